"""Sets of (query, key) pairs as disjoint bands, in integers: what structured masks are made of.

A band is the part of a rectangle that lies between two diagonals: queries ``[q_start, q_stop)``, keys ``[k_start,
k_stop)``, and ``low <= query - key <= high``. Rectangles, triangles and windows are bands; intersections and differences
of bands are bands again. (MagiAttention's slices, arXiv 2505.13211, are the same sets with four kinds of diagonals.) A set of
them is an int64 array [n, 6] with the columns ``Q0``, ``Q1``, ``K0``, ``K1``, ``LOW`` and ``HIGH``.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Bands = NDArray[np.int64]

Q0, Q1, K0, K1, LOW, HIGH = range(6)
FAR = 2**40  # beyond any difference of positions: a diagonal that hides nothing
EMPTY: Bands = np.empty((0, 6), np.int64)


def make_bands(rows: Iterable[tuple[int, int, int, int, int, int]]) -> Bands:
    """Make a set of bands from (q_start, q_stop, k_start, k_stop, low, high)."""
    return tighten(np.array(list(rows), np.int64).reshape(-1, 6))


def rectangles(q_start: Bands, q_stop: Bands, k_start: Bands, k_stop: Bands) -> Bands:
    """Make a set of rectangles from arrays [n]."""
    far = np.full(len(q_start), FAR)
    return tighten(np.stack((q_start, q_stop, k_start, k_stop, -far, far), 1))


def intersect(one: Bands, other: Bands) -> Bands:
    """Pairs in both sets: each band of one with each of the other."""
    low = np.maximum(one[:, None, :], other[None, :, :])[..., [Q0, K0, LOW]]
    high = np.minimum(one[:, None, :], other[None, :, :])[..., [Q1, K1, HIGH]]
    return tighten(np.stack((low, high), -1)[..., [0, 1, 2], :].reshape(-1, 6))


def unite(one: Bands, other: Bands) -> Bands:
    """Pairs in either set."""
    few, many = sorted((one, other), key=len)
    return np.concatenate((few, subtract(many, few)))


def subtract(one: Bands, other: Bands) -> Bands:
    """Pairs in one set that are not in the other."""
    for q0, q1, k0, k1, low, high in other.tolist():
        everything = (-FAR, FAR, -FAR, FAR, -FAR, FAR)
        inside, outside = one, []
        for column, value in ((Q1, q0), (Q0, q1), (K1, k0), (K0, k1), (HIGH, low - 1), (LOW, high + 1)):
            beyond, within = list(everything), list(everything)
            beyond[column] = value
            # the complement of a half plane: its other bound
            within[column ^ 1] = value if column < LOW else value + (1 if column == HIGH else -1)
            outside.append(intersect(inside, np.array([beyond])))
            inside = intersect(inside, np.array([within]))
        one = np.concatenate(outside)
    return one


def split_queries(found: Bands, size: int) -> Bands:
    """Cut bands where their queries cross a multiple of ``size``."""
    index, block = spread(found[:, Q0] // size, (found[:, Q1] - 1) // size)
    parts = found[index]
    parts[:, Q0] = np.maximum(parts[:, Q0], block * size)
    parts[:, Q1] = np.minimum(parts[:, Q1], (block + 1) * size)
    return tighten(parts)


def spread(first: Bands, last: Bands) -> tuple[Bands, Bands]:
    """All integers from ``first`` to ``last``, [n] each, one range after the other, and for each the index of its range."""
    counts = last - first + 1
    index = np.repeat(np.arange(len(counts)), counts)
    return index, first[index] + np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def count_pairs(sets: Bands) -> NDArray[np.int64]:
    """Number of pairs of each band, [n]."""
    last = _sum_of_minima(sets[:, Q0], sets[:, Q1], 1 - sets[:, LOW], sets[:, K1])
    # a maximum is a negated minimum: the sum of max(k_start, query - high)
    first = -_sum_of_minima(1 - sets[:, Q1], 1 - sets[:, Q0], sets[:, HIGH], -sets[:, K0])
    return last - first


def _sum_of_minima(start: Bands, stop: Bands, shift: Bands, most: Bands) -> NDArray[np.int64]:
    """Sum min(x + shift, most) over x in [start, stop)."""
    turn = np.clip(most - shift, start, stop)
    return (turn - start) * (turn + start - 1) // 2 + (turn - start) * shift + (stop - turn) * most


def tighten(sets: Bands) -> Bands:
    """Shrink the rectangle of each band to what its diagonals leave of it, and drop empty ones."""
    q0, q1, k0, k1, low, high = sets.T
    q0, q1 = np.maximum(q0, k0 + low), np.minimum(q1, k1 + high)
    k0, k1 = np.maximum(k0, q0 - high), np.minimum(k1, q1 - low)
    low, high = np.maximum(low, q0 - k1 + 1), np.minimum(high, q1 - 1 - k0)
    full = (q0 < q1) & (k0 < k1) & (low <= high)
    return np.stack((q0, q1, k0, k1, low, high), 1)[full]
