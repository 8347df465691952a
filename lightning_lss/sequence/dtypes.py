"""Autocast for functions outside torch's own lists, and the dtype in which tensors are sent."""

import torch
from torch import Tensor


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors, except of float64, to autocast's dtype where autocast is on, as torch's linear layers do."""
    device = tensors[0].device.type
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)  # torch 2.11 cannot trace it
    if not available or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def resolve_communication_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Turn the name of a dtype, as in a configuration file, into the dtype; dtypes and None are returned unchanged.

    Raises:
        ValueError: if ``dtype`` is not bfloat16, float16 or None.
    """
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or resolved in (torch.bfloat16, torch.float16):
        return resolved
    raise ValueError(
        f"communication_dtype={dtype!r} must be 'bfloat16' or 'float16', or None to send tensors in the dtype that they"
        " are computed in."
    )
