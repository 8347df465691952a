"""How the visible pairs of a mask are cut to tiles, the rectangles that one kernel call computes: pure integers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lightning_lss.attention.bands import FAR, count_pairs, tighten

Band = tuple[int, int, int, int, int, int]
"""A row of :data:`lightning_lss.attention.bands.Bands`: q_start, q_stop, k_start, k_stop, low, high."""

# A kernel without windows computes what is hidden beside a diagonal that cuts off the left of a tile, so such tiles have few
# rows. One call for a strip of a window takes less time than three for its parts, unless these have many keys.
ROWS, WIDE = 128, 2048


class Tile(NamedTuple):
    """A rectangle: the local query rows ``[q_start, q_stop)`` against the fetched keys ``[k_start, k_stop)``.

    Row i of the tile sees its key j where ``low <= i - j <= high`` and the table of the tile, if it has one, says so.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    low: int = -FAR
    high: int = FAR
    table: int | None = None
    """Index in :attr:`lightning_lss.attention.plan.Plan.tables`."""

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.k_stop - self.k_start

    @property
    def cuts_right(self) -> bool:
        """Whether a diagonal hides keys at the right of the upper rows."""
        return self.low > 1 - self.keys

    @property
    def cuts_left(self) -> bool:
        """Whether a diagonal hides keys at the left of the lower rows."""
        return self.high < self.rows - 1

    @property
    def causal(self) -> bool:
        """Whether the last row sees all keys and each row above it one fewer."""
        return self.low == self.rows - self.keys and self.cuts_right and not self.cuts_left

    @property
    def window(self) -> tuple[int, int] | None:
        """The keys that a row sees to the left and to the right of its place on the diagonal that ends in the bottom right
        corner; -1 for all. None if a row has that place beyond what it sees, as in a part of a tile."""
        corner = self.rows - self.keys
        left, right = self.high - corner, corner - self.low
        if (self.cuts_left and left < 0) or (self.cuts_right and right < 0):
            return None
        return left if self.cuts_left else -1, right if self.cuts_right else -1

    @property
    def pairs(self) -> int:
        """Number of visible pairs; with a table, of all pairs."""
        band = np.array([[0, self.rows, 0, self.keys, self.low, self.high]])
        return int(count_pairs(tighten(band)).sum())

    @property
    def whole(self) -> bool:
        """Whether all of its pairs are visible."""
        return not (self.cuts_right or self.cuts_left) and self.table is None

    def part(self, rows: slice, keys: slice) -> "Tile":
        """The part of the tile at some of its rows and keys."""
        shift = rows.start - keys.start
        return Tile(
            self.q_start + rows.start,
            self.q_start + rows.stop,
            self.k_start + keys.start,
            self.k_start + keys.stop,
            self.low - shift,
            self.high - shift,
            self.table,
        )

    def cut(self, rows: int | None, keys: int | None) -> Iterator["Tile"]:
        """Cut the tile to parts of at most ``rows`` rows and ``keys`` keys, None for any number; parts without a visible
        pair are left out."""
        for row in _steps(self.rows, rows):
            for key in _steps(self.keys, keys):
                part = self.part(row, key)
                if part.low <= part.rows - 1 and part.high >= 1 - part.keys:
                    yield part


def _steps(size: int, step: int | None) -> Iterator[slice]:
    for start in range(0, size, step or size):
        yield slice(start, min(start + (step or size), size))


def cut_band(band: Band, offset_diagonal: bool, windows: bool) -> Iterator[Band]:
    """Cut a band to rectangles and triangles that a kernel takes.

    With ``offset_diagonal`` the diagonal of a tile that is wider than it is high may end in the bottom right corner,
    with ``windows`` any tile may have diagonals.
    """
    q0, q1, k0, k1, low, high = band
    cuts_right, cuts_left = low > q0 - k1 + 1, high < q1 - 1 - k0
    if (windows and cuts_left) or not (cuts_right or cuts_left):
        yield band
    elif not cuts_left:
        yield from _cut_right(band, offset_diagonal)
    elif not cuts_right:
        yield from _cut_left(band)
    elif q1 - q0 <= ROWS:
        yield from _cut_strip(band, offset_diagonal)
    else:
        for start in range(q0, q1, ROWS):
            stop = min(start + ROWS, q1)
            strip = start, stop, max(k0, start - high), min(k1, stop - low), low, high
            yield from cut_band(strip, offset_diagonal, windows)


