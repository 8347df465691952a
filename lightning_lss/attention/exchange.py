"""Fetch keys and values from the other ranks, send their gradients back, and keep the buffers for both.

In memory a head chunk of K and V is [L, 2, B, g, D]. Every run of positions is then one run of memory, and a segment
can be received in its final position.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.sequence.collectives import Pending, all_gather, all_to_all_sum, exchange, is_gloo, reduce_scatter
from lightning_lss.sequence.layout import chunks_per_rank


class Buffers:
    """Buffers used in turn, each allocated when it is first needed.

    With two of them, A and B, one head chunk is computed while the next is in flight::

        head chunk       0    1    2    3
        gathered into    A    B    A    B
        in use           .    A    B    A    B
        in flight        A    B    A    B    .

    The gradients of head chunks are written to two buffers in the same way and sent one head chunk later.
    """

    def __init__(self, number: int, allocate: Callable[[], Tensor]) -> None:
        self._in_turn = cycle(allocate() for _ in range(number))

    def next(self) -> Tensor:
        """Return the buffer whose turn it is."""
        return next(self._in_turn)


def empty_head_chunk(k: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate K and V of S = ``size`` segments, [S l, 2, B, g, D], for one segment's ``k`` [B, g, l, D]."""
    batch, heads, local_length, width = k.shape
    return k.new_empty(size * local_length, 2, batch, heads, width, dtype=dtype)


def heads_first(keys_values: Tensor) -> Tensor:
    """View K and V, or their gradients, in the order of kernels: [l, 2, B, g, D] -> [2, B, g, l, D]."""
    return keys_values.permute(1, 2, 3, 0, 4)


def gathered_head_chunks(k: Tensor, v: Tensor, spec: AttentionSpec) -> Iterator[Tensor]:
    """Gather K and V of the whole sequence by head chunk, [2, B, g, L, D]; while one is in use, gather the next.

    ``k`` and ``v`` [B, G, l, D] are this rank's segment, and ``spec`` is resolved. A head chunk is valid until the next
    one is requested. A single one stays valid.
    """
    own_chunks = [(k[:, heads], v[:, heads]) for heads in spec.split_heads(k.size(1))]
    like, shard, in_place = own_chunks[0][0], spec.shard, _received_in_place(k, spec)
    dtype = k.dtype if in_place else shard.communication_dtype
    buffers = Buffers(2 if in_place else 1, lambda: empty_head_chunk(like, shard.size, dtype))
    ordered = None if in_place else empty_head_chunk(like, shard.size)

    def arrived(pending: Pending) -> Tensor:
        received = pending.wait()
        if ordered is not None:
            segments = received.unflatten(0, (shard.size, -1))
            received = torch.cat(shard.chunks_in_order(segments, 0), out=ordered)
        return heads_first(received)

    ahead = _gather(*own_chunks[0], buffers.next(), spec)
    for following in own_chunks[1:]:
        keys_values = arrived(ahead)
        ahead = _gather(*following, buffers.next(), spec)
        yield keys_values
    keys_values = arrived(ahead)
    del ahead, buffers  # no gather is in flight during the last head chunk
    yield keys_values


def scatter_gradients(by_rank: Tensor, spec: AttentionSpec) -> Pending:
    """Start to sum the gradients of a head chunk of K and V, [S, l, 2, B, g, D], over the ranks; each rank receives
    those of its own segment, [l, 2, B, g, D]."""
    shard = spec.shard
    if shard.size == 1:
        return Pending(by_rank[0].clone())  # the buffer is reused
    scatter = all_to_all_sum if _sends_messages(by_rank, spec) else reduce_scatter
    return scatter(by_rank.to(shard.communication_dtype or by_rank.dtype), shard.require_group())


def _sends_messages(x: Tensor, spec: AttentionSpec) -> bool:
    """Whether head chunks of K, V and their gradients, such as ``x``, are sent in messages from rank to rank."""
    # over gloo these take less time; with all heads at once, one collective of each kind is promised
    return spec.head_chunks != 1 and is_gloo(x, spec.shard.require_group())


def _received_in_place(k: Tensor, spec: AttentionSpec) -> bool:
    """Whether K and V are received in position order and in their own dtype. A collective leaves the early and the late
    chunk of a zigzag segment side by side."""
    if spec.shard.size == 1:
        return True
    own_dtype = spec.shard.communication_dtype in (None, k.dtype)
    return own_dtype and (_sends_messages(k, spec) or chunks_per_rank(spec.shard.size, spec.shard.layout) == 1)


def _gather(k: Tensor, v: Tensor, buffer: Tensor, spec: AttentionSpec) -> Pending:
    """Start to gather a head chunk of K and V, [B, g, l, D] each, into ``buffer`` [L, 2, B, g, D]."""
    shard = spec.shard
    segments = buffer.unflatten(0, (shard.size, -1))
    in_place = _received_in_place(k, spec)
    destinations = shard.chunks_by_rank(buffer, 0) if in_place else [[segment] for segment in segments]
    _write(destinations[shard.rank], k, v)
    if shard.size == 1:
        return Pending(buffer)
    if _sends_messages(k, spec):
        return Pending(buffer, exchange(destinations, shard.require_group()))
    return Pending(buffer, all_gather(segments[shard.rank], shard.require_group(), segments).works)


def _write(destinations: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Copy ``k`` and ``v`` [B, g, l, D] to consecutive destinations [n, 2, B, g, D] of n positions each."""
    lengths = [destination.size(0) for destination in destinations]
    for destination, *own in zip(destinations, k.split(lengths, 2), v.split(lengths, 2)):
        for buffer, x in zip(heads_first(destination), own):
            buffer.copy_(x)
