"""Attention of one tile on CUDA by torch's own operators; for the signatures see
:mod:`lightning_lss.attention.kernels`.

torch does not document what the operators expect, and they check little of it: a wrong stride gives wrong gradients,
not an error. The expectations are therefore written down beside each kernel, from torch's sources
(``aten/src/ATen/native/transformers/cuda/attention_backward.cu``, ``aten/src/ATen/native/cudnn/MHA.cpp``).
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.attention.kernels.packed import Packed, Segments
from lightning_lss.attention.kernels.scores import Scores

aten = torch.ops.aten

FLASH = frozenset({"offset_diagonal", "windows"})
CUDNN: frozenset[str] = frozenset()
EFFICIENT = frozenset({"offset_diagonal", "bias"})
Gradients = tuple[Tensor, Tensor, Tensor]


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padded(width: int, x: Tensor) -> Tensor:
    """Pad the heads of a tensor with zeros to ``width``, a multiple of 8. Rows must also start at such multiples; those
    of keys and values that are stored side by side may not, and are copied."""
    starts = *x.stride()[:-1], x.storage_offset()
    if x.size(-1) == width and not any(start % 8 for start in starts):
        return x
    return F.pad(x, (0, width - x.size(-1)))  # copies whatever the padding


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Pad the width of each tensor to a multiple of 8."""
    return [_padded(_round_up(x.size(-1), 8), x) for x in tensors]


def _equal(*tensors: Tensor) -> list[Tensor]:
    """Pad all tensors to one width, a multiple of 8."""
    width = _round_up(max(x.size(-1) for x in tensors), 8)
    return [_padded(width, x) for x in tensors]


def _cut(grads: Sequence[Tensor], *like: Tensor) -> Gradients:
    """Remove the padding of gradients of ``like``: of q, k and v."""
    grad_q, grad_k, grad_v = (grad[..., : x.size(-1)] for grad, x in zip(grads, like))
    return grad_q, grad_k, grad_v


# -- flash -------------------------------------------------------------------------------------------------------------
# FlashAttention-2, or 3 or 4 where ``torch.nn.attention.activate_flash_attention_impl`` has registered them under the
# same operators. All require contiguous rows and take any other strides (the operator for version 2 copies the output
# and its gradient itself), and values of the width of the keys. All take grouped-query heads and end a causal diagonal
# in the bottom right corner. Version 2 requires a contiguous log-sum-exp, and gives a row that sees no key plus
# infinity. Only the operators without ``scaled_dot_product`` in their names take a window; theirs are [B, m, H, D].


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call FlashAttention (arXiv 2307.08691)."""
    assert scores.needs(q.size(2), k.size(2)) <= FLASH
    padded = _equal(q, k, v)
    if scores.window is None:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*padded, 0.0, scores.causal, False, scale=scores.scale)
        return out[..., : v.size(-1)], lse
    lengths = None, None, q.size(2), k.size(2)
    out, lse, *_ = aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in padded), *lengths, 0.0, False, False, scale=scores.scale, **_window(scores)
    )
    return out.transpose(1, 2)[..., : v.size(-1)], lse.masked_fill(lse.isposinf(), float("-inf"))


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> Gradients:
    """Compute the adjoint of :func:`flash_forward`."""
    assert scores.needs(q.size(2), k.size(2)) <= FLASH
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # loaded by the kernel, used only with dropout
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    padded = _equal(grad, q, k, v, out)
    lse, lengths = lse.contiguous(), (None, None, q.size(2), k.size(2))
    if scores.window is None:
        grads = aten._scaled_dot_product_flash_attention_backward(
            *padded, lse, *lengths, 0.0, scores.causal, seed, unused, scale=scores.scale
        )
        return _cut(grads, q, k, v)
    *inputs, padded_out = (x.transpose(1, 2) for x in padded)
    grads = aten._flash_attention_backward(
        *inputs, padded_out, lse, *lengths, 0.0, False, seed, unused, scale=scores.scale, **_window(scores)
    )
    return _cut([x.transpose(1, 2) for x in grads], q, k, v)


def _window(scores: Scores) -> dict[str, int]:
    left, right = scores.band()
    return {"window_size_left": left, "window_size_right": right}


# The form for segments ("varlen") takes rows of all segments as [m, H, D], and int32 tensors of where segments start and
# end, on the device and contiguous. Its log-sum-exp is [H, m]. The lengths of the longest segments are limits: rows and
# keys beyond them are not computed. Segments without rows or keys are possible. With a longest segment of one row,
# grouped-query heads and no window, version 2 takes it for granted that every segment has one row. What becomes of rows
# and keys that no block of the kernel visits differs by version, so their results are overwritten.


@lru_cache(maxsize=128)
def _lengths(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where segments start and end, and the lengths of the longest."""
    rows, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in (segments.rows, segments.keys))
    return rows, keys, max(2, *(m for m, _ in segments.sizes)), max(n for _, n in segments.sizes)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """View one row of the batch as segments: [1, H, m, D] -> [m, H, D]."""
    return [x[0].transpose(0, 1) for x in tensors]


