"""Attention of one rank's queries over keys and values that are spread over its sequence group: the algorithm.

Key/value heads are taken in chunks. While one chunk is computed, the keys and values of the next are being gathered and
the gradients of the last are being scattered, into and from two buffers each that are made once a call, so beside its
own tensors a rank holds two chunks of keys and values, and in the backward pass two chunks of their gradients (over gloo
also what arrives of one; with ``communication_dtype`` the copy of one that travels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lss.attention.kernels import KERNELS, select_kernel
from lightning_lss.attention.tiles import Tile, attention_tiles
from lightning_lss.sequence.collectives import Pending, all_gather, all_to_all_sum, exchange, is_gloo, reduce_scatter
from lightning_lss.sequence.layout import chunks_per_rank
from lightning_lss.sequence.segment import SequenceShard

HeadChunks = int | Literal["auto"]

# Where the number of chunks is left open: small chunks hide the first gather and stay in the cache, but small messages
# waste the network.
_MOST_CHUNKS = 8
_LEAST_BYTES = 2**20  # of keys and values that a rank sends at a time


@dataclass(frozen=True)
class Plan:
    """Everything about one call that is not a tensor, every choice made.

    Args:
        shard: the rank's place in its sequence group.
        kernel: name of a kernel in :data:`lightning_lss.attention.kernels.KERNELS`.
        causal: whether a query sees only keys at or before its own position.
        scale: factor on the scores.
        head_chunks: in how many parts the key/value heads are gathered, a divisor of their number.
        keep_gathered: whether gathered keys and values are kept for the backward pass; then ``head_chunks`` is 1.
    """

    shard: SequenceShard
    kernel: str
    causal: bool
    scale: float
    head_chunks: int
    keep_gathered: bool

    def in_messages(self, x: Tensor) -> bool:
        """Whether chunks of K, V and their gradients, such as ``x``, travel in messages from rank to rank: over gloo they
        take less time. All heads at once are promised as one collective of each kind."""
        return self.head_chunks > 1 and is_gloo(x, self.shard.require_group())

    def in_place(self, k: Tensor) -> bool:
        """Whether K and V arrive where they belong. With one collective a zigzag segment arrives as an early and a late
        chunk side by side, and in another dtype nothing arrives as it is needed."""
        own_dtype = self.shard.communication_dtype in (None, k.dtype)
        return own_dtype and (self.in_messages(k) or chunks_per_rank(self.shard.size, self.shard.layout) == 1)

    def tiles(self, local_length: int) -> tuple[Tile, ...]:
        """What this rank computes."""
        shard, offset_diagonal = self.shard, KERNELS[self.kernel].offset_diagonal
        return attention_tiles(
            local_length * shard.size, shard.rank, shard.size, shard.layout, self.causal, offset_diagonal
        )

    def chunks(self, heads: int) -> list[slice]:
        """Slices of ``heads`` heads, one a chunk; query heads of a chunk attend to its key/value heads."""
        step = heads // self.head_chunks
        return [slice(first, first + step) for first in range(0, heads, step)]


def make_plan(
    q: Tensor,
    k: Tensor,
    shard: SequenceShard,
    causal: bool,
    scale: float,
    kernel: str,
    head_chunks: int | None,
    keep_gathered: bool,
) -> Plan:
    """Choose what was left open: the kernel with ``"auto"``, the number of chunks with None.

    Raises:
        ValueError: if the kernel cannot take ``q``, or the chunks do not fit the heads of ``k``.
    """
    chunks = choose_head_chunks(k.size(1), 2 * k.nbytes, keep_gathered) if head_chunks is None else head_chunks
    check_head_chunks(chunks, k.size(1), keep_gathered)
    return Plan(shard, select_kernel(q, kernel).name, causal, scale, chunks, keep_gathered)


def check_head_chunks(chunks: object, heads: int, keep_gathered: bool) -> None:
    """Raise ``ValueError`` unless ``heads`` key/value heads can be gathered in ``chunks`` parts."""
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1 or heads % chunks:
        raise ValueError(f"head_chunks={chunks!r} must be 'auto' or a divisor of the {heads} key/value heads.")
    if keep_gathered and chunks != 1:
        raise ValueError(
            f"keep_gathered=True gathers all heads at once, so head_chunks={chunks} has no use: leave it at 'auto', or set"
            " keep_gathered=False to gather in chunks."
        )


def choose_head_chunks(heads: int, sent: int, keep_gathered: bool) -> int:
    """In how many parts to gather ``heads`` key/value heads, of which a rank sends ``sent`` bytes in all."""
    most = 1 if keep_gathered else min(_MOST_CHUNKS, int(sent) // _LEAST_BYTES)
    return max(n for n in range(1, max(1, most) + 1) if heads % n == 0)


class Attended(NamedTuple):
    """What the forward pass of attention leaves."""

    out: Tensor
    """[B, H, l, D], in memory [B, l, H, D], so that heads can be put side by side without a copy."""
    lse: Tensor
    """Log of the sum of the exponentials of each row's scores, [B, H, l]; float64 for float64 queries, else float32."""
    gathered: Tensor
    """K and V of the whole sequence, [2, B, G, L, D], with ``keep_gathered``; else empty."""


