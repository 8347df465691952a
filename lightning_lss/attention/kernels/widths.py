"""Heads of the width that a kernel requires."""

from torch import Tensor
from torch.nn import functional as F


def pad_heads(width: int, *tensors: Tensor) -> list[Tensor]:
    """Pad heads [..., D] with zeros to ``width``: they change no score, and results are 0 there."""
    return [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in tensors]
