"""Bits per byte."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Bits per byte of a text: the sum of the negative log-likelihoods in nats over the number of bytes, over ln 2.

    Both are summed over batches and ranks, so the result is exact however unevenly bytes are spread. Where each
    character is one byte, these are the bits per character that papers report for enwik8.
    """

    full_state_update = higher_is_better = is_differentiable = False

    nats: Tensor
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nats", "num_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor | float, num_bytes: Tensor | float) -> None:
        """Add ``nats``, a sum of negative log-likelihoods, over ``num_bytes`` bytes of text."""
        self.nats += torch.as_tensor(nats, dtype=torch.float64, device=self.nats.device).detach()
        self.num_bytes += torch.as_tensor(num_bytes, dtype=torch.float64, device=self.nats.device)

    def compute(self) -> Tensor:
        """Bits per byte, float64 scalar; NaN before any byte was seen."""
        return self.nats / self.num_bytes / math.log(2)
