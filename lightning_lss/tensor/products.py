"""Rules of products, which sum over pairs of entries."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.borders import sum_over_ranks
from lightning_lss.tensor.split_tensor import Function, SplitTensor, rule, shape_of, split_tensor, whole

Labels = Sequence[Any]
"""What the dimensions of a tensor are called, as in the index notation of einsum."""


def _contract(compute: Function, operands: Sequence[Tensor], labels: Sequence[Labels], result: Labels) -> Any:
    """Compute a product of ``operands`` with ``labels``, of which those not in ``result`` are summed over.

    The sequence of the first operand that has one in the result stays split there; other operands are gathered. If all
    sequences are summed over, and are the same one, each rank sums over its part, and then the sums are added.
    """
    own = [(x, names[x.placement.dim]) for x, names in zip(operands, labels) if isinstance(x, SplitTensor)]
    like, label = next(((x, name) for x, name in own if name in result), own[0])
    sums = label not in result
    if sums and any(name != label or x.placement.at(0) != like.placement.at(0) for x, name in own):
        return NotImplemented
    parts = []
    for x, names in zip(operands, labels):
        dim = list(names).index(label) if label in names else None
        placement = None if dim is None else like.placement.at(dim)
        if isinstance(x, SplitTensor) and x.placement == placement:
            own_part = x.part
        else:
            own_part = whole(x)
            if placement is not None and own_part.size(placement.dim) == placement.size:
                own_part = placement.part_of(own_part)
        parts.append(placement.counting(own_part) if sums and placement is not None else own_part)
    if sums:
        return sum_over_ranks(compute(*parts), like.placement.shard)
    return split_tensor(compute(*parts), like.placement.at(list(result).index(label)))


@rule("einsum")
def einsum(func: Function, equation: str, *operands: Any) -> Any:
    """A product in index notation, with its result named."""
    operands = tuple(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    sources, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        return NotImplemented
    terms = sources.split(",")
    free = [len(shape_of(x)) - len(term.replace("...", "")) for x, term in zip(operands, terms)]  # dimensions of ...

    def labels(term: str, count: int) -> list[Any]:
        before, dots, after = term.partition("...")
        return [*before, *(range(max(free) - count, max(free)) if dots else ()), *after]

    named = [labels(term, count) for term, count in zip(terms, free)]
    compute = partial(torch.einsum, equation)
    return _contract(compute, operands, named, labels(result, max(free)))


@rule("matmul", "rmatmul", "bmm", "mm")
def matmul(func: Function, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    """A product of matrices [..., n, k] and [..., k, m]."""
    a, b = (b, a) if func.__name__ == "__rmatmul__" else (a, b)
    dims = [len(shape_of(x)) for x in (a, b)]
    if kwargs or min(dims) < 2:
        return NotImplemented

    def labels(x: Tensor, side: int, last: str) -> list[Any]:
        leading = range(max(dims) - dims[side], max(dims) - 2)
        return [*(d if n != 1 else (side, d) for d, n in zip(leading, shape_of(x))), *last]

    return _contract(torch.matmul, [a, b], [labels(a, 0, "nk"), labels(b, 1, "km")], [*range(max(dims) - 2), "n", "m"])


@rule("baddbmm", "addmm", composed=True)
def add_product(
    func: Function, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **kwargs: Any
) -> Any:
    """A product added to a tensor."""
    return NotImplemented if kwargs else x * beta + (a @ b) * alpha


@rule("linear")
def linear(func: Function, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A map of the last dimension."""
    if not isinstance(x, SplitTensor) or isinstance(weight, SplitTensor) or x.placement.dim == x.part.dim() - 1:
        return NotImplemented
    return split_tensor(func(x.part, weight, bias), x.placement)