def _packed_options(scores: Scores) -> dict[str, Any]:
    return {"scale": scores.scale, **_window(scores)}


def packed_flash_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call FlashAttention once for all segments."""
    assert scores.needs(1, 2) <= FLASH
    lengths, causal = _lengths(segments, q.device), scores.band() == (-1, 0)
    out, lse, *_ = aten._flash_attention_forward(
        *_flat(*_equal(q, k, v)), *lengths, 0.0, causal, False, **_packed_options(scores)
    )
    out, lse = out.transpose(0, 1)[None, ..., : v.size(-1)], lse[None].masked_fill(lse.isposinf(), float("-inf"))
    for rows in segments.blind_rows:
        out[:, :, rows] = 0
        lse[:, :, rows] = float("-inf")
    return out, lse


def packed_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scores: Scores
) -> Gradients:
    """Compute the adjoint of :func:`packed_flash_forward`."""
    assert scores.needs(1, 2) <= FLASH
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    lengths, causal = _lengths(segments, q.device), scores.band() == (-1, 0)
    flat = _flat(*_equal(grad, q, k, v, out))
    grads = aten._flash_attention_backward(
        *flat, lse[0].contiguous(), *lengths, 0.0, causal, seed, unused, **_packed_options(scores)
    )
    grad_q, grad_k, grad_v = _cut([x.transpose(0, 1)[None] for x in grads], q, k, v)
    for rows in segments.blind_rows:
        grad_q[:, :, rows] = 0
    for keys in segments.unseen_keys:
        grad_k[:, :, keys] = 0
        grad_v[:, :, keys] = 0
    return grad_q, grad_k, grad_v


FLASH_PACKED = None if torch.version.hip else Packed(packed_flash_forward, packed_flash_backward)

# -- cuDNN -------------------------------------------------------------------------------------------------------------
# cuDNN builds a graph for the shapes and strides of queries, keys and values, and caches it with the strides that the
# output and its gradient have in the first call. These two are therefore always made contiguous. A causal diagonal
# starts in the top left corner. Grouped-query heads are supported. Some versions take a bias, and values of another
# width; this one gives them neither.


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call cuDNN's attention."""
    assert scores.needs(q.size(2), k.size(2)) <= CUDNN
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *_equal(q, k, v), None, True, 0.0, scores.causal, scale=scores.scale
    )
    return out[..., : v.size(-1)], lse.view(q.shape[:3])


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> Gradients:
    """Compute the adjoint of :func:`cudnn_forward`."""
    assert scores.needs(q.size(2), k.size(2)) <= CUDNN
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout generator's state
    lse = lse.contiguous()
    if _cudnn_keeps_last_dimension(q.device, q.dtype):
        lse = lse.unsqueeze(-1)
    padded = _equal(grad.contiguous(), q, k, v, out.contiguous())
    bias_and_lengths = None, None, None, q.size(2), k.size(2)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *padded, lse, unused, unused, *bias_and_lengths, 0.0, scores.causal, scale=scores.scale
    )
    return _cut(grads, q, k, v)


