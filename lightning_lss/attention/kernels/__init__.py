"""Attention of one tile, forward and backward, with its log-sum-exp; one signature over every kernel.

A kernel takes ``q`` [B, H, m, D] and ``k``, ``v`` [B, G, n, D]. H is a multiple of G (grouped-query heads): query head
``h`` uses key/value head ``h // (H / G)``.

- ``forward(q, k, v, causal, scale)`` returns ``out`` [B, H, m, D] in the dtype of ``q`` and ``lse`` [B, H, m], the log
  of the sum of the exponentials of each row's scores (float32, or float64 for float64 inputs);
- ``backward(grad, q, k, v, out, lse, causal, scale)`` returns ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` may be those
  of the whole row while ``k`` and ``v`` are only a part of its keys. The result is then that part's contribution to the
  gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2), so tiles need no correction.

Tiles with ``causal`` are square, unless the kernel has ``offset_diagonal``: it then also takes wider ones, whose
diagonal ends in the bottom right corner.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss.attention.kernels import cpu, cuda, reference

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


class Kernel(NamedTuple):
    """One way to compute a tile."""

    name: str
    forward: Forward
    backward: Backward
    offset_diagonal: bool = False
    backward_keys: int | None = None
    """Maximum number of keys for one call of ``backward``, where fewer at a time are faster; None for any number."""
    forward_keys: Callable[[int], int | None] = lambda rows: None
    """The same for ``forward``, by the number of query rows of the call."""


def select_kernel(q: Tensor, name: str = "auto") -> Kernel:
    """Return the kernel called ``name``, or with ``"auto"`` the best one for the device, dtype and head width of ``q``
    [B, H, l, D].

    Raises:
        ValueError: if the name is unknown, or the kernel does not support such a tensor.
    """
    if name == "auto":
        return KERNELS[next(known for known in KERNELS if _obstacle(known, q) is None)]
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown: choose 'auto' or one of {', '.join(map(repr, KERNELS))}.")
    obstacle = _obstacle(name, q)
    if obstacle is not None:
        raise ValueError(f"kernel={name!r} {obstacle}. Use kernel='auto' or 'reference'.")
    return KERNELS[name]


def _obstacle(name: str, q: Tensor) -> str | None:
    """Why the kernel cannot take ``q``, as the end of a sentence, or None."""
    device, dtype, width = q.device.type, q.dtype, q.size(-1)
    if name == "reference" or (name == "cpu_flash" and device == "cpu"):
        return None
    runs_on = "cpu" if name == "cpu_flash" else "cuda"
    if device != runs_on:
        return f"runs on {runs_on.upper()} tensors, not on {device}"
    efficient, amd = name == "efficient", torch.version.hip is not None
    if efficient and amd:
        return "needs an NVIDIA GPU"
    if efficient and dtype == torch.float64:
        return "computes in float32, float16 and bfloat16, not in torch.float64"
    if not efficient and dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, not in {dtype}"
    needs_ampere = not amd and (not efficient or dtype == torch.bfloat16)
    if needs_ampere and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 (Ampere) or newer for {dtype}"
    if width > _WIDEST_HEAD.get(name, width):
        return f"takes heads of width up to {_WIDEST_HEAD[name]}, not {width}"
    return None


_WIDEST_HEAD = {"cuda_flash": 256, "cudnn": 128}


# In order of preference: "auto" takes the first one that supports the tensors.
_KERNELS = (
    # each block of queries reads all keys and their gradients, and these must stay in the cache (measured: 1,024)
    Kernel("cpu_flash", cpu.flash_forward, cpu.flash_backward, backward_keys=1024, forward_keys=cpu.flash_forward_keys),
    Kernel("cuda_flash", cuda.flash_forward, cuda.flash_backward, offset_diagonal=True),
    Kernel("cudnn", cuda.cudnn_forward, cuda.cudnn_backward),
    Kernel("efficient", cuda.efficient_forward, cuda.efficient_backward, offset_diagonal=True),
    Kernel("reference", reference.forward, reference.backward, offset_diagonal=True),
)
KERNELS = {kernel.name: kernel for kernel in _KERNELS}
