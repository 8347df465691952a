"""``layout="auto"``: which batches are balanced, what is refused, and nothing of a layout stays after its batches."""

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss import (
    AttentionMask,
    InexactError,
    sequence_shard,
)
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from tests.strategy.packed import (
    ROTARY,
    STALE,
    UNEVEN,
    Packed,
    Sometimes,
    message_of_fit,
    run_of,
)
from tests.training import (
    LENGTH,
    VOCAB,
    Run,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    whole_state,
)


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
