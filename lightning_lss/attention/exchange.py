"""Fetch keys and values from the other ranks, send their gradients back, and keep the buffers for both.

In memory a head chunk of K and V is [n, B, g, D + Dv]. Every run of positions is then one run of memory, and a segment,
or a part of one, can be received in its final position.

Where ranks look at most of the sequence, all of it is gathered, in one collective. Else each rank receives the runs of
keys that it needs and no others (:attr:`lightning_lss.attention.plan.Plan.needs`).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from lightning_lss.attention.plan import Run
from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.sequence.collectives import (
    Pending,
    all_gather,
    all_to_all_sum,
    exchange,
    is_gloo,
    reduce_scatter,
    send_and_receive,
)

Needs = Sequence[Sequence[Run]]


class Buffers:
    """Buffers used in turn, each allocated when it is first needed.

    With two of them, A and B, one head chunk is computed while the next is in flight::

        head chunk       0    1    2    3
        fetched into     A    B    A    B
        in use           .    A    B    A    B
        in flight        A    B    A    B    .

    The gradients of head chunks are written to two buffers in the same way and sent one head chunk later.
    """

    def __init__(self, number: int, allocate: Callable[[], Tensor]) -> None:
        self._in_turn = cycle(allocate() for _ in range(number))

    def next(self) -> Tensor:
        """Return the buffer whose turn it is."""
        return next(self._in_turn)


def empty_head_chunk(k: Tensor, v: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate K and V of ``length`` n positions, [n, B, g, D + Dv], for ``k`` [B, g, l, D] and ``v`` [B, g, l, Dv]."""
    batch, heads, _, width = k.shape
    return k.new_empty(length, batch, heads, width + v.size(-1), dtype=dtype)


def heads_first(keys_values: Tensor) -> Tensor:
    """View K and V, or their gradients, in the order of kernels: [n, B, g, W] -> [B, g, n, W]."""
    return keys_values.permute(1, 2, 0, 3)


def fetched_head_chunks(k: Tensor, v: Tensor, spec: AttentionSpec, needs: Needs | None) -> Iterator[Tensor]:
    """Fetch the keys and values that this rank needs by head chunk, [B, g, n, D + Dv]; while one is in use, fetch the
    next.

    ``k`` [B, G, l, D] and ``v`` [B, G, l, Dv] are this rank's segment, and ``spec`` is resolved. A head chunk is valid
    until the next one is requested. A single one stays valid.
    """
    own_chunks = [(k[:, heads], v[:, heads]) for heads in spec.split_heads(k.size(1))]
    start = _gathers(*own_chunks[0], spec) if needs is None else _fetches(*own_chunks[0], spec, needs)
    ahead = start(*own_chunks[0])
    for following in own_chunks[1:]:
        keys_values = ahead.wait()
        ahead = start(*following)
        yield heads_first(keys_values)
    keys_values = ahead.wait()
    del ahead, start  # nothing is in flight during the last head chunk
    yield heads_first(keys_values)


# -- the whole sequence ------------------------------------------------------------------------------------------------


def _gathers(k: Tensor, v: Tensor, spec: AttentionSpec) -> Callable[[Tensor, Tensor], Pending]:
    """Return what starts to gather a head chunk like ``k`` and ``v``, [L, B, g, W]."""
    shard, in_place = spec.key_shard, _received_in_place(k, spec)
    length = shard.size * k.size(2)
    dtype = k.dtype if in_place else shard.communication_dtype
    buffers = Buffers(2 if in_place else 1, lambda: empty_head_chunk(k, v, length, dtype))
    ordered = None if in_place else empty_head_chunk(k, v, length)

    def into_order(received: Tensor) -> Tensor:
        segments = received.unflatten(0, (shard.size, -1))
        return torch.cat(shard.chunks_in_order(segments, 0), out=ordered)

    def start(k: Tensor, v: Tensor) -> Pending:
        pending = _gather(k, v, buffers.next(), spec)
        return pending if in_place else pending._replace(finish=into_order)

    return start


def _sends_messages(x: Tensor, spec: AttentionSpec) -> bool:
    """Whether head chunks of K, V and their gradients, such as ``x``, are sent in messages from rank to rank."""
    # over gloo these take less time; with all heads at once, one collective of each kind is promised
    return spec.head_chunks != 1 and is_gloo(x, spec.key_shard.require_group())


def _received_in_place(k: Tensor, spec: AttentionSpec) -> bool:
    """Whether K and V are received in position order and in their own dtype. A collective leaves the chunks of a segment
    side by side."""
    shard = spec.key_shard
    if shard.size == 1:
        return True
    own_dtype = shard.communication_dtype in (None, k.dtype)
    return own_dtype and (_sends_messages(k, spec) or shard.held_chunks == tuple((rank,) for rank in range(shard.size)))


