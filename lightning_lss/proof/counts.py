"""Plain means over tokens, which are exact only while all segments have the same number of tokens that count."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_lss.proof.shorten import sequence_dim_of
from lightning_lss.sequence.batch import Path, SequenceDims, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard

Means = list[tuple[Tensor, int]]
"""Targets and ``ignore_index`` of each loss."""


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
                self.calls.append((target.detach().clone(), int(kwargs.get("ignore_index", -100))))
        return func(*args, **kwargs)


def ignored_values(whole: Means, split: Means, batch: Any, size: int) -> dict[Path, int]:
    """Return the batch entries that are targets of plain means over the tokens of a segment, with the value that does not
    count."""
    found = {}
    for (target, ignored), (own, _) in zip(whole, split):
        if target.numel() == size * own.numel():
            for path, x in tensors_by_path(batch):
                if (
                    x.numel() == target.numel()
                    and x.dtype == target.dtype
                    and torch.equal(x.flatten(), target.flatten())
                ):
                    found[path] = ignored
    return found


def is_uneven(batch: Any, ignored: dict[Path, int], shard: SequenceShard, dims: SequenceDims) -> bool:
    """Whether segments of an entry of the whole ``batch`` have different numbers of its ``ignored`` value."""
    for path, x in tensors_by_path(batch):
        dim = sequence_dim_of(path, x, dims)
        if path not in ignored or dim is None:
            continue
        hidden = (x == ignored[path]).movedim(dim, 0)
        counts = {
            int(sum(hidden[run.start : run.stop].sum() for run in runs)) for runs in _segments(shard, x.size(dim))
        }
        if len(counts) > 1:
            return True
    return False


def _segments(shard: SequenceShard, length: int) -> list[tuple[range, ...]]:
    ranks = range(shard.size)
    return [SequenceShard(rank, shard.size, shard.layout).ranges(length) for rank in ranks]
