"""Time training steps."""

import time
from typing import Any

import lightning.pytorch as pl
import torch


class StepClock(pl.Callback):
    """Note when each step of a training run begins and ends; on CUDA the work of the device is included.

    Attributes:
        starts: ``time.perf_counter()`` when each step received its batch.
        ends: ``time.perf_counter()`` when each step was over.
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
        """Seconds of each step, without the loading of its batch."""
        return [end - start for start, end in zip(self.starts, self.ends)]

    @property
    def seconds_between_ends(self) -> list[float]:
        """Seconds between the ends of consecutive steps, data loading included; one fewer than there are steps."""
        return [end - start for start, end in zip(self.ends, self.ends[1:])]


def _now(trainer: pl.Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
