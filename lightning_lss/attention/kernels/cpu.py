"""Attention of one tile on CPUs by torch's flash kernel; for the signatures see
:mod:`lightning_lss.attention.kernels`.

The operator takes values of the width of the keys only. Its causal diagonal starts in the top left corner. It checks
little of its mask: one of float32 beside float64 inputs is read as if it were float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.attention.kernels.scores import Scores

aten = torch.ops.aten

FLASH = frozenset({"bias"})


def _padded(width: int, *tensors: Tensor) -> list[Tensor]:
    """Pad heads [..., D] with zeros to ``width``: they change no score, and results are 0 there."""
    return [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in tensors]


def _mask_of(scores: Scores, q: Tensor) -> Tensor | None:
    return None if scores.bias is None else scores.bias.to(torch.promote_types(q.dtype, torch.float32))


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call torch's flash attention for CPUs."""
    assert scores.needs(q.size(2), k.size(2)) <= FLASH
    padded = _padded(max(q.size(-1), v.size(-1)), q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *padded, 0.0, scores.causal, attn_mask=_mask_of(scores, q), scale=scores.scale
    )
    if scores.bias is not None and not lse.all():  # torch gives rows without a key 0, which others can have too
        hidden = scores.hidden_rows(q.size(2), k.size(2))
        lse = lse.masked_fill(hidden, float("-inf"))
    return out[..., : v.size(-1)], lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of :func:`flash_forward`."""
    assert scores.needs(q.size(2), k.size(2)) <= FLASH
    padded = _padded(max(q.size(-1), v.size(-1)), grad, q, k, v, out)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *padded, lse, 0.0, scores.causal, attn_mask=_mask_of(scores, q), scale=scores.scale
    )
    return dq[..., : q.size(-1)], dk[..., : k.size(-1)], dv[..., : v.size(-1)]


def flash_forward_keys(rows: int) -> int | None:
    """Limit the keys of a call with fewer than 768 rows.

    The kernel processes such rows in blocks of 64 (or 32) instead of 256, and reads all keys once for each block, so
    the keys must stay in the cache (measured with 512 rows: 15 % of the time). With more rows the joins cost more.
    """
    return 2048 if rows < 768 else None
