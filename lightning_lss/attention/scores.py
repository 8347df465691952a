"""What a kernel is told about the scores of a tile: masks, biases and dropout by global position."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, Kernel, Packed, Scores
from lightning_lss.attention.plan import Plan
from lightning_lss.attention.series import Series
from lightning_lss.attention.spec import AttentionSpec, Modifiers
from lightning_lss.attention.tiles import Tile
from lightning_lss.sequence.random import keep_mask

# A tile with a number for each of its pairs is computed in parts of this many rows and keys, so that memory stays linear in
# the sequence length.
_ROWS, _KEYS = 256, 1024


@dataclass(frozen=True)
class ScoreMaker:
    """Says how the scores of some query heads are made, tile by tile."""

    spec: AttentionSpec
    plan: Plan
    modifiers: Modifiers
    heads: slice
    like: Tensor
    """A tensor with the dtype and device of the log-sum-exp."""

    def kernel(self, tile: Tile) -> Kernel:
        """The kernel that computes a tile."""
        plain = KERNELS[self.spec.kernel_name]
        takes = tile.table is None and (not tile.cuts_left or "windows" in plain.takes)
        return plain if takes else KERNELS[self.spec.masked_kernel_name]

    def packed(self, series: Series) -> Packed | None:
        """How the kernel computes a series by one call, None if it cannot."""
        plain = KERNELS[self.spec.kernel_name]
        if len(series.groups) == 1 or self._by_pair:
            return None
        return plain.packed if self.scores_of_series(series).needs(1, 2) <= plain.takes else None

    def scores_of_series(self, series: Series) -> Scores:
        """How the scores of each tile of a series are made."""
        left, right = series.window
        window = None if left < 0 and right <= 0 else (left, right)
        return Scores(self.spec.scale, right == 0, softcap=self.spec.softcap, window=window)

    def parts(self, tile: Tile, forward: bool) -> Iterator[Tile]:
        """Cut a tile to what one call of its kernel computes."""
        kernel = self.kernel(tile)
        keys = kernel.forward_keys(tile.rows) if forward else kernel.backward_keys
        if self._by_pair or tile.table is not None:
            return tile.cut(_ROWS, min(keys or _KEYS, _KEYS))
        return tile.cut(None, None if tile.cuts_right or tile.cuts_left else keys)

    @property
    def _by_pair(self) -> bool:
        bias, slopes, seed = self.modifiers.bias, self.modifiers.slopes, self.modifiers.seed
        return bias is not None or slopes is not None or seed is not None

    def scores(self, batch: slice, tile: Tile) -> Scores:
        """How the scores of a tile are made, for some rows of the batch."""
        spec, kernel = self.spec, self.kernel(tile)
        bias = self._bias(batch, tile)
        kept = None if self.modifiers.seed is None else self._kept(batch, tile, self.modifiers.seed)
        if tile.table is None and bias is None and (tile.causal or not (tile.cuts_right or tile.cuts_left)):
            return Scores(spec.scale, tile.causal, softcap=spec.softcap, kept=kept)
        window = tile.window
        if tile.table is None and bias is None and window is not None and "windows" in kernel.takes:
            return Scores(spec.scale, window[1] == 0, softcap=spec.softcap, kept=kept, window=window)
        return Scores(spec.scale, bias=self._hide(batch, tile, bias), softcap=spec.softcap, kept=kept)

    def _hide(self, batch: slice, tile: Tile, bias: Tensor | None) -> Tensor:
        """Add minus infinity to a bias where pairs are hidden."""
        bias = self.like.new_zeros(1, 1, tile.rows, tile.keys) if bias is None else bias
        if tile.cuts_right or tile.cuts_left:
            hidden = _hidden_by_diagonals(tile.rows, tile.keys, tile.low, tile.high, self.like.device)
            bias = bias.masked_fill(hidden, float("-inf"))
        if tile.table is not None:
            bias = torch.where(self._visible(tile, tile.table), bias, float("-inf"))
        return bias

    def _visible(self, tile: Tile, index: int) -> Tensor:
        table = self.plan.tables[index]
        row, key = tile.q_start - table.q_start, tile.k_start - table.k_start
        heads = self.heads if table.visible.size(1) > 1 else slice(None)
        return table.visible[:, heads, row : row + tile.rows, key : key + tile.keys].to(self.like.device)

    def _bias(self, batch: slice, tile: Tile) -> Tensor | None:
        """The bias and the slopes of a tile, [B or 1, H or 1, m, n]."""
        given, slopes = self.modifiers.bias, self.modifiers.slopes
        if given is None and slopes is None:
            return None
        q, k = self._positions(tile)
        total = self.like.new_zeros(1, 1, tile.rows, tile.keys)
        if given is not None:
            own = given[batch if given.size(0) > 1 else slice(None), self.heads if given.size(1) > 1 else slice(None)]
            total = total + _hide_least(own.index_select(2, q).index_select(3, k)).to(total)
        if slopes is not None:
            distance = (q[:, None] - k).abs().to(total)
            total = total - slopes[self.heads].to(total)[:, None, None] * distance
        return total

    def _kept(self, batch: slice, tile: Tile, seed: Tensor) -> Tensor:
        """The dropout of a tile, [B, H, m, n]; it depends on nothing but the seed and the place of each pair."""
        q, k = self._positions(tile)
        rows = torch.arange(batch.start, batch.stop, device=q.device)
        heads = torch.arange(self.heads.start, self.heads.stop, device=q.device)
        indices = rows[:, None, None, None], heads[:, None, None], q[:, None], k
        return keep_mask(seed, *indices, p=self.spec.dropout, dtype=self.like.dtype)

    def _positions(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Global positions of a tile's queries and keys."""
        q, k = self._all_positions
        return q[tile.q_start : tile.q_stop], k[tile.k_start : tile.k_stop]

    @cached_property
    def _all_positions(self) -> tuple[Tensor, Tensor]:
        return self.plan.q_positions.to(self.like.device), self.plan.k_positions.to(self.like.device)


def _hide_least(bias: Tensor) -> Tensor:
    """Put the least numbers of a bias to minus infinity, in place.

    Models write ``finfo.min`` for what is hidden. As a number it would be all that the log-sum-exp of a row keeps that has
    nothing else. A bias in float64 may hold the least number of float32.
    """
    dtype = torch.float32 if bias.dtype == torch.float64 else bias.dtype
    return torch.threshold_(bias, torch.finfo(dtype).min / 2, float("-inf"))


@lru_cache(maxsize=32)
def _hidden_by_diagonals(rows: int, keys: int, low: int, high: int, device: torch.device) -> Tensor:
    """Which pairs of a tile its diagonals hide, bool [1, 1, rows, keys]."""
    difference = torch.arange(rows, device=device)[:, None] - torch.arange(keys, device=device)
    return ((difference < low) | (difference > high))[None, None]
