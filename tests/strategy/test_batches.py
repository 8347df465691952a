"""Batches that differ within a sequence group are found in every loader, every stage and every run; what looks wrong but
may be meant is warned of."""

import random
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_lss.strategy.validation import warn_of_images
from tests.training import LENGTH, Run, SGDTransformer, make_loader, make_module, make_samples, make_trainer


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


class Drifts(SGDTransformer):
    """One rank draws a random number that the others do not, at the end of every epoch."""

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 1:
            torch.rand(1)


def fit_drifting(rank: int, run: Run) -> tuple[str, int]:
    module, trainer = make_module(run), make_trainer(rank, run, use_distributed_sampler=True)
    try:
        trainer.fit(module, DataLoader(make_samples(16), 2, shuffle=True))
    except ValueError as error:
        return str(error), trainer.global_step
    return "nothing was raised", trainer.global_step


def test_batches_are_compared_in_every_epoch(world) -> None:
    # A loader shuffles by the default generator, which a rank may move on alone: the first epoch is then as it should be.
    run = Run(size=2, module=Drifts, steps=-1, trainer={"max_epochs": 2})
    for message, steps in world.run(2, fit_drifting, run, timeout=60):
        assert "were given different batches" in message
        assert steps == 8  # of the first epoch


class Stream(IterableDataset):
    """Samples of a stream, all of them or this replica's."""

    def __init__(self, first: int, step: int) -> None:
        self.samples = make_samples(16)[first::step]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.samples)


def warnings_of_fit(rank: int, run: Run, splits: bool) -> list[str]:
    module, trainer = make_module(run), make_trainer(rank, run, use_distributed_sampler=True)
    strategy = trainer.strategy
    stream = Stream(strategy.data_rank, strategy.data_parallel_size) if splits else Stream(0, 1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(stream, 2))
    return [str(x.message) for x in found if "data replicas were given the same batch" in str(x.message)]


@pytest.mark.parametrize(("ranks", "size", "megatron"), [(2, 1, False), (4, 2, False), (4, 2, True)])
def test_data_replicas_with_one_batch_are_warned_of_once(world, ranks, size, megatron) -> None:
    run = Run(size, steps=3, strategy={"megatron": True} if megatron else {})
    assert world.run(ranks, warnings_of_fit, run, True)[0] == []
    (message,) = world.run(ranks, warnings_of_fit, run, False)[0]
    for word in ("All 2 data replicas", "data_parallel_size", "data_rank", "get_worker_info"):
        assert word in message


def test_one_data_replica_is_not_compared_with_itself(world) -> None:
    assert world.run(2, warnings_of_fit, Run(2, steps=1), False)[0] == []


IMAGES = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("batch", "dims", "words"),
    [
        ({"more": {"pixels": IMAGES}}, None, [r"more.pixels (2, 4, 8, 8)", "dimension 1", "channels", "{'pixels': "]),
        ((IMAGES, torch.zeros(2)), {}, ["0 (2, 4, 8, 8)", "{0: "]),
        (IMAGES, None, ["batch (2, 4, 8, 8)", "shard_batch"]),
        ({"pixels": IMAGES}, {"pixels": 2}, None),
        ({"pixels": IMAGES}, {"pixels": None}, None),
        ({"tokens": IMAGES.long(), "audio": IMAGES[0]}, None, None),
    ],
)
def test_tensors_that_look_like_images_are_warned_of(batch, dims, words) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_images(batch, dims)
    assert len(found) == (words is not None)
    assert all(word in str(found[0].message) for word in words or ())


class OfImages(SGDTransformer):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert batch["pixels"].view(-1).numel() == batch["pixels"].numel()
        return super().training_step(batch, batch_idx)


def image_warnings(rank: int, run: Run) -> list[str]:
    samples = [{**sample, "pixels": torch.zeros(LENGTH, 2, 2)} for sample in make_samples(8)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer = make_trainer(rank, run)
        trainer.fit(make_module(run), make_loader(trainer, samples, 2))
    return [str(x.message) for x in found if "taken for the sequence" in str(x.message)]


def test_images_are_warned_of_once_a_loader(world) -> None:
    run = Run(2, layout="contiguous", module=OfImages, steps=3)
    assert world.run(2, image_warnings, run)[0] == []  # the proof has shown that it is the sequence
    unproved = Run(2, layout="contiguous", module=OfImages, steps=3, strategy={"verify": False})
    assert len(world.run(2, image_warnings, unproved)[0]) == 1


class SumsImages(pl.LightningModule):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["pixels"].sum()


def images_in_prediction(rank: int, run: Run) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer(rank, run).predict(SumsImages(), DataLoader([{"pixels": IMAGES[0]}]))
    return [str(x.message) for x in found if "taken for the sequence" in str(x.message)]


@pytest.mark.parametrize(("view", "count"), [("segment", 1), ("whole", 0)])
def test_images_that_are_shown_whole_are_not_warned_of(world, view, count) -> None:
    run = Run(2, layout="contiguous", strategy={"view": view})
    assert len(world.run(2, images_in_prediction, run)[0]) == count
