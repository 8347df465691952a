"""One process against N: the same weights after several steps, every parameter by name.

Runs go through the real Trainer with SGD (Adam would hide a gradient that is wrong by a factor), on batches whose
targets are unevenly spread over the segments.
"""

import itertools
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lss.sequence.layout import LAYOUTS
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from lightning_lss.testing.world import World
from tests.modules import MaskedModule, OwnModule
from tests.training import Run, fit, make_loader, make_module, make_samples, make_trainer

GRIDS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # (W, S)
CLIPS: dict[str, dict[str, Any]] = {
    "no_clip": {},
    "clip_by_norm": {"gradient_clip_val": 0.3},
    "clip_by_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
FACTORS: list[list[Any]] = [
    GRIDS,
    ["contiguous", "zigzag"],
    [None, "fsdp", "hybrid"],
    ["learned", "rotary"],
    [1, 3],
    list(CLIPS),
    [True, False],
]


GATHERING: dict[str, dict[str, Any]] = {
    "all_at_once": {},
    "in_chunks": {"head_chunks": 2},
    "kept": {"keep_gathered": True},
}
# What changes how a step is computed, but not what; a vocabulary larger than the width has its loss in chunks.
OPTION_FACTORS: list[list[Any]] = [
    GRIDS[1:],
    ["contiguous", "zigzag"],
    [None, "fsdp", "hybrid"],
    ["none", "full", "selective", "offload"],
    [1, 2],
    list(GATHERING),
    [11, 40],
]


def all_combinations(factors: list[list[Any]]) -> list[tuple[Any, ...]]:
    """The product of all factors, without hybrid sharding where there is nothing to shard over."""
    return [x for x in itertools.product(*factors) if x[2] != "hybrid" or x[0] != (2, 1)]


def covering_combinations(factors: list[list[Any]]) -> list[tuple[Any, ...]]:
    """A part of the product of all factors in which every pair of values of two factors occurs, chosen greedily."""
    left = all_combinations(factors)
    uncovered = {pair for combination in left for pair in pairs_in(combination)}
    chosen = []
    while uncovered:
        best = max(left, key=lambda combination: len(uncovered & pairs_in(combination)))
        uncovered -= pairs_in(best)
        chosen.append(best)
    return chosen


def pairs_in(combination: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(combination), 2))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    choose = all_combinations if metafunc.config.getoption("--all-combinations") else covering_combinations
    for name, factors in (("combination", FACTORS), ("options", OPTION_FACTORS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name, choose(factors), ids=lambda c: f"W{c[0][0]}S{c[0][1]}-" + "-".join(map(str, c[1:]))
            )


def make_run(positions: str, accumulate: int, clip: str, causal: bool, precision: str = "64-true", **more: Any) -> Run:
    trainer = {"accumulate_grad_batches": accumulate, "precision": precision, **CLIPS[clip]}
    return Run(model={"positions": positions, "causal": causal}, trainer=trainer, **more)


@pytest.fixture(scope="module")
def one_process(world: World) -> Any:
    """Weights that one process without a parallel strategy arrives at, by options."""
    return cache(lambda *options: world.run(1, fit, make_run(*options))[0])


def test_float64(world, one_process, combination) -> None:
    # the order of summation is all that differs
    (world_size, size), layout, sharding, *options = combination
    run = make_run(*options, size=size, layout=layout, strategy={"check_batches": 1, "sharding": sharding})
    assert_equal_on_ranks(world.run(world_size, fit, run), one_process(*options), 1e-10)


@pytest.fixture(scope="module")
def one_process_by_vocabulary(world: World) -> Any:
    return cache(lambda vocabulary: world.run(1, fit, Run(**options_run(vocabulary)))[0])


def options_run(vocabulary: int, **options: Any) -> dict[str, Any]:
    trainer = {"accumulate_grad_batches": 2, "precision": "64-true", "gradient_clip_val": 0.3}
    return {"model": {"positions": "learned", "vocab_size": vocabulary, **options}, "trainer": trainer}


def test_options_in_float64(world, one_process_by_vocabulary, options) -> None:
    (world_size, size), layout, sharding, checkpointing, tiles, gathering, vocabulary = options
    run = Run(
        size=size,
        layout=layout,
        strategy={"check_batches": 1, "sharding": sharding},
        **options_run(vocabulary, activation_checkpointing=checkpointing, mlp_tiles=tiles, **GATHERING[gathering]),
    )
    assert_equal_on_ranks(world.run(world_size, fit, run), one_process_by_vocabulary(vocabulary), 1e-10)


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_gradients_may_travel_in_bfloat16(world, sharding) -> None:
    common = options_run(11)
    exact = world.run(2, fit, Run(size=2, **common, strategy={"sharding": sharding}))[0]
    rounded = {"sharding": sharding, "communication_dtype": "bfloat16"}
    state = world.run(2, fit, Run(size=2, **common, strategy=rounded))[0]
    difference, name, _ = worst_difference(state, exact)
    assert 1e-6 < difference < 2e-2, name  # 8 bits of a gradient, in a few steps


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"W{grid[0]}S{grid[1]}")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_float32(world, one_process, grid, layout) -> None:
    world_size, size = grid
    options = ("learned", 3, "clip_by_norm", True, "32-true")
    run = make_run(*options, size=size, layout=layout, strategy={"check_batches": 1})
    assert_equal_on_ranks(world.run(world_size, fit, run), one_process(*options), 1e-5)


