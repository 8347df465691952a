"""Rotary position embedding for a split sequence."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.segment import SequenceShard, ShardedModule


class RotaryEmbedding(ShardedModule):
    """Rotary position embedding by global position (RoFormer, arXiv 2104.09864, section 3.2.2).

    It pairs channel i of a head's first half with channel i of its second half, as GPT-NeoX does.

    Args:
        head_dim: width D of a head; ``ValueError`` if it is odd.
        base: the longest wavelength is about ``2 * pi * base`` positions.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even: rotary embedding rotates pairs of channels.")
        self.head_dim, self.base = head_dim, base
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def set_shard(self, shard: SequenceShard) -> None:
        """Turn by the positions of ``shard`` from now on."""
        super().set_shard(shard)
        self._cached = None

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [B, H, l, D] by their global positions; the dtype stays."""
        cos, sin = self.prepare(x)
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [l, D/2] of the angles for ``x`` [..., l, any width].

        The latest are cached for other layers. Compiled blocks cannot cache them: call it before, outside of them.
        """
        needs = x.size(-2), x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
        # the shard is no part of the key: a compiled block would be compiled anew for every one
        if self._cached is not None and self._cached[0] == needs:
            return self._cached[1]
        if torch.compiler.is_compiling():  # a graph's tensors may belong to inference mode and must not be cached
            return self._compute_turns(*needs)
        # after a validation in inference mode, training would find tensors that autograd cannot use
        with torch.inference_mode(False), torch.no_grad():
            self._cached = (needs, self._compute_turns(*needs))
        return self._cached[1]

    def _compute_turns(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # angles in float64: at position 4,000,000 a float32 is a quarter of a radian off
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.outer(self.shard.positions(length).double(), self.base**-exponents)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.head_dim}, base={self.base}"
