"""Batches that differ within a sequence group are found in every loader, every stage and every run."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.training import Run, SGDTransformer, make_loader, make_module, make_samples, make_trainer


class Evaluated(SGDTransformer):
    """Takes any number of loaders."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def run_stages(rank: int, run: Run, which: str) -> str:
    """Do what ``which`` says, with one loader whose samples differ from rank to rank, after others that do not."""
    module, trainer, samples = make_module(run), make_trainer(rank, run, num_sanity_val_steps=0), make_samples(8)
    good, bad = DataLoader(samples, 2), DataLoader(samples[rank:], 2)
    try:
        if which == "second loader":
            trainer.validate(module, [good, bad], verbose=False)
        elif which == "validation while training":
            trainer.fit(module, good, bad)
        elif which == "test after validation":
            trainer.validate(module, good, verbose=False)
            trainer.test(module, bad, verbose=False)
        elif which == "second training":
            trainer.fit(module, good)
            trainer.fit_loop.epoch_loop.max_steps = 2 * run.steps
            trainer.fit(module, bad)
        else:
            trainer.validate(module, good, verbose=False)
            trainer.validate(module, bad, verbose=False)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    "which",
    [
        "second loader",
        "validation while training",
        "test after validation",
        "second training",
        "second validation",
    ],
)
def test_batches_are_compared_in_every_loader_stage_and_run(world, which) -> None:
    trainer = {"val_check_interval": 2}  # by then two batches have been compared, which is enough of one loader
    run = Run(size=2, module=Evaluated, trainer=trainer, model={"positions": "rotary"})
    for message in world.run(2, run_stages, run, which, timeout=60):
        assert "were given different batches" in message


class Draws(SGDTransformer):
    """Draws a number from each generator when a training starts."""

    def on_train_start(self) -> None:
        self.drawn = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002


def draw(rank: int, run: Run) -> Any:
    module, trainer = make_module(run), make_trainer(rank, run)
    loader = make_loader(trainer, make_samples(8), 2)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    trainer.fit(module, loader)
    return module.drawn


def test_a_sequence_group_draws_the_same_random_numbers(world) -> None:
    # or DropPath and augmentation would treat the segments of one sample differently
    first, second, third, fourth = world.run(4, draw, Run(size=2, module=Draws, steps=1))
    assert first == second
    assert third == fourth
    assert all(one != other for one, other in zip(first, third))
