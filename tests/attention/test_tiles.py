"""Tiles cover each pair of a band once and no other, whatever a kernel takes."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.attention import tiles
from lightning_lss.attention.bands import make_bands
from lightning_lss.attention.tiles import Band, Tile, cut_band

LENGTH = 20


@st.composite
def bands(draw: st.DrawFn) -> Band:
    """A band that is not empty, with diagonals on one side, on both or on none."""
    q, k = (sorted(draw(st.lists(st.integers(0, LENGTH), min_size=2, max_size=2, unique=True))) for _ in range(2))
    low = draw(st.one_of(st.just(-99), st.integers(-LENGTH, LENGTH)))
    found = make_bands([(*q, *k, low, draw(st.one_of(st.just(99), st.integers(-LENGTH, LENGTH))))])  # type: ignore[list-item]
    assume(len(found) > 0)
    return tuple(found[0].tolist())


def pairs(parts: Iterable[Band]) -> Counter[tuple[int, int]]:
    """How often each pair is in some bands."""
    return Counter(
        (q, k)
        for q0, q1, k0, k1, low, high in parts
        for q in range(q0, q1)
        for k in range(k0, k1)
        if low <= q - k <= high
    )


def as_band(tile: Tile) -> Band:
    shift = tile.q_start - tile.k_start
    return tile.q_start, tile.q_stop, tile.k_start, tile.k_stop, tile.low + shift, tile.high + shift


def as_tile(band: Band) -> Tile:
    q0, q1, k0, k1, low, high = band
    return Tile(q0, q1, k0, k1, low - q0 + k0, high - q0 + k0)


@settings(max_examples=300)
@given(bands(), st.booleans(), st.booleans(), st.sampled_from([1, 2, 3, 5, 8]), st.sampled_from([0, 99]))
def test_a_band_is_cut_to_tiles_that_a_kernel_takes(band, offset_diagonal, windows, rows, wide) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", rows)
        patch.setattr(tiles, "WIDE", wide)
        parts = list(cut_band(band, offset_diagonal, windows))
    assert pairs(parts) == pairs([band])
    for tile in map(as_tile, parts):
        assert min(tile.rows, tile.keys) > 0  # a kernel call on nothing has no log-sum-exp
        assert tile.pairs == sum(pairs([as_band(tile)]).values())
        if not tile.cuts_left and tile.cuts_right:
            assert tile.causal
            assert offset_diagonal or tile.rows == tile.keys
        if tile.cuts_left:
            assert windows or tile.rows <= rows
            left, right = tile.window
            assert left >= 0  # -1 stands for no limit
            assert (right >= 0) == tile.cuts_right


@settings(max_examples=100)
@given(bands(), st.sampled_from([None, 1, 3]), st.sampled_from([None, 2, 4]))
def test_a_tile_is_cut_to_parts_that_see_something(band, rows, keys) -> None:
    parts = list(as_tile(band).cut(rows, keys))
    assert pairs(map(as_band, parts)) == pairs([band])
    for part in parts:
        assert pairs([as_band(part)])
        assert part.rows <= (rows or LENGTH)
        assert part.keys <= (keys or LENGTH)


def tiles_of(mask: AttentionMask, length: int, shard: SequenceShard) -> list[Tile]:
    return [tile for _, tile in mask.plan(length, shard).tiles]


@pytest.mark.parametrize("size", range(1, 7))
def test_zigzag_gives_every_rank_the_same_causal_work(size) -> None:
    for length in (2 * size, 6 * size, 8 * size):
        shares = {
            AttentionMask.causal().plan(length, SequenceShard(rank, size, "zigzag")).pairs for rank in range(size)
        }
        assert shares == {length * (length + 1) // 2 // size}


def test_a_causal_chunk_is_a_rectangle_and_a_triangle() -> None:
    far = tiles.FAR
    assert tiles_of(AttentionMask.causal(), 16, SequenceShard(0, 2, "zigzag")) == [
        Tile(0, 4, 0, 4, 0, far),
        Tile(4, 8, 0, 12),
        Tile(4, 8, 12, 16, 0, far),
    ]


def test_adjacent_chunks_share_tiles() -> None:
    assert tiles_of(AttentionMask.causal(), 16, SequenceShard(1, 2, "zigzag")) == [
        Tile(0, 8, 0, 4),
        Tile(0, 8, 4, 12, 0, tiles.FAR),
    ]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_all_see_is_one_tile(layout) -> None:
    assert tiles_of(AttentionMask.full(), 24, SequenceShard(1, 3, layout)) == [Tile(0, 8, 0, 24)]


def test_a_length_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="length 10 cannot be split over 4 ranks"):
        AttentionMask.full().plan(10, SequenceShard(0, 4, "contiguous"))
