"""What a step under the Trainer sends: in which dtype, and how often while gradients accumulate."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lss.testing.collectives import CollectiveCounter, Tally
from tests.training import Run, make_loader, make_module, make_samples, make_trainer

BYTES_OF_A_COUNT = 64  # numbers of tokens are smaller, tensors of a model larger


class CountTraining(pl.Callback):
    """Counts a training's collectives, from a loss to the end of its batch as ``backward``."""

    def __init__(self) -> None:
        self.counter = CollectiveCounter()

    def on_train_start(self, *args: Any) -> None:
        self.counter.__enter__()

    def on_before_backward(self, *args: Any) -> None:
        self.counter.phase = "backward"

    def on_train_batch_end(self, *args: Any) -> None:
        self.counter.phase = "forward"

    def on_train_end(self, *args: Any) -> None:
        self.counter.__exit__(None, None, None)


def count_training(rank: int, run: Run, logged: bool = False) -> Tally:
    """Without the numbers of tokens that every loss is divided by; what is logged apart from all the rest."""
    counted = CountTraining()
    trainer = make_trainer(rank, run, callbacks=[counted])
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), 2))
    large = {x: n for x, n in counted.counter.tally.items() if x.received > BYTES_OF_A_COUNT}
    return Tally({x: n for x, n in large.items() if logged == (x.dtype == torch.float64)})


def dtypes(tally: Tally) -> dict[tuple[str, str], set[torch.dtype]]:
    """By phase and kind of collective."""
    found: dict[tuple[str, str], set[torch.dtype]] = {}
    for collective in tally:
        found.setdefault((collective.phase, collective.kind), set()).add(collective.dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_which_dtype_is_sent(world, checkpointing, dtype) -> None:
    sent = dtype or torch.float32
    strategy = {"communication_dtype": dtype, "check_batches": 0, "verify": False}
    model = {"activation_checkpointing": checkpointing, "positions": "rotary"}
    for tally in world.run(2, count_training, Run(size=2, model=model, strategy=strategy, steps=1)):
        assert dtypes(tally) == {
            ("forward", "all_gather"): {sent},  # keys and values
            ("backward", "all_gather"): {sent},
            ("backward", "reduce_scatter"): {sent},  # their gradients
            ("backward", "all_reduce"): {sent},  # gradients of parameters
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_which_dtype_is_sent_with_sharded_parameters(world, dtype) -> None:
    sent = dtype or torch.float32
    strategy = {"communication_dtype": dtype, "check_batches": 0, "verify": False, "sharding": "fsdp"}
    run = Run(size=1, model={"positions": "rotary"}, strategy=strategy, steps=1)  # attention alone sends nothing
    for tally in world.run(2, count_training, run):
        found = dtypes(tally)
        assert found["forward", "all_gather"] == {torch.float32}  # parameters
        assert found["backward", "reduce_scatter"] == {sent}  # their gradients


def test_gradients_of_positional_tables_are_sent_in_full(world) -> None:
    strategy = {"communication_dtype": torch.bfloat16, "check_batches": 0, "verify": False}
    for tally in world.run(4, count_training, Run(size=2, strategy=strategy, steps=1)):
        assert dtypes(tally)["backward", "all_reduce"] == {torch.bfloat16, torch.float32}


STRATEGIES: dict[str, dict[str, Any]] = {
    "replicated": {"check_batches": 0, "verify": False},
    "hybrid": {"check_batches": 0, "verify": False, "sharding": "hybrid"},
    "megatron": {"check_batches": 0, "megatron": True},
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_gradients_are_averaged_once_however_many_batches_accumulate(world, kind) -> None:
    # FSDP reduces a batch's gradients to each rank's part at once; their sum over copies waits for the last batch
    once, accumulated = (
        world.run(4, count_training, Run(size=2, strategy=STRATEGIES[kind], steps=1, trainer=trainer))
        for trainer in ({}, {"accumulate_grad_batches": 3})
    )
    for few, many in zip(once, accumulated):
        reduced, gathered = (
            [sum(n for x, n in tally.items() if x.kind == name) for tally in (few, many)]
            for name in ("all_reduce", "all_gather")
        )
        assert reduced[0] == reduced[1] > 0
        assert gathered[1] >= 3 * gathered[0] - 2 > 0  # three batches did run


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_step_sends_what_it_logs_in_one_small_collective(world, kind) -> None:
    run = Run(size=2, strategy=STRATEGIES[kind], steps=2, trainer={"accumulate_grad_batches": 3})
    for tally in world.run(4, count_training, run, True):
        ((collective, times),) = tally.items()
        assert (collective.phase, collective.kind, times) == ("forward", "all_reduce", 6)
        assert collective.received == 1008 * 2 * 3 // 4  # 1 KiB, in a ring of four ranks


def test_a_rank_with_whole_sequences_sends_nothing_of_what_it_logs(world) -> None:
    run = Run(size=1, strategy=STRATEGIES["replicated"], steps=1)
    assert world.run(2, count_training, run, True) == [Tally(), Tally()]
