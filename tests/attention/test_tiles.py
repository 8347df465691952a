"""The tiles of all ranks, painted on the attention matrix, cover each visible pair once and no hidden one."""

import pytest
import torch
from torch import Tensor

from lightning_lss.attention.tiles import Tile, attention_tiles, pairs_of_rank
from lightning_lss.sequence.layout import LAYOUTS, position_ranges

SIZES = range(1, 7)


def lengths(size: int, layout: str) -> list[int]:
    """The four smallest lengths that can be shared out."""
    step = 2 * size if layout == "zigzag" and size > 1 else size
    return [step * factor for factor in (1, 2, 3, 4)]


def paint(tiles: tuple[Tile, ...], positions: Tensor, length: int) -> Tensor:
    """How often the tiles compute each (query position, key position), [L, L]."""
    painted = torch.zeros(length, length, dtype=torch.int64)
    for tile in tiles:
        rows, keys = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
        assert min(rows, keys) > 0  # a kernel call on nothing has no log-sum-exp
        seen = torch.ones(rows, keys, dtype=torch.int64)
        if tile.causal:  # the diagonal ends in the bottom right corner
            seen = seen.tril(keys - rows)
        painted[positions[tile.q_start : tile.q_stop], tile.k_start : tile.k_stop] += seen
        assert tile.pairs == seen.sum()
    return painted


def visible(length: int, causal: bool) -> Tensor:
    ones = torch.ones(length, length, dtype=torch.int64)
    return ones.tril() if causal else ones


@pytest.mark.parametrize("offset_diagonal", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_visible_pair_is_computed_exactly_once(size, layout, causal, offset_diagonal) -> None:
    for length in lengths(size, layout):
        painted = torch.zeros(length, length, dtype=torch.int64)
        for rank in range(size):
            held = torch.tensor([p for run in position_ranges(length, rank, size, layout) for p in run])
            tiles = attention_tiles(length, rank, size, layout, causal, offset_diagonal)
            painted += paint(tiles, held, length)
        assert torch.equal(painted, visible(length, causal))


@pytest.mark.parametrize("offset_diagonal", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_zigzag_gives_every_rank_the_same_causal_work(size, offset_diagonal) -> None:
    for length in lengths(size, "zigzag"):
        work = {
            sum(tile.pairs for tile in attention_tiles(length, rank, size, "zigzag", True, offset_diagonal))
            for rank in range(size)
        }
        assert work == {length * (length + 1) // 2 // size}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_causal_tiles_are_square_unless_the_diagonal_may_be_offset(size, layout) -> None:
    for rank in range(size):
        tiles = attention_tiles(12 * size, rank, size, layout, causal=True)
        assert all(tile.q_stop - tile.q_start == tile.k_stop - tile.k_start for tile in tiles if tile.causal)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_an_offset_diagonal_needs_one_call_for_each_run_of_positions(size, layout) -> None:
    for rank in range(size):
        tiles = attention_tiles(12 * size, rank, size, layout, causal=True, offset_diagonal=True)
        assert len(tiles) == len(position_ranges(12 * size, rank, size, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_mask_one_tile_holds_all_rows_and_keys(layout) -> None:
    assert attention_tiles(24, 1, 3, layout, causal=False) == (Tile(0, 8, 0, 24, False),)


@pytest.mark.parametrize(("causal", "offset_diagonal"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_the_same_rows_follow_each_other(size, layout, causal, offset_diagonal) -> None:
    # attention joins neighbouring tiles of the same rows and puts the rows after one another
    for rank in range(size):
        tiles = attention_tiles(12 * size, rank, size, layout, causal, offset_diagonal)
        runs = list(dict.fromkeys((tile.q_start, tile.q_stop) for tile in tiles))
        assert runs == sorted(runs)
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == 12
        assert [(tile.q_start, tile.q_stop) for tile in tiles] == sorted((tile.q_start, tile.q_stop) for tile in tiles)


def test_a_rectangle_is_cut_along_its_keys_and_a_diagonal_is_not() -> None:
    rectangle, diagonal = Tile(0, 4, 8, 15, False), Tile(0, 4, 0, 4, True)
    assert list(rectangle.cut(3)) == [Tile(0, 4, 8, 11, False), Tile(0, 4, 11, 14, False), Tile(0, 4, 14, 15, False)]
    assert list(rectangle.cut(None)) == list(rectangle.cut(7)) == [rectangle]
    assert list(diagonal.cut(3)) == [diagonal]


def test_a_length_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="length 10 cannot be split over 4 ranks"):
        attention_tiles(10, 0, 4, "contiguous", causal=False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_pairs_of_the_ranks_are_those_of_the_mask(layout, causal) -> None:
    shares = [pairs_of_rank(64, rank, 4, layout, causal) for rank in range(4)]
    assert sum(shares) == (64 * 65 // 2 if causal else 64 * 64)
    assert (min(shares) == max(shares)) == (layout == "zigzag" or not causal)
