"""Attention of one tile, forward and backward, with its log-sum-exp; one signature over every kernel.

A kernel takes ``q`` [B, H, m, D] and ``k``, ``v`` [B, G, n, D] with H a multiple of G (grouped-query heads: query head
``h`` uses key/value head ``h // (H / G)``), and

- ``forward(q, k, v, causal, scale)`` returns ``out`` [B, H, m, D] in the dtype of ``q`` and ``lse`` [B, H, m], the log
  of the sum of the exponentials of each row's scores (float32, or float64 for float64 inputs);
- ``backward(grad, q, k, v, out, lse, causal, scale)`` returns ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` may be those
  of the whole row while ``k`` and ``v`` are only a part of its keys: the result is then that part's share of the
  gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2), which is why tiles need no correction.

Tiles with ``causal`` are square unless the kernel says ``offset_diagonal``: the diagonal then ends in the bottom right
corner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss import kernels_cuda

aten = torch.ops.aten

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


class Kernel(NamedTuple):
    """One way to compute a tile."""

    name: str
    forward: Forward
    backward: Backward
    offset_diagonal: bool
    backward_keys: int | None = None
    """The most keys to give to one call of ``backward``, where fewer at a time are faster; None for any number."""
    forward_keys: Callable[[int], int | None] = lambda rows: None
    """The same for ``forward``, by the number of query rows of the call."""


def select_kernel(q: Tensor, name: str = "auto") -> Kernel:
    """The kernel called ``name``, or with ``"auto"`` the best one for the device, dtype and head width of ``q`` [B, H,
    l, D].

    Raises:
        ValueError: if there is no kernel of that name, or it cannot take such a tensor.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown: choose 'auto' or one of {', '.join(map(repr, KERNELS))}.")
    if name == "auto":
        return KERNELS[next(candidate for candidate in KERNELS if _obstacle(candidate, q) is None)]
    obstacle = _obstacle(name, q)
    if obstacle is not None:
        raise ValueError(f"kernel={name!r} {obstacle}. Use kernel='auto' or 'reference'.")
    return KERNELS[name]


def _obstacle(name: str, q: Tensor) -> str | None:
    """Why the kernel cannot take ``q``, as the end of a sentence, or None."""
    device, dtype, width = q.device.type, q.dtype, q.size(-1)
    if name == "reference":
        return None
    if name == "cpu_flash":
        return None if device == "cpu" else f"runs on CPU tensors, not on {device}"
    if device != "cuda":
        return f"runs on CUDA tensors, not on {device}"
    return _cuda_obstacle(name, dtype, width, q.device)


def _cuda_obstacle(name: str, dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    amd = torch.version.hip is not None
    if name == "efficient":
        if amd:
            return "needs an NVIDIA GPU"
        if dtype == torch.float64:
            return "computes in float32, float16 and bfloat16, not in torch.float64"
        ampere_only = dtype == torch.bfloat16
    else:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 and bfloat16, not in {dtype}"
        ampere_only = True
    if ampere_only and not amd and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 (Ampere) or newer for {dtype}"
    widest = _WIDEST_HEAD.get(name)
    if widest is not None and width > widest:
        return f"takes heads of width up to {widest}, not {width}"
    return None


_WIDEST_HEAD = {"cuda_flash": 256, "cudnn": 128}


# -- CPU flash ---------------------------------------------------------------------------------------------------------


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cpu_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


# -- plain reference ---------------------------------------------------------------------------------------------------

_REFERENCE_ROWS = 512  # query rows at a time, so that memory stays linear in the sequence length


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, first_row: int, rows: int) -> Tensor:
    """Scores of query rows ``first_row ...`` of ``rows``, with hidden pairs at minus infinity: [B, G, H/G, m, n]."""
    scores = torch.einsum("bgrmd,bgnd->bgrmn", q, k) * scale
    if causal:
        m, n = scores.shape[-2:]
        last_visible = torch.arange(first_row, first_row + m, device=q.device) + (n - rows)
        scores.masked_fill_(torch.arange(n, device=q.device) > last_visible[:, None], float("-inf"))
    return scores


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that the reference computes in: float64 stays, all else becomes float32."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide_k, wide_v = _wide(k, v)
    grouped = q.unflatten(1, (k.size(1), -1))  # [B, G, H/G, m, D]
    outs, lses = [], []
    for first in range(0, q.size(2), _REFERENCE_ROWS):
        (block,) = _wide(grouped[..., first : first + _REFERENCE_ROWS, :])
        scores = _scores(block, wide_k, causal, scale, first, q.size(2))
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bgrmn,bgnd->bgrmd", (scores - lse[..., None]).exp_(), wide_v))
        lses.append(lse)
    return torch.cat(outs, -2).flatten(1, 2).to(q.dtype), torch.cat(lses, -1).flatten(1, 2)


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide_k, wide_v = _wide(k, v)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    grouped = [x.unflatten(1, (k.size(1), -1)) for x in (grad, q, out)]
    grouped_lse = lse.unflatten(1, (k.size(1), -1))
    grads_q = []
    for first in range(0, q.size(2), _REFERENCE_ROWS):
        rows = slice(first, first + _REFERENCE_ROWS)
        g, block, o = _wide(*(x[..., rows, :] for x in grouped))
        probabilities = (_scores(block, wide_k, causal, scale, first, q.size(2)) - grouped_lse[..., rows, None]).exp_()
        grad_v += torch.einsum("bgrmn,bgrmd->bgnd", probabilities, g)
        grad_scores = torch.einsum("bgrmd,bgnd->bgrmn", g, wide_v).sub_((g * o).sum(-1, keepdim=True))
        grad_scores.mul_(probabilities).mul_(scale)
        grads_q.append(torch.einsum("bgrmn,bgnd->bgrmd", grad_scores, wide_k))
        grad_k += torch.einsum("bgrmn,bgrmd->bgnd", grad_scores, block)
    return torch.cat(grads_q, -2).flatten(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _cpu_flash_forward_keys(rows: int) -> int | None:
    """Fewer than 768 rows the kernel takes 64 at a time (or 32), not 256, and passes over all keys as often: these must
    stay in the cache (measured with 512 rows: 15 % of the time). More rows lose more by the joins than they gain."""
    return 2048 if rows < 768 else None


# In order of preference: "auto" takes the first that can.
KERNELS = {
    kernel.name: kernel
    for kernel in (
        # a block of queries passes over all keys and their gradients, which must stay in the cache (measured: 1,024)
        Kernel(
            "cpu_flash",
            _cpu_flash_forward,
            _cpu_flash_backward,
            offset_diagonal=False,
            backward_keys=1024,
            forward_keys=_cpu_flash_forward_keys,
        ),
        Kernel("cuda_flash", kernels_cuda.flash_forward, kernels_cuda.flash_backward, offset_diagonal=True),
        Kernel("cudnn", kernels_cuda.cudnn_forward, kernels_cuda.cudnn_backward, offset_diagonal=False),
        Kernel("efficient", kernels_cuda.efficient_forward, kernels_cuda.efficient_backward, offset_diagonal=True),
        Kernel("reference", _reference_forward, _reference_backward, offset_diagonal=True),
    )
}
