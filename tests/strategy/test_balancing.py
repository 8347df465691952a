"""Each batch has its own layout: the training is that of one device, and nothing of it stays after a run."""

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss import (
    AttentionMask,
    InexactError,
    ShardedModule,
    sequence_shard,
)
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from tests.training import (
    LENGTH,
    VOCAB,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    whole_state,
)

ROTARY = {"positions": "rotary"}
STALE = "This SequenceShard is of an earlier batch"
UNEVEN = AttentionMask.documents((torch.arange(LENGTH) - LENGTH // 2).clamp(min=0)[None]) & AttentionMask.causal()
"""One long document, and many of a token."""


def documents(tokens: Tensor) -> AttentionMask:
    """A document starts at every token 0 and 1."""
    return AttentionMask.documents((tokens < 2).cumsum(1)) & AttentionMask.causal()


class Packed(SGDTransformer):
    """Its batches have packed documents."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[str, SequenceShard]] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "mask": documents(batch["inputs"])}

    def _loss(self, batch: Any) -> Any:
        assert isinstance(batch["mask"], AttentionMask)
        self.seen.append((self.trainer.state.stage.value, sequence_shard(self)))
        return super()._loss(batch)


def run_of(size: int, layout: str, module: Any = Packed, **more: Any) -> Run:
    trainer = {"precision": "64-true", **more.pop("trainer", {})}
    return Run(size, layout, more.pop("model", ROTARY), trainer, module=module, **more)


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


# -- auto --------------------------------------------------------------------------------------------------------------


class Sometimes(Packed):
    """The mask of the fourth batch, unlike those before it, has one long document and many of a token."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        odd = int(batch["inputs"].sum()) % 2 == 1
        return {**batch, "mask": AttentionMask.causal() if odd else UNEVEN}


def layouts_seen(rank: int, run: Run) -> tuple[list[str], dict[str, Tensor]]:
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), 4))
    return [shard.layout for _, shard in module.seen], {x: y.clone() for x, y in module.state_dict().items()}


def test_auto_balances_only_what_zigzag_leaves_uneven(world) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag", Sometimes, steps=5))[0]
    strategy = {"verify": False}
    seen, weights = world.run(2, layouts_seen, run_of(2, "auto", Sometimes, steps=5, strategy=strategy))[0]
    batches = torch.stack([x["inputs"] for x in make_samples(20)]).view(5, 4, LENGTH)
    assert seen == ["zigzag" if int(x.sum()) % 2 == 1 else "balanced" for x in batches]
    assert seen.index("balanced") == 3
    assert_equal(weights, expected, 1e-10)


def test_auto_leaves_learned_tables_their_rows(world) -> None:
    run = run_of(2, "auto", Sometimes, steps=5, model={"positions": "learned"}, strategy={"verify": False})
    assert set(world.run(2, layouts_seen, run)[0][0]) == {"zigzag"}


