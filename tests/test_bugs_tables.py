"""Bugs of positional tables that tell their story; see also test_bugs.py."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_lss import SegmentPositionalEmbedding
from lightning_lss.nn.positions import InitialRows
from lightning_lss.testing.compare import assert_equal_on_ranks
from tests.training import (
    LENGTH,
    TABLE,
    Run,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
)


class TableInspector(pl.Callback):
    """Looks at the table in ``setup``, where weight averaging copies the module."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.rows = pl_module.model.positions.weight.size(0)
        self.shard = pl_module.model.blocks[0].attention.attention.shard


def rows_built(rank: int, run: Run) -> tuple[list[int], int, int]:
    built: list[int] = []
    original = InitialRows.draw

    def draw(self: InitialRows) -> Tensor:
        table = original(self)
        built.append(table.size(0))
        return table

    InitialRows.draw = draw  # type: ignore[method-assign]
    try:
        inspector = TableInspector()
        trainer = make_trainer(rank, run, callbacks=[inspector])
        trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    finally:
        InitialRows.draw = original  # type: ignore[method-assign]
    return built, inspector.rows, inspector.shard.size


def test_tables_are_built_once_with_own_rows_before_callbacks_see_them(world) -> None:
    # Trap 15. Weight averaging copies the module in ``setup``. A copy that is made before the module knows its segment
    # builds the whole table, on every rank, and averages rows of other positions.
    assert world.run(4, rows_built, Run(size=4)) == [([LENGTH // 4], LENGTH // 4, 4)] * 4


def fit_with_ema(rank: int, run: Run) -> dict[str, Tensor]:
    trainer = make_trainer(rank, run, callbacks=[EMAWeightAveraging(decay=0.5)])
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), run.global_batch))
    return trainer.strategy.lightning_module_state_dict()


def test_weight_averaging_averages_own_rows(world) -> None:
    reference = world.run(1, fit_with_ema, Run(steps=4))[0]
    assert_equal_on_ranks(world.run(2, fit_with_ema, Run(size=2, steps=4)), reference, 1e-5)


def load_on_rank_zero(rank: int, run: Run, table: Tensor) -> dict[str, Tensor]:
    module, trainer = make_module(run), make_trainer(rank, run)
    if rank == 0:
        module.model.positions.load_state_dict({"weight": table})
    elif rank == 1:
        module.model.positions.load_state_dict({"weight": -table})
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), 4))
    return trainer.strategy.lightning_module_state_dict()


@pytest.mark.parametrize("length", [LENGTH, 3 * 4096 + 64])  # tables are sent 4,096 rows at a time
def test_rows_start_from_those_of_rank_zero(world, length) -> None:
    # as DDP starts from rank 0's weights, whatever the other ranks made of theirs
    table = torch.randn(length, 16)
    for state in world.run(4, load_on_rank_zero, Run(size=4, steps=0, model={"seq_len": length}), table):
        assert torch.equal(state[TABLE], table)


def print_parameters_on_rank_zero(rank: int, run: Run) -> dict[str, Tensor]:
    # what every training script does; it builds the table on one rank only
    module, trainer = make_module(run), make_trainer(rank, run)
    if rank == 0:
        assert sum(p.numel() for p in module.parameters()) > 0
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), run.global_batch))
    return trainer.strategy.lightning_module_state_dict()


def test_looking_at_parameters_on_one_rank_changes_nothing(world) -> None:
    reference = world.run(1, fit, Run())[0]
    assert_equal_on_ranks(world.run(2, print_parameters_on_rank_zero, Run(size=2)), reference, 1e-5)


def fit_and_test_with_two_trainers(rank: int, run: Run) -> float:
    module = make_module(run)
    module.example_input_array = make_samples(1)[0]["inputs"][None]
    samples = make_samples(16)
    for _ in range(2):
        trainer = make_trainer(rank, run, enable_model_summary=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, make_loader(trainer, samples, 4))
        ignored = [x for x in caught if "`example_input_array` is ignored under LSSStrategy" in str(x.message)]
        assert len(ignored) == (run.size > 1 and rank == 0)
    assert module.example_input_array.shape == (1, LENGTH)
    other = make_trainer(rank, run)
    return other.test(module, make_loader(other, samples, 4), verbose=False)[0]["test/loss"]


def test_one_model_under_several_trainers(world) -> None:
    # the table has been cut by the first of them
    reference = world.run(1, fit_and_test_with_two_trainers, Run(steps=2))[0]
    for loss in world.run(2, fit_and_test_with_two_trainers, Run(size=2, steps=2)):
        assert loss == pytest.approx(reference, rel=1e-5)


def test_a_table_may_be_saved_whole_by_hand(tmp_path: Path) -> None:
    # without a strategy nothing is deferred that anyone could notice
    table = SegmentPositionalEmbedding(8, 4)
    torch.save(table.state_dict(), tmp_path / "table.pt")
    assert torch.load(tmp_path / "table.pt")["weight"].shape == (8, 4)
