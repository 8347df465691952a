"""The peak memory of every rank."""

import resource
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, on the GPU or, for a CPU, in its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class PeakMemoryMonitor(pl.Callback):
    """Logs the highest peak memory of all ranks in GiB, ``memory/peak``, and each rank's, ``memory/rank_0`` and so on.

    With more than ``most_ranks`` ranks only the highest is logged.
    """

    def __init__(self, most_ranks: int = 64) -> None:
        self.most_ranks = most_ranks
        self._last_step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._last_step or not every or step % every:
            return
        self._last_step = step  # under accumulation several batches end at the same step
        device = trainer.strategy.root_device
        gib = torch.tensor(peak_memory(device) / 2**30, device=device)
        peaks = trainer.strategy.all_gather(gib).flatten().tolist()
        metrics = {"memory/peak": max(peaks)}
        if 1 < len(peaks) <= self.most_ranks:
            metrics |= {f"memory/rank_{rank}": peak for rank, peak in enumerate(peaks)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # Lightning counts steps from 0
