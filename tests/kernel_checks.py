"""Attention in one tile: inputs, the textbook formula, and how results are compared with it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss.attention.exchange import empty_head_chunk, heads_first
from lightning_lss.attention.kernels import KERNELS, Scores
from lightning_lss.testing.compare import assert_equal

SCALE = 0.3

# How much one rounding of each dtype changes a number. Results are sums of some tens of products of numbers around 1,
# so a right kernel is off by ten roundings or so (by fewer in the short types, which it sums up in float32), a wrong
# one by 1e-1 and more.
ROUNDING = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
NAMES = ("out", "lse", "dq", "dk", "dv")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


def make_inputs(
    m: int,
    n: int,
    heads: int = 2,
    kv_heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Inputs:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    shapes = [(2, heads, m, width), (2, kv_heads, n, width), (2, kv_heads, n, width), (2, heads, m, width)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Inputs(*(x.to(device, dtype) for x in tensors))


def textbook(inputs: Inputs, causal: bool) -> list[Tensor]:
    """Out, lse, dq, dk, dv from softmax(scale q k^T) v in float64, the causal diagonal ending in the bottom right
    corner."""
    q, k, v, grad = (x.double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q.clone(), k.clone(), v.clone()))
    repeat = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeat, 1).mT * SCALE
    m, n = scores.shape[-2:]
    if causal:
        hidden = torch.ones(m, n, device=q.device).triu(n - m + 1).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(repeat, 1)
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def compute(name: str, inputs: Inputs, causal: bool) -> list[Tensor]:
    """The same five by the kernel, checked for their shapes and dtypes."""
    q, k, v, grad = inputs
    kernel = KERNELS[name]
    out, lse = kernel.forward(q, k, v, Scores(SCALE, causal))
    grads = kernel.backward(grad, q, k, v, out, lse, Scores(SCALE, causal))
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert [x.shape for x in (out, lse, *grads)] == [q.shape, q.shape[:3], q.shape, k.shape, v.shape]
    assert all(x.dtype == q.dtype for x in grads)
    return [out, lse, *grads]


def check(results: Sequence[Tensor], expected: Sequence[Tensor], bound: float, names: Sequence[str] = NAMES) -> None:
    """Compare by name."""
    assert len(results) == len(expected) == len(names)
    assert_equal(dict(zip(names, results)), dict(zip(names, expected)), bound)


def laid_out_as_in_attention(inputs: Inputs) -> Inputs:
    """The same numbers as parts of larger tensors: heads and rows of [B, l, H, D], keys and values of a head chunk."""
    q, k, v, grad = inputs
    chunk = heads_first(empty_head_chunk(k.new_zeros(k.size(0), k.size(1), k.size(2) + 3, k.size(3)), 1))
    keys_values = chunk.zero_()[..., 2:-1, :].copy_(torch.stack((k, v)))
    larger = [x.new_zeros(x.size(0), x.size(2) + 3, x.size(1) + 2, x.size(3)) for x in (q, grad)]
    q, grad = [whole.transpose(1, 2)[:, 1:-1, 2:-1].copy_(x) for whole, x in zip(larger, (q, grad))]
    return Inputs(q, *keys_values, grad)
