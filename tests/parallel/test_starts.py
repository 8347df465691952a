"""How ranks start and skip together: unequal weights, overflows, buffers."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lss import SequenceShard, ShardedModule, sequence_shard
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from tests.modules import OwnModule
from tests.training import Run, SGDTransformer, make_loader, make_module, make_samples, make_trainer


class OwnTable(SGDTransformer, ShardedModule):
    """A segment-local parameter and buffer that every rank starts with other values."""

    segment_local = ("bias", "offset")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shard = SequenceShard()
        self.bias = nn.Parameter(torch.full((3,), 1.0 + dist.get_rank()))
        self.register_buffer("offset", torch.full((2,), 1.0 + dist.get_rank()))


def start(rank: int, run: Run) -> tuple[list[float], list[float]]:
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, make_samples(8), 2))
    return module.bias.tolist(), module.offset.tolist()


@pytest.mark.parametrize(
    ("sharding", "precision"), [(None, "32-true"), (None, "64-true"), ("fsdp", "32-true"), ("hybrid", "64-true")]
)
def test_replicas_of_a_segment_start_from_the_first_of_them(world, sharding, precision) -> None:
    # a "true" precision replaces buffers
    options = {"strategy": {"sharding": sharding}, "trainer": {"precision": precision}}
    run = Run(size=2, module=OwnTable, model={"positions": "rotary"}, steps=0, **options)
    firsts = [1.0, 2.0, 1.0, 2.0]  # ranks 0 and 2 hold the first segment, 1 and 3 the second
    assert world.run(4, start, run) == [([first] * 3, [first] * 2) for first in firsts]


class Overflowing(SGDTransformer):
    """With a fused optimizer. In step 1 the table's gradient overflows on the last rank only."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, fused=True)

    def on_after_backward(self) -> None:
        self.passes = getattr(self, "passes", 0) + 1
        shard = sequence_shard(self)
        if self.passes == 2 and shard.rank == shard.size - 1:
            self.model.positions.weight.grad[0, 0] = torch.inf


class OnlyScaled(MixedPrecision):
    """The scaler of mixed precision without its rounding, so that results can be compared exactly."""

    def forward_context(self) -> Any:
        return nullcontext()


def fit_with_scaler(rank: int, run: Run) -> tuple[dict[str, Tensor], list[float], int]:
    scaler = torch.amp.GradScaler("cpu", 1024.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=1)
    module = make_module(run)
    trainer = make_trainer(rank, run, plugins=OnlyScaled("16-mixed", "cpu", scaler), max_steps=-1, max_epochs=1)
    trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    scaler = trainer.precision_plugin.scaler
    options = [scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()]
    return trainer.strategy.lightning_module_state_dict(), [scaler.get_scale(), *options], module.passes


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_a_fused_optimizer_skips_an_overflow_on_all_ranks_and_takes_the_other_steps(world, sharding) -> None:
    scale = 1024.0 * 3 * 0.25 * 3 * 3  # four batches, the second of which overflows
    options = [scale, 3.0, 0.25, 1]
    run = Run(module=Overflowing)
    ((expected, expected_options, passes),) = world.run(1, fit_with_scaler, run)
    assert (expected_options, passes) == (options, 4)
    run = Run(size=2, module=Overflowing, strategy={"sharding": sharding})
    if sharding is not None:
        run.module = OverflowingApart
    ranks = world.run(2, fit_with_scaler, run)
    assert [(own, count) for _, own, count in ranks] == [(options, 4)] * 2
    assert_equal(ranks[0][0], expected, 1e-5)
    if sharding is None:  # else whole weights are rank 0's alone
        assert_equal_on_ranks([state for state, *_ in ranks], ranks[0][0], 0)


class OverflowingApart(Overflowing):
    """One optimizer for sharded parameters and one for the table, since a fused step takes DTensors or others."""

    def configure_optimizers(self) -> Any:
        table = self.model.positions.weight
        others = [x for x in self.parameters() if x is not table]
        return torch.optim.SGD([{"params": others}, {"params": [table]}], lr=0.5, momentum=0.9, foreach=False)


class Normed(OwnModule):
    """With buffers, and a validation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(11)
        self.out.register_forward_hook(lambda module, args, output: self.norm(output.transpose(1, 2)).transpose(1, 2))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.out(self.embedding(batch["inputs"]))  # nothing that replicas do together


def validate_unequally(rank: int, run: Run) -> bool:
    """The second data replica has one batch more, and each goes on by itself."""
    module, trainer = make_module(run), make_trainer(rank, run, val_check_interval=1)
    data_rank = rank // run.size
    trainer.fit(module, make_loader(trainer, make_samples(8), 2), DataLoader(make_samples(2 + 2 * data_rank), 2))
    return trainer.global_step == run.steps


@pytest.mark.parametrize("sharding", [None, "hybrid"])
def test_replicas_may_validate_different_numbers_of_batches(world, sharding) -> None:
    run = Run(size=2, module=Normed, strategy={"sharding": sharding, "verify": False}, steps=2)
    assert world.run(4, validate_unequally, run, timeout=40) == [True] * 4
