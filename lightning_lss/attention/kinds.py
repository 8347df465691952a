"""The kinds of masks that :class:`~lightning_lss.AttentionMask` is made of.

Every kind says which pairs are visible twice: as a dense tensor, which is its definition, and, where it has a
structure, as bands (:mod:`lightning_lss.attention.bands`), from which tiles are made without looking at single pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_lss.attention.bands import FAR, Bands, TooManyBandsError, intersect, make_bands, rectangles, unite

MOST_BANDS = 2**16  # of one row of the batch: a mask with more is treated as one without structure


class Sizes(NamedTuple):
    """Sizes of one call of attention over whole sequences."""

    batch: int
    heads: int  # of queries
    queries: int
    keys: int

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """The rectangle of all pairs."""
        return 0, self.queries, 0, self.keys


class Kind:
    """A mask, or a part of one; a dataclass of integers, tensors, kinds and functions."""

    rows: int = 1
    """Number of rows of the batch that it tells apart; 1 if it is the same for all."""
    heads: int = 1
    """The same for heads."""
    queries: int | None = None
    """Number of queries that it is for; None for any."""
    keys: int | None = None
    """The same for keys."""

    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        """Which keys some ``queries``, int64 [m], see: bool [B or 1, H or 1, m, keys]."""
        raise NotImplementedError

    def told_apart(self, sizes: Sizes) -> Sizes:
        """The sizes of a call with as many rows of the batch and heads as the mask tells apart there."""
        return sizes._replace(batch=self.rows, heads=self.heads)

    def bands(self, sizes: Sizes) -> list[Bands] | None:
        """The visible pairs by row of the batch (one entry: the same for all); None if there is no such structure."""
        return None

    def select(self, positions: Tensor) -> "Kind":
        """The mask of the sequence that consists of ``positions``, int64 [n], ascending."""
        return self

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise ``ValueError`` if the mask is not for such sequences."""
        shown = f"AttentionMask({self})"
        if self.rows not in (1, sizes.batch) or self.heads not in (1, sizes.heads):
            raise ValueError(
                f"{shown} is for a batch of {self.rows} and {self.heads} heads; attention was given a batch of {sizes.batch} with"
                f" {sizes.heads} query heads."
            )
        if self.queries not in (None, sizes.queries) or self.keys not in (None, sizes.keys):
            keys = "" if sizes.keys == sizes.queries else f" and a memory of length {sizes.keys}"
            raise ValueError(
                f"{shown} is for sequences of length {self.queries or self.keys}; attention was given queries of global"
                f" length {sizes.queries}{keys}. Make the mask from whole sequences: before the batch is split, or from an entry"
                " that LSSStrategy(sequence_dims={key: None}) leaves whole."
            )

    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if something that its functions read has changed since the mask was made."""
        for function in self.functions:
            function.check_unchanged()

    @property
    def functions(self) -> list[Any]:
        """The masks made of a function (:class:`~lightning_lss.attention.functions.Function`) that are a part of it."""
        return [found for x in self.arguments if isinstance(x, Kind) for found in x.functions]

    @property
    def arguments(self) -> list[Any]:
        """What the kind was made of."""
        return [getattr(self, x.name) for x in fields(self) if x.init]  # type: ignore[arg-type]  # each is a dataclass

    def __repr__(self) -> str:
        shown = [
            f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") if isinstance(x, Tensor) else repr(x)
            for x in self.arguments
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(eq=False, repr=False)
class Diagonals(Kind):
    """Pairs with ``low <= query - key <= high``."""

    low: int = -FAR
    high: int = FAR

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        difference = queries[:, None] - torch.arange(sizes.keys)
        return ((difference >= self.low) & (difference <= self.high))[None, None]

    @override
    def bands(self, sizes: Sizes) -> list[Bands]:
        return [make_bands([(*sizes.rectangle, self.low, self.high)])]


@dataclass(eq=False, repr=False)
class Chunked(Kind):
    """Pairs within the same ``size`` positions."""

    size: int

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        return (queries[:, None] // self.size == torch.arange(sizes.keys) // self.size)[None, None]

    @override
    def bands(self, sizes: Sizes) -> list[Bands]:
        start = np.arange(0, min(sizes.queries, sizes.keys), self.size)
        stop = start + self.size
        return [rectangles(start, np.minimum(stop, sizes.queries), start, np.minimum(stop, sizes.keys))]


@dataclass(eq=False, repr=False)
class Prefix(Kind):
    """Causal pairs, and those whose key is among the first ``lengths``, int64 [B]."""

    lengths: Tensor

    def __post_init__(self) -> None:
        self.rows = len(self.lengths)

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        keys = torch.arange(sizes.keys)
        return ((keys <= queries[:, None]) | (keys < self.lengths[:, None, None]))[:, None]

    @override
    def bands(self, sizes: Sizes) -> list[Bands]:
        queries, keys = sizes.queries, sizes.keys
        return [
            make_bands([(0, queries, 0, prefix, -FAR, FAR), (prefix, queries, prefix, keys, 0, FAR)])
            for prefix in self.lengths.clamp(max=keys).tolist()
        ]

    @override
    def select(self, positions: Tensor) -> "Prefix":
        return Prefix((positions < self.lengths[:, None]).sum(1))


@dataclass(eq=False, repr=False)
class Documents(Kind):
    """Pairs with the same id, of ``ids``, int32 [B, L]; with a negative id nothing is visible."""

    ids: Tensor

    def __post_init__(self) -> None:
        self.rows = len(self.ids)
        self.queries = self.keys = self.ids.size(1)

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        of_queries = self.ids[:, queries, None]
        return ((of_queries == self.ids[:, None]) & (of_queries >= 0))[:, None]

    @override
    def bands(self, sizes: Sizes) -> list[Bands] | None:
        rows = [_blocks(ids) for ids in self.ids.numpy()]
        return None if any(row is None for row in rows) else rows  # type: ignore[return-value]  # mypy: none is None

    @override
    def select(self, positions: Tensor) -> "Documents":
        return Documents(self.ids[:, positions])


def _blocks(ids: NDArray[Any]) -> Bands | None:
    """The rectangles of equal ids that are not negative; None if there are too many."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    stops, values = np.append(starts[1:], len(ids)), ids[starts]
    starts, stops, values = (x[values >= 0] for x in (starts, stops, values))
    _, runs = np.unique(values, return_counts=True)  # runs of tokens: an id may come back
    if (runs**2).sum() > MOST_BANDS:
        return None
    if (runs == 1).all():
        return rectangles(starts, stops, starts, stops)
    q, k = np.nonzero(values[:, None] == values)
    return rectangles(starts[q], stops[q], starts[k], stops[k])


