"""Rotary embedding turns by global position, whatever the spread."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lss.nn.rotary import RotaryEmbedding
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.layout import STATIC_LAYOUTS
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard

HEAD = 8


def rotary(shard: SequenceShard = WHOLE_SEQUENCE, base: float = 10_000.0) -> RotaryEmbedding:
    module = RotaryEmbedding(HEAD, base)
    module.set_shard(shard)
    return module


def heads(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, 3, length, HEAD, generator=generator, dtype=torch.float64).to(dtype)


class FromPosition(SequenceShard):
    """The segment of ``local_length`` tokens that starts at a given position."""

    start = 0

    def positions(self, local_length: int, device: Any = None) -> Tensor:
        return torch.arange(self.start, self.start + local_length, device=device)


def turned_by_formula(x: Tensor, positions: range, base: float = 10_000.0) -> Tensor:
    """Pair (i, i + D/2) as a complex number times exp(i * position * base^(-2i/D)), with Python's own arithmetic."""
    pairs = torch.complex(*x.double().chunk(2, -1))
    frequencies = [base ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    angles = [[math.fmod(position * frequency, 2 * math.pi) for frequency in frequencies] for position in positions]
    turn = torch.tensor(angles, dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(turn), turn)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_is_a_complex_turn_by_position(base) -> None:
    x = heads(50)
    # angles of up to 50 are good to 50 roundings of 1e-16
    torch.testing.assert_close(rotary(base=base)(x), turned_by_formula(x, range(50), base), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_splitting_then_turning_is_turning_then_splitting(size, layout) -> None:
    x = heads(16)
    whole = rotary()(x)
    for rank in range(size):
        shard = SequenceShard(rank, size, layout)
        assert torch.equal(rotary(shard)(shard.split(x, 2)), shard.split(whole, 2))


def test_scores_depend_on_the_distance_only() -> None:
    q, k = heads(1).expand(-1, -1, 20, -1), heads(2)[:, :, 1:].expand(-1, -1, 20, -1)  # the same at every position
    module = rotary()
    scores = module(q) @ module(k).mT  # [B, H, 20, 20]
    for distance in range(-19, 20):
        along = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores.diagonal(0, -2, -1), scores.diagonal(1, -2, -1)[..., :1], atol=1e-3)


def test_angles_are_right_at_position_four_million_in_float32() -> None:
    shard = FromPosition()
    object.__setattr__(shard, "start", 4_000_000)
    x = heads(8, torch.float32)
    expected = turned_by_formula(x, range(4_000_000, 4_000_008))
    # a few roundings of float32 (6e-8); angles computed in float32 would be off by up to 0.25
    torch.testing.assert_close(rotary(shard)(x).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_turn_is_no_worse_than_float32(dtype) -> None:
    x = heads(30, dtype)
    turned = rotary()(x)
    assert turned.dtype == dtype
    wide = rotary()(x.double() if dtype == torch.float64 else x.float())
    # rounded once, at the end; the turned numbers themselves come from wider ones
    torch.testing.assert_close(turned, wide.to(dtype), rtol=0, atol=0)


def test_training_works_after_inference() -> None:
    module = rotary()
    with torch.inference_mode():
        module(heads(6))
    x = heads(6).requires_grad_()
    turned = module(x)
    (turned * turned.detach()).sum().backward()
    torch.testing.assert_close(x.grad, x.detach(), rtol=1e-13, atol=1e-13)  # a turn's adjoint turns back


def test_what_is_kept_follows_length_dtype_and_shard() -> None:
    module = rotary()
    for x in (heads(6), heads(8), heads(8, torch.float32), heads(6)):
        torch.testing.assert_close(module(x), rotary()(x), rtol=0, atol=0)
    shard = SequenceShard(1, 2, "contiguous")
    module.set_shard(shard)
    assert torch.equal(module(heads(6)), rotary(shard)(heads(6)))


def test_rotary_has_nothing_to_train_or_to_save() -> None:
    module = rotary()
    module(heads(6))
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("head_dim", [0, 7, -2])
def test_rotary_turns_pairs(head_dim) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be even"):
        RotaryEmbedding(head_dim)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rotary = nn.Linear(HEAD, HEAD, dtype=torch.float64), RotaryEmbedding(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        return self.rotary(self.linear(x))


@pytest.mark.parametrize("prepared", [True, False])
def test_compiled_code_serves_every_assignment(prepared) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, counter, x = Projected(), CompileCounterWithBackend("aot_eager"), heads(32)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for seed in range(6):
        owners = torch.randperm(16, generator=torch.Generator().manual_seed(seed)) % 2
        shard = SequenceShard(1, 2, "balanced", assignment=ChunkAssignment.from_owners(owners, 2))
        block.rotary.set_shard(shard)
        own = shard.split(x, 2)
        if prepared:
            block.rotary.prepare(own)
        found = compiled(own)
        found.sum().backward()
        expected = shard.split(rotary()(block.linear(x)), 2)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert counter.frame_count <= 2