@pytest.mark.parametrize("grid", GRIDS[1:], ids=lambda grid: f"W{grid[0]}S{grid[1]}")
def test_a_users_own_module(world, grid) -> None:
    world_size, size = grid
    common = {"module": OwnModule, "steps": 5, "trainer": {"gradient_clip_val": 0.3}}
    reference = world.run(1, fit, Run(**common))[0]
    assert_equal_on_ranks(world.run(world_size, fit, Run(size=size, **common)), reference, 1e-5)


MASKED_GRIDS = [(2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", MASKED_GRIDS, ids=lambda grid: f"W{grid[0]}S{grid[1]}")
@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_documents_padding_windows_sinks_and_soft_capping(world, grid, layout, sharding) -> None:
    world_size, size = grid
    common = {"module": MaskedModule, "trainer": {"precision": "64-true", "accumulate_grad_batches": 2}}
    reference = world.run(1, fit, Run(**common))[0]
    run = Run(size=size, layout=layout, strategy={"sharding": sharding}, **common)
    assert_equal_on_ranks(world.run(world_size, fit, run), reference, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
def test_dropout_of_attention_and_of_elements(world, size, layout, checkpointing) -> None:
    common = {"module": MaskedModule, "trainer": {"precision": "64-true"}, "model": {"dropout": 0.3}}
    reference = world.run(1, fit, Run(**common))[0]
    names = None if checkpointing is None else ["packed", "windowed"]
    strategy = {"activation_checkpointing": checkpointing, "checkpointed_modules": names}
    run = Run(size=size, layout=layout, strategy=strategy, **common)
    assert_equal_on_ranks(world.run(size, fit, run), reference, 1e-10)


def test_one_rank_a_sequence_is_bit_identical_to_ddp(world) -> None:
    common = {"steps": 10, "size": 1, "trainer": {"gradient_clip_val": 0.3}}
    lss, ddp = (world.run(2, fit, Run(**common, strategy=kind))[0] for kind in ({"check_batches": 2}, {"ddp": True}))
    assert_equal(lss, ddp, 0)


class _Operators(pl.Callback):
    """How often each of torch's operators runs in the last step."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.counts: dict[str, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            self.profile.start()
        elif trainer.global_step == trainer.max_steps:
            self.profile.stop()
            self.counts = {event.key: event.count for event in self.profile.key_averages()}


def _operators_of(rank: int, run: Run) -> dict[str, int]:
    operators = _Operators()
    trainer = make_trainer(rank, run, callbacks=[operators])
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), run.global_batch))
    return operators.counts


def test_one_rank_a_sequence_runs_the_operators_of_ddp(world) -> None:
    """So that what the strategy itself costs is at most some Python a step."""
    lss, ddp = (
        world.run(1, _operators_of, Run(steps=6, strategy=kind))[0] for kind in ({"check_batches": 2}, {"ddp": True})
    )
    assert ddp["aten::mm"] > 0
    assert lss == ddp