@dataclass(eq=False, repr=False)
class Keys(Kind):
    """Pairs whose key is ``valid``, bool [B, M]."""

    valid: Tensor

    def __post_init__(self) -> None:
        self.rows, self.keys = self.valid.shape

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        return self.valid[:, None, None].expand(-1, 1, len(queries), -1)

    @override
    def bands(self, sizes: Sizes) -> list[Bands] | None:
        rows = [_runs(valid) for valid in self.valid.numpy()]
        if any(len(starts) > MOST_BANDS for starts, _ in rows):
            return None
        q_start = [np.zeros_like(starts) for starts, _ in rows]
        return [rectangles(zero, zero + sizes.queries, *run) for zero, run in zip(q_start, rows)]

    @override
    def select(self, positions: Tensor) -> "Keys":
        return Keys(self.valid[:, positions])


def _runs(valid: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last-but-one positions of the runs of true values."""
    edges = np.flatnonzero(np.diff(valid.astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2]


@dataclass(eq=False, repr=False)
class Dense(Kind):
    """Pairs of a table, bool [B or 1, H or 1, queries, keys]."""

    table: Tensor

    def __post_init__(self) -> None:
        self.rows, self.heads, self.queries, self.keys = self.table.shape

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        return self.table[:, :, queries]

    @override
    def select(self, positions: Tensor) -> "Dense":
        return Dense(self.table[:, :, positions][..., positions])


@dataclass(eq=False, repr=False)
class Combined(Kind):
    """Pairs that two masks both show, or that either shows."""

    one: Kind
    other: Kind
    both: bool

    def __post_init__(self) -> None:
        one, other = self.one, self.other
        self.rows, self.heads = (max(x, y) for x, y in ((one.rows, other.rows), (one.heads, other.heads)))
        self.queries, self.keys = (
            y if x is None else x for x, y in ((one.queries, other.queries), (one.keys, other.keys))
        )

    @override
    def told_apart(self, sizes: Sizes) -> Sizes:
        one, other = (kind.told_apart(sizes) for kind in (self.one, self.other))
        return sizes._replace(batch=max(one.batch, other.batch), heads=max(one.heads, other.heads))

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        one, other = (kind.visible(queries, sizes) for kind in (self.one, self.other))
        return one & other if self.both else one | other

    @override
    def bands(self, sizes: Sizes) -> list[Bands] | None:
        one, other = (kind.bands(sizes) for kind in (self.one, self.other))
        if one is None or other is None:
            return None
        rows = max(len(one), len(other))
        join = intersect if self.both else unite
        try:
            return [join(x, y, MOST_BANDS) for x, y in zip(_repeat(one, rows), _repeat(other, rows))]
        except TooManyBandsError:
            return None

    @override
    def select(self, positions: Tensor) -> "Combined":
        return Combined(self.one.select(positions), self.other.select(positions), self.both)


def _repeat(rows: Sequence[Bands], number: int) -> Sequence[Bands]:
    return rows if len(rows) == number else list(rows) * number
