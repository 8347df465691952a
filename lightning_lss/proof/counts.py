"""Plain means over tokens, which are exact only while all segments have the same number of tokens that count."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_lss.proof.shorten import sequence_dim_of
from lightning_lss.sequence.batch import SequenceDims, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard

Means = list[tuple[int, int]]
"""Number of targets and ``ignore_index`` of each loss."""


class PlainMeans(TorchFunctionMode):
    """Note the calls of losses that are means over the targets that do not have a value of their ``ignore_index``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Means = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            target = kwargs.get("target", args[1] if len(args) > 1 else None)
            if isinstance(target, Tensor) and kwargs.get("reduction", "mean") == "mean":
                self.calls.append((target.numel(), int(kwargs.get("ignore_index", -100))))
        return func(*args, **kwargs)


def ignored_values(whole: Means, split: Means, size: int) -> set[int]:
    """Return the values of targets that do not count in plain means over the tokens of a segment."""
    pairs = zip(whole, split)
    return {ignored for (count, ignored), (own, _) in pairs if count == size * own}


def is_uneven(batch: Any, ignored: set[int], shard: SequenceShard, dims: SequenceDims) -> bool:
    """Whether segments of an entry of the whole ``batch`` have different numbers of an ignored value."""
    for path, x in tensors_by_path(batch):
        dim = sequence_dim_of(path, x, dims)
        if dim is None or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            continue
        for value in ignored:
            hidden = (x == value).movedim(dim, 0)
            counts = {
                int(sum(hidden[run.start : run.stop].sum() for run in runs)) for runs in _segments(shard, x.size(dim))
            }
            if len(counts) > 1:
                return True
    return False


def _segments(shard: SequenceShard, length: int) -> list[tuple[range, ...]]:
    ranks = range(shard.size)
    return [SequenceShard(rank, shard.size, shard.layout).ranges(length) for rank in ranks]
