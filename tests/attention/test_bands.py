"""Sets of bands against sets of pairs."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_lss.attention.bands import (
    EMPTY,
    Bands,
    TooManyBandsError,
    count_pairs,
    intersect,
    make_bands,
    rectangles,
    split_queries,
    subtract,
    unite,
)

LENGTH = 12


@st.composite
def sets(draw: st.DrawFn) -> Bands:
    """Disjoint bands."""
    found = EMPTY
    for _ in range(draw(st.integers(0, 5))):
        edges = [sorted(draw(st.lists(st.integers(0, LENGTH), min_size=2, max_size=2))) for _ in range(2)]
        diagonals = sorted(draw(st.lists(st.integers(-LENGTH, LENGTH), min_size=2, max_size=2)))
        found = unite(found, make_bands([(*edges[0], *edges[1], *diagonals)]))  # type: ignore[list-item]
    return found


def paint(found: Bands) -> NDArray[Any]:
    """How often each pair is in the set, [LENGTH, LENGTH]."""
    q, k = np.mgrid[:LENGTH, :LENGTH]
    painted = np.zeros((LENGTH, LENGTH), int)
    for q0, q1, k0, k1, low, high in found.tolist():
        painted += (q >= q0) & (q < q1) & (k >= k0) & (k < k1) & (q - k >= low) & (q - k <= high)
    return painted


@settings(max_examples=300)
@given(sets(), sets())
def test_sets_of_bands_are_sets_of_pairs(one, other) -> None:
    a, b = paint(one), paint(other)
    assert max(a.max(), b.max()) <= 1
    assert (paint(intersect(one, other)) == a * b).all()
    assert (paint(unite(one, other)) == np.maximum(a, b)).all()
    assert (paint(subtract(one, other)) == a * (1 - b)).all()


@settings(max_examples=100)
@given(sets(), sets(), st.integers(0, 40))
def test_a_limit_is_kept_or_raises(one, other, most) -> None:
    for join in (intersect, unite, subtract):
        whole = join(one, other)
        try:
            found = join(one, other, most)
        except TooManyBandsError:
            assert most < 6 * (len(one) + 1) * (len(other) + 1)
        else:
            assert len(found) <= most
            assert (paint(found) == paint(whole)).all()


@pytest.mark.parametrize("documents", [512, 4096])
def test_documents_and_a_key_of_each_for_all_are_few_bands(documents) -> None:
    size = 64
    starts = np.arange(documents) * size
    length = documents * size
    blocks = rectangles(starts, starts + size, starts, starts + size)
    columns = rectangles(0 * starts, 0 * starts + length, starts, starts + 1)
    for found in (unite(blocks, columns, 2**16), unite(columns, blocks, 2**16)):
        assert len(found) <= 3 * documents
        assert count_pairs(found).sum() == documents * (length + size * (size - 1))


def test_giving_up_takes_a_moment() -> None:
    starts = np.arange(0, 2**16, 64)
    zero, stop = 0 * starts, 0 * starts + 2**16
    rows, columns = rectangles(starts, starts + 32, zero, stop), rectangles(zero, stop, starts, starts + 32)
    begin = time.process_time()
    for join in (intersect, unite, subtract):
        with pytest.raises(TooManyBandsError):
            join(rows, columns, 2**16)
    assert time.process_time() - begin < 2


@settings(max_examples=200)
@given(sets())
def test_each_row_and_column_of_a_band_has_a_pair(found) -> None:
    assert count_pairs(found).tolist() == [paint(band[None]).sum() for band in found]
    for band in found:
        q0, q1, k0, k1, *_ = band
        seen = paint(band[None])[q0:q1, k0:k1]
        assert seen.any(0).all()
        assert seen.any(1).all()


@settings(max_examples=100)
@given(sets(), st.integers(1, LENGTH))
def test_bands_are_cut_where_their_queries_cross_a_border(found, size) -> None:
    parts = split_queries(found, size)
    assert (paint(parts) == paint(found)).all()
    assert (parts[:, 0] // size == (parts[:, 1] - 1) // size).all()


@pytest.mark.parametrize("length", [1, 2**20])
def test_pairs_are_counted_without_looking_at_them(length) -> None:
    assert count_pairs(make_bands([(0, length, 0, length, 0, length)])).tolist() == [length * (length + 1) // 2]
