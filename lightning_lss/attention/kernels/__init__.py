"""Attention of one tile, forward and backward, with its log-sum-exp; one signature over every kernel.

A kernel takes ``q`` [B, H, m, D], ``k`` [B, G, n, D] and ``v`` [B, G, n, Dv], all of one dtype. H is a multiple of G
(grouped-query heads): query head ``h`` uses key/value head ``h // (H / G)``. :class:`Scores` says what becomes of the
scores.

- ``forward(q, k, v, scores)`` returns ``out`` [B, H, m, Dv] in the dtype of ``q`` and ``lse`` [B, H, m], the log of the
  sum of the exponentials of each row's scores, before dropout (float32, or float64 for float64 inputs). A row that sees
  no key of the tile has ``out`` 0 and ``lse`` minus infinity;
- ``backward(grad, q, k, v, out, lse, scores)`` returns ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` may be those of the
  whole row while ``k`` and ``v`` are only a part of its keys. The result is then that part's contribution to the
  gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2), so tiles need no correction. ``lse`` must be finite: pass 0
  for a row that sees no key at all.

A causal tile is at least as wide as high, and square for a kernel without ``"offset_diagonal"``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss.attention.kernels import cpu, cuda, flex, reference
from lightning_lss.attention.kernels.packed import Packed, Segments
from lightning_lss.attention.kernels.scores import Scores

__all__ = ["FEATURES", "KERNELS", "Kernel", "Packed", "Scores", "Segments", "select_kernel"]

Forward = Callable[[Tensor, Tensor, Tensor, Scores], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Scores], tuple[Tensor, Tensor, Tensor]]

FEATURES = {
    "bias": "an additive mask",
    "softcap": "soft-capping",
    "dropout": "dropout",
    "windows": "a window",
    "offset_diagonal": "a causal tile that is not square",
}
"""What :class:`Scores` can ask for beyond a square causal tile: the names of :attr:`Kernel.takes`, in words."""


class Kernel(NamedTuple):
    """One way to compute a tile."""

    name: str
    forward: Forward
    backward: Backward
    takes: frozenset[str] = frozenset()
    """The names in :data:`FEATURES` that it can do."""
    backward_keys: int | None = None
    """Maximum number of keys for one call of ``backward``, where fewer at a time are faster; None for any number."""
    forward_keys: Callable[[int], int | None] = lambda rows: None
    """The same for ``forward``, by the number of query rows of the call."""
    skips_hidden: bool = False
    """Whether a tile with a window takes little more time than its visible pairs; else it is cut to small ones."""
    packed: Packed | None = None
    """How it computes many tiles by one call, if it can."""


def select_kernel(
    q: Tensor, name: str = "auto", needs: frozenset[str] = frozenset(), value_width: int | None = None
) -> Kernel:
    """Return the kernel called ``name``, or with ``"auto"`` the best one for the device, dtype and head width of ``q``
    [B, H, l, D] that takes all ``needs``, names in :data:`FEATURES`. ``value_width`` is Dv, None if it is D.

    Raises:
        ValueError: if the name is unknown, or the kernel does not support such tensors or needs.
    """
    assert needs <= FEATURES.keys(), needs
    width = max(q.size(-1), value_width or 0)
    if name == "auto":
        return KERNELS[next(known for known in KERNELS if _obstacle(known, q, width, needs) is None)]
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown: choose 'auto' or one of {', '.join(map(repr, KERNELS))}.")
    obstacle = _obstacle(name, q, width, needs)
    if obstacle is not None:
        raise ValueError(f"kernel={name!r} {obstacle}. Use kernel='auto' or 'reference'.")
    return KERNELS[name]


def _obstacle(name: str, q: Tensor, width: int, needs: frozenset[str]) -> str | None:
    """Why the kernel cannot take ``q``, heads of ``width`` or ``needs``, as the end of a sentence, or None."""
    missing = [words for feature, words in FEATURES.items() if feature in needs - KERNELS[name].takes]
    if missing:
        return f"does not take {' or '.join(missing)}"
    if name == "cuda_flash" and "windows" in needs and torch.version.hip is not None:
        return "takes a window only on an NVIDIA GPU"
    return _obstacle_of_tensors(name, q, width)


def _obstacle_of_tensors(name: str, q: Tensor, width: int) -> str | None:
    device, dtype = q.device.type, q.dtype
    if name == "reference" or (name == "cpu_flash" and device == "cpu"):
        return None
    runs_on = "cpu" if name == "cpu_flash" else "cuda"
    if device != runs_on:
        return f"runs on {runs_on.upper()} tensors, not on {device}"
    efficient, amd, float32 = name == "efficient", torch.version.hip is not None, name in ("efficient", "flex")
    if efficient and amd:
        return "needs an NVIDIA GPU"
    if float32 and dtype == torch.float64:
        return "computes in float32, float16 and bfloat16, not in torch.float64"
    if not float32 and dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, not in {dtype}"
    if name == "flex" and not flex.is_available():
        return "needs torch.compile and Triton"
    needs_ampere = not amd and (not efficient or dtype == torch.bfloat16)
    if needs_ampere and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 (Ampere) or newer for {dtype}"
    if width > _WIDEST_HEAD.get(name, width):
        return f"takes heads of width up to {_WIDEST_HEAD[name]}, not {width}"
    return None


_WIDEST_HEAD = {"cuda_flash": 256, "cudnn": 128, "flex": flex.WIDEST_HEAD}


# In order of preference: "auto" takes the first one that supports the tensors and the needs.
_KERNELS = (
    Kernel(
        "cpu_flash",
        cpu.flash_forward,
        cpu.flash_backward,
        cpu.FLASH,
        # each block of queries reads all keys and their gradients, and these must stay in the cache (measured: 1,024)
        backward_keys=1024,
        forward_keys=cpu.flash_forward_keys,
    ),
    Kernel(
        "cuda_flash",
        cuda.flash_forward,
        cuda.flash_backward,
        cuda.FLASH,
        skips_hidden=True,
        packed=cuda.FLASH_PACKED,
    ),
    Kernel("cudnn", cuda.cudnn_forward, cuda.cudnn_backward, cuda.CUDNN),
    Kernel("efficient", cuda.efficient_forward, cuda.efficient_backward, cuda.EFFICIENT),
    Kernel("flex", flex.forward, flex.backward, flex.TAKES, skips_hidden=True),
    Kernel("reference", reference.forward, reference.backward, reference.TAKES),
)
KERNELS = {kernel.name: kernel for kernel in _KERNELS}
