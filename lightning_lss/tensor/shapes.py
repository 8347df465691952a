"""Rules of functions that give a tensor another shape: the sequence goes with its dimension."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.properties import same_shape
from lightning_lss.tensor.split_tensor import Function, SplitTensor, part_like, rule, shape_of, split_tensor


def _sizes(args: Sequence[Any], *options: Any) -> list[int]:
    """Sizes or dimensions that were given one by one, as a sequence, or by name."""
    given = args or [x for x in options if x is not None]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else list(given)


def _resolve(shape: Sequence[int], entries: int) -> list[int]:
    """Replace the -1 in a shape."""
    return [entries // max(1, prod(n for n in shape if n != -1)) if n == -1 else n for n in shape]


# -- views -------------------------------------------------------------------------------------------------------------


def _placement_after(x: SplitTensor, shape: Sequence[int]) -> Placement | None:
    """Where the sequence lies in a view of the whole ``shape``; None if a part is not a view of this rank's part.

    In memory, ``before`` times in turn, come the positions of the sequence. A dimension of the view holds them if it
    begins at one of these turns and spans whole ones. It holds windows of positions if these are within chunks.
    """
    old = x.placement
    before = prod(shape_of(x)[: old.dim]) * old.outer
    ends = [prod(shape[: dim + 1]) for dim in range(len(shape))]
    starts = [1, *ends]
    for dim, (start, end) in enumerate(zip(starts, ends)):
        if before % start == 0 and end and end % (before * old.length) == 0:
            return Placement(dim, old.length, old.shard, before // start, end // (before * old.length))
    for dim, (start, end) in enumerate(zip(starts, ends)):
        windows = end // before
        whole_windows = before % start == 0 and end % before == 0 and windows > 1 and old.length % windows == 0
        if whole_windows and windows % old.shard.num_chunks == 0:
            return Placement(dim, windows, old.shard, before // start, 1)
    return None


def _view(x: SplitTensor, shape: Sequence[int]) -> Any:
    shape = _resolve(shape, prod(shape_of(x)))
    placement = _placement_after(x, shape)
    return NotImplemented if placement is None else split_tensor(x.part.reshape(placement.part_shape(shape)), placement)


@rule("view", "reshape")
def view(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """To another shape, or seen as another dtype."""
    if args and isinstance(args[0], torch.dtype):
        same = args[0].itemsize == x.part.dtype.itemsize
        return same_shape(func, x, *args) if same else NotImplemented
    return _view(x, _sizes(args, kwargs.get("size"), kwargs.get("shape")))


@rule("view_as", "reshape_as")
def view_as(func: Function, x: Tensor, other: Tensor) -> Any:
    """To the shape of another."""
    return _view(x, shape_of(other)) if isinstance(x, SplitTensor) else x.reshape(shape_of(other))


@rule("flatten", "ravel")
def flatten(func: Function, x: SplitTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Merge dimensions."""
    shape = shape_of(x)
    start, end = start_dim % len(shape), end_dim % len(shape)
    return _view(x, [*shape[:start], prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule("unflatten")
def unflatten(func: Function, x: SplitTensor, dim: int, sizes: Sequence[int]) -> Any:
    """Divide a dimension."""
    shape = shape_of(x)
    dim %= len(shape)
    return _view(x, [*shape[:dim], *_resolve(sizes, shape[dim]), *shape[dim + 1 :]])


@rule("unsqueeze")
def unsqueeze(func: Function, x: SplitTensor, dim: int) -> Any:
    """Insert a dimension."""
    dim, old = dim % (x.part.dim() + 1), x.placement
    return split_tensor(x.part.unsqueeze(dim), old.at(old.dim + (dim <= old.dim)))


@rule("squeeze")
def squeeze(func: Function, x: SplitTensor, dim: Any = None) -> Any:
    """Remove dimensions of size 1."""
    shape, old = shape_of(x), x.placement
    asked = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    removed = sorted({d % len(shape) for d in asked if shape[d] == 1})
    if old.dim in removed:
        return NotImplemented
    return split_tensor(x.part.squeeze(removed), old.at(old.dim - sum(d < old.dim for d in removed)))


@rule("view_as_complex", "view_as_real")
def view_as_complex(func: Function, x: SplitTensor) -> Any:
    """The last dimension, or a new one, holds real and imaginary parts."""
    if func.__name__ == "view_as_complex" and x.placement.dim == x.part.dim() - 1:
        return NotImplemented
    return split_tensor(func(x.part), x.placement)


# -- orders of dimensions ----------------------------------------------------------------------------------------------


def _permute(x: SplitTensor, order: Sequence[int]) -> SplitTensor:
    order = [dim % x.part.dim() for dim in order]
    return split_tensor(x.part.permute(order), x.placement.at(order.index(x.placement.dim)))


@rule("permute")
def permute(func: Function, x: SplitTensor, *dims: Any, **kwargs: Any) -> Any:
    """Put dimensions in another order."""
    return _permute(x, _sizes(dims, kwargs.get("dims")))


@rule("transpose", "swapaxes", "swapdims", "get mT")
def transpose(func: Function, x: SplitTensor, *dims: int, **kwargs: int) -> Any:
    """Swap two dimensions."""
    order = list(range(x.part.dim()))
    first, second = dims or tuple(kwargs.values()) or (-2, -1)
    order[first], order[second] = order[second], order[first]
    return _permute(x, order)


@rule("t", "get T")
def reverse(func: Function, x: SplitTensor) -> Any:
    """Put dimensions in the reverse order."""
    return _permute(x, range(x.part.dim() - 1, -1, -1))


@rule("movedim", "moveaxis")
def movedim(func: Function, x: SplitTensor, source: Any, destination: Any) -> Any:
    """Move some dimensions."""
    dims = x.part.dim()
    sources = [d % dims for d in ([source] if isinstance(source, int) else source)]
    goals = [d % dims for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(d for d in range(dims) if d not in sources)
    return _permute(x, [sources[goals.index(d)] if d in goals else next(rest) for d in range(dims)])


# -- repetitions -------------------------------------------------------------------------------------------------------


@rule("expand", "broadcast_to")
def expand(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """Repeat dimensions of size 1."""
    sizes, old = _sizes(args, kwargs.get("size")), x.placement
    new = old.at(old.dim + len(sizes) - x.part.dim())
    if sizes[new.dim] not in (-1, old.size):
        return NotImplemented
    return split_tensor(x.part.expand(new.part_shape(sizes)), new)


@rule("expand_as")
def expand_as(func: Function, x: Tensor, other: Tensor) -> Any:
    """To the shape of another."""
    if isinstance(x, SplitTensor):
        return expand(func, x, *shape_of(other))
    assert isinstance(other, SplitTensor)
    return split_tensor(part_like(x, other.placement, other.part.dim()).expand(other.part.shape), other.placement)


@rule("repeat", "tile")
def repeat(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """Repeat dimensions other than the sequence."""
    times, old = _sizes(args, kwargs.get("repeats"), kwargs.get("dims")), x.placement
    times = [1] * (x.part.dim() - len(times)) + times
    new = old.at(old.dim + len(times) - x.part.dim())
    return split_tensor(x.part.repeat(times), new) if times[new.dim] == 1 else NotImplemented


@rule("repeat_interleave")
def repeat_interleave(func: Function, x: SplitTensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    """Repeat the entries of a dimension other than the sequence."""
    if not isinstance(repeats, int) or dim is None or dim % x.part.dim() == x.placement.dim:
        return NotImplemented
    return split_tensor(x.part.repeat_interleave(repeats, dim), x.placement)
