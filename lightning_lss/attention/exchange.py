"""What keys and values a rank fetches, what gradients it sends back, and the buffers that both need.

A head chunk of K and V lies in memory as [L, 2, B, g, D]: every run of positions is one run of memory, so that a segment
can arrive where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.sequence.collectives import Pending, all_gather, all_to_all_sum, exchange, is_gloo, reduce_scatter
from lightning_lss.sequence.layout import chunks_per_rank


class Buffers:
    """Buffers that take turns, each allocated when it is first needed.

    With two of them, A and B, one head chunk is computed while the next is in flight::

        chunk            0    1    2    3
        gathered into    A    B    A    B
        in use           .    A    B    A    B
        in flight        A    B    A    B    .

    The gradients of chunks are written to two buffers in the same way, and are sent one chunk later.
    """

    def __init__(self, number: int, allocate: Callable[[], Tensor]) -> None:
        self._number = number
        self._allocate = allocate
        self._buffers: list[Tensor] = []  # the one that has waited longest comes first

    def next(self) -> Tensor:
        """The buffer that was handed out longest ago, or a new one while there are fewer than their number."""
        full = len(self._buffers) == self._number
        self._buffers.append(self._buffers.pop(0) if full else self._allocate())
        return self._buffers[-1]


def empty_chunk(k: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for K and V of ``size`` segments, [S l, 2, B, g, D], for ``k`` [B, g, l, D]."""
    batch, heads, local_length, width = k.shape
    return k.new_empty(size * local_length, 2, batch, heads, width, dtype=dtype)


def heads_first(keys_values: Tensor) -> Tensor:
    """View K and V, or their gradients, as kernels take them: [l, 2, B, g, D] -> [2, B, g, l, D]."""
    return keys_values.permute(1, 2, 3, 0, 4)


def gathered_chunks(k: Tensor, v: Tensor, spec: AttentionSpec) -> Iterator[Tensor]:
    """K and V of the whole sequence by head chunk, [2, B, g, L, D]; while one is in use the next is gathered.

    A chunk is valid until the next one is asked for, unless there is only one.

    Args:
        k: [B, G, l, D], this rank's segment of the keys.
        v: [B, G, l, D], its segment of the values.
        spec: a resolved spec.
    """
    chunks = [(k[:, heads], v[:, heads]) for heads in spec.split_heads(k.size(1))]
    if spec.shard.size == 1:
        for own in chunks:
            whole = empty_chunk(own[0], 1)
            _write([whole], *own)
            yield heads_first(whole)
        return
    shard, in_place = spec.shard, _arrive_in_place(k, spec)
    sent_dtype = shard.communication_dtype
    buffers = Buffers(2 if in_place else 1, lambda: empty_chunk(chunks[0][0], shard.size, sent_dtype))
    ordered = None if in_place else empty_chunk(chunks[0][0], shard.size)

    def put_in_order(arrived: Tensor) -> Tensor:
        if ordered is None:
            return arrived
        return shard.in_position_order(arrived.unflatten(0, (shard.size, -1)), 0, out=ordered)

    ahead = _gather(*chunks[0], buffers.next(), spec)
    for following in chunks[1:]:
        keys_values = put_in_order(ahead.wait())
        ahead = _gather(*following, buffers.next(), spec)
        yield heads_first(keys_values)
    keys_values = put_in_order(ahead.wait())
    del ahead, buffers  # no gather is in flight during the last chunk
    yield heads_first(keys_values)


def scatter_gradients(by_rank: Tensor, spec: AttentionSpec) -> Pending:
    """Start to sum the gradients of a head chunk of K and V, [S, l, 2, B, g, D], over the ranks; each receives its own
    segment's [l, 2, B, g, D]."""
    shard = spec.shard
    if shard.size == 1:
        return Pending(by_rank[0].clone())  # the buffer is used again
    scatter = all_to_all_sum if _sends_messages(by_rank, spec) else reduce_scatter
    return scatter(by_rank.to(shard.communication_dtype or by_rank.dtype), shard.require_group())


def _sends_messages(x: Tensor, spec: AttentionSpec) -> bool:
    """Whether head chunks of K, V and their gradients, such as ``x``, are sent in messages from rank to rank. Over gloo
    these take less time. All heads at once are promised as one collective of each kind."""
    return spec.head_chunks != 1 and is_gloo(x, spec.shard.require_group())


def _arrive_in_place(k: Tensor, spec: AttentionSpec) -> bool:
    """Whether K and V arrive in position order and in their own dtype. One collective brings a zigzag segment as an early
    and a late chunk side by side."""
    own_dtype = spec.shard.communication_dtype in (None, k.dtype)
    return own_dtype and (_sends_messages(k, spec) or chunks_per_rank(spec.shard.size, spec.shard.layout) == 1)


def _gather(k: Tensor, v: Tensor, buffer: Tensor, spec: AttentionSpec) -> Pending:
    """Start to gather a head chunk of K and V, [B, g, l, D] each, into ``buffer`` [L, 2, B, g, D]."""
    shard, group = spec.shard, spec.shard.require_group()
    segments = buffer.unflatten(0, (shard.size, -1))
    in_place = _arrive_in_place(k, spec)
    destinations = shard.chunks_by_rank(buffer, 0) if in_place else [[segment] for segment in segments]
    _write(destinations[shard.rank], k, v)
    if _sends_messages(k, spec):
        return Pending(buffer, exchange(destinations, group))
    return Pending(buffer, all_gather(segments[shard.rank], group, segments).works)


def _write(destinations: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Copy ``k`` and ``v`` [B, g, l, D] side by side to consecutive destinations [n, 2, B, g, D]."""
    lengths = [destination.size(0) for destination in destinations]
    for destination, *own in zip(destinations, k.split(lengths, 2), v.split(lengths, 2)):
        for buffer, x in zip(heads_first(destination), own):
            buffer.copy_(x)
