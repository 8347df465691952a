"""Dropout whose masks differ from segment to segment."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.sequence.segment import ShardedModule


class SegmentDropout(ShardedModule):
    """Dropout whose mask differs from segment to segment; with one rank it is ``torch.nn.Dropout``.

    ``p`` is the probability of dropping an element. The seed of each mask is drawn from the default CPU generator.
    Activation checkpointing restores that generator's state and so draws the same mask again.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p={p} must be in [0, 1): it is the probability of dropping an element.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, of any shape, and scale the others by 1 / (1 - p)."""
        if self.shard.size == 1 or not self.training or self.p == 0.0:
            return F.dropout(x, self.p, self.training)
        return x * self._mask(x)

    @torch.compiler.disable  # generators cannot be traced: dropout breaks the graph
    def _mask(self, x: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, (), device="cpu").item()) + self.shard.rank
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"p={self.p}"
