"""What a mask shows of the sequences of one call: bands by row of the batch, and by chunk what its queries look at."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_lss.attention.bands import EMPTY, K0, K1, Q0, Bands, count_pairs, rectangles, split_queries, spread
from lightning_lss.attention.kinds import Kind, Sizes
from lightning_lss.attention.packing import PackedMask, no_modes, unpack

Edges = NDArray[np.int64]

BLOCK = 128  # width of the blocks in which masks without structure are looked at


class Structure(NamedTuple):
    """What is visible, by row of the batch (one entry: the same for all)."""

    exact: list[Bands]
    """Disjoint bands of visible pairs."""
    mixed: list[Bands]
    """Rectangles, disjoint from the bands, in which some pairs are visible."""


class ChunkWork(NamedTuple):
    """What the queries of each of C chunks of a sequence do, over all rows of the batch that the mask tells apart."""

    pairs: NDArray[np.int64]
    """Number of pairs that are computed for a head, [C]."""
    keys: NDArray[np.int64]
    """Number of keys of chunk j from the first to the last that chunk i looks at, [C, C]."""
    first: NDArray[np.int64]
    """The first of these keys, [C, C]."""


def structure_of(mask: PackedMask, sizes: Sizes, query_chunks: int, key_chunks: int) -> Structure:
    """Find what a mask shows; a mask without structure is looked at in blocks that do not cross the borders of equal
    chunks."""
    return _structure_of(mask, unpack(mask).told_apart(sizes), query_chunks, key_chunks)


@lru_cache(maxsize=4)  # it keeps the mask, which may be large
@no_modes()
def _structure_of(mask: PackedMask, sizes: Sizes, query_chunks: int, key_chunks: int) -> Structure:
    kind = unpack(mask)
    exact = kind.bands(sizes)
    if exact is not None:
        return Structure(exact, [EMPTY] * len(exact))
    return _blocks(kind, sizes, _edges(sizes.queries, query_chunks), _edges(sizes.keys, key_chunks))


def _blocks(kind: Kind, sizes: Sizes, q_edges: Edges, k_edges: Edges) -> Structure:
    """Look at every pair, and sort the blocks: all visible, all hidden, mixed."""
    widths = np.diff(k_edges)
    exact: list[list[Bands]] = []
    mixed: list[list[Bands]] = []
    for start, stop in zip(q_edges[:-1].tolist(), q_edges[1:].tolist()):
        visible = kind.visible(torch.arange(start, stop), sizes)
        exact = exact or [[] for _ in visible]
        mixed = mixed or [[] for _ in visible]
        seen = visible.sum((1, 2), dtype=torch.int64).numpy()  # by row of the batch and key
        counts = np.add.reduceat(seen, k_edges[:-1], axis=1)
        everything = widths * visible.size(1) * visible.size(2)
        for row, count in enumerate(counts):
            exact[row].append(_runs_of(count == everything, start, stop, k_edges))
            mixed[row].append(_runs_of((count > 0) & (count < everything), start, stop, k_edges))
    return Structure([np.concatenate(row) for row in exact], [np.concatenate(row) for row in mixed])


def _edges(length: int, num_chunks: int) -> Edges:
    chunk = length // num_chunks
    starts = np.arange(0, length, chunk)[:, None] + np.arange(0, chunk, BLOCK)
    return np.append(starts.ravel(), length)


def _runs_of(wanted: NDArray[np.bool_], start: int, stop: int, edges: Edges) -> Bands:
    """Rectangles of the queries [start, stop) over the runs of wanted blocks of keys."""
    turns = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    first, last = edges[turns[::2]], edges[turns[1::2]]
    return rectangles(np.full_like(first, start), np.full_like(first, stop), first, last)


def chunk_work(mask: PackedMask, sizes: Sizes, num_chunks: int) -> ChunkWork:
    """Find what each of ``num_chunks`` equal chunks of the queries looks at."""
    return _chunk_work(mask, unpack(mask).told_apart(sizes), num_chunks)


@lru_cache(maxsize=4)
def _chunk_work(mask: PackedMask, sizes: Sizes, num_chunks: int) -> ChunkWork:
    exact, mixed = structure_of(mask, sizes, num_chunks, num_chunks)
    chunk, key_chunk = sizes.queries // num_chunks, sizes.keys // num_chunks
    pieces = split_queries(np.concatenate(exact + mixed), chunk)
    chunks = pieces[:, Q0] // chunk
    pairs = np.zeros(num_chunks, np.int64)
    np.add.at(pairs, chunks, count_pairs(pieces))
    index, of_keys = spread(pieces[:, K0] // key_chunk, (pieces[:, K1] - 1) // key_chunk)
    first = np.full((num_chunks, num_chunks), sizes.keys)
    stop = np.zeros_like(first)
    at = chunks[index], of_keys
    np.minimum.at(first, at, np.maximum(pieces[index, K0], of_keys * key_chunk))
    np.maximum.at(stop, at, np.minimum(pieces[index, K1], (of_keys + 1) * key_chunk))
    return ChunkWork(pairs, np.maximum(stop - first, 0), first)


def forget_structures() -> None:
    """Empty the caches."""
    for cached in (_structure_of, _chunk_work):
        cached.cache_clear()
