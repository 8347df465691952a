"""Attention of one tile on CPUs by torch's flash kernel; for the signatures see :mod:`lightning_lss.attention.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's flash attention for CPUs."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of :func:`flash_forward`."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def flash_forward_keys(rows: int) -> int | None:
    """Fewer than 768 rows the kernel takes 64 at a time (or 32), not 256, and passes over all keys as often: these must
    stay in the cache (measured with 512 rows: 15 % of the time). More rows lose more by the joins than they gain."""
    return 2048 if rows < 768 else None
