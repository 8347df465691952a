"""Tokens and operations per second of a run whose sequences are split over ranks."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_lss.sequence.segment import place_of


class LSSThroughputMonitor(ThroughputMonitor):
    """Lightning's ``ThroughputMonitor`` for sequences that are split over several ranks.

    Logs ``train/tokens_per_sec`` of the whole world. If the module has ``flops_per_batch``, the operations of this rank
    in a batch, it also logs ``train/device/flops_per_sec`` and, on devices whose peak is known, ``train/device/mfu``
    (model FLOP/s utilization).

    Args:
        window_size: number of batches to average over.
        batch_size_fn: number of sequences in a batch; by default B of its first tensor of shape [B, l, ...].
        length_fn: number of local tokens in a batch; by default B * l of that tensor.
    """

    def __init__(
        self,
        window_size: int = 20,
        batch_size_fn: Callable[[Any], int] = lambda batch: _first_sequence(batch).size(0),
        length_fn: Callable[[Any], int] = lambda batch: _first_sequence(batch).shape[:2].numel(),
    ) -> None:
        super().__init__(batch_size_fn, length_fn, window_size=window_size)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        size, flops = place_of(pl_module).size, self.available_flops
        for stage in self._throughputs:
            self._throughputs[stage] = _SequenceThroughput(size, flops, trainer.world_size, **self.kwargs)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean training rate of the whole world in the window, tokens per second; None before the window is full."""
        throughput = self._throughputs.get(RunningStage.TRAINING)
        return throughput.compute().get("tokens_per_sec") if throughput is not None and throughput._time else None


class _SequenceThroughput(Throughput):
    """Lightning's rates, corrected: it counts a sequence on each of the S ranks that share it."""

    def __init__(self, sequence_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_size = sequence_size

    @override
    def compute(self) -> dict[str, int | float]:
        metrics = super().compute()
        for name in metrics:
            if name.endswith(("batches_per_sec", "samples_per_sec")):
                metrics[name] /= self.sequence_size
        if "device/items_per_sec" in metrics:
            metrics["tokens_per_sec"] = metrics["device/items_per_sec"] * self.world_size
        return metrics


def _first_sequence(batch: Any) -> Tensor:
    """Return the first tensor [B, l, ...] of a batch."""
    return next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1)