def _cut_right(band: Band, offset_diagonal: bool) -> Iterator[Band]:
    """Cut a band whose upper rows do not see the keys at the right."""
    q0, q1, k0, k1, low, _ = band
    middle = min(q1, k1 + low)  # rows from here on see all keys
    if middle < q1:
        yield middle, q1, k0, k1, -FAR, FAR
    first = k0 if offset_diagonal else q0 - low  # the first row sees the keys up to the latter
    if first > k0:
        yield q0, middle, k0, first, -FAR, FAR
    yield q0, middle, first, middle - low, low, FAR


def _cut_left(band: Band) -> Iterator[Band]:
    """Cut a band whose lower rows do not see the keys at the left; a triangle is halved until it is small."""
    q0, q1, k0, k1, _, high = band
    middle = max(q0, k0 + high)  # rows before this one see all keys
    if middle > q0:
        yield q0, middle, k0, k1, -FAR, FAR
    last = q1 - high  # the last row sees the keys from the one before this on
    if last < k1:
        yield middle, q1, last, k1, -FAR, FAR
    yield from _halve(middle, q1, middle - high, last, high)


def _halve(q0: int, q1: int, k0: int, k1: int, high: int) -> Iterator[Band]:
    if q1 - q0 <= ROWS:
        yield q0, q1, k0, k1, -FAR, high
        return
    middle = (q0 + q1) // 2
    yield q0, middle, middle - high, k1, -FAR, FAR
    yield from _halve(q0, middle, k0, middle - high, high)
    yield from _halve(middle, q1, middle - high, k1, high)


def _cut_strip(band: Band, offset_diagonal: bool) -> Iterator[Band]:
    """Cut a few rows with a diagonal on either side: a wide strip to two triangles and what is between them."""
    q0, q1, k0, k1, low, high = band
    left, right = max(k0, q1 - 1 - high), min(k1, q0 + 1 - low)  # between these all rows see all keys
    if left > right or k1 - k0 <= WIDE:
        yield band
        return
    yield from _cut_left((q0, min(q1, left + high), k0, left, -FAR, high))
    if left < right:
        yield q0, q1, left, right, -FAR, FAR
    yield from _cut_right((q0 + 1, q1, right, k1, low, FAR), offset_diagonal)


class RowGroup(NamedTuple):
    """Local query rows whose keys are all in some tiles, of some rows of the batch."""

    batch: slice
    q_start: int
    q_stop: int
    tiles: tuple[Tile, ...]
    """Tiles of rows ``[q_start, q_stop)``; the highest comes first."""


def group_rows(batch: slice, tiles: Sequence[Tile]) -> list[RowGroup]:
    """Group tiles by the rows that they share, directly or through other tiles."""
    groups: list[list[Tile]] = []
    stop = -1
    for tile in sorted(tiles, key=lambda tile: (tile.q_start, -tile.rows, tile.k_start)):
        if tile.q_start >= stop:
            groups.append([])
        groups[-1].append(tile)
        stop = max(stop, tile.q_stop)
    return [
        RowGroup(
            batch, group[0].q_start, max(tile.q_stop for tile in group), tuple(sorted(group, key=lambda x: -x.rows))
        )
        for group in groups
    ]


def join_tiles(tiles: Sequence[Tile]) -> list[Tile]:
    """Join whole tiles of adjacent rows over the same keys."""
    joined: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (not tile.whole, tile.k_start, tile.k_stop, tile.q_start)):
        last = joined[-1] if joined else None
        same_keys = last is not None and (last.k_start, last.k_stop) == (tile.k_start, tile.k_stop)
        if last is not None and last.whole and tile.whole and same_keys and last.q_stop == tile.q_start:
            joined[-1] = Tile(last.q_start, tile.q_stop, tile.k_start, tile.k_stop)
        else:
            joined.append(tile)
    return joined
