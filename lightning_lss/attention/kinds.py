"""The kinds of masks that :class:`~lightning_lss.AttentionMask` is made of.

Every kind says which pairs are visible twice: as a dense tensor, which is its definition, and, where it has a
structure, as bands (:mod:`lightning_lss.attention.bands`), from which tiles are made without looking at single pairs.
"""

import inspect
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from typing_extensions import override

from lightning_lss.attention.bands import FAR, Bands, TooManyBandsError, intersect, make_bands, rectangles, unite

VisiblePair = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""visible(b, h, q, k) -> bool, of int64 scalars, as FlexAttention's ``mask_mod``."""

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

    @property
    def functions(self) -> list["Function"]:
        """The functions that are a part of it."""
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


by_number: "WeakValueDictionary[int, Function]" = WeakValueDictionary()
"""Every mask made of a function, by its number: under ``torch.compile`` only a number can pass through the graph."""
_recent: "deque[Function]" = deque(maxlen=256)
"""The latest ones, kept for backward passes after their masks are gone."""
_numbers = itertools.count()


@dataclass(eq=False, repr=False)
class Function(Kind):
    """Pairs for which a function is true; with ``positions``, int64 [n], a pair's positions are looked up there."""

    function: VisiblePair
    positions: Tensor | None = None
    depends: tuple[bool, bool] = field(init=False)
    """Whether the function looks at the row of the batch, and at the head."""
    number: int = field(init=False)

    @property
    def functions(self) -> list["Function"]:
        """Itself."""
        return [self]

    def __post_init__(self) -> None:
        self.number = next(_numbers)
        by_number[self.number] = self
        _recent.append(self)
        self._read = what_is_read(self.function)
        self.depends = _depends(self.function)
        if self.positions is not None:
            self.queries = self.keys = len(self.positions)

    @override
    def told_apart(self, sizes: Sizes) -> Sizes:
        batch, heads = (n if used else 1 for n, used in zip(sizes, self.depends))
        return sizes._replace(batch=batch, heads=heads)

    @override
    def visible(self, queries: Tensor, sizes: Sizes) -> Tensor:
        rows, heads, *_ = self.told_apart(sizes)
        keys = torch.arange(sizes.keys)
        if self.positions is not None:
            queries, keys = self.positions[queries], self.positions[keys]
        over_all = self.function
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            over_all = torch.vmap(over_all, in_dims=dims)
        # in a thread of its own, since vmap fails under the dispatch modes that watch a step, such as a proof's
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(over_all, torch.arange(rows), torch.arange(heads), queries, keys)
            try:
                return future.result().bool().cpu()
            except Exception as error:
                raise ValueError(
                    f"The function {_name(self.function)} of a mask failed under torch.vmap ({error}). It must return a bool tensor,"
                    " made with torch's operators from b, h, q and k: & | ~ instead of and, or, not, and torch.where instead of if."
                ) from error

    def check(self) -> None:
        """Raise ``ValueError`` if a tensor or number that the function reads has changed since the mask was made."""
        if what_is_read(self.function) != self._read:
            raise ValueError(
                f"The function {_name(self.function)} of a mask reads something that has changed since the mask was made. A mask is a"
                " value: make a new one with AttentionMask.from_function for every batch."
            )

    def __reduce__(self) -> tuple[Any, ...]:  # in another process it gets another number
        return Function, (self.function, self.positions)

    @override
    def select(self, positions: Tensor) -> "Function":
        return replace(self, positions=positions if self.positions is None else self.positions[positions])


def _name(function: VisiblePair) -> str:
    return getattr(function, "__qualname__", repr(function))


def what_is_read(function: VisiblePair) -> list[tuple[Any, ...]]:
    """The numbers and tensors that a function reads; of a tensor who it is and how often it was written to."""
    numbers, tensors = values_read(function)
    return [*enumerate(numbers), *((id(x), 0 if x.is_inference() else x._version) for x in tensors)]


def values_read(function: VisiblePair) -> tuple[list[float], list[Tensor]]:
    """The numbers and tensors in a function's closure and defaults, and among the globals that it names; of modules there
    their buffers."""
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    values: list[Any] = list(getattr(inner, "__defaults__", None) or ())
    for cell in getattr(inner, "__closure__", None) or ():
        with suppress(ValueError):  # of a cell that is still empty
            values.append(cell.cell_contents)
    names = code.co_names if code is not None else ()
    values += [inner.__globals__[name] for name in names if name in inner.__globals__]
    owners = [x for x in values if isinstance(x, torch.nn.Module)]
    values += [buffer for owner in owners for buffer in owner.buffers()]
    return [x for x in values if isinstance(x, (bool, int, float))], [x for x in values if isinstance(x, Tensor)]


def _depends(function: VisiblePair) -> tuple[bool, bool]:
    """Whether a function looks at its first and at its second argument; true where it cannot be told."""
    try:
        graph = make_fx(function)(*(torch.zeros((), dtype=torch.int64) for _ in range(4))).graph
    except Exception:  # whatever a user's function does under tracing, evaluating it is still right
        return True, True
    row, head, *_ = (node for node in graph.nodes if node.op == "placeholder")
    return bool(row.users), bool(head.users)


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
