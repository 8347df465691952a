"""Attention of one tile in plain torch, on any device and in float64; for the signatures see
:mod:`lightning_lss.attention.kernels`."""

import torch
from torch import Tensor

_ROWS = 512  # query rows at a time, so that memory stays linear in the sequence length


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, first_row: int, rows: int) -> Tensor:
    """Scores of the query rows from ``first_row`` on, of ``rows`` in all, hidden pairs at minus infinity: [B, G, H/G,
    m, n]."""
    scores = torch.einsum("bgrmd,bgnd->bgrmn", q, k) * scale
    if causal:
        m, n = scores.shape[-2:]
        last_visible = torch.arange(first_row, first_row + m, device=q.device) + (n - rows)
        scores.masked_fill_(torch.arange(n, device=q.device) > last_visible[:, None], float("-inf"))
    return scores


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Cast the tensors to the dtype of the computation: float64 stays, all others become float32."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the textbook formula, a few rows of scores at a time."""
    wide_k, wide_v = _wide(k, v)
    grouped = q.unflatten(1, (k.size(1), -1))  # [B, G, H/G, m, D]
    outs, lses = [], []
    for first in range(0, q.size(2), _ROWS):
        (block,) = _wide(grouped[..., first : first + _ROWS, :])
        scores = _scores(block, wide_k, causal, scale, first, q.size(2))
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bgrmn,bgnd->bgrmd", (scores - lse[..., None]).exp_(), wide_v))
        lses.append(lse)
    return torch.cat(outs, -2).flatten(1, 2).to(q.dtype), torch.cat(lses, -1).flatten(1, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of :func:`forward`."""
    wide_k, wide_v = _wide(k, v)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    grouped = [x.unflatten(1, (k.size(1), -1)) for x in (grad, q, out)]
    grouped_lse = lse.unflatten(1, (k.size(1), -1))
    grads_q = []
    for first in range(0, q.size(2), _ROWS):
        rows = slice(first, first + _ROWS)
        g, block, o = _wide(*(x[..., rows, :] for x in grouped))
        probabilities = (_scores(block, wide_k, causal, scale, first, q.size(2)) - grouped_lse[..., rows, None]).exp_()
        grad_v += torch.einsum("bgrmn,bgrmd->bgnd", probabilities, g)
        grad_scores = torch.einsum("bgrmd,bgnd->bgrmn", g, wide_v).sub_((g * o).sum(-1, keepdim=True))
        grad_scores.mul_(probabilities).mul_(scale)
        grads_q.append(torch.einsum("bgrmn,bgnd->bgrmd", grad_scores, wide_k))
        grad_k += torch.einsum("bgrmn,bgrmd->bgnd", grad_scores, block)
    return torch.cat(grads_q, -2).flatten(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
