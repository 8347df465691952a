"""What crosses the border of a segment: sums over the whole sequence, single positions, neighbours.

All functions are differentiable with their exact adjoint, and every rank of the sequence group must call them. They take a
rank's segment, ``x`` [..., l, ...], and its place, a :class:`~lightning_lss.SequenceShard`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lss.sequence.segment import SequenceShard


def sum_over_ranks(x: Tensor, shard: SequenceShard) -> Tensor:
    """Sum what each rank has, of one shape and any dtype: the same on every rank."""
    return _Sum.apply(x, shard.require_group()) if shard.size > 1 else x


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


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def number_for_mean(number: Tensor, shard: SequenceShard, trains: bool) -> Tensor:
    """Divide the sum of a sequence group's losses by this, so that the mean over data replicas is that over all entries.

    Replicas take training steps together. In evaluation, where they need not, each has its own mean.
    """
    if not trains:
        return sum_over_ranks(number, shard)
    total = number.clone()
    dist.all_reduce(total)
    return total * (shard.size / dist.get_world_size())


def pick(x: Tensor, positions: range, shard: SequenceShard, dim: int = 1) -> Tensor:
    """Take some positions of the whole sequence, the same on every rank: [..., l, ...] -> [..., n, ...]."""
    own = shard.positions(x.size(dim))
    wanted = (own >= positions.start) & (own < positions.stop) & ((own - positions.start) % positions.step == 0)
    source = wanted.nonzero().flatten()
    target = (own[source] - positions.start) // positions.step
    zeros = x.new_zeros([len(positions) if d == dim % x.dim() else n for d, n in enumerate(x.shape)])
    found = zeros.index_copy(dim, target.to(x.device), x.index_select(dim, source.to(x.device)))
    return sum_over_ranks(found, shard)


def take(x: Tensor, position: Tensor | int, shard: SequenceShard, dim: int = 1) -> Tensor:
    """Take one position of the whole sequence, the same on every rank.

    Args:
        x: [..., l, ...], this rank's segment.
        position: in [0, L): a number, or int64 [B] with one for each row of dimension 0.
        shard: the rank's place in its sequence group.
        dim: of the sequence; with a position for each row it is not 0.

    Returns:
        ``x`` without the dimension.
    """
    dim %= x.dim()
    position = torch.as_tensor(position, device=x.device)
    own = shard.positions(x.size(dim), x.device)
    found = own == position.unsqueeze(-1)  # [l] or [B, l]
    index, here = found.int().argmax(-1), found.any(-1)
    if position.dim() == 0:
        picked = x.index_select(dim, index[None]).squeeze(dim)
    else:
        index = index.view(-1, *[1] * (x.dim() - 1)).expand(*(1 if d == dim else n for d, n in enumerate(x.shape)))
        picked = x.gather(dim, index).squeeze(dim)
        here = here.view(-1, *[1] * (picked.dim() - 1))
    return sum_over_ranks(picked.where(here, 0), shard)


def with_neighbours(
    x: Tensor, shard: SequenceShard, dim: int, before: int, after: int, fill: float = 0.0
) -> list[Tensor]:
    """Extend each chunk of this rank by ``before`` positions of the sequence before it, and ``after`` after it.

    What is before the first and after the last position of the whole sequence is ``fill``.

    Returns:
        [..., before + c + after, ...] for each chunk of c positions that the rank holds, in local order.

    Raises:
        ValueError: if a chunk is shorter than ``before`` or ``after``: the neighbours would not be those of one chunk.
    """
    dim %= x.dim()
    chunks = x.chunk(shard.num_chunks // shard.size, dim)
    length = chunks[0].size(dim)
    if max(before, after) > length:
        raise ValueError(
            f"A chunk of {length} positions is shorter than what is needed beside it, {max(before, after)}: use longer sequences or"
            " fewer ranks."
        )
    # the edges of all chunks are a sequence of their own, split in the same way
    edges = [t for chunk in chunks for t in (chunk.narrow(dim, 0, after), chunk.narrow(dim, length - before, before))]
    gathered = shard.gather(torch.cat(edges, dim), dim).split(before + after, dim) if before + after else ()
    heads = [edge.narrow(dim, 0, after) for edge in gathered] or [x.narrow(dim, 0, 0)] * shard.num_chunks
    tails = [edge.narrow(dim, after, before) for edge in gathered] or heads
    start, end = (torch.full_like(t, fill) for t in (tails[0], heads[0]))
    held = shard.held_chunks[shard.rank]
    heads, tails = [*heads, end], [start, *tails]
    return [torch.cat([tails[c], chunk, heads[c + 1]], dim) for c, chunk in zip(held, chunks)]


def shift(x: Tensor, offset: int, shard: SequenceShard, dim: int = 1, fill: float | None = 0.0) -> Tensor:
    """Move a sequence: position p of the result is position p + ``offset``, or ``fill`` where there is none.

    With ``offset`` 1 each token sees the next one (labels), with -1 the one before it.

    Args:
        x: [..., l, ...], this rank's segment.
        offset: in positions, at most those of a chunk.
        shard: the rank's place in its sequence group.
        dim: of the sequence.
        fill: what enters at the end of the sequence; None repeats the position there.

    Raises:
        ValueError: if a chunk is shorter than ``offset``.
    """
    before, after = max(0, -offset), max(0, offset)
    extended = with_neighbours(x, shard, dim, before, after, fill or 0)
    moved = torch.cat([t.narrow(dim, after, t.size(dim) - before - after) for t in extended], dim)
    if fill is not None:
        return moved
    length = x.size(dim) * shard.size
    own = shard.positions(x.size(dim), x.device) + offset
    outside = ((own < 0) | (own >= length)).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    end = range(length - 1, length) if offset > 0 else range(1)
    return moved.where(~outside, pick(x, end, shard, dim))


def with_halo(
    compute: Callable[[Tensor], Tensor], x: Tensor, shard: SequenceShard, dim: int, before: int, after: int
) -> Tensor:
    """Apply to each position of the sequence what depends on ``before`` positions before it and ``after`` after it.

    ``compute`` maps [B, ..., before + c + after, ...] to [B, ..., c, ...], as a convolution without padding does; rows of
    the batch are independent of each other. ``x`` is [B, ..., l, ...], and beyond its ends the sequence is 0.
    """
    extended = torch.cat(with_neighbours(x, shard, dim, before, after))  # chunks are rows
    return torch.cat(compute(extended).split(x.size(0)), dim)
