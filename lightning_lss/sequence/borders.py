"""What crosses the border of a segment: whole sequences, sums, single positions, neighbours.

All functions are differentiable, once, with their exact adjoint, and every rank of the sequence group must call them. They
take a rank's segment, ``x`` [..., l, ...], and its place, a :class:`~lightning_lss.SequenceShard`. With one rank they are
what torch computes of a whole sequence. Compiled code calls them as they are, since the compiler cannot trace what they send.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lss.sequence.collectives import all_gather, reduce_scatter

if TYPE_CHECKING:  # whose methods call this file
    from lightning_lss.sequence.segment import SequenceShard


# -- the whole sequence ------------------------------------------------------------------------------------------------


def gather(x: Tensor, shard: "SequenceShard", dim: int = 1) -> Tensor:
    """Gather the whole sequence in its original order on every rank; see :meth:`~lightning_lss.SequenceShard.gather`."""
    whole = _gather_all(x, shard, dim)
    return whole.narrow(dim, 0, shard.true_length(x.size(dim))) if shard.padding else whole


@torch.compiler.disable
def _gather_all(x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
    """The same with the padding at the end of the sequence."""
    if shard.size == 1:
        return x
    _check(x, shard, dim)
    dim %= x.dim()
    if x.is_complex():  # which gloo cannot gather
        return torch.view_as_complex(_Gather.apply(torch.view_as_real(x), shard, dim))
    return _Gather.apply(x, shard, dim)


def padded(x: Tensor, padding: int, dim: int) -> Tensor:
    """Repeat the last position ``padding`` times: what is computed of it stays finite."""
    last = x.narrow(dim, x.size(dim) - 1, 1)
    return torch.cat([x, *[last] * padding], dim)


def without_padding(x: Tensor, shard: "SequenceShard", dim: int, fill: float = 0.0) -> Tensor:
    """Write ``fill`` over the padding in a segment."""
    if not shard.padding:
        return x
    valid = shard.valid(x.size(dim), x.device)
    return x.masked_fill(~valid.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]), fill)


def _check(x: Tensor, shard: "SequenceShard", dim: int) -> None:
    """Raise before any rank communicates, as :meth:`~lightning_lss.SequenceShard.gather`."""
    shard.check_current()
    shard.check_length(x.size(dim) * shard.size)


class _Gather(torch.autograd.Function):
    """All-gather of segments in position order, and its adjoint.

    ======== ======================= ==========================================
    forward  x [..., l, ...]         -> [..., L, ...], the same on every rank
    backward grad [..., L, ...]      -> sum over ranks, own segment [..., l, ...]
    ======== ======================= ==========================================
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.shape = shard, dim, x.shape
        return torch.cat(shard.chunks_in_order(all_gather(x, shard.require_group()).wait(), dim), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        stacked = grad.new_empty(ctx.shard.size, *ctx.shape)
        chunks = ctx.shard.chunks_in_order(stacked, ctx.dim)
        for chunk, part in zip(chunks, grad.chunk(len(chunks), ctx.dim)):
            chunk.copy_(part)
        return reduce_scatter(stacked, ctx.shard.require_group()).wait(), None, None


# -- sums --------------------------------------------------------------------------------------------------------------


@torch.compiler.disable
def sum_over_ranks(x: Tensor, shard: "SequenceShard") -> Tensor:
    """Sum what each rank has, of one shape: the same on every rank. The sum of booleans is whether any is true."""
    if shard.size == 1:
        return x
    group = shard.require_group()
    if x.dtype == torch.bool:  # which gloo cannot sum
        return _all_reduce(x.int(), group) > 0
    return _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group.

    ======== ============ ===========================================================
    forward  x            -> sum over ranks, the same on every rank
    backward grad         -> sum over ranks: each rank's x is a part of all ranks' sum
    ======== ============ ===========================================================
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=group)
    return total


def sum_over_sequence(x: Tensor, shard: "SequenceShard", dim: int = 1) -> Tensor:
    """Sum over the whole sequence, the same on every rank: [..., l, ...] -> [..., ...]; integers become int64."""
    if shard.size == 1:
        return x.sum(dim)
    x = without_padding(x, shard, dim)
    total = sum_over_ranks(x.sum(dim, dtype=_wide(x)), shard)
    return total.to(x.dtype) if x.is_floating_point() else total


