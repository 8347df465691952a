"""What users do to a model is refused before the first step, and the cause is named; what is right is not refused."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lss import InexactError, sequence_shard
from lightning_lss.nn.loss import IGNORED
from lightning_lss.strategy.verification import suspects, warn_of_unverified
from lightning_lss.testing.world import WorkerError
from tests.proof.faulty import (
    FAULTS,
    LENGTH,
    REMEDIES,
    Convolution,
    LocalTable,
    MaskedMean,
    MaskedTargets,
    MergesPairs,
    OtherAttention,
    OwnPositions,
    PaddedMean,
    PlainMean,
    Recurrence,
    Right,
    WrongBeyondTheProof,
    WrongByLittle,
    WrongLater,
    make_batch,
)
from tests.proof.verdict import verdict
from tests.training import Run, make_trainer


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("module", FAULTS)
def test_a_fault_is_named_on_every_rank(world, module, layout) -> None:
    found = world.run(2, verdict, module, Run(size=2, layout=layout, steps=1))
    assert found[0] == found[1]
    first = found[0].partition("First: ")[2].partition("Also: ")[0]
    what, _, write = first.partition("Write: ")
    assert FAULTS[module] in what, found[0]
    assert REMEDIES[module] in write, found[0]


class Two(OwnPositions, OtherAttention):
    """Own positions and another attention."""


def test_two_faults_are_both_named(world) -> None:
    found = world.run(2, verdict, Two, Run(size=2, steps=1))[0]
    assert FAULTS[OwnPositions] in found.partition("Also: ")[0]
    assert FAULTS[OtherAttention] in found.partition("Also: ")[2]


@pytest.mark.parametrize("trainer", [{}, {"precision": "bf16-mixed"}, {"precision": "64-true"}], ids=str)
def test_a_right_module_passes(world, trainer) -> None:
    assert world.run(2, verdict, Right, Run(size=2, steps=1, trainer=trainer)) == ["", ""]


@pytest.mark.parametrize("strategy", [{"sharding": "fsdp"}, {"sharding": "hybrid"}, {}], ids=str)
def test_faults_are_found_with_replicas_and_sharded_parameters(world, strategy) -> None:
    run = Run(size=2, steps=1, strategy=strategy)
    for module in (OwnPositions, PlainMean):
        found = world.run(4, verdict, module, run)
        assert FAULTS[module] in found[0], found[0]
        assert len(set(found)) == 1
    assert world.run(4, verdict, Right, run) == [""] * 4


def test_a_long_batch_is_shortened(world) -> None:
    found = world.run(2, verdict, OtherAttention, Run(size=2, steps=1), 4096)[0]
    assert "shortened to 512 of 4096 positions" in found


@pytest.mark.parametrize(("length", "is_right"), [(516, False), (4 * 1031, False), (512, True), (4 * 1032, True)])
def test_a_short_chunk_divides_as_a_long_one(world, length, is_right) -> None:
    """Chunks of 129 positions cut pairs in two: a proof with chunks of 64 does not see it."""
    found = world.run(2, verdict, MergesPairs, Run(size=2, layout="zigzag", steps=1), length)
    assert found[0] == found[1]
    assert found[0].startswith("This run would not be") != is_right, found[0]
    assert is_right or "unflatten" in found[0]


UNEVEN = {
    PlainMean: lambda batch: batch["targets"][0, :5].fill_(IGNORED),
    MaskedMean: lambda batch: batch["mask"][1, 12:].zero_(),
    MaskedTargets: lambda batch: batch["mask"][1, 13:].zero_(),
    PaddedMean: lambda batch: batch["inputs"][0, 10:].zero_(),
}


def fit_until_uneven(rank: int, module: type[pl.LightningModule], run: Run) -> tuple[int, str]:
    warnings.filterwarnings("ignore")
    batches = [make_batch() for _ in range(3)]
    for batch in batches:
        batch["inputs"] = batch["inputs"].clamp(min=1)
        batch["targets"] = batch["inputs"].roll(-1, 1)
    UNEVEN[module](batches[2])
    model, trainer = module(), make_trainer(rank, run)
    try:
        trainer.fit(model, DataLoader(batches, batch_size=None, shuffle=False))
    except InexactError as error:
        return trainer.global_step, str(error)
    return trainer.global_step, ""


@pytest.mark.parametrize("module", UNEVEN)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_mean_is_refused_at_the_first_batch_whose_segments_count_different_numbers(world, module, layout) -> None:
    for steps, message in world.run(2, fit_until_uneven, module, Run(size=2, layout=layout, steps=3)):
        assert steps == 2
        assert FAULTS[PlainMean] in message or "Pooling over the tokens" in message, message


def fit_replicas(rank: int, run: Run) -> str:
    """The second data replica alone has a batch whose segments are uneven, at the first step or the second."""
    warnings.filterwarnings("ignore")
    at = 0 if run.strategy.pop("at_once") else 1
    batches = [make_batch() for _ in range(2)]
    for batch in batches:
        batch["targets"] = batch["inputs"].roll(-1, 1)
    if rank >= 2:
        UNEVEN[PlainMean](batches[at])
    model, trainer = PlainMean(), make_trainer(rank, run)
    try:
        trainer.fit(model, DataLoader(batches, batch_size=None, shuffle=False))
    except InexactError as error:
        return f"{trainer.global_step} {error}"
    return "trained"


@pytest.mark.parametrize(("sharding", "at_once"), [(None, True), ("fsdp", True), ("fsdp", False), ("hybrid", False)])
def test_what_one_replica_refuses_all_do(world, sharding, at_once) -> None:
    # without sharding a replica proves a later batch alone, and the others are stopped as after any error
    found = world.run(4, fit_replicas, Run(size=2, steps=2, strategy={"sharding": sharding, "at_once": at_once}))
    assert all(x.startswith(f"{0 if at_once else 1} This run would not be") for x in found)
    assert any(FAULTS[PlainMean] in x for x in found)


class OutOfMemory(Right):
    def mix(self, x: Tensor) -> Tensor:
        if sequence_shard(self).size > 1:
            raise torch.OutOfMemoryError("no memory")
        return x


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_module(world) -> None:
    with pytest.raises(WorkerError, match="OutOfMemoryError: no memory"):
        world.run(2, verdict, OutOfMemory, Run(size=2, steps=1))


class NeedsRanks(Convolution):
    """Cannot run on one device."""

    def mix(self, x: Tensor) -> Tensor:
        if sequence_shard(self).size == 1:
            raise RuntimeError("more than one rank is needed")
        return super().mix(x)


def test_what_cannot_run_on_one_device_is_said_and_trained(world) -> None:
    found = world.run(2, verdict, NeedsRanks, Run(size=2, steps=1))
    assert all("not proved: on one device the step does not run: RuntimeError: more than one rank" in x for x in found)
    assert suspects(NeedsRanks()) == ["conv"]
    assert suspects(Recurrence()) == ["gru"]
    with pytest.warns(UserWarning, match=r"was not proved to be the training of one device: why\. .*conv"):
        warn_of_unverified(NeedsRanks(), "why")


@pytest.mark.parametrize(("module", "name"), [(Recurrence, "gru"), (Convolution, "conv"), (OtherAttention, "")])
def test_a_run_without_a_proof_names_recurrences_and_convolutions(world, module, name) -> None:
    run = Run(size=2, steps=1, strategy={"verify": False, "view": "segment"})
    said = [x for x in world.run(2, warnings_of, module, run)[0] if "was not proved" in x]
    assert len(said) == bool(name)
    assert not name or said[0].endswith(
        f"not proved to be the training of one device: verify=False. Recurrences and convolutions do not see across segments: {name}."
    )


def warnings_of(rank: int, module: type[pl.LightningModule], run: Run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(rank, run)
        trainer.fit(module(), DataLoader([make_batch()], batch_size=None))
    return [str(x.message) for x in caught]


@pytest.mark.parametrize(
    ("module", "run", "length"),
    [
        (WrongBeyondTheProof, Run(size=2, steps=1), 4096),
        (WrongLater, Run(size=2, steps=2), LENGTH),
        (WrongByLittle, Run(size=2, steps=1, trainer={"precision": "bf16-true"}), LENGTH),
    ],
)
def test_what_the_proof_cannot_see_is_what_the_readme_says(world, module, run, length) -> None:
    """A longer segment than it computes, a later batch, and little of all gradients in half precision; dropout is off in it."""
    assert world.run(2, verdict, module, run, length) == ["", ""]


class FailsInValidation(Right):
    """Its validation, which Lightning runs first, needs the whole length."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert batch["inputs"].size(1) == LENGTH, "whole sequences are needed"


