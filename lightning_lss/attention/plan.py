"""What one rank does in one call of attention: the tiles that it computes, and the keys that every rank fetches.

A plan follows from the mask and the layout alone, so every rank knows what all others need without a word.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lss.attention.bands import FAR, HIGH, K0, Q1, Bands, intersect, rectangles
from lightning_lss.attention.kinds import Kind, Sizes
from lightning_lss.attention.packing import PackedMask, no_modes, unpack
from lightning_lss.attention.series import Series, find_series
from lightning_lss.attention.structure import Structure, chunk_work, forget_structures, structure_of
from lightning_lss.attention.tiles import RowGroup, Tile, cut_band, group_rows, join_tiles
from lightning_lss.sequence.segment import SequenceShard

_FEW = 0.5  # of all keys: where ranks need fewer on average, these are sent one by one; else a collective is faster


class Call(NamedTuple):
    """Everything that a plan depends on beside the mask."""

    sizes: Sizes
    rank: int
    chunks: tuple[tuple[int, ...], ...]
    """The chunks of the sequence that each rank holds."""
    fetches: bool = True
    """Whether keys are split over the ranks; else every rank holds them whole."""
    fetches_all: bool = False
    """Whether to fetch the keys that nobody looks at as well."""
    offset_diagonal: bool = False
    windows: bool = False

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the sequence."""
        return sum(map(len, self.chunks))


class Run(NamedTuple):
    """Adjacent keys that a rank needs, all of one chunk."""

    owner: int
    """The rank that holds them."""
    start: int
    """Where they start in the owner's segment."""
    size: int
    position: int
    """Global position of the first."""


class Table(NamedTuple):
    """Which pairs of a tile are visible."""

    q_start: int
    k_start: int
    visible: Tensor
    """bool [B or 1, H or 1, rows, keys]."""


class Plan(NamedTuple):
    """What one rank does in one call of attention."""

    series: tuple[Series, ...]
    tables: tuple[Table, ...]
    needs: tuple[tuple[Run, ...], ...] | None
    """The keys that each rank fetches, in position order, as far as this rank receives or sends them; None for the whole
    sequence."""
    received: tuple[int, ...]
    """How many keys each rank receives from others."""
    hides_rows: bool
    """Whether a row may see nothing."""
    sums: int
    """The largest number of tiles that look at the same key."""
    q_positions: Tensor
    """Global positions of the local queries, int64 [l]."""
    k_positions: Tensor
    """Global positions of the fetched keys, int64."""

    @property
    def groups(self) -> Iterator[RowGroup]:
        """All groups of rows."""
        return (group for series in self.series for group in series.groups)

    @property
    def tiles(self) -> Iterator[tuple[slice, Tile]]:
        """All tiles, each with its rows of the batch."""
        return ((group.batch, tile) for group in self.groups for tile in group.tiles)

    @property
    def pairs(self) -> int:
        """Number of pairs that the rank computes, over all rows of the batch."""
        return sum((batch.stop - batch.start) * tile.pairs for batch, tile in self.tiles)


def plan_call(mask: PackedMask, call: Call) -> Plan:
    """Plan what ``call.rank`` does; every rank's plan is made in the same way, and kept for other layers."""
    has_tables = "bias" in features_of(mask, call)
    return (_plan_with_tables if has_tables else _plan)(mask, call)


