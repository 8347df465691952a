"""Attention of one tile on CUDA by torch's own operators; for the signatures see
:mod:`lightning_lss.attention.kernels`.

torch does not document what the operators expect, and they check little of it: a wrong stride gives wrong gradients,
not an error. The expectations are therefore written down beside each kernel, from torch's sources
(``aten/src/ATen/native/transformers/cuda/attention_backward.cu``, ``aten/src/ATen/native/cudnn/MHA.cpp``).
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Pad head widths with zeros to a multiple of 8, as the kernels require; zeros change no score."""
    return [F.pad(x, (0, -x.size(-1) % 8)) if x.size(-1) % 8 else x for x in tensors]


# -- flash -------------------------------------------------------------------------------------------------------------
# FlashAttention-2, or 3 or 4 where ``torch.nn.attention.activate_flash_attention_impl`` has registered them under the
# same operators. All require contiguous rows and take any other strides (the operator for version 2 copies the output
# and its gradient itself). All take grouped-query heads and end a causal diagonal in the bottom right corner. Version 2
# requires a contiguous log-sum-exp.


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call FlashAttention (arXiv 2307.08691)."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*_padded(q, k, v), 0.0, causal, False, scale=scale)
    return out[..., : q.size(-1)], lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    """Compute the adjoint of :func:`flash_forward`."""
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # loaded by the kernel, used only with dropout
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    lengths = None, None, q.size(2), k.size(2)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *_padded(grad, q, k, v, out), lse.contiguous(), *lengths, 0.0, causal, seed, unused, scale=scale
    )
    return tuple(x[..., : q.size(-1)] for x in grads)


# -- cuDNN -------------------------------------------------------------------------------------------------------------
# cuDNN builds a graph for the shapes and strides of queries, keys and values, and caches it with the strides that the
# output and its gradient have in the first call. These two are therefore always made contiguous. A causal diagonal
# starts in the top left corner. Grouped-query heads are supported.


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call cuDNN's attention."""
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*_padded(q, k, v), None, True, 0.0, causal, scale=scale)
    return out[..., : q.size(-1)], lse.view(q.shape[:3])


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    """Compute the adjoint of :func:`cudnn_forward`."""
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout generator's state
    lse = lse.contiguous()
    if _cudnn_keeps_last_dimension(q.device, q.dtype):
        lse = lse.unsqueeze(-1)
    padded = _padded(grad.contiguous(), q, k, v, out.contiguous())
    bias_and_lengths = None, None, None, q.size(2), k.size(2)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *padded, lse, unused, unused, *bias_and_lengths, 0.0, causal, scale=scale
    )
    return tuple(x[..., : q.size(-1)] for x in grads)


@cache
def _cudnn_keeps_last_dimension(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the log-sum-exp is [B, H, m, 1], as in newer versions of torch, or [B, H, m].

    The backward operator takes the shape that the forward operator returns.
    """
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim() == 4


# -- memory-efficient --------------------------------------------------------------------------------------------------
# The kernels of xFormers, which also support float32 and GPUs before Ampere. The operators take [B, m, H, D], with as
# many key/value heads as query heads. The rows of the log-sum-exp are padded to a multiple of 32. The backward kernel
# assumes a contiguous output.

_NO_MASK, _BOTTOM_RIGHT = 0, 2  # custom_mask_type, as in torch.nn.attention.bias.CausalVariant
_LSE_ROWS = 32


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that use it: [B, G, n, D] -> [B, H, n, D]."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)


def _summed(grad: Tensor, heads: int) -> Tensor:
    """Compute the adjoint of :func:`_repeated`: [B, H, n, D] -> [B, G, n, D]."""
    return grad if grad.size(1) == heads else grad.unflatten(1, (heads, -1)).sum(2)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call memory-efficient attention (arXiv 2112.05682) as implemented by xFormers."""
    padded = _padded(q, _repeated(k, q.size(1)), _repeated(v, q.size(1)))
    mask, bias_and_lengths = _BOTTOM_RIGHT if causal else _NO_MASK, [None] * 5
    out, lse, *_ = aten._efficient_attention_forward(
        *(x.transpose(1, 2) for x in padded), *bias_and_lengths, 0.0, mask, True, scale=scale
    )
    return out.transpose(1, 2)[..., : q.size(-1)], lse[..., : q.size(2)]


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    """Compute the adjoint of :func:`efficient_forward`."""
    heads, rows = q.shape[1:3]
    padded = _padded(grad, q, _repeated(k, heads), _repeated(v, heads), out)
    *inputs, padded_out = (x.transpose(1, 2) for x in padded)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout generator's state
    lse = F.pad(lse, (0, -rows % _LSE_ROWS), value=float("inf")).contiguous()  # padding rows get weight 0
    mask, lengths = _BOTTOM_RIGHT if causal else _NO_MASK, (None, None, rows, k.size(2))
    *grads, _ = aten._efficient_attention_backward(
        *inputs, None, padded_out.contiguous(), *lengths, lse, 0.0, unused, unused, mask, False, scale=scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2)[..., : q.size(-1)] for x in grads)
    return grad_q, _summed(grad_k, k.size(1)), _summed(grad_v, v.size(1))
