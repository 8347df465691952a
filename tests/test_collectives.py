"""All-gather and reduce-scatter by rank, the latter in two ways: every shape, dtype and stride, as adjoints, and without
a warning."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.collectives import Pending, all_gather, exchange_and_sum, reduce_scatter

SHAPES = [(), (0,), (1,), (5,), (2, 0, 3), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCATTERS = [reduce_scatter, exchange_and_sum]


def local(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small whole numbers, another on every rank and in every place: their sums are exact in every dtype."""
    return (torch.arange(math.prod(shape)).reshape(shape) + 30 * rank).to(dtype)


def check_values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size, group = dist.get_world_size(), dist.group.WORLD
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch 2.13 renamed both collectives and deprecated the old names
        gathered = all_gather(local(rank, shape, dtype), group).wait()
        stacked = local(rank, (size, *shape), dtype)
        sums = [scatter(stacked, group).wait() for scatter in SCATTERS]
    assert gathered.shape == (size, *shape)
    assert torch.equal(gathered, torch.stack([local(other, shape, dtype) for other in range(size)]))
    expected = sum(local(other, (size, *shape), dtype) for other in range(size))[rank]
    for received in sums:
        assert received.shape == shape
        assert received.dtype == dtype
        assert torch.equal(received, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_by_rank_for_every_shape_and_dtype_without_a_warning(world, shape, dtype) -> None:
    world.run(2, check_values, shape, dtype)


def test_four_ranks(world) -> None:
    world.run(4, check_values, (3, 2), torch.float32)


def check_strides(rank: int) -> None:
    group = dist.group.WORLD
    x = local(rank, (3, 4), torch.float64)
    expected = torch.stack([local(other, (3, 4), torch.float64).T for other in range(2)])
    assert torch.equal(all_gather(x.T, group).wait(), expected)
    stacked = local(rank, (3, 2), torch.float64)
    total = sum(local(other, (3, 2), torch.float64) for other in range(2))
    one = torch.tensor(rank + 1.0).expand(2, 3)  # the gradient of a sum
    for scatter in SCATTERS:
        assert torch.equal(scatter(stacked.T, group).wait(), total.T[rank])
        assert scatter(one, group).wait().tolist() == [3.0, 3.0, 3.0]
    assert torch.equal(stacked, local(rank, (3, 2), torch.float64)), "the input is not written to"


def test_inputs_of_any_stride(world) -> None:
    world.run(2, check_strides)


def check_adjoint(rank: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    gathered, received = all_gather(x, dist.group.WORLD).wait(), reduce_scatter(y, dist.group.WORLD).wait()
    return (gathered * y).sum().item(), (x * received).sum().item()


def test_each_is_the_adjoint_of_the_other(world) -> None:
    # <gather x, y> = <x, scatter y>, where an inner product over the world is the sum of those of the ranks
    left, right = zip(*world.run(2, check_adjoint))
    assert sum(left) == pytest.approx(sum(right), rel=1e-14, abs=0)


def check_handles(rank: int) -> None:
    first = all_gather(torch.full((2,), float(rank)), dist.group.WORLD)
    others = [scatter(torch.full((2, 2), float(rank)), dist.group.WORLD) for scatter in SCATTERS]
    assert first.work is not None
    for other in reversed(others):
        assert other.work is not None
        assert other.wait().tolist() == [1.0, 1.0]
    assert first.wait().tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_several_can_be_under_way_and_are_waited_for_in_any_order(world) -> None:
    world.run(2, check_handles)


def test_what_is_complete_needs_no_waiting() -> None:
    x = torch.zeros(2)
    assert Pending(x, None).wait() is x


def gather_in_a_subgroup(rank: int) -> list[float]:
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    return all_gather(torch.tensor(float(rank)), group).wait().tolist()


def test_only_the_given_group_takes_part(world) -> None:
    assert world.run(4, gather_in_a_subgroup) == [[0.0, 2.0], [1.0, 3.0], [0.0, 2.0], [1.0, 3.0]]
