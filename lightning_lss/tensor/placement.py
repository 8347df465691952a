"""Where the sequence lies in a tensor, and which part of it a rank holds."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lss.sequence.segment import SequenceShard


class Placement(NamedTuple):
    """A dimension of ``outer * length * inner`` entries, split along the ``length`` positions of a sequence.

    ``outer`` and ``inner`` are what a view has merged with the sequence: of [B, L, E], ``flatten(0, 1)`` makes ``outer`` B,
    and ``flatten(1, 2)`` makes ``inner`` E. Where ``length`` does not split evenly, ranks hold segments of a longer
    sequence, whose last positions repeat the last one and count nowhere.
    """

    dim: int
    length: int
    shard: SequenceShard
    outer: int = 1
    inner: int = 1

    @property
    def padded(self) -> int:
        """The length that ranks hold segments of."""
        chunks = self.shard.num_chunks
        return -(-self.length // chunks) * chunks

    @property
    def filled_up(self) -> SequenceShard:
        """The rank's place in sequences of this length; not every tensor of a batch is filled up by as much as the batch."""
        if not self.is_padded:
            return self.shard
        self.shard.check_current()
        return replace(self.shard, padding=self.padded - self.length, is_current=None)

    @property
    def is_padded(self) -> bool:
        """Whether some rank holds positions that count nowhere."""
        return self.length % self.shard.num_chunks != 0

    @property
    def size(self) -> int:
        """Of the whole dimension."""
        return self.outer * self.length * self.inner

    @property
    def part_size(self) -> int:
        """Of the dimension on each rank."""
        return self.outer * (self.padded // self.shard.size) * self.inner

    def at(self, dim: int) -> "Placement":
        """The same in another dimension."""
        return self._replace(dim=dim)

    def whole_shape(self, part: Iterable[int]) -> torch.Size:
        """The shape of the tensor of which a rank holds a part of shape ``part``."""
        return torch.Size([self.size if dim == self.dim else n for dim, n in enumerate(part)])

    def part_shape(self, whole: Iterable[int]) -> torch.Size:
        """The shape of a rank's part of a tensor of shape ``whole``."""
        return torch.Size([self.part_size if dim == self.dim else n for dim, n in enumerate(whole)])

    def part_of(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of ``whole``; differentiable."""
        x = self._unmerge(whole, self.length)
        return self.filled_up.split(x, self.dim + 1).reshape(self.part_shape(whole.shape))

    def gather(self, part: Tensor) -> Tensor:
        """Gather the whole tensor on every rank; differentiable, with the exact adjoint."""
        x = self._unmerge(part, self.padded // self.shard.size)
        return self.filled_up.gather(x, self.dim + 1).reshape(self.whole_shape(part.shape))

    def counts(self, device: torch.device) -> Tensor:
        """Which of this rank's entries of the dimension are of the sequence, bool [part_size]."""
        own = self.filled_up.valid(self.padded // self.shard.size, device)
        return own[:, None].expand(self.outer, -1, self.inner).flatten()

    def counting(self, part: Tensor, value: float = 0.0) -> Tensor:
        """Write ``value`` over what is not of the sequence."""
        if not self.is_padded:
            return part
        shape = [-1 if dim == self.dim else 1 for dim in range(part.dim())]
        return part.masked_fill(~self.counts(part.device).view(shape), value)

    def _unmerge(self, x: Tensor, length: int) -> Tensor:
        """View the dimension as three, [..., outer, length, inner, ...]."""
        return x.reshape(*x.shape[: self.dim], self.outer, length, self.inner, *x.shape[self.dim + 1 :])
