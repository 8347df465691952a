"""Which tiles one call of a kernel can compute together, as segments of rows that each see keys of their own: pure
integers. Packed documents are such tiles."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_lss.attention.bands import FAR
from lightning_lss.attention.tiles import RowGroup, Tile


class Series(NamedTuple):
    """Groups that one call can compute, or a single group of any kind.

    Each of several groups has one tile, all of one row of the batch. Rows and keys ascend from tile to tile.
    """

    groups: tuple[RowGroup, ...]
    window: tuple[int, int] = (-1, -1)
    """Of several groups: a window of every tile, as :attr:`Tile.window`."""
    row_bounds: tuple[int, ...] = ()
    """Of several groups: where segments of rows start and end, counted from the first row. Each group is a segment. Rows
    between groups are a segment without keys, and keys between groups one without rows."""
    key_bounds: tuple[int, ...] = ()
    """The same for their keys."""

    @property
    def batch(self) -> slice:
        """Rows of the batch."""
        return self.groups[0].batch

    @property
    def rows(self) -> slice:
        """Local query rows, from the first of the first group to the last of the last."""
        return slice(self.groups[0].q_start, self.groups[-1].q_stop)

    @property
    def keys(self) -> slice:
        """The same for keys, of several groups."""
        return slice(self.groups[0].tiles[0].k_start, self.groups[-1].tiles[0].k_stop)


class _Limits(NamedTuple):
    """The windows that hide what a tile hides: ``least <= window <= most`` on the left and on the right."""

    least: tuple[int, int]
    most: tuple[int, int]

    def intersect(self, other: "_Limits") -> "_Limits | None":
        least = max(self.least[0], other.least[0]), max(self.least[1], other.least[1])
        most = min(self.most[0], other.most[0]), min(self.most[1], other.most[1])
        return _Limits(least, most) if least[0] <= most[0] and least[1] <= most[1] else None

    @property
    def window(self) -> tuple[int, int]:
        left, right = (-1 if most == FAR else most for most in self.most)
        return left, right


def find_series(groups: Sequence[RowGroup]) -> tuple[Series, ...]:
    """Split groups to series, as long as possible; those of a row of the batch are in the order of their rows."""
    found: list[tuple[list[RowGroup], _Limits | None]] = []
    for group in groups:
        members, limits = found[-1] if found else ([], None)
        common = _common_limits(members[-1], limits, group) if limits is not None else None
        if common is not None:
            members.append(group)
            found[-1] = members, common
        else:
            found.append(([group], _limits_of(group)))
    return tuple(_series_of(members, limits) for members, limits in found)


def _limits_of(group: RowGroup) -> _Limits | None:
    """The limits of the group's only tile, None if it cannot be part of a series."""
    tile = group.tiles[0]
    window = tile.window
    if len(group.tiles) > 1 or tile.table is not None or group.batch.stop - group.batch.start > 1 or window is None:
        return None
    left, right = window
    # where nothing is hidden, any window will do that reaches as far as the tile
    least = tile.keys - 1 if left < 0 else left, tile.rows - 1 if right < 0 else right
    return _Limits(least, (FAR if left < 0 else left, FAR if right < 0 else right))


def _common_limits(last: RowGroup, limits: _Limits, group: RowGroup) -> _Limits | None:
    """The limits of a series when ``group`` follows ``last``, None if it cannot."""
    own = _limits_of(group)
    if own is None or last.batch != group.batch or last.tiles[0].k_stop > group.tiles[0].k_start:
        return None
    assert last.q_stop <= group.q_start
    return limits.intersect(own)


def _series_of(groups: Sequence[RowGroup], limits: _Limits | None) -> Series:
    if limits is None or len(groups) == 1:
        return Series(tuple(groups))
    tiles: list[Tile] = [group.tiles[0] for group in groups]
    rows, keys = [0], [0]
    for tile in tiles:
        row, key = tile.q_start - tiles[0].q_start, tile.k_start - tiles[0].k_start
        if row > rows[-1]:
            rows.append(row)
            keys.append(keys[-1])
        if key > keys[-1]:
            rows.append(row)
            keys.append(key)
        rows.append(row + tile.rows)
        keys.append(key + tile.keys)
    return Series(tuple(groups), limits.window, tuple(rows), tuple(keys))
