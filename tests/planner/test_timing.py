"""The estimate of a step's time, and figures of hardware."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_lss.planner import Link, Options, load_hardware
from lightning_lss.planner.hardware import bytes_of
from lightning_lss.planner.timing import Grid, Transfer, step_time, utilization
from lightning_lss.planner.trace import Trace
from tests.planner.modules import DEVICE

WORK = np.array([[1e13, 2e12, 1e11, 100], [2e13, 4e12, 2e11, 200], [0, 0, 1e10, 50]])
COLLECTIVES = np.array([[2, 1e10, 0, 0, 0, 0], [4, 2e10, 5e12, 2.5e12, 1e11, 1]])  # a rank waits for the first
PARAMETERS = np.array([4e9, 1e9, 1e9, 1e9, 3])
TRACE = Trace(np.zeros((1, 6)), np.zeros(1), WORK, COLLECTIVES, np.array(["all_gather", "reduce_scatter"]), PARAMETERS)
OPTIONS = Options("32-true")


def test_a_roofline() -> None:
    time = step_time(TRACE, OPTIONS, Grid(1, 4, replace(DEVICE, launch=1e-3)))
    assert time.matmul == pytest.approx(3e13 / 0.5e13)
    assert time.attention == pytest.approx(6e12 / 0.25e13)
    assert time.memory == pytest.approx(3 * 3e11 / 1e12)
    assert time.launch == pytest.approx(0.3)
    assert time.optimizer == pytest.approx(3 * 1e10 / 1e12 + 0.05)
    gather, scatter, gradients = (0.75 * 1e10, 0.75 * 2e10, 1.5 * 4e9)
    assert time.received == pytest.approx(gather + scatter + gradients)
    assert time.communication == pytest.approx(time.received / 1e11, rel=0.01)
    assert time.exposed == pytest.approx(gather / 1e11, rel=0.01)  # the others pass while the rank computes
    assert time.total == pytest.approx(
        time.matmul + time.attention + time.memory + time.launch + time.optimizer + time.exposed
    )


def test_the_link_that_bounds_a_ring() -> None:
    def bandwidth(group: str, ranks: int, data_size: int, size: int) -> float:
        return Grid(data_size, size, DEVICE).link(group, ranks).bandwidth

    assert bandwidth("sequence", 4, 2, 4) == 1e11  # within nodes of four
    assert bandwidth("sequence", 8, 1, 8) == 1e10  # enters each node once
    assert bandwidth("sequence", 3, 4, 3) == 1e10 / 2  # two groups share a node's link
    assert bandwidth("data", 2, 2, 4) == 1e10 / 4  # each of a node's devices has a ring of its own
    assert bandwidth("data", 4, 4, 1) == 1e11


@pytest.mark.parametrize(
    ("kind", "received", "rounds"),
    [
        ("all_gather", 30, 3),
        ("reduce_scatter", 30, 3),
        ("all_reduce", 60, 6),
        ("receive", 40, 1),
        ("all_to_all", 30, 3),
    ],
)
def test_rings(kind, received, rounds) -> None:
    transfer = Transfer(kind, "sequence", 4, calls=2, payload=40, work=0.0)
    assert transfer.received == received
    assert transfer.seconds(Grid(1, 4, DEVICE)) == pytest.approx(2 * rounds * 1e-6 + received / 1e11)


def test_work_hides_no_more_than_the_hardware_overlaps() -> None:
    transfer = Transfer("all_gather", "sequence", 4, calls=0, payload=4e11, work=1.0)
    assert transfer.seconds(Grid(1, 4, DEVICE)) == 3
    assert transfer.exposed(Grid(1, 4, DEVICE)) == 2
    assert transfer.exposed(Grid(1, 4, replace(DEVICE, overlap=0.1))) == pytest.approx(2.7)


def test_gradients_of_positions_stay_in_the_data_group() -> None:
    one, two = (step_time(TRACE, OPTIONS, Grid(data, 4, DEVICE)).received for data in (1, 2))
    world = 2 * 4e9 * (7 / 8 - 3 / 4)  # gradients of shared parameters, of 8 ranks instead of 4
    assert two - one == pytest.approx(world + 2 * 1e9 / 2)


def test_parts_of_parameters_are_gathered_twice_and_scattered() -> None:
    for sharding, shards in (("fsdp", 8), ("hybrid", 4)):
        received = step_time(TRACE, replace(OPTIONS, sharding=sharding), Grid(2, 4, DEVICE), shards).received
        attention = 0.75 * 3e10
        across = 4e9 / shards if sharding == "hybrid" else 0.0  # of 2 copies, twice half of a part
        assert received - attention == pytest.approx(3 * 4e9 * (shards - 1) / shards + 1e9 + across)


def test_gradients_in_two_bytes() -> None:
    whole, half = (
        step_time(TRACE, replace(OPTIONS, communication_dtype=dtype), Grid(1, 4, DEVICE)).received
        for dtype in (None, "bfloat16")
    )
    assert whole - half == 1.5 * 4e9 / 2


def test_a_baseline_averages_over_the_data_group_alone() -> None:
    time = step_time(TRACE, OPTIONS, Grid(1, 4, DEVICE), shared="data")
    assert time.received == 0.75 * 3e10


def test_utilization() -> None:
    assert utilization(TRACE, OPTIONS, Grid(2, 4, DEVICE), 2, 10.0) == pytest.approx(3 * 2 * 1.2e13 / (10 * 8 * 1e13))


def test_better_hardware_is_never_slower() -> None:
    grid = Grid(4, 4, DEVICE)
    seconds = step_time(TRACE, OPTIONS, grid).total
    for better in (
        {"between": Link(1e11, 1e-6)},
        {"peak": {"float32": 2e13}},
        {"bandwidth": 2e12},
        {"matmul": 0.7},
        {"attention": 0.5},
    ):
        assert step_time(TRACE, OPTIONS, replace(grid, hardware=replace(DEVICE, **better))).total <= seconds
    assert step_time(TRACE, OPTIONS, replace(grid, hardware=replace(DEVICE, overlap=0.0))).total > seconds


def test_sizes_as_people_write_them() -> None:
    assert [bytes_of(x) for x in (80e9, "80GB", "24 GiB", "1.5e9")] == [80e9, 80e9, 24 * 2**30, 1.5e9]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: load_hardware("h100"), "'h100' is not a file"),
        (lambda: replace(DEVICE, matmul=0), "matmul=0 must be positive"),
        (lambda: replace(DEVICE, kernel="magic"), "kernel='magic' is unknown"),
        (lambda: bytes_of("ten"), "is not a size"),
        (lambda: DEVICE.peak_of("16-mixed"), "no peak for float16"),
    ],
)
def test_figures_that_make_no_sense_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()
