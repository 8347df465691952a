"""Shorten a batch along the sequence, so that one device can compute all of it in a moment."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.batch import Path, SequenceDims, map_tensors, sequence_dim, tensors_by_path
from lightning_lss.sequence.layout import chunks_per_rank

POSITIONS = 512
"""To how many positions a batch is shortened: enough for several chunks on each of many ranks, and little work."""


def sequence_length(batch: Any, dims: SequenceDims) -> int:
    """Return the length of the longest sequence in ``batch``, 0 if it has none."""
    return max(
        (x.size(dim) for path, x in tensors_by_path(batch) if (dim := sequence_dim_of(path, x, dims)) is not None),
        default=0,
    )


def short_length(length: int, size: int, layout: str) -> int:
    """Return how many of ``length`` positions to take for ``size`` ranks: no more than one of them holds in a training step,
    where that can be divided among all, so that no rank needs more memory than for such a step."""
    unit = size * chunks_per_rank(size, layout)
    return max(min(POSITIONS, length // size) // unit, 1) * unit


def shortened(batch: Any, length: int, short: int, dims: SequenceDims, chunks: int) -> Any:
    """Keep ``short`` of ``length`` positions: of each of ``chunks`` equal runs the first and the last, so that every rank keeps
    positions of its own, with their padding and masked targets. Sequences of other lengths that ``dims`` names are
    shortened in proportion."""

    def cut(path: Path, x: Tensor) -> Tensor:
        dim = sequence_dim_of(path, x, dims)
        is_named = not dims.keys().isdisjoint(path)
        if dim is None or (x.size(dim) != length and not is_named):  # left whole by ``shard_batch``
            return x
        run, kept = x.size(dim) // chunks, x.size(dim) * short // length // chunks
        ends = [(start, kept - kept // 2) for start in range(0, run * chunks, run)]
        ends += [(start + run - kept // 2, kept // 2) for start in range(0, run * chunks, run)]
        return torch.cat([x.narrow(dim, start, count) for start, count in sorted(ends)], dim)

    return map_tensors(batch, cut)


def sequence_dim_of(path: Path, x: Tensor, dims: SequenceDims) -> int | None:
    """Return the dimension of the sequence of a batch entry; None for one that is left whole or does not have it."""
    dim = sequence_dim(path, x, dims)
    return dim if dim is not None and -x.dim() <= dim < x.dim() else None