def empty_attended(q: Tensor) -> Attended:
    """Room for the output and log-sum-exp of queries [B, H, l, D]."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Attended(_rows_like(q), lse, q.new_empty(0))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Attended:
    """Rows of ``q`` [B, H, l, D] over the whole sequence's ``k`` and ``v``, of which this rank has [B, G, l, D]."""
    tiles = plan.tiles(q.size(2))
    attended = empty_attended(q)
    with _no_autocast(q.device.type):
        for heads, keys_values in zip(plan.chunks(q.size(1)), _gathered_chunks(k, v, plan)):
            rows = [x[:, heads] for x in (q, attended.out, attended.lse)]
            _forward_tiles(rows, keys_values, tiles, plan)
            if plan.keep_gathered:
                return attended._replace(gathered=keys_values)
    return attended


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Gradient of ``q`` [B, H, l, D], and that of ``k`` and ``v`` as one tensor [2, B, G, l, D], from that of the
    output; every rank of the sequence group must call it."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    gathered = iter([attended.gathered]) if plan.keep_gathered else _gathered_chunks(k, v, plan)
    grad_q = _rows_like(q)
    with _no_autocast(q.device.type):
        grads = list(_scattered_chunks([grad, q, attended.out, attended.lse, grad_q], gathered, plan))
    del gathered  # and with it all that the chunks needed, before the whole is made
    return grad_q, _heads_first(_cat(grads, 3).to(q.dtype))


def _scattered_chunks(rows: Sequence[Tensor], gathered: Iterator[Tensor], plan: Plan) -> Iterator[Tensor]:
    """Gradients of this rank's K and V [l, 2, B, g, D] a chunk; while one is on its way the next is computed.

    ``rows`` [B, H, l, ...] are as for :func:`_backward_tiles`, of all heads; the last of them, for the gradients of
    the queries, is filled in.
    """
    tiles = plan.tiles(rows[0].size(2))
    rooms: list[Tensor] = []  # one is filled while the other is on its way
    on_its_way: Pending | None = None
    for index, heads in enumerate(plan.chunks(rows[0].size(1))):
        keys_values = next(gathered)
        if index < 2:
            rooms.append(_room(keys_values[0], 1).unflatten(0, (plan.shard.size, -1)))
        by_rank = rooms[index % 2]
        _backward_tiles([x[:, heads] for x in rows], keys_values, by_rank, tiles, plan)
        if on_its_way is not None:
            yield on_its_way.wait()
            on_its_way = None  # with it goes what gloo received, before there is room for the next
        on_its_way = _scatter(by_rank, plan)
    assert on_its_way is not None
    yield on_its_way.wait()


