"""Sets of bands against sets of pairs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_lss.attention.bands import (
    EMPTY,
    Bands,
    count_pairs,
    intersect,
    make_bands,
    split_queries,
    subtract,
    unite,
)

LENGTH = 12


@st.composite
def sets(draw: st.DrawFn) -> Bands:
    """Disjoint bands."""
    found = EMPTY
    for _ in range(draw(st.integers(0, 3))):
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


@settings(max_examples=300, deadline=None)
@given(sets(), sets())
def test_sets_of_bands_are_sets_of_pairs(one, other) -> None:
    a, b = paint(one), paint(other)
    assert max(a.max(), b.max()) <= 1
    assert (paint(intersect(one, other)) == a * b).all()
    assert (paint(unite(one, other)) == np.maximum(a, b)).all()
    assert (paint(subtract(one, other)) == a * (1 - b)).all()


@settings(max_examples=200, deadline=None)
@given(sets())
def test_each_row_and_column_of_a_band_has_a_pair(found) -> None:
    assert count_pairs(found).tolist() == [paint(band[None]).sum() for band in found]
    for band in found:
        q0, q1, k0, k1, *_ = band
        seen = paint(band[None])[q0:q1, k0:k1]
        assert seen.any(0).all()
        assert seen.any(1).all()


@settings(max_examples=100, deadline=None)
@given(sets(), st.integers(1, LENGTH))
def test_bands_are_cut_where_their_queries_cross_a_border(found, size) -> None:
    parts = split_queries(found, size)
    assert (paint(parts) == paint(found)).all()
    assert (parts[:, 0] // size == (parts[:, 1] - 1) // size).all()


@pytest.mark.parametrize("length", [1, 2**20])
def test_pairs_are_counted_without_looking_at_them(length) -> None:
    assert count_pairs(make_bands([(0, length, 0, length, 0, length)])).tolist() == [length * (length + 1) // 2]
