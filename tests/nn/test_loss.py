"""The average over the world of ``token_mean`` is the mean over all tokens, exactly; cross entropy without logits."""

import math
import operator
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_lss.nn.loss import IGNORED, linear_cross_entropy, token_mean
from lightning_lss.testing.collectives import Watch
from lightning_lss.testing.compare import assert_equal


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
    assert_equal([average], [weight.grad], 1e-14)


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


# -- cross entropy without logits --------------------------------------------------------------------------------------

ROWS, WIDTH = 700, 12  # more than two chunks of the fewest rows


def head_inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (ROWS,), generator=generator)
    return features, weight, targets.masked_fill(torch.arange(ROWS) % 5 == 0, IGNORED)


def loss_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, leaves)]


@pytest.fixture(params=["torch", "own"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "own":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # torch before 2.13 has none
    return request.param


# float64 to the order of summation; bfloat16 rounds logits and gradients to 8 bits in both
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("vocabulary", [8, 50])
def test_cross_entropy_and_gradients_are_those_of_logits(implementation, vocabulary, dtype, bound) -> None:
    features, weight, targets = head_inputs(vocabulary, dtype)
    ours = loss_and_gradients(linear_cross_entropy(features, weight, targets), features, weight)
    wide = [x.detach().double().requires_grad_() for x in (features, weight)]
    plain = F.cross_entropy(F.linear(*wide), targets, ignore_index=IGNORED, reduction="sum")
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_equal(ours, loss_and_gradients(plain, *wide), bound)


def test_cross_entropy_of_nothing_that_counts_is_zero(implementation) -> None:
    features, weight, targets = head_inputs(50, torch.float32)
    loss, *grads = loss_and_gradients(
        linear_cross_entropy(features, weight, torch.full_like(targets, IGNORED)), features, weight
    )
    assert loss == 0
    assert all(not grad.any() for grad in grads)


def test_cross_entropy_in_autocast_and_without_gradients(implementation) -> None:
    features, weight, targets = head_inputs(50, torch.float32)
    plain = F.cross_entropy(F.linear(features, weight), targets, ignore_index=IGNORED, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        lower = linear_cross_entropy(features, weight, targets)
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(features, weight, targets), plain.detach())
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, plain, rtol=1e-2, atol=0)
    assert torch.autograd.grad(lower, features)[0].dtype == torch.float32


def test_cross_entropy_never_holds_all_logits(monkeypatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # its inside is not visible
    features, weight, targets = head_inputs(50, torch.float32)
    elements: list[int] = []

    def see(func: Any, args: Any, result: Any) -> None:
        elements.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))

    with Watch(see):
        linear_cross_entropy(features, weight, targets).backward()
    assert max(elements) < ROWS * 50 / 2


def test_gradients_of_a_sum_that_float16_cannot_say(implementation) -> None:
    # 100,000 alike: the head's gradient before it is scaled to a mean is past 65,504
    features = torch.ones(100_000, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(50, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(features, weight, torch.zeros(100_000, dtype=torch.int64)) / 100_000
    (grad,) = torch.autograd.grad(loss, weight)
    expected = torch.full((50, 4), 1 / 50)
    expected[0] -= 1
    torch.testing.assert_close(grad.float(), expected, rtol=1e-2, atol=1e-3)


def test_evaluation_computes_no_gradients(monkeypatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    features, weight, targets = head_inputs(50, torch.float32)
    products: list[Any] = []

    def see(func: Any, args: Any, result: Any) -> None:
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            products.append(func)

    with torch.no_grad(), Watch(see):
        linear_cross_entropy(features, weight, targets)
    assert len(products) == -(-ROWS // 256)