class SplitAttention(torch.autograd.Function):
    """:func:`attend` with its adjoint.

    ======== =============================================== ===================================================
    forward  q [B, H, l, D], k and v [B, G, l, D]            K, V <- all-gather(k, v) [B, G, L, D]; out [B, H, l, D]
    backward grad of out [B, H, l, D]                        dq [B, H, l, D]; dk, dv <- reduce-scatter(dK, dV) [B, G, l, D]
    ======== =============================================== ===================================================
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """See :func:`attend`."""
        attended = attend(q, k, v, plan)
        own = (q.new_empty(0), q.new_empty(0)) if plan.keep_gathered else (k, v)
        ctx.plan = plan
        ctx.save_for_backward(q, *own, *attended)
        return attended.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """See :func:`attend_backward`."""
        q, k, v, *attended = ctx.saved_tensors
        grad_q, (grad_k, grad_v) = attend_backward(grad, q, k, v, Attended(*attended), ctx.plan)
        return grad_q, grad_k, grad_v, None


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Leave the kernels the dtypes that they are given."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _rows_like(q: Tensor) -> Tensor:
    """Room for a tensor like ``q`` [B, H, l, D], in memory [B, l, H, D]."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


# -- communication -----------------------------------------------------------------------------------------------------


def empty_gathered(k: Tensor, size: int) -> Tensor:
    """Room for K and V of the whole sequence, [2, B, g, S l, D] for ``k`` [B, g, l, D]."""
    return _heads_first(_room(k, size))


