"""Whether the segments of a batch have as many tokens that count.

A mean over the tokens of each segment is the mean over all only where they have. So a run that agrees on an even batch is
proved again on the first uneven one. Which tokens count is the module's to say; what usually says it is looked at: negative
targets (-100), masks of zeros and ones, and padding, which is a run of equal values at an end.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lss.proof.shorten import sequence_dim_of
from lightning_lss.sequence.batch import Path, SequenceDims, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard

Sign = tuple[Path, str]
"""A batch entry, and what in it may say that a token does not count."""


def uneven_signs(
    batch: Any, shard: SequenceShard, dims: SequenceDims, known: Collection[Sign] = ()
) -> dict[Sign, Tensor]:
    """Return the signs in the whole ``batch``, but for those that are ``known``, of which its segments have different
    numbers; with each, how many there are at every position, int64 [length]."""
    found = {}
    for path, x in tensors_by_path(batch):
        dim = sequence_dim_of(path, x, dims)
        if dim is None or x.size(dim) % shard.num_chunks:
            continue
        for name, hidden in _signs(x.movedim(dim, -1)):
            counts = hidden.reshape(-1, hidden.size(-1)).sum(0)
            if (path, name) not in known and len(set(by_rank(counts, shard).tolist())) > 1:
                found[path, name] = counts
    return found


def by_rank(counts: Tensor, shard: SequenceShard) -> Tensor:
    """Sum numbers by position [length] over the segment of each rank, [S]."""
    sums = [
        sum(counts[run.start : run.stop].sum() for run in shard.ranges(len(counts), rank)) for rank in range(shard.size)
    ]
    return torch.stack([torch.as_tensor(x) for x in sums])


def _signs(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield which elements of ``x`` [..., length] may stand for tokens that do not count; features have none.

    Every batch of a run comes here, so most is settled by the extremes and the ends.
    """
    if x.numel() == 0 or x.is_complex() or (x.is_floating_point() and x.dim() != 2):
        return
    low, high = (float(extreme) for extreme in x.aminmax())
    if low >= 0 and high <= 1 and (not x.is_floating_point() or bool(((x == 0) | (x == 1)).all())):
        yield "mask", x == 0
    elif not x.is_floating_point():
        if low < 0:
            yield "negative", x < 0
        if x.size(-1) > 1 and bool(((x[..., 0] == x[..., 1]) | (x[..., -1] == x[..., -2])).any()):
            yield "padding", _run_at_end(x) | _run_at_end(x.flip(-1)).flip(-1)


def _run_at_end(x: Tensor) -> Tensor:
    """Tell which elements belong to a run of two or more equal ones at the end."""
    same = (x == x[..., -1:]).flip(-1).cumprod(-1).flip(-1).bool()
    return same & (same.sum(-1, keepdim=True) > 1)
