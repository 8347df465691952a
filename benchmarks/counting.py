"""Count what a rank receives in a training step, and what one layer adds."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from benchmarks.training import Job, fit
from lightning_lss.testing.collectives import CollectiveCounter, Tally, total_bytes


class _CountedStep(pl.Callback):
    """Count one step after the warm-up; forward, backward and the rest are apart."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.counter = CollectiveCounter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.counter.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.counter.phase = "backward"

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counter.phase = "optimizer"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.counter.__exit__(None, None, None)
        self.counter.phase = "forward"


def count_step(rank: int, name: str, size: int, job: Job) -> Tally:
    """Count the collectives of the job's last step."""
    counted = _CountedStep(job.steps - 1)
    fit(name, size, job, counted)
    return counted.counter.tally


def per_layer(run: Callable[[Job], Tally], job: Job) -> tuple[Tally, int]:
    """Count what one layer adds to a step: the collectives of its activations, and the bytes of its parameters.

    A layer's collectives are those of a model of two layers without those of a model of one. Collectives of parameters
    are as large at 2 L as at L; those of activations grow.

    Args:
        run: counts the tally of a job.
        job: the model and L.
    """
    twice = job.with_model(seq_len=2 * job.length)
    one, two = (run(job.with_model(num_layers=layers)) for layers in (1, 2))
    long_one, long_two = (run(twice.with_model(num_layers=layers)) for layers in (1, 2))
    layer, long_layer = two - one, long_two - long_one
    activations = layer - (layer & long_layer)
    return activations, total_bytes(two) - total_bytes(one) - total_bytes(activations)
