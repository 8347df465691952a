"""Dropout whose masks depend on the global position, so that they are the same however a sequence is split."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lss.sequence.random import draw_seed, kept
from lightning_lss.sequence.segment import ShardedModule


@dataclass
class Tile:
    """Positions ``start`` to ``stop`` of a segment of ``length``: what a part of a module's input stands for.

    ``seeds`` are those that the dropout has drawn in this call of the module, in order. All tiles of a call share the
    list, and so use the seeds of the first one: together they draw what the whole segment would.
    """

    start: int
    stop: int
    length: int
    seeds: list[Tensor]
    used: int = field(default=0, init=False)

    def next_seed(self) -> Tensor:
        """Return the seed of the next draw in this tile."""
        if self.used == len(self.seeds):
            self.seeds.append(draw_seed())
        self.used += 1
        return self.seeds[self.used - 1]


class SegmentDropout(ShardedModule):
    """Dropout for a split sequence: each element of the whole sequence is dropped or kept whatever rank holds it.

    A mask depends on a seed, on the row of the batch, on the global position and on the feature. So a training is the same
    with any number of ranks and any layout, on one device without a strategy, on CPU and CUDA. Each call in training
    draws one seed from torch's default CPU generator. The ranks of a sequence group draw the same one, data replicas each
    their own. Activation checkpointing restores the generator's state and so repeats the mask.

    ``p`` is the probability of dropping an element. Use ``torch.nn.Dropout`` for what is the same on all ranks of a
    sequence group, such as pooled features.

    Raises:
        ValueError: if ``p`` is not in [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p={p} must be in [0, 1): it is the probability of dropping an element.")
        self.p = p
        self._tile: Tile | None = None  # what the next input stands for; None for the whole segment

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` and scale the others by 1 / (1 - p); in evaluation return ``x``.

        ``x`` is [B, l, ...], where l is the local length, or [l]. Dimension 1 is taken for the sequence whatever it is: with
        another one there, such as [B, H, l, D], masks depend on how the sequence is split.

        Raises:
            ValueError: if ``x`` has no dimensions; if no sequence can be split into segments of length l; in a module that
                is computed in tiles, if dimension 1 is not the tile.
        """
        if not self.training or self.p == 0.0:
            return x
        if x.dim() == 0:
            raise ValueError("SegmentDropout needs [B, l, ...], not a single number: use torch.nn.Dropout.")
        length = x.size(min(1, x.dim() - 1))
        seed = draw_seed() if self._tile is None else self._tile.next_seed()
        if x.numel() == 0:
            return x
        rows = torch.arange(x.size(0) if x.dim() > 1 else 1, device=x.device)
        features = torch.arange(x.numel() // (rows.numel() * length), device=x.device)
        keep = kept(seed, rows[:, None, None], self._positions(length, x.device)[:, None], features, p=self.p)
        return (x * keep.view(x.shape)).mul_(1 / (1 - self.p))  # autograd holds the mask, a byte for each element

    @contextmanager
    def computing(self, tile: Tile) -> Iterator[None]:
        """Take inputs for ``tile`` within the ``with`` statement; raise ``ValueError`` if they are for another already."""
        if self._tile is not None:
            raise ValueError(
                "A module that is computed in tiles contains another one: name only one of them in tiled_modules."
            )
        self._tile = tile
        try:
            yield
        finally:
            self._tile = None

    def _positions(self, length: int, device: torch.device) -> Tensor:
        tile = self._tile
        if tile is None:
            return self.shard.positions(length, device)
        if length != tile.stop - tile.start:
            raise ValueError(
                f"SegmentDropout in a module that is computed in tiles was given {length} positions in dimension 1, where the tile"
                f" has {tile.stop - tile.start}. Give it [B, l, ...], or name other modules in tiled_modules."
            )
        return self.shard.positions(tile.length, device)[tile.start : tile.stop]

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"p={self.p}"