def mean_over_sequence(x: Tensor, shard: "SequenceShard", dim: int = 1) -> Tensor:
    """Average over the whole sequence, the same on every rank: [..., l, ...] -> [..., ...]; of numbers with a fraction."""
    if shard.size == 1:
        return x.mean(dim)
    own, share = without_padding(x, shard, dim).mean(dim, dtype=_wide(x)), x.size(dim) / shard.true_length(x.size(dim))
    return (sum_over_ranks(own, shard) * share).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype | None:
    """The dtype that torch accumulates sums of ``x`` in, so that they are rounded once, as on one device."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else None


# -- single positions --------------------------------------------------------------------------------------------------


def pick(x: Tensor, positions: range, shard: "SequenceShard", dim: int = 1) -> Tensor:
    """Take some positions of the whole sequence, the same on every rank: [..., l, ...] -> [..., n, ...]."""
    own = shard.places(x.size(dim))
    wanted = (own >= positions.start) & (own < positions.stop) & ((own - positions.start) % positions.step == 0)
    source = wanted.nonzero().flatten()
    target = (own[source] - positions.start) // positions.step
    zeros = x.new_zeros([len(positions) if d == dim % x.dim() else n for d, n in enumerate(x.shape)])
    found = zeros.index_copy(dim, target.to(x.device), x.index_select(dim, source.to(x.device)))
    return sum_over_ranks(found, shard)


def take(x: Tensor, position: Tensor | int, shard: "SequenceShard", dim: int = 1) -> Tensor:
    """Take one position of the whole sequence, the same on every rank.

    Args:
        x: [..., l, ...], this rank's segment.
        position: a number, or int64 [B] with one for each row of dimension 0. Outside of [0, L) there is 0.
        shard: the rank's place in its sequence group.
        dim: of the sequence; with a position for each row it is not 0.

    Returns:
        ``x`` without the dimension.
    """
    dim %= x.dim()
    position = torch.as_tensor(position, device=x.device)
    own = shard.places(x.size(dim), x.device)
    found = own == position.unsqueeze(-1)  # [l] or [B, l]
    index, here = found.int().argmax(-1), found.any(-1)
    if position.dim() == 0:
        picked = x.index_select(dim, index[None]).squeeze(dim)
    else:
        index = index.view(-1, *[1] * (x.dim() - 1)).expand(*(1 if d == dim else n for d, n in enumerate(x.shape)))
        picked = x.gather(dim, index).squeeze(dim)
        here = here.view(-1, *[1] * (picked.dim() - 1))
    return sum_over_ranks(picked.where(here, torch.zeros_like(picked)), shard)


@torch.compiler.disable
def take_end(x: Tensor, shard: "SequenceShard", dim: int, last: bool, valid: Tensor | None = None) -> Tensor:
    """Take the first or the last position of the whole sequence; see :meth:`~lightning_lss.SequenceShard.first`."""
    if valid is None:
        return take(x, shard.true_length(x.size(dim)) - 1 if last else 0, shard, dim)
    rows = (x.size(0), x.size(dim))
    if valid.dtype != torch.bool or valid.shape != rows or dim % x.dim() == 0:
        raise ValueError(
            f"valid must be bool [B, l] = {list(rows)}, of this rank's segment, with the rows in dimension 0 and the sequence in"
            f" another; got {valid.dtype} {list(valid.shape)} for x {list(x.shape)} with dim={dim}. Split it as x is split."
        )
    valid = without_padding(valid, shard, 1)
    own = shard.places(valid.size(1), valid.device)
    position = torch.where(valid, own, -1).amax(1) if last else torch.where(valid, own, _NOWHERE).amin(1)
    if shard.size > 1:
        op = dist.ReduceOp.MAX if last else dist.ReduceOp.MIN
        position = _all_reduce(position, shard.require_group(), op)
    return take(x, position, shard, dim)


_NOWHERE = torch.iinfo(torch.int64).max


# -- neighbours --------------------------------------------------------------------------------------------------------


@torch.compiler.disable
def with_neighbours(
    x: Tensor, shard: "SequenceShard", dim: int, before: int, after: int, fill: float = 0.0
) -> list[Tensor]:
    """Extend each chunk of this rank by ``before`` positions of the sequence before it, and ``after`` after it.

    What is before the first and after the last position of the whole sequence, padding included, is ``fill``. Only the edges
    of chunks are sent; where a chunk is shorter than what is asked for, the whole sequence is gathered.

    Returns:
        [..., before + c + after, ...] for each chunk of c positions that the rank holds, in local order.

    Raises:
        ValueError: if no sequence can be divided into segments of length l.
    """
    dim %= x.dim()
    _check(x, shard, dim)
    x = without_padding(x, shard, dim, fill)
    held = shard.held_chunks[shard.rank]
    chunks = x.chunk(len(held), dim)
    length = chunks[0].size(dim)
    start, end = (x.new_full([n if d == dim else m for d, m in enumerate(x.shape)], fill) for n in (before, after))
    if max(before, after) > length:
        whole = torch.cat([start, _gather_all(x, shard, dim), end], dim)
        return [whole.narrow(dim, c * length, before + length + after) for c in held]
    if before + after == 0:
        return list(chunks)
    # the edges of all chunks are a sequence of their own, split in the same way
    edges = [t for chunk in chunks for t in (chunk.narrow(dim, 0, after), chunk.narrow(dim, length - before, before))]
    gathered = _gather_all(torch.cat(edges, dim), shard, dim).split(before + after, dim)
    heads = [*(edge.narrow(dim, 0, after) for edge in gathered), end]
    tails = [start, *(edge.narrow(dim, after, before) for edge in gathered)]
    return [torch.cat([tails[c], chunk, heads[c + 1]], dim) for c, chunk in zip(held, chunks)]


def shift(x: Tensor, offset: int, shard: "SequenceShard", dim: int = 1, fill: float | None = 0.0) -> Tensor:
    """Move a sequence: position p of the result is position p + ``offset``, or ``fill`` where there is none.

    See :meth:`~lightning_lss.SequenceShard.shift`. Where ``fill`` is None the position at that end is repeated.
    """
    length = shard.true_length(x.size(dim))
    reach = min(abs(offset), length)
    before, after = (0, reach) if offset > 0 else (reach, 0)
    extended = with_neighbours(x, shard, dim, before, after, fill or 0)
    moved = torch.cat([t.narrow(dim, after, t.size(dim) - before - after) for t in extended], dim)
    if fill is not None:
        return moved
    own = shard.places(x.size(dim), x.device) + offset
    outside = ((own < 0) | (own >= length)).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    end = range(length - 1, length) if offset > 0 else range(1)
    return moved.where(~outside, pick(x, end, shard, dim))


def with_halo(
    compute: Callable[[Tensor], Tensor], x: Tensor, shard: "SequenceShard", dim: int, before: int, after: int
) -> Tensor:
    """Apply to each position of the sequence what depends on ``before`` positions before it and ``after`` after it.

    Args:
        compute: maps [B, ..., before + c + after, ...] to [B, ..., c, ...], as a convolution without padding does; rows of
            the batch are independent of each other.
        x: [B, ..., l, ...], this rank's segment; beyond its ends the sequence is 0.
        shard: the rank's place in its sequence group.
        dim: of the sequence, not 0.
        before: in positions.
        after: in positions.

    Raises:
        ValueError: if no sequence can be divided into segments of length l.
    """
    return of_rows(compute(as_rows(x, shard, dim, before, after)), x.size(0), dim)


def as_rows(x: Tensor, shard: "SequenceShard", dim: int, before: int, after: int) -> Tensor:
    """Extend the n chunks of [B, ..., l, ...] by their neighbours and make them rows of a batch, [n B, ..., c + ..., ...]."""
    return torch.cat(with_neighbours(x, shard, dim, before, after))


def of_rows(rows: Tensor, batch: int, dim: int) -> Tensor:
    """Join chunks that are rows of a batch, [n B, ..., c, ...] -> [B, ..., l, ...]."""
    return torch.cat(rows.split(batch), dim)
