"""Each batch has its own layout: the training is that of one device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lss import (
    ShardedModule,
)
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from tests.strategy.packed import (
    ROTARY,
    Packed,
    documents,
    message_of_fit,
    run_of,
)
from tests.training import (
    LENGTH,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
)

# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "size", "options"),
    [
        (2, 2, {"trainer": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}}),
        (4, 2, {}),
        (2, 2, {"module": SGDTransformer}),  # without masks
    ],
)
def test_training_is_that_of_one_device(world, ranks, size, options) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag", steps=4, **options))[0]
    by_rank = world.run(ranks, fit, run_of(size, "balanced", steps=4, **options))
    assert_equal_on_ranks(by_rank, expected, 1e-10)


def fit_sharded(rank: int, run: Run) -> dict[str, Tensor]:
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), run.global_batch))
    return dict(trainer.strategy.lightning_module_state_dict())


def test_parameters_may_be_sharded_and_activations_recomputed(world) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag"))[0]
    strategy = {"sharding": "fsdp", "activation_checkpointing": "full"}
    assert_equal(world.run(4, fit_sharded, run_of(4, "balanced", strategy=strategy))[0], expected, 1e-10)


def stages(rank: int, run: Run) -> dict[str, Tensor]:
    """Train with validation in between, test and predict; everything that comes out, and check the shards."""
    module, trainer = make_module(run), make_trainer(rank, run, val_check_interval=1, limit_val_batches=2)
    loader = make_loader(trainer, make_samples(run.samples), 4)
    found = {}
    for name, run_stage in (("fit", trainer.fit), ("test", trainer.test)):
        run_stage(module, loader, loader) if name == "fit" else run_stage(module, loader, verbose=False)
        found |= {f"{name} {key}": value for key, value in trainer.callback_metrics.items()}
        assert {part.shard for part in segment_modules(module)} == {WHOLE_SEQUENCE}
        if run.size > 1:
            assert trainer.strategy.sequence_shard.assignment is None
    found["predictions"] = torch.cat(trainer.predict(module, loader)).double()
    if run.size > 1:
        stages_seen = {stage for stage, shard in module.seen if shard.assignment is not None}
        assert stages_seen == {"train", "validate", "sanity_check", "test"}
        assert len({shard.assignment for _, shard in module.seen} - {None}) > 3  # they differ from batch to batch
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_stage_is_that_of_one_device(world, ranks) -> None:
    expected = world.run(1, stages, run_of(1, "zigzag", steps=3, samples=16))[0]
    for found in world.run(ranks, stages, run_of(ranks, "balanced", steps=3, samples=16)):
        assert_equal(found, expected, 1e-6)  # torchmetrics adds up in float32
        name = "predictions"
        assert_equal({name: found[name]}, {name: expected[name]}, 1e-10)


@pytest.mark.parametrize("layout", ["balanced", "auto"])
def test_documents_are_apart_as_on_one_device(world, layout) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag", steps=5))[0]
    causal = world.run(1, fit, run_of(1, "zigzag", SGDTransformer, steps=5))[0]
    assert worst_difference(causal, expected).error > 1e-3
    for ranks in (2, 4):
        assert_equal_on_ranks(world.run(ranks, fit, run_of(ranks, layout, steps=5)), expected, 1e-10)


# -- refused -----------------------------------------------------------------------------------------------------------


class OwnTable(ShardedModule):
    segment_local = ("rows",)

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(4))


class WithTable(SGDTransformer):
    def configure_model(self) -> None:
        self.table = OwnTable()


class WrongLength(Packed):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "mask": documents(batch["inputs"][:, 2:])}


class SplitsItself(SGDTransformer):
    def shard_batch(self, batch: Any, shard: SequenceShard) -> Any:
        return {name: shard.split(x) for name, x in batch.items()}


@pytest.mark.parametrize(
    ("module", "model", "words"),
    [
        (SGDTransformer, {}, "model.positions.weight stands for the same ones in all. Use RotaryEmbedding"),
        (WithTable, ROTARY, "table.rows stands for the same ones in all"),
        (WrongLength, ROTARY, f"for sequences of length {LENGTH - 2}, and the batch has sequences of length {LENGTH}"),
        (WrongLength, ROTARY, "such as a pooled one, use layout='zigzag'"),
        (SplitsItself, ROTARY, "Put the AttentionMask of the batch into it"),
    ],
)
def test_what_cannot_be_balanced_is_refused_with_the_remedy(world, module, model, words) -> None:
    for message in world.run(2, message_of_fit, run_of(2, "balanced", module, model=model)):
        assert words in message


class SplitsMasked(Packed):
    def shard_batch(self, batch: Any, shard: SequenceShard) -> Any:
        return {name: x if name == "mask" else shard.split(x) for name, x in batch.items()}


def test_a_module_that_splits_its_own_batches_is_balanced_by_their_masks(world) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag"))[0]
    assert_equal_on_ranks(world.run(2, fit, run_of(2, "balanced", SplitsMasked)), expected, 1e-10)
