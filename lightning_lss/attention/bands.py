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

# Where the number of bands is limited, so is the time: how many pairs of bands are looked at, how many bands are subtracted
# from one, and how often pieces are cut, as a multiple of that number.
_MOST_MEETINGS, _MOST_TURNS, _MOST_CUTS = 2**20, 2**10, 8
_BEYOND = (0, 0, 0, 0, -1, 1)  # from each bound of a band to that of what is outside: only diagonals include their stop


def make_bands(rows: Iterable[tuple[int, int, int, int, int, int]]) -> Bands:
    """Make a set of bands from (q_start, q_stop, k_start, k_stop, low, high)."""
    return tighten(np.array(list(rows), np.int64).reshape(-1, 6))


def rectangles(q_start: Bands, q_stop: Bands, k_start: Bands, k_stop: Bands) -> Bands:
    """Make a set of rectangles from arrays [n]."""
    far = np.full(len(q_start), FAR)
    return tighten(np.stack((q_start, q_stop, k_start, k_stop, -far, far), 1))


class TooManyBandsError(Exception):
    """A set would have more bands than were asked for, or finding them would take too long."""


def intersect(one: Bands, other: Bands, most: int | None = None) -> Bands:
    """Pairs in both sets: each band of one with each of the other that it meets.

    Raises :class:`TooManyBandsError` for more than ``most`` bands.
    """
    other, index, others = _meeting(one, other, most)
    _check(len(index), most)
    return _overlap(one[index], other[others])[0]


def unite(one: Bands, other: Bands, most: int | None = None) -> Bands:
    """Pairs in either set. Raises :class:`TooManyBandsError` for more than ``most`` bands."""
    _, *meeting = _meeting(one, other, most)
    turns = [np.bincount(x, minlength=1).max() for x in meeting]
    if (turns[0], -len(one)) < (turns[1], -len(other)):  # subtract from the set whose bands meet few of the other
        one, other = other, one
    found = np.concatenate((one, subtract(other, one, most)))
    _check(len(found), most)
    return found


def subtract(one: Bands, other: Bands, most: int | None = None) -> Bands:
    """Pairs in one set that are not in the other.

    Raises :class:`TooManyBandsError` for more than ``most`` bands, also on the way.
    """
    other, index, others = _meeting(one, other, most)
    rest = _bounds_of_rest(other)
    counts = np.bincount(index, minlength=len(one))
    first = np.cumsum(counts) - counts
    if most is not None and counts.max(initial=0) > _MOST_TURNS:
        raise TooManyBandsError
    source = np.flatnonzero(counts)
    pieces, done, size, spent = one[source], [one[counts == 0]], len(one), 0
    for turn in range(
        counts.max(initial=0)
    ):  # each piece loses what it shares with the next band that its source meets
        spent += len(pieces)
        _check(max(size, spent // _MOST_CUTS), most)
        parts, of = _cut(pieces, other[others[first[source] + turn]])
        size += len(parts) - len(pieces)
        source = source[of]
        more = counts[source] > turn + 1
        more[more] = _may_meet(parts[more], rest[others[first[source[more]] + turn + 1]])
        done.append(parts[~more])
        pieces, source = parts[more], source[more]
    _check(size, most)
    return np.concatenate(done)


def _check(count: int, most: int | None) -> None:
    if most is not None and count > most:
        raise TooManyBandsError


def _meeting(one: Bands, other: Bands, most: int | None) -> tuple[Bands, Bands, Bands]:
    """The other set in a new order; and which bands may meet: indices of one, ascending, and of the other."""
    spans = [_span(one, other, start) for start in (Q0, K0)]
    order, first, last = min(spans, key=lambda span: int((span[2] - span[1]).sum()))
    if most is not None and (last - first + 1).sum() > _MOST_MEETINGS:
        raise TooManyBandsError
    index, others = spread(first, last)
    other = other[order]
    meets = _may_meet(one[index], other[others])
    return other, index[meets], others[meets]


def _span(one: Bands, other: Bands, start: int) -> tuple[Bands, Bands, Bands]:
    """The order of the other set by one of its columns, and for each band of one the first and the last of those in that
    order that may share its queries or keys."""
    order = np.argsort(other[:, start], kind="stable")
    starts, stops = other[order, start], np.maximum.accumulate(other[order, start + 1])
    first = np.searchsorted(stops, one[:, start], "right")
    last = np.searchsorted(starts, one[:, start + 1], "left") - 1
    return order, first, np.maximum(last, first - 1)


def _may_meet(one: Bands, other: Bands) -> NDArray[np.bool_]:
    """Whether pairs of bands share queries, keys and diagonals, [n]; a corner between them may still be empty."""
    start, stop = np.maximum(one[:, ::2], other[:, ::2]), np.minimum(one[:, 1::2], other[:, 1::2])
    meets: NDArray[np.bool_] = (start[:, :2] < stop[:, :2]).all(1) & (start[:, 2] <= stop[:, 2])
    return meets


def _overlap(one: Bands, other: Bands) -> tuple[Bands, NDArray[np.bool_]]:
    """What pairs of bands share, and which of them, [n], share something."""
    start, stop = np.maximum(one[:, ::2], other[:, ::2]), np.minimum(one[:, 1::2], other[:, 1::2])
    return _tighten(np.stack((start, stop), 2).reshape(-1, 6))


def _cut(pieces: Bands, cutters: Bands) -> tuple[Bands, Bands]:
    """The parts of each piece outside its cutter, and of which piece each part is."""
    _, meets = _overlap(pieces, cutters)
    of = np.flatnonzero(meets)
    parts, sources = [pieces[~meets]], [np.flatnonzero(~meets)]
    inside, cutters = pieces[meets], cutters[meets]
    for side in range(6):
        limit, other_limit = (np.minimum, np.maximum) if side % 2 else (np.maximum, np.minimum)
        outside = inside.copy()
        outside[:, side ^ 1] = other_limit(outside[:, side ^ 1], cutters[:, side] + _BEYOND[side])
        inside[:, side] = limit(inside[:, side], cutters[:, side])
        outside, full = _tighten(outside)
        parts.append(outside)
        sources.append(of[full])
    return np.concatenate(parts), np.concatenate(sources)


def _bounds_of_rest(sets: Bands) -> Bands:
    """Of each band and all after it, what they lie within."""
    rest = np.empty_like(sets)
    rest[::-1, ::2] = np.minimum.accumulate(sets[::-1, ::2])
    rest[::-1, 1::2] = np.maximum.accumulate(sets[::-1, 1::2])
    return rest


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
    return _tighten(sets)[0]


def _tighten(sets: Bands) -> tuple[Bands, NDArray[np.bool_]]:
    """The same, and which of them, [n], are not empty."""
    q0, q1, k0, k1, low, high = sets.T
    q0, q1 = np.maximum(q0, k0 + low), np.minimum(q1, k1 + high)
    k0, k1 = np.maximum(k0, q0 - high), np.minimum(k1, q1 - low)
    low, high = np.maximum(low, q0 - k1 + 1), np.minimum(high, q1 - 1 - k0)
    full = (q0 < q1) & (k0 < k1) & (low <= high)
    return np.stack((q0, q1, k0, k1, low, high), 1)[full], full