@cache
def _cudnn_keeps_last_dimension(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the log-sum-exp is [B, H, m, 1], as in newer versions of torch, or [B, H, m].

    The backward operator takes the shape that the forward operator returns.
    """
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim() == 4


# -- memory-efficient --------------------------------------------------------------------------------------------------
# The kernels of xFormers, which also support float32 and GPUs before Ampere. The operators take [B, m, H, D], with as
# many key/value heads as query heads, and values of any width. The rows of the log-sum-exp are padded to a multiple of
# 32. The backward kernel assumes a contiguous output. A bias must have the dtype of the queries (so it is rounded to
# it, as for torch's own attention), the shape [B, H, m, n], contiguous keys, and rows, heads and a start that are
# aligned to 8 numbers, or 16 for some types. What becomes of a row that sees no key differs by version.

_NO_MASK, _BOTTOM_RIGHT = 0, 2  # custom_mask_type, as in torch.nn.attention.bias.CausalVariant
_LSE_ROWS = 32
_ALIGNMENT = 16


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that use it: [B, G, n, D] -> [B, H, n, D]."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)


def _summed(grad: Tensor, heads: int) -> Tensor:
    """Compute the adjoint of :func:`_repeated`: [B, H, n, D] -> [B, G, n, D]."""
    return grad if grad.size(1) == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _bias(scores: Scores, q: Tensor, keys: int) -> Tensor | None:
    """The bias as the operators require it, in a copy only where it must be."""
    if scores.bias is None:
        return None
    bias = scores.bias.to(q.dtype)
    *strides, last = bias.stride()
    if last != 1 or any(x % _ALIGNMENT for x in (*strides, bias.storage_offset())):
        bias = bias.new_empty(*bias.shape[:3], _round_up(keys, _ALIGNMENT))[..., :keys].copy_(bias)
    return bias.expand(*q.shape[:3], keys)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call memory-efficient attention (arXiv 2112.05682) as implemented by xFormers."""
    assert scores.needs(q.size(2), k.size(2)) <= EFFICIENT
    padded = _aligned(q, _repeated(k, q.size(1)), _repeated(v, q.size(1)))
    mask, bias, lengths = _BOTTOM_RIGHT if scores.causal else _NO_MASK, _bias(scores, q, k.size(2)), [None] * 4
    out, lse, *_ = aten._efficient_attention_forward(
        *(x.transpose(1, 2) for x in padded), bias, *lengths, 0.0, mask, True, scale=scores.scale
    )
    out, lse = out.transpose(1, 2)[..., : v.size(-1)], lse[..., : q.size(2)]
    hidden = scores.hidden_rows(q.size(2), k.size(2))
    if hidden is not None:
        out, lse = out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, float("-inf"))
    return out, lse


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> Gradients:
    """Compute the adjoint of :func:`efficient_forward`."""
    assert scores.needs(q.size(2), k.size(2)) <= EFFICIENT
    heads, rows = q.shape[1:3]
    padded = _aligned(grad, q, _repeated(k, heads), _repeated(v, heads), out)
    *inputs, padded_out = (x.transpose(1, 2) for x in padded)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout generator's state
    lse = F.pad(lse, (0, -rows % _LSE_ROWS), value=float("inf")).contiguous()  # padding rows get weight 0
    mask, bias = _BOTTOM_RIGHT if scores.causal else _NO_MASK, _bias(scores, q, k.size(2))
    lengths = None, None, rows, k.size(2)
    *grads, _ = aten._efficient_attention_backward(
        *inputs, bias, padded_out.contiguous(), *lengths, lse, 0.0, unused, unused, mask, False, scale=scores.scale
    )
    grad_q, grad_k, grad_v = _cut([x.transpose(1, 2) for x in grads], q, k, v)
    return grad_q, _summed(grad_k, k.size(1)), _summed(grad_v, v.size(1))
