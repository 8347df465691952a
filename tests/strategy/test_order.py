"""The order of samples is the loader's: one data replica sees what one device sees, several share it in that order."""

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, WeightedRandomSampler

from lightning_lss.sequence.segment import sequence_shard
from lightning_lss.testing.compare import assert_equal_on_ranks
from tests.training import LENGTH, Run, SGDTransformer, make_module, make_samples, make_trainer, whole_state

COUNT = 8


class Numbered(Dataset):
    """Samples that know their number; ``augmented``, they are rolled by a random shift."""

    def __init__(self, augmented: bool = False) -> None:
        self.samples, self.augmented = make_samples(COUNT), augmented

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {**self.samples[index], "number": torch.tensor(index)}
        if self.augmented:
            sample["inputs"] = sample["inputs"].roll(int(torch.randint(LENGTH, ())))
        return sample


class Backwards(Sampler):
    def __init__(self, dataset: Dataset) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT - 1, -1, -1))

    def __len__(self) -> int:
        return COUNT


class RandomPairs(Sampler):
    """A batch sampler that takes no sampler and draws its batches from torch's default generator."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[2 * i, 2 * i + 1] for i in torch.randperm(COUNT // 2).tolist()])

    def __len__(self) -> int:
        return COUNT // 2


def make_loader(kind: str, batch_size: int, augmented: bool = False, **options: Any) -> DataLoader:
    data = Numbered(augmented)
    if kind == "own batch sampler":
        return DataLoader(data, batch_sampler=RandomPairs(), **options)
    if kind == "backwards in batches":
        return DataLoader(data, batch_sampler=BatchSampler(Backwards(data), batch_size, False), **options)
    if kind == "backwards":
        return DataLoader(data, batch_size, sampler=Backwards(data), **options)
    if kind == "own sampler":
        return DataLoader(data, batch_size, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT), **options)
    return DataLoader(data, batch_size, shuffle=kind == "shuffled", **options)


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


class Sees(SGDTransformer):
    """Writes down which samples it was given, by stage."""

    def see(self, stage: str, batch: dict[str, Tensor]) -> None:
        assert batch["inputs"].size(1) * sequence_shard(self).size == LENGTH
        vars(self).setdefault("seen", {}).setdefault(stage, []).append(batch["number"].tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch.get("one", batch)
        self.see("fit", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.see("validate", batch)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.see("test", batch)
        super().test_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.see("predict", batch)


def default_trainer(rank: int, run: Run, **more: Any) -> pl.Trainer:
    """A trainer as users make it: Lightning may replace samplers."""
    return make_trainer(rank, run, use_distributed_sampler=True, num_sanity_val_steps=0, **more)


TWICE = {"max_epochs": 2, "precision": "64-true"}


def run_of(size: int, **more: Any) -> Run:
    return Run(size, module=Sees, steps=-1, **{"trainer": TWICE, **more})


def fit_twice(
    rank: int, run: Run, kind: str, batch_size: int, seeds: list[int], loader: dict[str, Any]
) -> tuple[Any, Any]:
    """Train for two epochs; return what was seen and the weights."""
    try:
        module, trainer = make_module(run), default_trainer(rank, run)
        pl.seed_everything(seeds[rank], workers=True, verbose=False)
        trainer.fit(module, make_loader(kind, batch_size, **loader))
        assert trainer._accelerator_connector.use_distributed_sampler  # as before the run
        return module.seen["fit"], whole_state(module)
    finally:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["in order", "shuffled", "own sampler", "own batch sampler"])
def test_one_data_replica_sees_what_one_device_sees(world, kind, workers) -> None:
    loader: dict[str, Any] = {"augmented": True}
    if workers:
        loader |= {"num_workers": workers, "multiprocessing_context": "fork"}  # a rank's own way to start takes seconds
    seen, weights = world.run(1, fit_twice, run_of(1), kind, 2, [3], loader)[0]
    assert len(seen) == 2 * COUNT // 2
    results = world.run(2, fit_twice, run_of(2), kind, 2, [3, 3], loader)
    assert [own for own, _ in results] == [seen, seen]
    assert_equal_on_ranks([own for _, own in results], weights, 1e-10)


@pytest.mark.parametrize("strategy", [{}, {"megatron": True}], ids=["lss", "megatron"])
def test_ranks_with_other_seeds_shuffle_as_the_first(world, strategy) -> None:
    run = run_of(2, strategy=strategy, trainer={"max_epochs": 2})
    first, second = world.run(2, fit_twice, run, "shuffled", 2, [3, 4], {})
    assert first[0] == second[0]
    assert first[0][:4] != first[0][4:]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["in order", "backwards", "backwards in batches"])
def test_data_replicas_share_the_samples_in_order(world, kind, size) -> None:
    _, weights = world.run(1, fit_twice, run_of(1), kind, 4, [3], {})[0]
    ranks = 2 * size
    results = world.run(ranks, fit_twice, run_of(size), kind, 2, [3] * ranks, {})
    order = list(range(COUNT)) if kind == "in order" else list(range(COUNT - 1, -1, -1))
    for rank, (seen, _) in enumerate(results):
        own = order[rank // size :: 2]
        assert seen == 2 * [own[:2], own[2:]]
    assert_equal_on_ranks([own for _, own in results], weights, 1e-10)


@pytest.mark.parametrize("size", [1, 2])
def test_data_replicas_share_shuffled_samples_in_another_order_each_epoch(world, size) -> None:
    ranks = 2 * size
    results = world.run(ranks, fit_twice, run_of(size), "shuffled", 2, [3] * ranks, {})
    first, second = results[0][0], results[size][0]
    epochs = [first[:2] + second[:2], first[2:] + second[2:]]
    assert epochs[0] != epochs[1]  # set_epoch reaches the sampler
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(COUNT))
        assert flat(epoch) != list(range(COUNT))


def see_all_stages(rank: int, run: Run) -> dict[str, Any]:
    module = make_module(run)
    combined, plain = CombinedLoader({"one": make_loader("in order", 2)}), make_loader("in order", 2)
    default_trainer(rank, run).fit(module, combined, plain)
    module.seen["fit with validation"] = module.seen.pop("validate")
    trainer = default_trainer(rank, run)
    for stage in ("validate", "test"):
        getattr(trainer, stage)(module, plain, verbose=False)
    trainer.predict(module, plain)
    seen = {stage: flat(batches) for stage, batches in module.seen.items()}
    module.seen = {}
    default_trainer(rank, run, overfit_batches=1, limit_val_batches=0).fit(module, make_loader("shuffled", 2))
    return {**seen, "overfit": flat(module.seen["fit"])}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_stage_goes_through_its_loader_in_order(world, ranks) -> None:
    run = Run(2, module=Sees, steps=-1, trainer={"max_epochs": 1}, model={"positions": "rotary"})
    for rank, seen in enumerate(world.run(ranks, see_all_stages, run)):
        own = list(range(COUNT))[rank // 2 :: ranks // 2]
        assert seen.pop("overfit") == own[:2]
        assert seen == dict.fromkeys(("fit", "fit with validation", "validate", "test", "predict"), own)
