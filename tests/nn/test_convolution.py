"""Convolutions along a split sequence equal those of one device, with their gradients."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss import SegmentConv1d
from lightning_lss.nn.convolution import crossing_borders
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard
from lightning_lss.testing.compare import assert_equal

LAYOUTS = ["contiguous", "zigzag", "balanced"]


def shard_of(rank: int, layout: str) -> SequenceShard:
    size = dist.get_world_size()
    held = tuple((r, 3 * size - 2 * (r + 1), 3 * size - 2 * (r + 1) + 1) for r in range(size))
    assignment = ChunkAssignment(held) if layout == "balanced" else None
    return SequenceShard(rank, size, layout, dist.group.WORLD, assignment=assignment)


def settings(draw: random.Random, causal: bool) -> dict[str, Any]:
    kernel, dilation = draw.randint(1, 6), draw.randint(1, 3)
    reach = dilation * (kernel - 1)
    padding = "causal" if causal else draw.choice(["same"] if reach % 2 else ["same", reach // 2])
    return {
        "kernel_size": kernel,
        "padding": padding,
        "dilation": dilation,
        "groups": draw.choice([1, 2]),
        "bias": draw.random() < 0.5,
    }


def backward(conv: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The result, and the gradients of a weighted sum of it: of the input, then of the parameters."""
    y, x.grad = conv(x), None
    conv.zero_grad()
    (y * weights).sum().backward()
    return [y, x.grad, *(p.grad for p in conv.parameters())]  # type: ignore[list-item]


def convolve(shard: SequenceShard, draw: random.Random, by_hooks: bool) -> None:
    torch.manual_seed(draw.randrange(999))
    options = settings(draw, causal=not by_hooks and draw.random() < 0.4)
    conv = (nn.Conv1d if by_hooks else SegmentConv1d)(4, 6, **options).double()
    x = torch.randn(2, 4, shard.num_chunks * draw.randint(1, 9), dtype=torch.float64)
    weights = torch.randn(2, 6, x.size(2), dtype=torch.float64)
    expected = backward(conv, x.clone().requires_grad_(), weights)
    segment, own = shard.split(x, 2).requires_grad_(), shard.split(weights, 2)
    if by_hooks:
        with crossing_borders([conv], lambda: shard):
            found = backward(conv, segment, own)
    else:
        conv.set_shard(shard)
        found = backward(conv, segment, own)
    for gradient in found[2:]:
        dist.all_reduce(gradient)
    parts = [shard.split(t, 2) for t in expected[:2]]
    assert_equal(found, [*parts, *expected[2:]], 1e-10, what=str((options, x.shape)))


def many_on_rank(rank: int, layout: str, seed: int, by_hooks: bool) -> None:
    draw = random.Random(seed)
    for _ in range(25):
        convolve(shard_of(rank, layout), draw, by_hooks)


@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3])
def test_random_kernels_lengths_and_layouts(world, size: int, layout: str, by_hooks: bool) -> None:
    world.run(size, many_on_rank, layout, size, by_hooks)


def compiled_on_rank(rank: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(SegmentConv1d(2, 2, 3), nn.GELU()), torch.randn(3, 2, 16)
    expected, shard = model(x), shard_of(rank, "zigzag")
    model[0].set_shard(shard)
    assert torch.allclose(torch.compile(model, backend="eager")(shard.split(x, 2)), shard.split(expected, 2), atol=1e-6)


def test_compiled(world) -> None:
    world.run(2, compiled_on_rank)


# -- one device --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["same", 2, (2,)])
def test_on_one_device_it_is_torchs(padding: Any) -> None:
    torch.manual_seed(0)
    ours = SegmentConv1d(2, 3, 3, padding=padding, dilation=2)
    torchs = nn.Conv1d(2, 3, 3, padding=padding, dilation=2)
    assert ours.load_state_dict(torchs.state_dict()).missing_keys == []
    x = torch.randn(2, 2, 7)
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours(x[0]), torchs(x[0]))


def test_a_causal_one_sees_no_later_position() -> None:
    conv, x = SegmentConv1d(1, 1, 3, padding="causal", dilation=2).double(), torch.randn(1, 1, 9, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: conv(t)[0, 0], x)[:, 0, 0]
    distance = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(jacobian != 0, (distance >= 0) & (distance <= 4) & (distance % 2 == 0))
    assert "padding=causal" in repr(conv)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"padding": 0}, r"padding=0 does not keep .*kernel_size=3 and dilation=1.*padding='same'"),
        ({"padding": "valid"}, "padding=valid does not keep"),
        ({"stride": 2, "padding": 1}, "stride=2 does not keep the length"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular' needs .*use 'zeros'"),
        ({"kernel_size": 4, "padding": 2}, r"padding=2 does not keep .*kernel_size=4"),
    ],
)
def test_what_does_not_keep_the_length_is_refused(options: dict[str, Any], words: str) -> None:
    options = {"kernel_size": 3, **options}
    with pytest.raises(ValueError, match=words):
        SegmentConv1d(2, 2, **options)
    with pytest.raises(ValueError, match=words), crossing_borders([nn.Conv1d(2, 2, **options)], lambda: WHOLE_SEQUENCE):
        pass


# -- hooks -------------------------------------------------------------------------------------------------------------


def hooks_on_rank(rank: int) -> None:
    torch.manual_seed(0)
    shard, conv, seen = shard_of(rank, "zigzag"), nn.Conv1d(2, 2, 3, padding=1), []
    conv.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())[0].shape), with_kwargs=True
    )
    conv.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    x = torch.randn(3, 2, 16)
    expected = conv(x)
    compiled = torch.compile(conv, backend="eager")
    assert torch.allclose(compiled(x), expected)  # before the run
    seen.clear()
    with crossing_borders([conv], lambda: shard):
        own = shard.split(x, 2)
        assert torch.allclose(conv(own), shard.split(expected, 2), atol=1e-6)
        assert torch.allclose(conv(input=own), shard.split(expected, 2), atol=1e-6)
        assert seen == [(3, 2, 8)] * 4  # the user's hooks see the segment
        assert torch.allclose(compiled(own), shard.split(expected, 2), atol=1e-6)
        moved = copy.deepcopy(conv)
        nn.init.zeros_(moved.weight)
        assert torch.allclose(moved(own), moved.bias[:, None].expand(3, 2, 8))  # a copy convolves with its own weights
        with pytest.raises(ValueError, match=r"needs \[B, C, l\]; got \[2, 8\].*conv\(x\[None\]\)\[0\]"):
            conv(own[0])
    assert len(conv._forward_hooks) == len(conv._forward_pre_hooks) == 1  # the user's
    assert torch.equal(conv(x), expected)
    assert torch.allclose(compiled(x), expected)


def test_hooks_come_and_go(world) -> None:
    world.run(2, hooks_on_rank)
