"""When training steps begin and end."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch


class StepClock(pl.Callback):
    """Notes when each step of a training run begins and ends, on CUDA with the work of the device included.

    Attributes:
        starts: ``time.perf_counter()`` when the step was given its batch.
        ends: likewise, when it was over.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the time."""
        self.starts.append(_now(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(_now(trainer))

    @property
    def seconds(self) -> list[float]:
        """Of each step, without the loading of its batch."""
        return [end - start for start, end in zip(self.starts, self.ends)]

    @property
    def seconds_between_ends(self) -> list[float]:
        """From the end of a step to the end of the next, data loading included: one fewer than there are steps."""
        return [end - start for start, end in zip(self.ends, self.ends[1:])]


def _now(trainer: pl.Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
