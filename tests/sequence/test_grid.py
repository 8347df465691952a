"""The grid data x sequence: its ranks on paper, as gloo groups, and at the paper's 3,456 GPUs."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_lss.sequence.grid import SequenceGrid, build_grid, rank_grid
from lightning_lss.testing.fake_world import fake_world

GRIDS = [(world_size, size) for world_size in (1, 2, 4, 6, 12) for size in range(1, 13) if world_size % size == 0]


def ranks_of(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def as_lists(mesh: SequenceGrid) -> tuple[list[int] | None, list[int] | None]:
    return ranks_of(mesh.sequence_group), ranks_of(mesh.data_group)


@pytest.mark.parametrize(("world_size", "size"), GRIDS)
def test_sequence_groups_are_neighbours_and_data_groups_hold_the_same_segment(world_size, size) -> None:
    sequences, replicas = rank_grid(world_size, size).tolist(), rank_grid(world_size, size).T.tolist()
    for rank in range(world_size):
        (sequence,) = (group for group in sequences if rank in group)
        (replica,) = (group for group in replicas if rank in group)
        assert sequence == list(range(rank // size * size, rank // size * size + size))
        assert replica == [other for other in range(world_size) if other % size == rank % size]
        assert set(sequence) & set(replica) == {rank}
    assert (len(sequences), len(replicas)) == (world_size // size, size)


@pytest.mark.parametrize(("world_size", "size"), GRIDS)
def test_a_mesh_knows_its_place(world_size, size) -> None:
    for rank in range(world_size):
        mesh = SequenceGrid(world_size, size, rank, None, None)
        assert mesh.data_rank * size + mesh.sequence_rank == rank
        assert mesh.data_size * size == world_size
        assert rank_grid(world_size, size)[mesh.data_rank, mesh.sequence_rank] == rank


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def build_on_rank(rank: int, size: int, seconds: int) -> dict[str, Any]:
    mesh = build_grid(dist.get_world_size(), rank, size, timedelta(seconds=seconds))
    groups = [group for group in (mesh.sequence_group, mesh.data_group) if group is not None]
    grid = mesh.device_mesh("cpu")
    mine = torch.tensor([float(rank)])
    sums = []
    for group in groups:  # the groups do communicate
        total = mine.clone()
        dist.all_reduce(total, group=group)
        sums.append(total.item())
    return {
        "ranks": as_lists(mesh),
        "timeouts": [timeout_of(group).total_seconds() for group in groups if group is not dist.group.WORLD],
        "sums": sums,
        "dims": dict(zip(grid.mesh_dim_names, grid.shape)),
        "grid": grid.mesh.tolist(),
        "wraps": [grid.get_group(name) is group for name, group in zip(("sequence", "data"), groups)],
    }


def test_two_by_two(world) -> None:
    for rank, built in enumerate(world.run(4, build_on_rank, 2, 77)):
        sequence, replica = [[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2]
        assert built["ranks"] == (sequence, replica)
        assert built["sums"] == [sum(sequence), sum(replica)]
        assert built["dims"] == {"data": 2, "sequence": 2}
        assert built["grid"] == [[0, 1], [2, 3]]
        assert built["wraps"] == [True, True]


def test_subgroups_have_the_timeout_that_was_asked_for(world) -> None:
    # init_device_mesh would give them the default of 30 minutes
    for built in world.run(4, build_on_rank, 2, 77):
        assert built["timeouts"] == [77, 77]


def test_one_sequence_over_the_whole_world(world) -> None:
    for built in world.run(2, build_on_rank, 2, 77):
        assert built["ranks"] == ([0, 1], None)
        assert built["timeouts"] == [77]
        assert built["dims"] == {"sequence": 2}
        assert built["grid"] == [0, 1]


def build_data_parallel(rank: int) -> tuple[Any, bool, dict[str, int]]:
    mesh = build_grid(dist.get_world_size(), rank, 1)
    grid = mesh.device_mesh("cpu")
    return as_lists(mesh), mesh.data_group is dist.group.WORLD, dict(zip(grid.mesh_dim_names, grid.shape))


def test_plain_data_parallelism_needs_no_second_group(world) -> None:
    assert world.run(2, build_data_parallel) == [((None, [0, 1]), True, {"data": 2})] * 2


def test_a_world_of_one_has_no_groups() -> None:
    mesh = build_grid(1, 0, 1)
    assert (mesh.sequence_group, mesh.data_group, mesh.data_size) == (None, None, 1)
    with pytest.raises(ValueError, match="one process has no device mesh"):
        mesh.device_mesh("cpu")


def build_in_a_fake_world(_: int, world_size: int, rank: int, size: int) -> tuple[Any, ...]:
    with fake_world(rank, world_size):
        mesh = build_grid(world_size, rank, size)
        return *as_lists(mesh), tuple(mesh.device_mesh("cpu").shape)


@pytest.mark.parametrize("rank", [0, 1_000, 3_455])
def test_the_grid_of_the_papers_largest_run(world, rank) -> None:
    ((sequence, replica, shape),) = world.run(1, build_in_a_fake_world, 3_456, rank, 6, group=False)
    assert sequence == list(range(rank - rank % 6, rank - rank % 6 + 6))
    assert replica == list(range(rank % 6, 3_456, 6))
    assert shape == (576, 6)
