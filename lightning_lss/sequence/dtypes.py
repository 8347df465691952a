"""Autocast for functions that torch's own lists do not know, and the dtype in which tensors travel."""

from __future__ import annotations

import torch
from torch import Tensor


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own attention and linear layers take theirs; float64
    is left alone."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_communication_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype itself, also where a configuration file names it.

    Raises:
        ValueError: if it is neither of bfloat16 and float16, nor None.
    """
    if dtype is None or dtype in _HALF.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _HALF:
        return _HALF[dtype.removeprefix("torch.")]
    raise ValueError(
        f"communication_dtype={dtype!r} must be 'bfloat16' or 'float16', or None to send tensors in the dtype that they"
        " are computed in."
    )
