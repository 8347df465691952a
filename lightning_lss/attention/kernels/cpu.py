"""Attention of one tile on CPUs by torch's flash kernel; for the signatures see
:mod:`lightning_lss.attention.kernels`."""

import torch
from torch import Tensor

aten = torch.ops.aten


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call torch's flash attention for CPUs."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of :func:`flash_forward`."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def flash_forward_keys(rows: int) -> int | None:
    """Limit the keys of a call with fewer than 768 rows.

    The kernel processes such rows in blocks of 64 (or 32) instead of 256, and reads all keys once for each block, so
    the keys must stay in the cache (measured with 512 rows: 15 % of the time). With more rows the joins cost more.
    """
    return 2048 if rows < 768 else None