def _room(k: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The same as it lies in memory, [S l, 2, B, g, D]: every run of positions is one run of memory."""
    batch, heads, local_length, width = k.shape
    return k.new_empty(size * local_length, 2, batch, heads, width, dtype=dtype)


def _heads_first(keys_values: Tensor) -> Tensor:
    """View of K and V, or their gradients, as kernels take them: [l, 2, B, g, D] -> [2, B, g, l, D]."""
    return keys_values.permute(1, 2, 3, 0, 4)


def _gathered_chunks(k: Tensor, v: Tensor, plan: Plan) -> Iterator[Tensor]:
    """K and V of the whole sequence, [2, B, g, L, D] a chunk; while one is in use the next is being gathered.

    Each is good until the next is asked for: among several ranks two rooms serve all of them.
    """
    chunks = [(k[:, heads], v[:, heads]) for heads in plan.chunks(k.size(1))]
    if plan.shard.size == 1:
        for own in chunks:
            whole = _room(own[0], 1)
            _write([whole], *own)
            yield _heads_first(whole)
        return
    in_use: Tensor | None = None
    ahead: Pending | None = _gather(*chunks[0], None, plan)
    for following in [*chunks[1:], None]:
        assert ahead is not None
        arrived = ahead.wait()
        if plan.in_place(k):
            in_use, free = arrived, in_use
        else:
            in_use = _room(chunks[0][0], plan.shard.size) if in_use is None else in_use
            plan.shard.in_position_order(arrived.unflatten(0, (plan.shard.size, -1)), 0, out=in_use)
            free = arrived
        ahead = _gather(*following, free, plan) if following is not None else None
        del arrived, free  # nothing arrives while the last chunk is in use
        yield _heads_first(in_use)


def _gather(k: Tensor, v: Tensor, room: Tensor | None, plan: Plan) -> Pending:
    """Start to gather K and V of the whole sequence, [L, 2, B, g, D], into ``room`` or a new one."""
    shard, group = plan.shard, plan.shard.require_group()
    room = _room(k, shard.size, shard.communication_dtype) if room is None else room
    segments = room.unflatten(0, (shard.size, -1))
    places = shard.chunks_by_rank(room, 0) if plan.in_place(k) else [[segment] for segment in segments]
    _write(places[shard.rank], k, v)
    works = exchange(places, group) if plan.in_messages(k) else all_gather(segments[shard.rank], group, segments).works
    return Pending(room, works)


def _write(places: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Put ``k`` and ``v`` [B, g, l, D] side by side into consecutive places [n, 2, B, g, D]."""
    lengths = [place.size(0) for place in places]
    for place, *own in zip(places, k.split(lengths, 2), v.split(lengths, 2)):
        for room, x in zip(_heads_first(place), own):
            room.copy_(x)


def _scatter(by_rank: Tensor, plan: Plan) -> Pending:
    """Sum gradients [S, l, 2, B, g, D] over the ranks; each receives its own segment's [l, 2, B, g, D]."""
    shard = plan.shard
    if shard.size == 1:
        return Pending(by_rank[0].clone())  # the room is used again
    scatter = all_to_all_sum if plan.in_messages(by_rank) else reduce_scatter
    return scatter(by_rank.to(shard.communication_dtype or by_rank.dtype), shard.require_group())


# -- computation -------------------------------------------------------------------------------------------------------


def _by_rows(tiles: Sequence[Tile]) -> Iterator[tuple[slice, list[Tile]]]:
    """Ranges of local query rows, each with its tiles."""
    for (start, stop), row_tiles in groupby(tiles, key=lambda tile: (tile.q_start, tile.q_stop)):
        yield slice(start, stop), list(row_tiles)


def _forward_tiles(rows: Sequence[Tensor], keys_values: Tensor, tiles: Sequence[Tile], plan: Plan) -> None:
    """Attend over the tiles of K and V [2, B, g, L, D].

    ``rows`` are the queries [B, h, l, D], and the output [B, h, l, D] and its log-sum-exp [B, h, l] to be filled in.
    """
    kernel = KERNELS[plan.kernel]
    for span, row_tiles in _by_rows(tiles):
        q, out, lse = (x[:, :, span] for x in rows)
        joint: tuple[Tensor, Tensor] | None = None
        keys = kernel.forward_keys(span.stop - span.start)
        for tile in (part for whole in row_tiles for part in whole.cut(keys)):
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            part = kernel.forward(q, k, v, tile.causal, plan.scale)
            joint = part if joint is None else _join(*joint, *part)
        assert joint is not None
        out.copy_(joint[0])
        lse.copy_(joint[1])


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the two results; weights are exp(lse - joint lse)."""
    joint = torch.logaddexp(lse, other_lse)
    weight = (other_lse - joint).exp_().unsqueeze(-1)
    return torch.lerp(out.to(joint.dtype), other_out.to(joint.dtype), weight), joint


def _backward_tiles(
    rows: Sequence[Tensor], keys_values: Tensor, by_rank: Tensor, tiles: Sequence[Tile], plan: Plan
) -> None:
    """Fill in the gradient of the queries and those of K and V, ``by_rank`` [S, l, 2, B, g, D].

    ``rows`` are the gradient of the output, the queries, the output [B, h, l, D], its log-sum-exp [B, h, l], and the
    gradient of the queries to be filled in.
    """
    kernel = KERNELS[plan.kernel]
    chunks = [_heads_first(chunk) for chunk in plan.shard.chunks_in_order(by_rank, 0)]
    rooms = list(zip(*chunks))  # of K, of V
    filled = 0  # positions whose gradients are in the rooms; the last rows come first, since they see the most keys
    for span, row_tiles in reversed(list(_by_rows(tiles))):
        grad, q, out, lse, grad_q = (x[:, :, span] for x in rows)
        sum_q: Tensor | None = None
        for tile in (part for whole in row_tiles for part in whole.cut(kernel.backward_keys)):
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            tile_q, *tile_keys_values = kernel.backward(grad, q, k, v, out, lse, tile.causal, plan.scale)
            sum_q = tile_q if sum_q is None else sum_q.to(lse.dtype).add_(tile_q)
            for room, tile_grad in zip(rooms, tile_keys_values):
                _put(room, tile_grad, tile.k_start, add=tile.k_start < filled)
            filled = max(filled, tile.k_stop)
        assert sum_q is not None
        grad_q.copy_(sum_q)
    for unseen in (chunk for room in rooms for chunk in room[filled // room[0].size(-2) :]):
        unseen.zero_()


def _put(chunks: Sequence[Tensor], grad: Tensor, start: int, add: bool) -> None:
    """Copy or add a tile's gradient [B, g, n, D] to the chunks of the sequence [B, g, c, D] from position ``start``
    on."""
    width, stop = chunks[0].size(-2), start + grad.size(-2)
    for index in range(start // width, -(-stop // width)):
        first = index * width
        low, high = max(start, first), min(stop, first + width)
        room, part = chunks[index][..., low - first : high - first, :], grad[..., low - start : high - start, :]
        room.add_(part) if add else room.copy_(part)
