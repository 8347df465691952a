"""The rectangles of the attention matrix that one rank computes under a layout: pure integer arithmetic."""

from collections.abc import Iterator
from typing import NamedTuple

from lightning_lss.sequence.layout import position_ranges


class Tile(NamedTuple):
    """A rectangle: local query rows ``[q_start, q_stop)`` against global keys ``[k_start, k_stop)``.

    With ``causal`` the last row sees all keys of the tile and each row above it one fewer: the diagonal ends in the
    bottom right corner. A square tile is then the ordinary lower triangle.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Number of query-key pairs that the tile computes."""
        rows, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return rows * keys - (rows * (rows - 1) // 2 if self.causal else 0)

    def cut(self, keys: int | None) -> Iterator["Tile"]:
        """Cut the tile into parts of at most ``keys`` keys each, in order; with None or a diagonal it stays whole."""
        step = self.k_stop - self.k_start if keys is None or self.causal else keys
        for start in range(self.k_start, self.k_stop, step):
            yield self._replace(k_start=start, k_stop=min(start + step, self.k_stop))


def pairs_of_rank(length: int, rank: int, size: int, layout: str, causal: bool) -> int:
    """Number of query-key pairs that ``rank`` computes; for the arguments see :func:`attention_tiles`."""
    return sum(tile.pairs for tile in attention_tiles(length, rank, size, layout, causal))


def attention_tiles(
    length: int, rank: int, size: int, layout: str, causal: bool, offset_diagonal: bool = False
) -> tuple[Tile, ...]:
    """Tiles of ``rank`` in a sequence of ``length``; over all ranks they cover every visible pair exactly once.

    With ``offset_diagonal`` the kernel can end the diagonal of a tile that is wider than it is high in the bottom right
    corner. Otherwise such a tile is cut into a rectangle and a triangle.
    """
    ranges = position_ranges(length, rank, size, layout)
    if not causal:
        return (Tile(0, sum(map(len, ranges)), 0, length, False),)
    tiles, row = [], 0
    for positions in ranges:
        rows = (row, row := row + len(positions))
        diagonal_from = 0 if offset_diagonal else positions.start
        if diagonal_from > 0:
            tiles.append(Tile(*rows, 0, diagonal_from, False))
        tiles.append(Tile(*rows, diagonal_from, positions.stop, True))
    return tuple(tiles)