class KeepsShard(Sometimes):
    """Weighs tokens by their positions under the shard that it was given at the start."""

    def on_train_start(self) -> None:
        self.kept = sequence_shard(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = torch.cos(self.kept.positions(batch["inputs"].size(1)))
        return super().training_step(batch, batch_idx) + (self(batch["inputs"]).sum(-1) * weights).mean()


def message_of_fit(rank: int, run: Run) -> str:
    try:
        fit(rank, run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_a_module_that_keeps_a_shard_is_found_on_the_first_batch_of_another_layout(world) -> None:
    unproved = {"strategy": {"verify": False}}
    assert (
        world.run(2, message_of_fit, run_of(2, "auto", KeepsShard, steps=3, **unproved)) == ["nothing was raised"] * 2
    )
    for message in world.run(2, message_of_fit, run_of(2, "auto", KeepsShard, steps=5, **unproved)):
        assert STALE in message, message
    expected = world.run(1, fit, run_of(1, "zigzag", KeepsShard, steps=5))[0]
    assert_equal_on_ranks(world.run(2, fit, run_of(2, "auto", KeepsShard, steps=5)), expected, 1e-10)


class KeepsFirst(Packed):
    """Keeps the shard of its first batch, under which the proof finds nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = getattr(self, "kept", None) or sequence_shard(self)
        weights = torch.cos(self.kept.positions(batch["inputs"].size(1)))
        return super().training_step(batch, batch_idx) + (self(batch["inputs"]).sum(-1) * weights).mean()


class KeepsPositions(Packed):
    """Keeps the positions of its first batch by their number."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        tokens = batch["inputs"].clone()
        # neither targets nor tokens look as if some did not count, or a second batch would be proved for that
        tokens[:, 1], tokens[:, -2] = (tokens[:, 0] + 1) % VOCAB, (tokens[:, -1] + 1) % VOCAB
        return super().on_before_batch_transfer({"inputs": tokens, "targets": tokens}, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = getattr(self, "kept", {})
        length = batch["inputs"].size(1)
        if length not in self.kept:
            self.kept[length] = torch.cos(sequence_shard(self).positions(length))
        logits = self(batch["inputs"], mask=batch["mask"])
        return super().training_step(batch, batch_idx) + (logits.sum(-1) * self.kept[length]).mean()


class Merges(Sometimes):
    """Merges pairs of neighbours, as zigzag can and a balanced chunk of one position cannot."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["inputs"], mask=batch["mask"])
        return super().training_step(batch, batch_idx) + logits.unflatten(1, (-1, 2)).mean(2).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        whole = sequence_shard(self).gather(batch["inputs"])
        assert torch.equal(whole, torch.stack([x["inputs"] for x in make_samples(20)]).view(5, 4, LENGTH)[batch_idx])


def warned(rank: int, run: Run) -> tuple[dict[str, Tensor], list[str], str]:
    """Train; return the weights, what was warned of layouts, and the layout at the end."""
    module, trainer = make_module(run), make_trainer(rank, run)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader(trainer, make_samples(run.samples), 4 * run.size // dist.get_world_size()))
    texts = [str(x.message) for x in found if "stays with zigzag" in str(x.message)]
    return dict(trainer.strategy.lightning_module_state_dict()), texts, module.seen[-1][1].layout


def test_auto_stays_with_zigzag_where_only_that_is_exact(world) -> None:
    expected = world.run(1, fit, run_of(1, "zigzag", Merges, steps=5))[0]
    results = world.run(2, warned, run_of(2, "auto", Merges, steps=5))
    for weights, _, layout in results:
        assert layout == "zigzag"
        assert_equal(weights, expected, 1e-10)
    (text,), others = (texts for _, texts, _ in results)
    assert re.search("is not this segment's part.*Write LSSStrategy\\(layout='zigzag'\\)", text)
    assert not others
    for message in world.run(2, message_of_fit, run_of(2, "balanced", Merges, steps=5)):
        assert "LSSStrategy(layout='zigzag') may train it exactly" in message


class MergesAlone(Merges):
    """Half of each batch, for one of two replicas, has the uneven mask, where it has one."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        uneven = int(batch["inputs"].sum()) % 4 == 0
        return {**batch, "mask": UNEVEN if uneven else AttentionMask.causal()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("strategy", [{}, {"sharding": "fsdp"}])
def test_a_replica_may_stay_with_zigzag_alone(world, strategy) -> None:
    run = run_of(2, "auto", MergesAlone, steps=5, strategy=strategy)
    expected = world.run(2, warned, dataclasses.replace(run, strategy={}, layout="zigzag", size=1))[0][0]
    results = world.run(4, warned, run)
    assert any(texts for _, texts, _ in results)
    assert {layout for *_, layout in results} == {"zigzag"}
    assert_equal(results[0][0], expected, 1e-10)


class RefusedAnyway(Merges):
    """Its fourth batch, the first balanced one, needs neighbours that are on other ranks under every layout."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["inputs"], mask=batch["mask"])
        wrong = logits.roll(1, 1) if batch_idx == 3 else logits
        return super().training_step(batch, batch_idx) + (wrong * logits).mean()


def test_auto_refuses_what_zigzag_does_not_train_either(world) -> None:
    for message in world.run(2, message_of_fit, run_of(2, "auto", RefusedAnyway, steps=5)):
        assert message.startswith(InexactError.__name__)
        assert "layout='zigzag'" not in message


class EvenInTraining(Packed):
    """Its batches are uneven in evaluation, and in training from the third on."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        even = self.trainer.training and self.trainer.global_step < 2
        return {**batch, "mask": AttentionMask.causal() if even else UNEVEN}


def stages_of_auto(rank: int, run: Run) -> list[list[tuple[str, str]]]:
    module, trainer = make_module(run), make_trainer(rank, run, val_check_interval=1, limit_val_batches=1)
    loader, found = make_loader(trainer, make_samples(20), 4), []
    for fit_or_test in (
        lambda: trainer.fit(module, loader, loader),
        lambda: trainer.test(module, loader, verbose=False),
    ):
        module.seen.clear()
        fit_or_test()
        found.append(list(dict.fromkeys((stage, shard.layout) for stage, shard in module.seen)))
    return found


def test_auto_evaluates_only_under_layouts_that_training_has_proved(world) -> None:
    zigzag = [("sanity_check", "zigzag"), ("train", "zigzag"), ("validate", "zigzag")]
    proved = [*zigzag, ("train", "balanced"), ("validate", "balanced")]
    run = run_of(2, "auto", EvenInTraining, steps=4)
    assert world.run(2, stages_of_auto, run)[0] == [proved, [("test", "zigzag")]]
    run = run_of(2, "auto", EvenInTraining, steps=2, strategy={"verify": False})
    chosen = [("sanity_check", "balanced"), ("train", "zigzag"), ("validate", "balanced")]
    assert world.run(2, stages_of_auto, run)[0] == [chosen, [("test", "balanced")]]


def fit_long(rank: int, run: Run) -> dict[str, Tensor]:
    module, trainer = make_module(run), make_trainer(rank, run)
    samples = make_samples(12, run.model["seq_len"])
    trainer.fit(module, make_loader(trainer, samples, 4))
    return whole_state(module)


def message_of_long_fit(rank: int, run: Run) -> str:
    try:
        fit_long(rank, run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class GathersAtEnd(Sometimes):
    """Gathers what its validation steps found at the end of the epoch; ``kind`` 0 has only even masks, 1 only the uneven one,
    2 both."""

    kind = 2

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.kind == 2:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        return {**batch, "mask": UNEVEN if self.kind else AttentionMask.causal()}

    def on_validation_epoch_start(self) -> None:
        self.found: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch)
        self.found.append(batch["inputs"])

    def on_validation_epoch_end(self) -> None:
        self.gathered = sequence_shard(self).gather(torch.cat(self.found))


def validate(rank: int, run: Run, kind: int) -> str | tuple[Tensor, set[str]]:
    module, trainer = make_module(run), make_trainer(rank, run, limit_val_batches=5)
    module.kind = kind
    try:
        trainer.validate(module, make_loader(trainer, make_samples(20), 4), verbose=False)
    except RuntimeError as error:
        return str(error)
    return module.gathered, {shard.layout for _, shard in module.seen}


def test_a_shard_that_is_kept_for_other_batches_is_refused(world) -> None:
    for message in world.run(2, message_of_fit, run_of(2, "balanced", KeepsFirst, steps=4)):
        assert STALE in message, message


@pytest.mark.parametrize("length", [LENGTH, 8 * LENGTH])  # the second is shortened for the proof
def test_positions_that_are_kept_for_other_batches_are_found_by_the_first_proof(world, length) -> None:
    model = {**ROTARY, "seq_len": length}
    for message in world.run(2, message_of_long_fit, run_of(2, "balanced", KeepsPositions, steps=1, model=model)):
        assert message.startswith(InexactError.__name__), message
    expected = world.run(1, fit_long, run_of(1, "zigzag", KeepsPositions, model=model))[0]
    by_rank = world.run(2, fit_long, run_of(2, "auto", KeepsPositions, model=model))
    assert_equal_on_ranks(by_rank, expected, 1e-10)


def test_after_batches_of_several_layouts_nothing_is_gathered(world) -> None:
    tokens = torch.stack([x["inputs"] for x in make_samples(20)])
    run = run_of(2, "auto", GathersAtEnd, strategy={"verify": False})
    for kind, layout in enumerate(("zigzag", "balanced")):
        for gathered, layouts in world.run(2, validate, run, kind):
            assert torch.equal(gathered, tokens)
            assert layouts == {layout}
    for message in world.run(2, validate, run, 2):
        assert STALE in message


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


# -- the choice --------------------------------------------------------------------------------------------------------
