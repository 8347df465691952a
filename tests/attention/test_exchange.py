"""What is easily right by chance: buffers that take turns, rounding that adds up, options on their way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lss import LSSAttention, SequenceShard, lss_attention
from lightning_lss.attention.kernels import KERNELS, Scores
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.fake_world import recorded_ranks
from tests.kernel_checks import ROUNDING, SCALE, Inputs, make_inputs, textbook

NAMES = ("out", "dq", "dk", "dv")


def expected(inputs: Inputs, causal: bool = True) -> dict[str, Tensor]:
    """Of the whole sequence in float64, with scores scaled by ``SCALE``."""
    out, _, *grads = textbook(inputs, Scores(SCALE, causal))
    return dict(zip(NAMES, (out, *grads)))


def attend(segment: SequenceShard, inputs: Inputs, attention: Any, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of the segment."""
    q, k, v, grad = (segment.split(x, 2) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, **options)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad))))


def whole(by_rank: list[dict[str, Tensor]], layout: str) -> dict[str, Tensor]:
    """Segments of all ranks in position order."""
    size, length = len(by_rank), by_rank[0]["out"].size(2)
    order = torch.cat([SequenceShard(rank, size, layout).positions(length) for rank in range(size)]).argsort()
    return {name: torch.cat([own[name] for own in by_rank], 2)[:, :, order] for name in NAMES}


@pytest.mark.parametrize(
    "options", [{"head_chunks": 4}, {"head_chunks": 2}, {"head_chunks": 1}, {"keep_gathered": True}]
)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_no_buffer_is_used_before_its_collective_is_over(layout, options) -> None:
    # over real ranks a buffer that is written too early is wrong only if the others are slow
    inputs = make_inputs(32, 32, 4, 4)

    def work(shard: SequenceShard) -> dict[str, Tensor]:
        return attend(shard, inputs, lss_attention, shard=shard, scale=SCALE, **options)

    found = whole(recorded_ranks(work, 4, layout, late=True), layout)
    assert_equal(found, expected(inputs), 100 * ROUNDING[torch.float64])


@pytest.mark.parametrize("kernel", ["cpu_flash", "reference"])
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_one_rank_with_a_kernel_of_choice_in_head_chunks(chunks, kernel) -> None:
    # gradients of a head chunk are kept while two buffers serve the chunks after it
    inputs = make_inputs(16, 16, 8, 8)
    own = attend(SequenceShard(), inputs, lss_attention, scale=SCALE, kernel=kernel, head_chunks=chunks)
    assert_equal(own, expected(inputs), 50 * ROUNDING[torch.float64])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_many_tiles_in_bfloat16_are_joined_and_summed_in_float32(monkeypatch, layout, causal) -> None:
    # 64 tiles of 4 keys. One rounding of bfloat16 is 3.9e-3; when every join rounds, they add up to 1e-2.
    kernel = KERNELS["cpu_flash"]._replace(forward_keys=lambda rows: 4, backward_keys=4)
    monkeypatch.setitem(KERNELS, "cpu_flash", kernel)
    inputs = make_inputs(256, 256, 2, 2, 16, torch.bfloat16)

    def work(shard: SequenceShard) -> dict[str, Tensor]:
        return attend(shard, inputs, lss_attention, shard=shard, scale=SCALE, causal=causal, kernel="cpu_flash")

    found = whole(recorded_ranks(work, 2, layout), layout)
    reference = expected(inputs, causal)
    for name, bound in (("out", 4e-3), ("dq", 5e-3)):
        assert_equal({name: found[name]}, {name: reference[name]}, bound)
    assert_equal(found, reference, 2e-2)


@pytest.mark.parametrize("options", [{}, {"kernel": "cpu_flash"}, {"keep_gathered": True}])
@pytest.mark.parametrize("size", [1, 2])
def test_the_module_hands_on_its_scale(size, options) -> None:
    inputs = make_inputs(16, 16, 2, 2)
    module = LSSAttention(scale=SCALE, **options)

    def work(shard: SequenceShard) -> dict[str, Tensor]:
        module.set_shard(shard)
        return attend(shard, inputs, module)

    found = work(SequenceShard()) if size == 1 else whole(recorded_ranks(work, size, "zigzag"), "zigzag")
    assert_equal(found, expected(inputs), 50 * ROUNDING[torch.float64])
