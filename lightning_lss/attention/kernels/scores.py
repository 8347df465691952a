"""How a kernel makes the scores of a tile and uses them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Scores(NamedTuple):
    """How the scores of a tile [B, H, m, n] are made and used.

    Scores are scaled, then soft-capped, then the bias is added, as in FlexAttention and in Gemma 2.
    """

    scale: float
    causal: bool = False
    """The last row sees all keys, each row above one fewer: the diagonal ends in the bottom right corner."""
    bias: Tensor | None = None
    """Added to the scores after soft-capping, [B or 1, H or 1, m, n]; minus infinity hides a pair. float32, or float64
    for float64 inputs. It has no gradient."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2)."""
    kept: Tensor | None = None
    """Dropout of the probabilities, [B or 1, H or 1, m, n]: 0, or 1 / (1 - p) where a probability is kept."""
    window: tuple[int, int] | None = None
    """A row sees the keys from ``left`` before its place on the bottom-right diagonal to ``right`` after it, both
    included; -1 for no limit."""

    def needs(self, m: int, n: int) -> frozenset[str]:
        """Return what a kernel must take to compute such a tile, by the names of :attr:`Kernel.takes`."""
        features = {
            "bias": self.bias is not None,
            "softcap": self.softcap is not None,
            "dropout": self.kept is not None,
            "windows": self.window is not None,
            "offset_diagonal": self.causal and m != n,
        }
        return frozenset(name for name, needed in features.items() if needed)

    def band(self) -> tuple[int, int]:
        """Return the window with ``causal`` in it: (left, right), -1 for no limit."""
        left, right = self.window or (-1, -1)
        assert min(left, right) >= -1, self.window  # a row's place on the diagonal would be hidden
        return left, 0 if self.causal else right

    def pairs(self, m: int, n: int) -> int:
        """Return the number of pairs that ``causal`` and ``window`` leave of a tile."""
        left, right = self.band()
        diagonal = np.arange(n - m, n)
        first = np.zeros_like(diagonal) if left < 0 else (diagonal - left).clip(0)
        stop = np.full_like(diagonal, n) if right < 0 else (diagonal + right + 1).clip(max=n)
        return int((stop - first).clip(0).sum())

    def hidden(self, m: int, n: int, rows: slice = slice(None), device: torch.device | None = None) -> Tensor | None:
        """Return which pairs of some ``rows`` of the tile ``causal`` and ``window`` hide, bool [rows, n]; None if none."""
        left, right = self.band()
        if left < 0 and right < 0:
            return None
        past = torch.arange(n, device=device) - torch.arange(n - m, n, device=device)[rows, None]  # the diagonal
        if left < 0:
            return past > right
        return past < -left if right < 0 else (past > right) | (past < -left)

    def hidden_rows(self, m: int, n: int) -> Tensor | None:
        """Return which rows of the tile see no key for their bias, bool [B or 1, H or 1, m]; None without a bias."""
        if self.bias is None:
            return None
        hidden = self.hidden(m, n, device=self.bias.device)
        bias = self.bias if hidden is None else self.bias.masked_fill(hidden, float("-inf"))
        return bias.amax(-1).isneginf()
