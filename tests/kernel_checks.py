"""Attention in one tile: inputs, the textbook formula, and how results are compared with it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss.attention.exchange import empty_head_chunk, heads_first
from lightning_lss.attention.kernels import KERNELS, Packed, Scores, Segments
from lightning_lss.testing.compare import assert_equal

SCALE = 0.3

# How much one rounding of each dtype changes a number. Results are sums of some tens of products of numbers around 1,
# so a right kernel is off by ten roundings or so (by fewer in the short types, which it sums up in float32), a wrong
# one by 1e-1 and more.
ROUNDING = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
BOUND = 30 * ROUNDING[torch.float64]
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
    value_width: int | None = None,
) -> Inputs:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    values = width if value_width is None else value_width
    shapes = [(2, heads, m, width), (2, kv_heads, n, width), (2, kv_heads, n, values), (2, heads, m, values)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Inputs(*(x.to(device, dtype) for x in tensors))


def make_bias(
    m: int, n: int, batch: int = 1, heads: int = 1, hidden: float = 0.3, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Numbers around 0, where not minus infinity: a part of the pairs, the third row and the last one."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    bias = torch.randn(batch, heads, m, n, generator=generator, dtype=torch.float64)
    bias[torch.rand(bias.shape, generator=generator) < hidden] = float("-inf")
    bias[..., 2::m, :] = bias[..., -1, :] = float("-inf")
    return bias.to(torch.promote_types(dtype, torch.float32))


def make_kept(m: int, n: int, batch: int = 2, heads: int = 1, dropout: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    kept = torch.rand(batch, heads, m, n, generator=generator, dtype=torch.float64) >= dropout
    return kept.double() / (1 - dropout)


def textbook(inputs: Inputs, how: Scores) -> list[Tensor]:
    """Out, lse, dq, dk, dv from softmax(bias + cap(scale q k^T)) v in float64, diagonals from the bottom right corner."""
    q, k, v, grad = (x.double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q.clone(), k.clone(), v.clone()))
    repeat = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeat, 1).mT * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    m, n = scores.shape[-2:]
    visible = torch.ones(m, n, device=q.device).bool()
    if how.causal:
        visible = visible.tril(n - m)
    left, right = how.window or (-1, -1)
    visible = visible.triu(n - m - left) if left >= 0 else visible
    visible = visible.tril(n - m + right) if right >= 0 else visible
    bias = torch.zeros(1, 1, m, n, device=q.device) if how.bias is None else how.bias
    scores = (scores + bias.double()).masked_fill(~visible, float("-inf"))
    seen = ~scores.isneginf().all(-1, keepdim=True)  # softmax gives rows without a key NaN
    probabilities = scores.masked_fill(~seen, 0).softmax(-1) * seen
    kept = 1 if how.kept is None else how.kept.double()
    out = (probabilities * kept) @ v.repeat_interleave(repeat, 1)
    lse = scores.detach().logsumexp(-1)
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad)]


def compute(name: str, inputs: Inputs, how: Scores) -> list[Tensor]:
    """The same five by the kernel, checked for their shapes and dtypes."""
    q, k, v, grad = inputs
    kernel = KERNELS[name]
    out, lse = kernel.forward(q, k, v, how)
    grads = kernel.backward(grad, q, k, v, out, finite(lse), how)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert [x.shape for x in (out, lse, *grads)] == [grad.shape, q.shape[:3], q.shape, k.shape, v.shape]
    assert all(x.dtype == q.dtype for x in grads)
    return [out, lse, *grads]


def finite(lse: Tensor) -> Tensor:
    """What backward is given: 0 for rows without a key."""
    return lse.masked_fill(lse.isneginf(), 0)


def check(results: Sequence[Tensor], expected: Sequence[Tensor], bound: float, names: Sequence[str] = NAMES) -> None:
    """Compare by name; the log-sum-exp may be minus infinity, in the same rows."""
    assert len(results) == len(expected) == len(names)
    for x, y in zip(results, expected):
        assert torch.equal(x.isneginf(), y.isneginf())
    assert_equal(dict(zip(names, map(finite, results))), dict(zip(names, map(finite, expected))), bound)


def check_kernel(name: str, inputs: Inputs, how: Scores, bound: float = BOUND) -> None:
    """Compare the five of the kernel with the textbook's."""
    check(compute(name, inputs, how), textbook(inputs, how), bound)


def laid_out_as_in_attention(inputs: Inputs) -> Inputs:
    """The same numbers as parts of larger tensors: heads and rows of [B, l, H, D], keys and values of a head chunk."""
    q, k, v, grad = inputs
    chunk = heads_first(empty_head_chunk(k, v, k.size(2) + 3)).zero_()
    k, v = chunk[..., 2:-1, :].copy_(torch.cat((k, v), -1)).split((k.size(-1), v.size(-1)), -1)
    larger = [x.new_zeros(x.size(0), x.size(2) + 3, x.size(1) + 2, x.size(3)) for x in (q, grad)]
    q, grad = [whole.transpose(1, 2)[:, 1:-1, 2:-1].copy_(x) for whole, x in zip(larger, (q, grad))]
    return Inputs(q, k, v, grad)


def cuda_tensor(dtype: torch.dtype = torch.float16, width: int = 64) -> SimpleNamespace:
    """What the selection looks at of a tensor on a GPU, on a machine without one."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, size=lambda dim: width)


def packed_loop(name: str) -> Packed:
    """The kernel on one segment after the other; what belongs to no segment stays hidden."""
    kernel = KERNELS[name]

    def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scores: Scores) -> tuple[Tensor, Tensor]:
        out, lse = q.new_zeros(*q.shape[:3], v.size(-1)), q.new_full(q.shape[:3], float("-inf"))
        for rows, keys in segments.parts:
            if rows.start < rows.stop and keys.start < keys.stop:
                out[:, :, rows], lse[:, :, rows] = kernel.forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], scores)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in segments.parts:
            if rows.start < rows.stop and keys.start < keys.stop:
                own = [x[:, :, rows] for x in (grad, q, out, lse)]
                parts = kernel.backward(own[0], own[1], k[:, :, keys], v[:, :, keys], own[2], own[3], scores)
                for whole, part, span in zip(grads, parts, (rows, keys, keys)):
                    whole[:, :, span] = part
        return grads

    return Packed(forward, backward)


def check_packed(
    name: str, rows: Sequence[int], keys: Sequence[int], inputs: Inputs, how: Scores, bound: float
) -> None:
    """Compare the kernel's one call for segments with the textbook's result for each, in the first row of the batch."""
    packed, segments = KERNELS[name].packed, Segments(tuple(rows), tuple(keys))
    assert packed is not None
    q, k, v, grad = (x[:1] for x in inputs)
    out, lse = packed.forward(q, k, v, segments, how)
    expected = [torch.zeros_like(x, dtype=torch.float64) for x in (out, lse, q, k, v)]
    expected[1].fill_(float("-inf"))
    for row, key in segments.parts:
        if row.start < row.stop and key.start < key.stop:
            own = textbook(Inputs(q[:, :, row], k[:, :, key], v[:, :, key], grad[:, :, row]), how)
            for whole, part, span in zip(expected, own, (row, row, row, key, key)):
                whole[:, :, span] = part
    check([out, lse, *packed.backward(grad, q, k, v, out, finite(lse), segments, how)], expected, bound)