def _gather(k: Tensor, v: Tensor, buffer: Tensor, spec: AttentionSpec) -> Pending:
    """Start to gather a head chunk of K and V, [B, g, l, D] and [B, g, l, Dv], into ``buffer`` [L, B, g, W]."""
    shard = spec.key_shard
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
    """Copy ``k`` [B, g, l, D] and ``v`` [B, g, l, Dv] to consecutive destinations [n, B, g, W] of n positions each."""
    lengths = [destination.size(0) for destination in destinations]
    for destination, own_k, own_v in zip(destinations, k.split(lengths, 2), v.split(lengths, 2)):
        into = heads_first(destination)
        into[..., : k.size(-1)].copy_(own_k)
        into[..., k.size(-1) :].copy_(own_v)


# -- only what is needed -----------------------------------------------------------------------------------------------


def _fetches(k: Tensor, v: Tensor, spec: AttentionSpec, needs: Needs) -> Callable[[Tensor, Tensor], Pending]:
    """Return what starts to fetch the needed runs of a head chunk like ``k`` and ``v``, [n, B, g, W]."""
    shard = spec.key_shard
    group, own_dtype = shard.require_group(), shard.communication_dtype in (None, k.dtype)
    dtype = k.dtype if own_dtype else shard.communication_dtype
    segment = empty_head_chunk(k, v, k.size(2), dtype)
    length = sum(run.size for run in needs[shard.rank])
    buffers = Buffers(2 if own_dtype else 1, lambda: empty_head_chunk(k, v, length, dtype))

    def start(own_k: Tensor, own_v: Tensor) -> Pending:
        _write([segment], own_k, own_v)
        buffer = buffers.next()
        incoming = _by_owner(buffer, needs[shard.rank], shard.size)
        outgoing = [_owned(segment, runs, shard.rank) for runs in needs]
        for into, own in zip(incoming[shard.rank], outgoing[shard.rank]):
            into.copy_(own)
        works = send_and_receive(outgoing, incoming, group)
        return Pending(buffer, works, None if own_dtype else lambda received: received.to(k.dtype))

    return start


def _by_owner(fetched: Tensor, runs: Sequence[Run], size: int) -> list[list[Tensor]]:
    """View fetched keys [n, ...] as the runs of each of ``size`` owners."""
    views: list[list[Tensor]] = [[] for _ in range(size)]
    for run, view in zip(runs, fetched.split([run.size for run in runs])):
        views[run.owner].append(view)
    return views


def _owned(segment: Tensor, runs: Sequence[Run], rank: int) -> list[Tensor]:
    """View the runs of ``segment`` [l, ...], that of ``rank``, among those that some rank needs."""
    return [segment[run.start : run.start + run.size] for run in runs if run.owner == rank]


# -- gradients ---------------------------------------------------------------------------------------------------------


def empty_gradients(k: Tensor, v: Tensor, spec: AttentionSpec, needs: Needs | None, dtype: torch.dtype) -> Tensor:
    """Allocate the gradients of the keys and values that were fetched for ``k`` [B, g, l, D] and ``v`` [B, g, l, Dv]: by
    rank, [S, l, B, g, W], or by run, [n, B, g, W]."""
    shard = spec.key_shard
    if needs is not None:
        return empty_head_chunk(k, v, sum(run.size for run in needs[shard.rank]), dtype)
    return empty_head_chunk(k, v, shard.size * k.size(2), dtype).unflatten(0, (shard.size, -1))


def gradients_in_order(grads: Tensor, spec: AttentionSpec, needs: Needs | None) -> list[Tensor]:
    """View gradients, as :func:`empty_gradients` allocates them, in the order of the fetched keys, [B, g, c, W] each."""
    chunks = [grads] if needs is not None else spec.key_shard.chunks_in_order(grads, 0)
    return [heads_first(chunk) for chunk in chunks]


def return_gradients(grads: Tensor, local_length: int, spec: AttentionSpec, needs: Needs | None) -> Pending:
    """Start to send the gradients of a head chunk to the ranks that hold the keys; each rank receives the sum of those of
    its own segment, [l, B, g, W]."""
    shard = spec.key_shard
    if shard.size == 1:
        return Pending(grads[0].clone())  # the buffer is reused
    grads = grads.to(shard.communication_dtype or grads.dtype)
    if needs is not None:
        return _return_runs(grads, local_length, spec, needs)
    scatter = all_to_all_sum if _sends_messages(grads, spec) else reduce_scatter
    return scatter(grads, shard.require_group())


def _return_runs(grads: Tensor, local_length: int, spec: AttentionSpec, needs: Needs) -> Pending:
    shard = spec.key_shard
    outgoing = _by_owner(grads, needs[shard.rank], shard.size)
    wanted = [[run for run in runs if run.owner == shard.rank] for runs in needs]
    incoming = [[grads.new_empty(run.size, *grads.shape[1:]) for run in runs] for runs in wanted]
    incoming[shard.rank] = outgoing[shard.rank]

    def add(total: Tensor) -> Tensor:
        # in the order of the ranks, so that sums do not change from run to run
        for runs, received in zip(wanted, incoming):
            for run, grad in zip(runs, received):
                total[run.start : run.start + run.size].add_(grad)
        return total

    total = grads.new_zeros(local_length, *grads.shape[1:])
    return Pending(total, send_and_receive(outgoing, incoming, shard.require_group()), add)
