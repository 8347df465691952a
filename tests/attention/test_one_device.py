"""Every rank's attention of a sequence group on one device, against plain attention on the whole sequence; and the
stand-ins for collectives by which one rank runs alone. Device-agnostic: on CPU here, on a GPU where there is one.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention.kernels import KERNELS
from lightning_lss.sequence import collectives
from lightning_lss.testing.fake_world import one_rank_of, recorded_ranks, shard_of
from tests.kernel_checks import ROUNDING, Inputs, check, make_inputs

LENGTH = 256
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="computes on a CUDA device, and there is none"),
]
# The bound for two-byte types is twice that of one kernel call: tiles of the same rows are joined, and gradients summed,
# in that type. In float32 sums over ranks are longer than over one kernel's keys.
CASES = [
    ("cpu", "cpu_flash", torch.float64, 100),
    *(
        pytest.param("cuda", name, dtype, limit, marks=GPU)
        for name, dtype, limit in [
            ("cuda_flash", torch.bfloat16, 16),
            ("cudnn", torch.bfloat16, 16),
            ("efficient", torch.bfloat16, 16),
            ("efficient", torch.float32, 100),
        ]
    ),
]


def plain(inputs: Inputs, causal: bool) -> list[Tensor]:
    """Out, dq, dk, dv of the whole sequence in float64."""
    q, k, v, grad = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys_values = [x.repeat_interleave(q.size(1) // k.size(1), 1) for x in leaves[1:]]
    out = torch.nn.functional.scaled_dot_product_attention(q, *keys_values, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("device", "kernel", "dtype", "limit"), CASES)
@pytest.mark.parametrize(
    ("kv_heads", "options"),
    [(8, {"head_chunks": 4}), (2, {"head_chunks": 1}), (2, {"keep_gathered": True}), (1, {"head_chunks": 1})],
)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("size", "causal"), [(4, True), (8, True), (4, False)])
def test_all_ranks_together_are_plain_attention(
    size, causal, layout, kv_heads, options, device, kernel, dtype, limit
) -> None:
    inputs = make_inputs(LENGTH, LENGTH, 8, kv_heads, 64, dtype, device)
    check_all_ranks(inputs, size, layout, causal, limit * ROUNDING[dtype], kernel=kernel, **options)


@pytest.mark.parametrize("keys", [1, 40, LENGTH])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_may_take_any_number_of_keys_at_a_time(monkeypatch, causal, layout, keys) -> None:
    monkeypatch.setitem(
        KERNELS, "cpu_flash", KERNELS["cpu_flash"]._replace(backward_keys=keys, forward_keys=lambda rows: keys)
    )
    inputs = make_inputs(LENGTH, LENGTH, 4, 2, 16, torch.float64, "cpu")
    check_all_ranks(inputs, 4, layout, causal, 100 * ROUNDING[torch.float64], kernel="cpu_flash")


def check_all_ranks(
    inputs: Inputs, size: int, layout: str, causal: bool, bound: float, late: bool = False, **options: Any
) -> None:
    """Compare output and gradients with those of the whole sequence."""

    def work(shard: SequenceShard) -> list[Tensor]:
        q, k, v, grad = (shard.split(x, 2).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = lss_attention(*leaves, shard, causal, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    by_rank = recorded_ranks(work, size, layout, late)
    order = torch.cat([SequenceShard(r, size, layout).positions(LENGTH // size) for r in range(size)]).argsort()
    whole = [torch.cat(parts, 2)[:, :, order.to(inputs[0].device)] for parts in zip(*by_rank)]
    check(whole, plain(inputs, causal), bound, names=("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_copies_stand_in_for_collectives(device) -> None:
    with one_rank_of(4, torch.device(device)):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 4)
        local = torch.arange(6.0, device=device).view(2, 3)
        gathered = collectives.all_gather(local, dist.group.WORLD).wait()
        assert gathered.equal(local.expand(4, 2, 3))
        stacked = torch.arange(24.0, device=device).view(4, 2, 3)
        assert collectives.reduce_scatter(stacked, dist.group.WORLD).wait().equal(stacked.sum(0))
    assert not dist.is_initialized()


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_the_rank_that_is_timed_is_the_busiest(layout) -> None:
    with one_rank_of(4, torch.device("cpu")):
        timed = AttentionMask.causal().plan(64, shard_of(4, layout)).pairs
    assert timed == max(AttentionMask.causal().plan(64, SequenceShard(rank, 4, layout)).pairs for rank in range(4))
