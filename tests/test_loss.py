"""The average over the world of ``token_mean`` is the mean over all tokens, exactly."""

from __future__ import annotations

import math
import operator
from functools import reduce

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.loss import token_mean


def mean_on_rank(rank: int, sums: list[float], counts: list[int], dtype: torch.dtype, as_tensor: bool) -> Tensor:
    count = torch.tensor(counts[rank]) if as_tensor else counts[rank]
    return token_mean(torch.tensor(sums[rank], dtype=dtype), count)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize(
    ("sums", "counts"),
    [([3.0, 5.0], [4, 4]), ([3.0, 50.0], [1, 99]), ([0.0, 5.0], [0, 7]), ([1.0, 2.0, 3.0, 0.0], [5, 1, 300, 0])],
)
def test_the_average_over_ranks_is_the_mean_over_tokens(world, sums, counts, as_tensor) -> None:
    losses = world.run(len(sums), mean_on_rank, sums, counts, torch.float64, as_tensor)
    average = sum(loss.item() for loss in losses) / len(losses)
    assert average == pytest.approx(sum(sums) / sum(counts), rel=1e-15, abs=0)  # one rounding of float64 or two


def test_a_world_without_tokens_has_loss_zero(world) -> None:
    losses = world.run(2, mean_on_rank, [0.0, 0.0], [0, 0], torch.float32, False)
    assert [loss.item() for loss in losses] == [0.0, 0.0]


def test_many_tokens_in_float16_do_not_overflow(world) -> None:
    # 80,000 tokens are more than float16 can say, and so is twice the sum
    losses = world.run(2, mean_on_rank, [50_000.0, 50_000.0], [40_000, 40_000], torch.float16, False)
    assert [loss.item() for loss in losses] == [1.25, 1.25]


def linear_loss(weight: Tensor, rank: int, counted: int) -> Tensor:
    """Sum over the counted tokens of this rank of a loss whose gradient is known."""
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (data[:counted] @ weight).square().sum()


def gradient_on_rank(rank: int, counts: list[int]) -> Tensor:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    token_mean(linear_loss(weight, rank, counts[rank]), counts[rank]).backward()
    return weight.grad


@pytest.mark.parametrize("counts", [[6, 6], [1, 5], [0, 4], [6, 0, 1, 2]])
def test_averaged_gradients_are_those_of_the_mean_over_all_tokens(world, counts) -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    losses = [linear_loss(weight, rank, count) for rank, count in enumerate(counts)]
    (reduce(operator.add, losses) / sum(counts)).backward()
    average = torch.stack(world.run(len(counts), gradient_on_rank, counts)).mean(0)
    torch.testing.assert_close(average, weight.grad, rtol=1e-14, atol=0)


def masked_on_rank(rank: int) -> float:
    """A usual mean over targets, of which rank 0 has none: 0 / 0."""
    targets = torch.full((4,), -100 if rank == 0 else 1)
    return token_mean(F.cross_entropy(torch.ones(4, 3), targets) * 4, (targets >= 0).sum()).item()


def test_a_rank_without_tokens_contributes_zero_even_where_its_own_mean_is_nan(world) -> None:
    assert world.run(2, masked_on_rank) == [0.0, pytest.approx(2 * math.log(3), rel=1e-6)]


def zero_tokens_gradient(rank: int) -> Tensor:
    logits = torch.ones(4, 3, requires_grad=True)
    targets = torch.full((4,), -100)
    token_mean(F.cross_entropy(logits, targets, reduction="sum"), (targets >= 0).sum()).backward()
    return logits.grad


def test_gradients_without_any_token_are_zero(world) -> None:
    assert all(torch.equal(grad, torch.zeros(4, 3)) for grad in world.run(2, zero_tokens_gradient))


def test_one_process_needs_no_process_group() -> None:
    assert token_mean(torch.tensor(6.0, dtype=torch.float64), 4).item() == 1.5
    assert token_mean(torch.tensor(0.0), 0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_sum_and_the_count_is_left_as_it_is(dtype) -> None:
    count = torch.tensor(4, dtype=torch.int32)
    loss = token_mean(torch.tensor(6.0, dtype=dtype), count)
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert count.item() == 4


def untouched_count(rank: int) -> int:
    count = torch.tensor(rank + 1)
    token_mean(torch.tensor(1.0), count)
    return count.item()


def test_the_sum_over_the_world_is_not_written_into_the_count(world) -> None:
    assert world.run(2, untouched_count) == [1, 2]
