"""Shorten a batch along the sequence, so that one device can compute all of it in a moment."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.batch import BatchMask, Path, SequenceDims, map_entries, sequence_dim, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard

POSITIONS = 512
"""To how many positions a batch is shortened: enough for several chunks on each of many ranks, and little work."""

BLOCKS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
"""How many neighbours a module may merge, or compute together."""


def sequence_length(batch: Any, dims: SequenceDims) -> int:
    """Return the length of the longest sequence in ``batch``, 0 if it has none."""
    sizes = [x.size(dim) for path, x in tensors_by_path(batch) if (dim := sequence_dim_of(path, x, dims)) is not None]
    return max(sizes, default=0)


def short_length(length: int, shard: SequenceShard) -> int:
    """Return how many of ``length`` positions to take: no more than a rank holds in a training step, where that can be
    divided among all, so that no rank needs more memory than for such a step.

    A shortened chunk can be cut only into blocks that a chunk can be cut into, and into as many of these as possible: what
    merges neighbours fails in the proof where it fails in the run. One device never computes as many positions as a rank
    does in a step: what a function has cached by the length would be used for a segment.
    """
    unit, rest = shard.num_chunks, length % shard.num_chunks
    chunk, more = length // unit, int(rest > 0)  # sequences that are filled up have one position more in every chunk
    local = (chunk + more) * unit // shard.size
    most, divisors = max(min(POSITIONS, local) // unit, 1), _blocks(chunk + more)
    sound = [x for x in range(1, min(chunk, most) + 1) if x * unit + rest != local and _blocks(x + more) <= divisors]
    if sound:  # pairs are the commonest blocks
        return unit * max(sound, key=lambda x: (x % 2 == chunk % 2, len(_blocks(x + more)), x))
    longer = (x for x in range(most + 1, chunk) if _blocks(x + more) <= divisors)  # a rank holds one position of each
    return unit * next(longer, max(chunk, 1))


def _blocks(count: int) -> set[int]:
    """Return into blocks of which sizes ``count`` positions can be cut."""
    return {size for size in BLOCKS if count % size == 0}


def shortened(batch: Any, length: int, starts: list[int], kept: int, dims: SequenceDims) -> Any:
    """Keep ``kept`` positions of each chunk, from ``starts`` on, of sequences of ``length``, and with the last chunk what
    does not divide into chunks: so it stays.

    Other sequences are shortened in proportion: those that ``dims`` names, and the rest where they have one length, as
    ``split_batch`` demands. Masks are shortened with the sequences that they are for.
    """
    unnamed = {
        x.size(dim)
        for path, x in tensors_by_path(batch)
        if dims.keys().isdisjoint(path) and (dim := sequence_dim_of(path, x, dims)) is not None
    }
    lengths = {length, *(size for size in unnamed if len(unnamed) == 1 and size % len(starts) == 0)}

    def dim_to_cut(path: Path, x: Tensor) -> int | None:
        dim = sequence_dim_of(path, x, dims)
        is_named = not dims.keys().isdisjoint(path)
        return dim if dim is not None and (x.size(dim) in lengths or is_named) else None

    def windows(size: int) -> list[tuple[int, int]]:
        counts = [kept] * (len(starts) - 1) + [kept + length % len(starts)]
        return [(start * size // length, count * size // length) for start, count in zip(starts, counts)]

    def cut(path: Path, x: Any) -> Any:
        if isinstance(x, BatchMask):
            size = length if x.num_queries is None and x.num_keys is None else x.num_queries or x.num_keys
            is_square = x.num_keys in (None, size)  # else it stays: such a batch is refused shortened, and proved whole
            return x.select(_positions(windows(size))) if is_square and size in sizes else x
        dim = dim_to_cut(path, x) if isinstance(x, Tensor) else None
        if dim is None:  # left whole by ``shard_batch``, or no sequence
            return x
        return torch.cat([x.narrow(dim, *window) for window in windows(x.size(dim))], dim)

    cuts = [(x, dim) for path, x in tensors_by_path(batch) if (dim := dim_to_cut(path, x)) is not None]
    sizes = {length, *(x.size(dim) for x, dim in cuts)}
    return map_entries(batch, cut)


def _positions(windows: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(start, start + count) for start, count in windows])


def window_starts(length: int, kept: int, shard: SequenceShard, counts: Tensor | None) -> list[int]:
    """Return where the ``kept`` positions of each chunk start: at its start, so that every rank keeps positions of its own.

    With ``counts``, int64 [length], the rank that has most of them keeps as many as it can, and others as few, so that an
    uneven batch stays uneven. Counts of a sequence of another length are stretched to this one.
    """
    run = length // shard.num_chunks
    if counts is None:
        return [chunk * run for chunk in range(shard.num_chunks)]
    counts = counts[torch.arange(length) * len(counts) // length][: run * shard.num_chunks]
    windows = counts.view(-1, run).unfold(1, kept, 1).sum(2)  # [chunks, starts]
    totals = counts.view(-1, run).sum(1)
    most = max(shard.held_chunks, key=lambda chunks: int(totals[list(chunks)].sum()))
    best = [windows[chunk].argmax() if chunk in most else windows[chunk].argmin() for chunk in range(len(windows))]
    return [chunk * run + int(start) for chunk, start in enumerate(best)]


def sequence_dim_of(path: Path, x: Tensor, dims: SequenceDims) -> int | None:
    """Return the dimension of the sequence of a batch entry; None for one that is left whole or does not have it."""
    dim = sequence_dim(path, x, dims)
    return dim if dim is not None and -x.dim() <= dim < x.dim() else None
