"""Rules of functions that cut tensors into pieces, join them, and pick entries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.borders import pick, shift
from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.split_tensor import (
    Function,
    SplitTensor,
    align,
    part_like,
    rule,
    shape_of,
    split,
    split_leaves,
    split_tensor,
    whole,
)

# -- pieces ------------------------------------------------------------------------------------------------------------


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def pieces(func: Function, x: SplitTensor, how: Any, dim: int = 0) -> Any:
    """Cut along a dimension other than the sequence."""
    if dim % x.part.dim() == x.placement.dim:
        return NotImplemented
    return split_leaves(func(x.part, how, dim), x.placement)


def _without(placement: Placement, dim: int) -> Placement:
    """The placement once a dimension before or after the sequence is gone."""
    return placement.at(placement.dim - (dim < placement.dim))


@rule("unbind", "iter")
def unbind(func: Function, x: SplitTensor, dim: int = 0) -> Any:
    """Take the entries of a dimension other than the sequence."""
    dim %= x.part.dim()
    if dim == x.placement.dim:
        return NotImplemented
    entries = split_leaves(x.part.unbind(dim), _without(x.placement, dim))
    return iter(entries) if func.__name__ == "__iter__" else entries


@rule("narrow", "select", "index_select")
def part_along(func: Function, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
    """Take some entries of a dimension other than the sequence."""
    split_index = any(isinstance(a, SplitTensor) for a in (*args, *kwargs.values()))
    if not isinstance(x, SplitTensor) or dim % x.part.dim() == x.placement.dim or split_index:
        return NotImplemented
    placement = _without(x.placement, dim % x.part.dim()) if func.__name__ == "select" else x.placement
    return split_tensor(func(x.part, dim, *args, **kwargs), placement)


# -- joins -------------------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(func: Function, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None, **kwargs: Any) -> Any:
    """Join tensors. Where they are joined along the sequence, that is split anew."""
    if kwargs:
        return NotImplemented
    tensors = [x for x in tensors if tuple(shape_of(x)) != (0,)]  # which torch ignores
    dim = (dim if axis is None else axis) % len(shape_of(tensors[0]))
    target = next(x.placement for x in tensors if isinstance(x, SplitTensor))
    if dim != target.dim:
        return split_tensor(torch.cat([part_like(x, target, len(shape_of(x))) for x in tensors], dim), target)
    if target.outer * target.inner > 1:
        return NotImplemented
    joined = torch.cat([whole(x) for x in tensors], dim)
    return split(joined, target._replace(length=joined.size(dim)))


@rule("stack")
def stack(func: Function, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    """Join tensors along a new dimension."""
    if kwargs:
        return NotImplemented
    parts, old = align(tensors)
    dim %= parts[0].dim() + 1
    return split_tensor(torch.stack(parts, dim), old.at(old.dim + (dim <= old.dim)))


# -- entries -----------------------------------------------------------------------------------------------------------


def _plain_index(x: SplitTensor, index: Any) -> tuple[tuple[Any, ...], int, Any] | None:
    """Take an index of integers, slices, None and an ellipsis apart: what is asked of the other dimensions, which
    dimension of that is the sequence, and what is asked of it. None for other indices."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return None
    named = sum(i is not None and i is not Ellipsis for i in index)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    index = (*index[:at], *[slice(None)] * (x.part.dim() - named), *index[at + 1 :])
    dims = [number for number, i in enumerate(index) if i is not None]  # of the index, by dimension of x
    at = dims[x.placement.dim]
    moved = sum(not isinstance(i, int) for i in index[:at])
    return (*index[:at], slice(None), *index[at + 1 :]), moved, index[at]


@rule("getitem")
def getitem(func: Function, x: Tensor, index: Any) -> Any:
    """Index a split tensor by integers and slices, or a table by split integers."""
    if not isinstance(x, SplitTensor):
        is_table = isinstance(index, SplitTensor) and index.part.dtype != torch.bool
        return split_tensor(x[index.part], index.placement) if is_table else NotImplemented
    plain = _plain_index(x, index)
    if plain is None:
        return NotImplemented
    others, dim, asked = plain
    result = _positions(split_tensor(x.part[others], x.placement.at(dim)), asked)
    if isinstance(result, SplitTensor) and result.placement.length != x.placement.length:
        result.slice_of = x, index
    return result


_FEW = 8
"""Positions that every rank is given, where more of them are split again."""


def _positions(x: SplitTensor, asked: int | slice) -> Any:
    """Index the dimension of the sequence."""
    old = x.placement
    if isinstance(asked, slice) and asked.indices(old.size) == (0, old.size, 1):
        return x
    if old.outer * old.inner > 1:
        return NotImplemented
    if isinstance(asked, int):
        if not -old.length <= asked < old.length:
            raise IndexError(f"index {asked} is out of bounds for dimension {old.dim} with size {old.length}")
        position = asked % old.length
        return pick(x.part, range(position, position + 1), old.shard, old.dim).squeeze(old.dim)
    run = range(*asked.indices(old.length))
    if len(run) <= _FEW:
        return pick(x.part, run, old.shard, old.dim)
    new = old._replace(length=len(run))
    if run.step == 1 and run.start <= old.padded // old.shard.num_chunks and new.padded == old.padded:
        return split_tensor(shift(x.part, run.start, old.shard, old.dim, fill=None) if run.start else x.part, new)
    return split(pick(x.part, run, old.shard, old.dim), new)


@rule("setitem")
def setitem(func: Function, x: Tensor, index: Any, value: Any) -> Any:
    """Assign to dimensions other than the sequence, or a number where a split mask says so."""
    if not isinstance(x, SplitTensor):
        return NotImplemented
    if isinstance(index, SplitTensor) and index.part.dtype == torch.bool and not isinstance(value, Tensor):
        if index.placement != x.placement:
            return NotImplemented
        x.part[index.part] = value
        return None
    plain = _plain_index(x, index)
    if plain is None or plain[2] != slice(None):
        return NotImplemented
    target = x.part[plain[0]]
    x.part[plain[0]] = part_like(value, x.placement.at(plain[1]), target.dim()) if isinstance(value, Tensor) else value
    return None


@rule("gather", "take_along_dim")
def gather(func: Function, x: Tensor, dim: Any, index: Any, **kwargs: Any) -> Any:
    """Pick along a dimension other than the sequence."""
    if func.__name__ == "take_along_dim" or len(shape_of(x)) != len(shape_of(index)) or kwargs.get("out") is not None:
        return NotImplemented
    (own, own_index), placement = align([x, index])
    if dim % own.dim() == placement.dim:
        return NotImplemented
    return split_tensor(torch.gather(own, dim, own_index), placement)


@rule("embedding", "one_hot")
def embedding(func: Function, index: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pick a row of a table for each entry, without options that look at how often it is picked."""
    looks = dict(zip(("weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args)) | kwargs
    counts = looks.get("max_norm") is not None or looks.get("scale_grad_by_freq")
    if not isinstance(index, SplitTensor) or counts or (func.__name__ == "one_hot" and not (args or kwargs)):
        return NotImplemented
    return split_tensor(func(index.part, *args, **kwargs), index.placement)
