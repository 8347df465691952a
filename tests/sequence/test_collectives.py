"""All-gather and reduce-scatter by rank, in one collective and in messages: every shape, dtype and stride, as adjoints, and
without a warning."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.collectives import Pending, all_gather, all_to_all_sum, exchange, reduce_scatter

SHAPES = [(), (0,), (1,), (5,), (2, 0, 3), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gather_in_messages(x: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> Pending:
    """:func:`exchange` in the place of :func:`all_gather`."""
    out = x.new_empty(dist.get_world_size(group), *x.shape) if out is None else out
    out[dist.get_rank(group)].copy_(x)
    return Pending(out, exchange([[place] for place in out], group))


GATHERS = [all_gather, gather_in_messages]
SCATTERS = [reduce_scatter, all_to_all_sum]


def local(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small whole numbers, another on every rank and in every place: their sums are exact in every dtype."""
    return (torch.arange(math.prod(shape)).reshape(shape) + 30 * rank).to(dtype)


def check_values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size, group = dist.get_world_size(), dist.group.WORLD
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch 2.13 renamed both collectives and deprecated the old names
        gathers = [gather(local(rank, shape, dtype), group).wait() for gather in GATHERS]
        stacked = local(rank, (size, *shape), dtype)
        sums = [scatter(stacked, group).wait() for scatter in SCATTERS]
    for gathered in gathers:
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
    for gather in GATHERS:
        assert torch.equal(gather(x.T, group).wait(), expected)
    stacked = local(rank, (3, 2), torch.float64)
    total = sum(local(other, (3, 2), torch.float64) for other in range(2))
    one = torch.tensor(rank + 1.0).expand(2, 3)  # the gradient of a sum
    for scatter in SCATTERS:
        assert torch.equal(scatter(stacked.T, group).wait(), total.T[rank])
        assert scatter(one, group).wait().tolist() == [3.0, 3.0, 3.0]
    assert torch.equal(stacked, local(rank, (3, 2), torch.float64)), "the input is not written to"


def check_places(rank: int, gather: Any) -> None:
    room = torch.full((2, 3), -1.0)
    room[rank] = rank
    assert gather(room[rank], dist.group.WORLD, room).wait() is room
    assert room.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("gather", GATHERS)
def test_what_is_sent_may_lie_where_it_belongs(world, gather) -> None:
    world.run(2, check_places, gather)


def test_inputs_of_any_stride(world) -> None:
    world.run(2, check_strides)


def check_adjoint(rank: int, gather: Any, scatter: Any) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    gathered, received = gather(x, dist.group.WORLD).wait(), scatter(y, dist.group.WORLD).wait()
    return (gathered * y).sum().item(), (x * received).sum().item()


@pytest.mark.parametrize(("gather", "scatter"), list(zip(GATHERS, SCATTERS)))
def test_each_is_the_adjoint_of_the_other(world, gather, scatter) -> None:
    # <gather x, y> = <x, scatter y>, where an inner product over the world is the sum of those of the ranks
    left, right = zip(*world.run(2, check_adjoint, gather, scatter))
    assert sum(left) == pytest.approx(sum(right), rel=1e-14, abs=0)


def check_handles(rank: int) -> None:
    gathers = [gather(torch.full((2,), float(rank + 2 * i)), dist.group.WORLD) for i in range(3) for gather in GATHERS]
    sums = [scatter(torch.full((2, 2), float(rank + i)), dist.group.WORLD) for i in range(3) for scatter in SCATTERS]
    assert all(pending.works for pending in gathers + sums)
    for place, pending in reversed(list(enumerate(sums))):
        assert pending.wait().tolist() == [1.0 + 2 * (place // 2)] * 2
    for place, pending in reversed(list(enumerate(gathers))):
        first = 2.0 * (place // 2)
        assert pending.wait().tolist() == [[first] * 2, [first + 1] * 2]


def test_several_can_be_under_way_and_are_waited_for_in_any_order(world) -> None:
    world.run(2, check_handles)


def test_what_is_complete_needs_no_waiting() -> None:
    x = torch.zeros(2)
    assert Pending(x).wait() is x


def gather_in_a_subgroup(rank: int, gather: Any) -> list[float]:
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    return gather(torch.tensor(float(rank)), group).wait().tolist()


@pytest.mark.parametrize("gather", GATHERS)
def test_only_the_given_group_takes_part(world, gather) -> None:
    assert world.run(4, gather_in_a_subgroup, gather) == [[0.0, 2.0], [1.0, 3.0], [0.0, 2.0], [1.0, 3.0]]