def validate_first(rank: int, run: Run) -> str:
    warnings.filterwarnings("ignore")
    trainer, loader = make_trainer(rank, run), DataLoader([make_batch()], batch_size=None)
    with pytest.raises(InexactError) as caught:
        trainer.fit(FailsInValidation(), loader, loader)
    return str(caught.value)


def test_a_validation_that_fails_before_the_first_step_is_explained(world) -> None:
    for message in world.run(2, validate_first, Run(size=2, steps=1)):
        assert message.startswith("validation_step fails on a segment of the batch: whole sequences are needed")
        assert "sequence_dims={key: dimension or None}" in message


class FrozenTable(LocalTable):
    """A wrong table that is frozen at first, at zero, where no gradient tells."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.positions).requires_grad_(False)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        self.positions.requires_grad_(batch_idx > 0)


def test_what_is_unfrozen_is_proved_before_its_first_step(world) -> None:
    found = world.run(2, fit_frozen, Run(size=2, steps=2))
    assert all(steps == 1 and "the most that of positions" in message for steps, message in found)


def fit_frozen(rank: int, run: Run) -> tuple[int, str]:
    warnings.filterwarnings("ignore")
    trainer = make_trainer(rank, run)
    with pytest.raises(InexactError) as caught:
        trainer.fit(FrozenTable(), DataLoader([make_batch()] * 2, batch_size=None, shuffle=False))
    return trainer.global_step, str(caught.value)


class FailsOnOneRank(PlainMean):
    """The last segment alone has no class token to be found; ranks do not wait for each other in what follows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sequence_shard(self).rank == 1:
            raise IndexError("there is no token 0")
        return v


def test_a_rank_that_fails_alone_is_refused_on_every_rank(world) -> None:
    found = world.run(2, verdict, FailsOnOneRank, Run(size=2, steps=1), timeout=15)
    assert "the step fails on a segment, though not on the whole: IndexError: there is no token 0" in found[1]
    assert "the step fails on a segment, though not on the whole" in found[0]
