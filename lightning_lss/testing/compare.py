"""Compare two sets of tensors by name, so that nothing wrong can pass.

Every tensor counts: names must be the same on both sides, shapes equal, every value finite. A tensor of zeros on one
side must be zero on the other to the same tolerance. Nothing to compare is an error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6
Tensors = Mapping[str, Tensor] | Sequence[Tensor]  # the names of a sequence are its indices


class Difference(NamedTuple):
    """How far a tensor is from its reference."""

    error: float
    """||actual - expected|| / max(||expected||, floor); infinite where they cannot be equal."""
    name: str
    reason: str
    """Why they cannot be equal whatever the tolerance, or empty."""


def worst_difference(actual: Tensors, expected: Tensors, *, floor: float = FLOOR) -> Difference:
    """Return the largest difference of any tensor from its reference.

    Floating-point tensors are compared in float64. Tensors of integers or booleans must be equal. Raises ``ValueError``
    if there are no tensors, ``TypeError`` if something is not a tensor or if tensors by name are compared with tensors in
    order.
    """
    return _differences(actual, expected, floor)[0]


def assert_equal(actual: Tensors, expected: Tensors, tolerance: float, *, floor: float = FLOOR, what: str = "") -> None:
    """Raise ``AssertionError`` unless every tensor is within ``tolerance`` of its reference; 0 asks for equal values.

    The message starts with ``what``, for example the rank. The other arguments are :func:`worst_difference`'s.
    """
    found = _differences(actual, expected, floor)
    wrong = [x for x in found if not x.error <= tolerance or math.isinf(x.error)]
    if wrong:
        lines = [f"{len(wrong)} of {len(expected)} tensors differ by more than {tolerance:.1e}"]
        lines += [f"  {x.name}: {x.reason or f'relative error {x.error:.1e}'}" for x in wrong[:5]]
        lines += [f"  and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        raise AssertionError((f"{what}: " if what else "") + "\n".join(lines))


def assert_equal_on_ranks(by_rank: Sequence[Tensors], expected: Tensors, tolerance: float) -> None:
    """Call :func:`assert_equal` for what every rank has; raise ``ValueError`` if there is no rank."""
    if not by_rank:
        raise ValueError("There are no ranks to compare.")
    for rank, actual in enumerate(by_rank):
        assert_equal(actual, expected, tolerance, what=f"rank {rank}")


def _differences(actual: Tensors, expected: Tensors, floor: float) -> list[Difference]:
    """Compare what has a name on either side, the worst first."""
    if isinstance(actual, Mapping) != isinstance(expected, Mapping):
        raise TypeError("Tensors by name cannot be compared with tensors in order.")
    one, other = _by_name(actual), _by_name(expected)
    if not one and not other:
        raise ValueError("There are no tensors to compare.")
    found = []
    for name in dict.fromkeys([*other, *one]):
        reason = _obstacle(one.get(name), other.get(name))
        found.append(Difference(math.inf if reason else _error(one[name], other[name], floor), name, reason))
    return sorted(found, key=lambda difference: -difference.error)


def _by_name(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError("Put single tensors into a list.")
    named = dict(tensors) if isinstance(tensors, Mapping) else {str(i): x for i, x in enumerate(tensors)}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(x).__name__}.")
    return named


def _obstacle(actual: Tensor | None, expected: Tensor | None) -> str:
    """Say why the two cannot be equal whatever the tolerance."""
    if actual is None or expected is None:
        return "missing" if actual is None else "not in the reference"
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    exact = {not (x.is_floating_point() or x.is_complex()) for x in (actual, expected)}
    if len(exact) == 2:
        return f"{actual.dtype} instead of {expected.dtype}"
    if exact == {True} and (different := int((actual.cpu() != expected.cpu()).sum())):
        return f"{different} of {actual.numel()} values differ"
    for x, whose in ((actual, "its"), (expected, "the reference's")):
        if bad := int((~torch.isfinite(x)).sum()):
            return f"{bad} of {whose} {x.numel()} values are not finite"
    return ""


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    wide = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    own, reference = (x.detach().to("cpu", wide) for x in (actual, expected))
    if torch.equal(own, reference):
        return 0.0
    error = (torch.linalg.vector_norm(own - reference) / max(torch.linalg.vector_norm(reference).item(), floor)).item()
    if math.isnan(error):  # both norms overflow
        return math.inf
    return max(error, torch.finfo(torch.float64).tiny)  # a square that underflows does not make two tensors equal
