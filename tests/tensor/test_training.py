"""Modules that are written for one device train the same on several, with no line changed."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lss.sequence.batch import map_tensors
from lightning_lss.testing.compare import assert_equal_on_ranks
from lightning_lss.testing.world import World
from tests.tensor import models
from tests.training import as_it_is_trainer, whole_state


def make(name: str) -> pl.LightningModule:
    torch.manual_seed(5)
    return getattr(models, name)().double()


def train_alone(name: str, length: int, steps: int = 3) -> dict[str, Tensor]:
    """The weights after training on one device, without a Trainer."""
    module = make(name)
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(models.make_batches(length, steps=steps)):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
    return {key: x.detach() for key, x in module.state_dict().items()}


def train(rank: int, name: str, length: int, size: int, layout: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after training on all ranks of this world."""
    warnings.simplefilter("ignore")
    replicas = dist.get_world_size() // size
    trainer = as_it_is_trainer(rank, size, layout, **options)
    own = slice(rank // size, None, replicas)
    batches = [map_tensors(batch, lambda path, x: x[own]) for batch in models.make_batches(length)]
    module = make(name)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    report = trainer.strategy.verification  # type: ignore[attr-defined]
    assert report is not None
    assert report.exact
    return whole_state(module)


# pairwise: a module, a length that splits or not, (W, S), layout, and how parameters and activations are kept
CASES: list[tuple[str, int, int, int, str, dict[str, Any]]] = [
    ("CausalDecoder", 16, 2, 2, "zigzag", {}),
    ("CausalDecoder", 13, 4, 2, "contiguous", {"sharding": "fsdp"}),
    (
        "CausalDecoder",
        15,
        4,
        4,
        "zigzag",
        {"activation_checkpointing": "full", "checkpointed_modules": ["projections"]},
    ),
    ("Classifier", 16, 2, 2, "zigzag", {"activation_checkpointing": "full"}),
    ("Classifier", 15, 4, 2, "zigzag", {"sharding": "fsdp"}),
    ("Classifier", 14, 2, 2, "contiguous", {"activation_checkpointing": "selective"}),
    ("Classifier", 12, 2, 2, "zigzag", {"activation_checkpointing": "offload"}),
    ("Seq2Seq", 16, 4, 2, "zigzag", {}),
    ("Seq2Seq", 17, 2, 2, "contiguous", {"sharding": "fsdp"}),
    ("Seq2Seq", 15, 2, 2, "balanced", {}),
    ("Genome", 24, 2, 2, "zigzag", {}),
    ("Genome", 21, 3, 3, "contiguous", {"sharding": "fsdp"}),
    ("Experts", 16, 2, 2, "zigzag", {}),
    ("Experts", 19, 2, 2, "contiguous", {"sharding": "fsdp"}),
    ("Ragged", 16, 2, 2, "zigzag", {}),
    ("Ragged", 15, 3, 3, "contiguous", {"activation_checkpointing": "full"}),
    ("Habits", 16, 2, 2, "zigzag", {}),
    ("Habits", 13, 2, 2, "contiguous", {}),
]


@pytest.mark.parametrize(("name", "length", "ranks", "size", "layout", "options"), CASES)
def test_a_module_for_one_device(
    world: World, name: str, length: int, ranks: int, size: int, layout: str, options: dict[str, Any]
) -> None:
    trained = world.run(ranks, train, name, length, size, layout, options)
    assert_equal_on_ranks(trained, train_alone(name, length), 1e-10)
