"""Dropout differs by segment and repeats itself on replay; a sequence group shares its other random numbers."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.parallel.broadcast import share_random_state
from lightning_lss.sequence.segment import SequenceShard

P = 0.25


def dropout(rank: int = 0, size: int = 2, p: float = P) -> SegmentDropout:
    module = SegmentDropout(p)
    module.set_shard(SequenceShard(rank, size))
    return module


def seeded(module: nn.Module, x: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return module(x)


def test_masks_differ_by_segment() -> None:
    masks = [seeded(dropout(rank, 4), torch.ones(1000)) for rank in range(4)]
    for i in range(4):
        for j in range(i):
            # independent masks agree in P^2 + (1 - P)^2 = 0.625 of the places, up to 5 x sqrt(0.23 / 1000)
            agreement = (masks[i] == masks[j]).float().mean().item()
            assert agreement == pytest.approx(0.625, abs=0.08)


def test_masks_differ_from_call_to_call_and_repeat_with_the_seed() -> None:
    module, x = dropout(1), torch.ones(1000)
    first, second = seeded(module, x), module(x)
    assert not torch.equal(first, second)
    assert torch.equal(seeded(module, x), first)


def test_every_segment_advances_the_shared_stream_equally() -> None:
    after = []
    for rank in range(2):
        seeded(dropout(rank), torch.ones(10))
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_mean_is_kept_and_the_right_share_is_dropped() -> None:
    y = seeded(dropout(1), torch.ones(100_000))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / (1 - P)]))
    # shares of 100,000 scatter by sqrt(P (1 - P) / 100,000) = 0.0014, the mean by 4/3 of it
    assert (y == 0).float().mean().item() == pytest.approx(P, abs=5 * 0.0014)
    assert y.mean().item() == pytest.approx(1.0, abs=5 * 0.0019)
    assert y.var().item() == pytest.approx(P / (1 - P), abs=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_with_one_rank_it_is_torchs_dropout_bit_for_bit(training) -> None:
    ours, torchs = SegmentDropout(P).train(training), nn.Dropout(P).train(training)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seeded(ours, x), seeded(torchs, x))


def test_nothing_is_dropped_or_drawn_in_evaluation_or_with_p_0() -> None:
    x = torch.ones(100)
    for module in (dropout(1).eval(), dropout(1, p=0.0)):
        assert torch.equal(seeded(module, x), x)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask_again(use_reentrant) -> None:
    layers = nn.Sequential(dropout(1), nn.Tanh(), dropout(1))
    x = torch.linspace(0.5, 2.0, 1000, dtype=torch.float64)
    plain, replayed = (x.clone().requires_grad_() for _ in range(2))
    seeded(layers, plain).sum().backward()
    torch.manual_seed(5)
    y = checkpoint(layers, replayed, use_reentrant=use_reentrant)
    torch.rand(7)  # the backward pass finds the generator elsewhere
    y.sum().backward()
    assert torch.equal(replayed.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay_and_the_gradient_has_the_mask(dtype) -> None:
    x = torch.ones(3, 0, 2, dtype=dtype)
    assert dropout(1)(x).shape == x.shape
    x = torch.ones(4, 50, dtype=dtype).T.requires_grad_()
    y = seeded(dropout(1), x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert torch.equal(x.grad, y)


def test_the_seed_comes_from_the_cpu_whatever_the_default_device_is() -> None:
    x = torch.ones(100)
    expected = seeded(dropout(1), x)
    with torch.device("meta"):
        assert torch.equal(seeded(dropout(1), x), expected)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2])
def test_a_probability_outside_the_range_is_refused(p) -> None:
    with pytest.raises(ValueError, match=rf"p={p} must be in \[0, 1\)"):
        SegmentDropout(p)


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the state that libraries use


def draws_on_rank(rank: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    own = draw()
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    share_random_state(pair, torch.device("cpu"))
    return own, draw(), draw()


def test_a_sequence_group_continues_with_the_states_of_its_first_rank(world) -> None:
    ranks = world.run(4, draws_on_rank)
    for rank, (_, shared, next_shared) in enumerate(ranks):
        first_own, first_shared, first_next = ranks[rank // 2 * 2]
        assert shared == first_own == first_shared
        assert next_shared == first_next
    assert ranks[0][1] != ranks[2][1]  # another group keeps another state