@no_modes()
def _make_plan(mask: PackedMask, call: Call) -> Plan:
    sizes, num_chunks = call.sizes, call.num_chunks
    structure = structure_of(mask, sizes, num_chunks, num_chunks if call.fetches else 1)
    needs, received = _needs(mask, call)
    everything = range(sizes.keys)
    runs = [everything] if needs is None else [range(x.position, x.position + x.size) for x in needs[call.rank]]
    held = _adjacent(call.chunks[call.rank], sizes.queries // num_chunks)
    planner = _Tiles(call, unpack(mask), held, _Fetched(runs))
    rows = list(_by_rows(structure, sizes.batch))
    mixed_tiles = planner.mixed_tiles([(batch, mixed) for batch, _, mixed in rows])
    groups = [
        group for (batch, exact, _), mixed in zip(rows, mixed_tiles) for group in planner.groups(batch, exact, mixed)
    ]
    seeing = sum((group.q_stop - group.q_start) * (group.batch.stop - group.batch.start) for group in groups)
    return Plan(
        find_series(groups),
        tuple(planner.tables),
        needs,
        tuple(received),
        seeing < sizes.batch * sum(map(len, held)) or bool(planner.tables),
        _most_tiles(groups, sum(map(len, runs))),
        torch.cat([torch.arange(run.start, run.stop) for run in held]),
        torch.cat([torch.arange(run.start, run.stop) for run in runs] or [torch.arange(0)]),
    )


_plan = lru_cache(maxsize=16)(_make_plan)
_plan_with_tables = lru_cache(maxsize=3)(_make_plan)  # tables take as much memory as a mask by pairs


def plan_segment(mask: PackedMask, length: int, shard: SequenceShard, batch: int = 1, heads: int = 1) -> Plan:
    """Plan self-attention of one segment of sequences of ``length``, for a kernel without special features.

    Raises ``ValueError`` if the length cannot be divided evenly.
    """
    shard.check_length(length)
    return plan_call(mask, Call(Sizes(batch, heads, length, length), shard.rank, shard.held_chunks))


def features_of(mask: PackedMask, call: Call) -> frozenset[str]:
    """What tiles of some rank need of a kernel: ``"windows"`` for a diagonal at the left, ``"bias"`` for a table."""
    key = mask.digest, call  # without the mask itself, which may be large
    if key not in _features:
        if len(_features) == _MOST_FEATURES:
            _features.clear()
        exact, mixed = structure_of(mask, call.sizes, call.num_chunks, call.num_chunks if call.fetches else 1)
        windows = any((x[:, HIGH] < x[:, Q1] - 1 - x[:, K0]).any() for x in exact)
        _features[key] = frozenset({"windows"} if windows else ()) | ({"bias"} if any(map(len, mixed)) else set())
    return _features[key]


_features: dict[tuple[bytes, Call], frozenset[str]] = {}
_MOST_FEATURES = 1024


def forget_plans() -> None:
    """Empty the caches of plans and of what they are made from, as tests and measurements need it."""
    _plan.cache_clear()
    _plan_with_tables.cache_clear()
    forget_structures()
    _features.clear()


# -- which keys --------------------------------------------------------------------------------------------------------


def _needs(mask: PackedMask, call: Call) -> tuple[tuple[tuple[Run, ...], ...] | None, list[int]]:
    """The keys that ranks fetch, None if these are nearly all, and how many each receives."""
    size, keys, num_chunks = len(call.chunks), call.sizes.keys, call.num_chunks
    if size == 1 or not call.fetches:
        return None, [0] * size
    everything = None, [keys - keys // size] * size
    if call.fetches_all:
        return everything
    work, held, chunk = chunk_work(mask, call.sizes, num_chunks), np.array(call.chunks), keys // num_chunks
    owner, local = np.empty(num_chunks, np.int64), np.empty(num_chunks, np.int64)
    owner[held], local[held] = np.arange(size)[:, None], np.arange(held.shape[1]) * chunk
    stop = np.where(work.keys > 0, work.first + work.keys, 0)
    first, width = work.first[held].min(1), stop[held].max(1)  # [S, C]
    width -= first
    wanted = width > 0
    received = np.where(wanted & (owner != np.arange(size)[:, None]), width, 0).sum(1)
    if received.sum() >= _FEW * (size - 1) * keys:
        return everything
    wanted[np.arange(size) != call.rank] &= owner == call.rank  # what others exchange does not matter here
    ranks, columns = np.nonzero(wanted)
    first, width = first[ranks, columns], width[ranks, columns]
    runs = np.stack((owner[columns], local[columns] + first - columns * chunk, width, first), 1)
    needs: list[list[Run]] = [[] for _ in range(size)]
    for rank, run in zip(ranks.tolist(), runs.tolist()):
        needs[rank].append(Run(*run))
    return tuple(map(tuple, needs)), received.tolist()


class _Fetched:
    """Where the keys of some runs of positions are in the buffer that they are fetched into."""

    def __init__(self, runs: list[range]) -> None:
        self._starts = np.array([run.start for run in runs])
        self._offsets = np.cumsum([0, *map(len, runs)])[:-1]

    def __call__(self, position: int) -> int:
        run = int(np.searchsorted(self._starts, position, "right")) - 1
        return int(self._offsets[run] + position - self._starts[run])


# -- which tiles -------------------------------------------------------------------------------------------------------


def _by_rows(structure: Structure, batch: int) -> Iterator[tuple[slice, Bands, Bands]]:
    """The rows of the batch with what is visible there; neighbours that see the same are taken together."""
    if len(structure.exact) == 1:
        yield slice(0, batch), structure.exact[0], structure.mixed[0]
        return
    rows = list(zip(structure.exact, structure.mixed))
    same = groupby(range(len(rows)), key=lambda row: (rows[row][0].tobytes(), row if len(rows[row][1]) else -1))
    for _, members in same:
        first, *others = members
        yield slice(first, first + 1 + len(others)), *rows[first]


def _adjacent(chunks: Sequence[int], size: int) -> list[range]:
    """The positions of some ascending chunks of one size, with adjacent chunks together: they share tiles."""
    runs: list[range] = []
    for chunk in chunks:
        if runs and runs[-1].stop == chunk * size:
            runs[-1] = range(runs[-1].start, (chunk + 1) * size)
        else:
            runs.append(range(chunk * size, (chunk + 1) * size))
    return runs


def _most_tiles(groups: Sequence[RowGroup], keys: int) -> int:
    """The largest number of tiles over one key, of one row of the batch."""
    most = 0
    for _, members in groupby(groups, key=lambda group: group.batch.start):
        change = np.zeros(keys + 1, np.int64)
        for tile in (tile for group in members for tile in group.tiles):
            change[tile.k_start] += 1
            change[tile.k_stop] -= 1
        most = max(most, int(change.cumsum().max()))
    return most


class _Tiles:
    """Makes the tiles of a rank; collects their tables."""

    def __init__(self, call: Call, kind: Kind, held: list[range], fetched: _Fetched) -> None:
        self.call, self.kind, self.fetched = call, kind, fetched
        self.starts, self.stops = (np.array(x) for x in zip(*((run.start, run.stop) for run in held)))
        self.rows = np.cumsum([0, *map(len, held)])[:-1]
        self.tables: list[Table] = []

    def groups(self, batch: slice, exact: Bands, mixed: list[Tile]) -> list[RowGroup]:
        """The tiles of some rows of the batch, by the query rows that they share."""
        tiles = [self._tile(band) for whole in self._own(exact) for band in self._cut(whole)]
        return group_rows(batch, join_tiles([*tiles, *mixed]))

    def mixed_tiles(self, rows: Sequence[tuple[slice, Bands]]) -> list[list[Tile]]:
        """Tiles with a table, for each of some rows of the batch; every strip of queries is looked at once."""
        found: list[list[Tile]] = [[] for _ in rows]
        bands = [(band, index) for index, (_, mixed) in enumerate(rows) for band in self._own(mixed)]
        strips = groupby(sorted(bands, key=lambda item: item[0][:2]), key=lambda item: item[0][:2])
        for (start, stop), members in strips:
            visible = self.kind.visible(torch.arange(start, stop), self.call.sizes)
            for band, index in members:
                found[index].append(self._mixed_tile(rows[index][0], band, visible))
        return found

    def _cut(self, band: list[int]) -> Iterator[tuple[int, ...]]:
        return cut_band(tuple(band), self.call.offset_diagonal, self.call.windows)  # type: ignore[arg-type]

    def _own(self, bands: Bands) -> list[list[int]]:
        """The parts of some bands in the chunks of this rank."""
        keys = np.full_like(self.starts, self.call.sizes.keys)
        return intersect(bands, rectangles(self.starts, self.stops, 0 * keys, keys)).tolist()

    def _tile(self, band: Sequence[int], table: int | None = None) -> Tile:
        q0, q1, k0, k1, low, high = band
        run = int(np.searchsorted(self.starts, q0, "right")) - 1
        row, key, shift = int(self.rows[run] - self.starts[run]) + q0, self.fetched(k0), k0 - q0
        tile = Tile(row, row + q1 - q0, key, key + k1 - k0, low + shift, high + shift, table)
        return tile._replace(low=tile.low if tile.cuts_right else -FAR, high=tile.high if tile.cuts_left else FAR)

    def _mixed_tile(self, batch: slice, band: Sequence[int], visible: Tensor) -> Tile:
        tile, (k_start, k_stop) = self._tile((*band[:4], -FAR, FAR), len(self.tables)), band[2:4]
        own = visible[batch if len(visible) > 1 else slice(None), ..., k_start:k_stop]
        self.tables.append(Table(tile.q_start, tile.k_start, own.clone()))  # not a view of the whole strip
        return tile
