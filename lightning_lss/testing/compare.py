"""Compare two sets of tensors by name, so that nothing wrong can pass.

Every tensor counts: names must be the same on both sides, shapes equal, every value finite. A tensor of zeros on one
side must be zero on the other to the same tolerance. Nothing to compare is an error.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # tensors of a smaller norm are compared by absolute error
Tensors = Mapping[str, Tensor] | Sequence[Tensor]


class Difference(NamedTuple):
    """How far a tensor is from its reference."""

    error: float
    """||actual - expected|| / max(||expected||, floor); infinite where the two cannot be compared."""
    name: str


def worst_difference(actual: Tensors, expected: Tensors, *, floor: float = FLOOR, dtypes: bool = False) -> Difference:
    """The largest difference of any tensor, and the name of the tensor.

    Args:
        actual: tensors by name, or in order; then their names are their indices.
        expected: the reference, likewise.
        floor: the smallest norm of a reference that an error is divided by.
        dtypes: whether dtypes must agree. Otherwise floating-point tensors are compared in float64.

    Returns:
        The worst one; infinite for a name on one side only, for shapes that differ, for a NaN or an infinity on either
        side, and for tensors of integers or booleans that differ at all.

    Raises:
        ValueError: if there are no tensors.
        TypeError: if something is not a tensor, or if tensors by name are compared with tensors in order.
    """
    error, name, _ = _differences(actual, expected, floor, dtypes)[0]
    return Difference(error, name)


def assert_equal(
    actual: Tensors, expected: Tensors, tolerance: float, *, floor: float = FLOOR, dtypes: bool = False, what: str = ""
) -> None:
    """Raise ``AssertionError`` unless every tensor is within ``tolerance`` of its reference; 0 asks for equal values.

    The message starts with ``what``, for example the rank. The other arguments are :func:`worst_difference`'s.
    """
    wrong = [x for x in _differences(actual, expected, floor, dtypes) if x[0] > tolerance or math.isinf(x[0])]
    if not wrong:
        return
    lines = [f"{len(wrong)} of {len(expected)} tensors differ by more than {tolerance:.1e}"]
    lines += [f"  {name}: {reason or f'relative error {error:.1e}'}" for error, name, reason in wrong[:5]]
    if len(wrong) > 5:
        lines.append(f"  and {len(wrong) - 5} more")
    raise AssertionError((f"{what}: " if what else "") + "\n".join(lines))


def assert_equal_on_ranks(
    by_rank: Sequence[Tensors], expected: Tensors, tolerance: float, *, floor: float = FLOOR, dtypes: bool = False
) -> None:
    """Call :func:`assert_equal` for what every rank has; raise ``ValueError`` if there is no rank."""
    if not by_rank:
        raise ValueError("There are no ranks to compare.")
    for rank, actual in enumerate(by_rank):
        assert_equal(actual, expected, tolerance, floor=floor, dtypes=dtypes, what=f"rank {rank}")


def _differences(actual: Tensors, expected: Tensors, floor: float, dtypes: bool) -> list[tuple[float, str, str | None]]:
    """Error of every name on either side, the worst first, with the reason where the two cannot be equal."""
    if isinstance(actual, Mapping) != isinstance(expected, Mapping):
        raise TypeError("Tensors by name cannot be compared with tensors in order.")
    one, other = _by_name(actual), _by_name(expected)
    found = []
    for name in dict.fromkeys([*other, *one]):
        reason = _obstacle(one.get(name), other.get(name), dtypes)
        found.append((math.inf if reason else _error(one[name], other[name], floor), name, reason))
    if not found:
        raise ValueError("There are no tensors to compare.")
    return sorted(found, key=lambda difference: -difference[0])


def _by_name(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError("Put single tensors into a list.")
    named = dict(tensors) if isinstance(tensors, Mapping) else {str(i): x for i, x in enumerate(tensors)}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(x).__name__}.")
    return named


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    wide = [torch.complex128 if x.is_complex() else torch.float64 for x in (actual, expected)]
    own, reference = (x.detach().to("cpu", dtype) for x, dtype in zip((actual, expected), wide))
    if torch.equal(own, reference):
        return 0.0
    error = (torch.linalg.vector_norm(own - reference) / max(torch.linalg.vector_norm(reference).item(), floor)).item()
    if math.isnan(error):  # both norms overflow
        return math.inf
    return max(error, sys.float_info.min)  # a square that underflows does not make two tensors equal


def _obstacle(actual: Tensor | None, expected: Tensor | None, dtypes: bool) -> str | None:
    """Why the two cannot be equal whatever the tolerance, or None."""
    if actual is None:
        return "missing"
    if expected is None:
        return "not in the reference"
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if dtypes and actual.dtype != expected.dtype:
        return f"{actual.dtype} instead of {expected.dtype}"
    inexact = {x.is_floating_point() or x.is_complex() for x in (actual, expected)}
    if len(inexact) == 2:
        return f"{actual.dtype} instead of {expected.dtype}"
    if inexact == {False}:
        different = int((actual.cpu() != expected.cpu()).sum())
        return f"{different} of {actual.numel()} values differ" if different else None
    for x, whose in ((actual, "of its"), (expected, "of the reference's")):
        if bad := int((~torch.isfinite(x)).sum()):
            return f"{bad} {whose} {x.numel()} values are not finite"
    return None
