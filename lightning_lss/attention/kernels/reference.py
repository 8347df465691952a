"""Attention of one tile in plain torch, on any device and in float64; for the signatures see
:mod:`lightning_lss.attention.kernels`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_lss.attention.kernels.scores import Scores

TAKES = frozenset({"bias", "softcap", "dropout", "windows", "offset_diagonal"})
_ROWS = 512  # query rows at a time, so that memory stays linear in the sequence length


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS))


def _capped(q: Tensor, k: Tensor, how: Scores) -> Tensor:
    """Scores of query rows [B, G, H/G, m, D] after soft-capping: [B, G, H/G, m, n]."""
    scores = torch.einsum("bgrmd,bgnd->bgrmn", q, k) * how.scale
    return scores if how.softcap is None else scores.div_(how.softcap).tanh_().mul_(how.softcap)


def _slope(capped: Tensor, how: Scores) -> Tensor | None:
    """The derivative of soft-capping at capped scores, or None without it."""
    return None if how.softcap is None else 1 - (capped / how.softcap).square_()


def _mask_(capped: Tensor, how: Scores, rows: slice, tile: tuple[int, int]) -> Tensor:
    """Add the bias of ``rows`` of a tile (m, n), and put hidden pairs to minus infinity; in place."""
    if how.bias is not None:
        capped += _grouped(how.bias, capped, rows)
    hidden = how.hidden(*tile, rows, capped.device)
    return capped if hidden is None else capped.masked_fill_(hidden, float("-inf"))


def _grouped(pairs: Tensor, like: Tensor, rows: slice) -> Tensor:
    """Some rows of the bias or of what is kept, [B or 1, H or 1, m, n], to go with [B, G, H/G, rows, n]."""
    heads = (1, 1) if pairs.size(1) == 1 else like.shape[1:3]
    return pairs[:, :, rows].unflatten(1, heads)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Cast the tensors to the dtype of the computation: float64 stays, all others become float32."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Compute the textbook formula, a few rows of scores at a time."""
    wide_k, wide_v = _wide(k, v)
    grouped = q.unflatten(1, (k.size(1), -1))  # [B, G, H/G, m, D]
    outs, lses = [], []
    for rows in _blocks(q.size(2)):
        (block,) = _wide(grouped[..., rows, :])
        masked = _mask_(_capped(block, wide_k, scores), scores, rows, (q.size(2), k.size(2)))
        lse = masked.logsumexp(-1)
        probabilities = masked.sub_(lse.masked_fill(lse.isneginf(), 0)[..., None]).exp_()
        if scores.kept is not None:
            probabilities *= _grouped(scores.kept, probabilities, rows)
        outs.append(torch.einsum("bgrmn,bgnd->bgrmd", probabilities, wide_v))
        lses.append(lse)
    return torch.cat(outs, -2).flatten(1, 2).to(q.dtype), torch.cat(lses, -1).flatten(1, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of :func:`forward`."""
    wide_k, wide_v = _wide(k, v)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    grouped = [x.unflatten(1, (k.size(1), -1)) for x in (grad, q, out)]
    grouped_lse = lse.unflatten(1, (k.size(1), -1))
    grads_q = []
    for rows in _blocks(q.size(2)):
        g, block, o = _wide(*(x[..., rows, :] for x in grouped))
        capped = _capped(block, wide_k, scores)
        slope = _slope(capped, scores)
        masked = _mask_(capped, scores, rows, (q.size(2), k.size(2)))
        probabilities = masked.sub_(grouped_lse[..., rows, None]).exp_()
        grad_scores = torch.einsum("bgrmd,bgnd->bgrmn", g, wide_v)
        used = probabilities
        if scores.kept is not None:
            kept = _grouped(scores.kept, probabilities, rows)
            grad_scores *= kept
            used = probabilities * kept
        grad_v += torch.einsum("bgrmn,bgrmd->bgnd", used, g)
        grad_scores.sub_((g * o).sum(-1, keepdim=True)).mul_(probabilities).mul_(scores.scale)
        if slope is not None:
            grad_scores *= slope
        grads_q.append(torch.einsum("bgrmn,bgnd->bgrmd", grad_scores, wide_k))
        grad_k += torch.einsum("bgrmn,bgrmd->bgnd", grad_scores, block)
    return torch.cat(grads_q, -2).flatten(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
