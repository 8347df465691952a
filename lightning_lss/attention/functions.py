"""Masks that are made of a function of single pairs."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from typing_extensions import override

from lightning_lss.attention.kinds import Kind, Sizes
from lightning_lss.attention.reading import Reading, Watched, name_of, watch

VisiblePair = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""visible(b, h, q, k) -> bool, of int64 scalars, as FlexAttention's ``mask_mod``."""

by_number: "WeakValueDictionary[int, Function]" = WeakValueDictionary()
"""Every mask made of a function, by its number: under ``torch.compile`` only a number can pass through the graph."""
_numbers = itertools.count()


@dataclass(eq=False, repr=False)
class Function(Kind):
    """Pairs for which a function is true; with ``positions``, int64 [n], a pair's positions are looked up there.

    Raises ``ValueError`` if the function fails, returns something else than one bool, or reads what cannot be known.
    """

    function: VisiblePair
    positions: Tensor | None = None
    depends: tuple[bool, bool] = field(init=False)
    """Whether the function looks at the row of the batch, and at the head."""
    number: int = field(init=False)
    content: str = field(init=False)
    """Digest of the function and of what it reads, as it was when the mask was made."""

    @property
    @override
    def functions(self) -> list["Function"]:
        """Itself."""
        return [self]

    @torch.compiler.disable  # or it is traced where a mask is made in compiled code
    def __post_init__(self) -> None:
        self.number = next(_numbers)
        by_number[self.number] = self
        self.depends = _depends(self.function)
        for _ in range(2):  # the first time modules may be imported and caches filled
            _, ran = _evaluate(self.function, *[torch.zeros(1, dtype=torch.int64)] * 4)
        self._reading = Reading(self.function, ran)
        self.content = self._reading.digest()
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
        return _evaluate(self.function, torch.arange(rows), torch.arange(heads), queries, keys)[0]

    @override
    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if something that the function reads has changed since the mask was made."""
        if self._reading.digest() != self.content:
            raise ValueError(
                f"The function {name_of(self.function)} of a mask reads something that has changed since the mask was made. A mask is a"
                " value: make a new one with AttentionMask.from_function for every batch."
            )

    def __reduce__(self) -> tuple[Any, ...]:  # in another process it gets another number
        self.check_unchanged()
        return Function, (self.function, self.positions)

    @override
    def select(self, positions: Tensor) -> "Function":
        self.check_unchanged()  # the selected one would be made of what is read now
        return replace(self, positions=positions.clone() if self.positions is None else self.positions[positions])


def _evaluate(function: VisiblePair, *places: Tensor) -> tuple[Tensor, Watched]:
    """What a function says of all combinations of rows, heads, queries and keys, bool [B, H, m, n]; which code ran."""
    over_all = function
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        over_all = torch.vmap(over_all, in_dims=dims)
    # in a thread of its own, since vmap fails under the dispatch modes that watch a step, such as a proof's
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(watch, over_all, *places)
        try:
            said, ran = future.result()
        except Exception as error:
            raise ValueError(
                f"The function {name_of(function)} of a mask failed under torch.vmap ({error}). It must return a bool tensor,"
                " made with torch's operators from b, h, q and k: & | ~ instead of and, or, not, and torch.where instead of if."
            ) from error
    wanted = tuple(map(len, places))
    if not isinstance(said, Tensor) or said.shape != wanted:
        got = f"shape {tuple(said.shape[4:])}" if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(
            f"The function {name_of(function)} of a mask must return one bool, of shape (); it returned {got}."
        )
    if said.dtype != torch.bool and (
        said.is_floating_point() or said.is_complex() or ((said != 0) & (said != 1)).any()
    ):
        raise ValueError(
            f"The function {name_of(function)} of a mask must return whether a pair is visible, as bool, or 0 and 1; it returned"
            f" {said.dtype}: of what is added to scores return where it is not -inf."
        )
    return said.bool().cpu(), ran


def _depends(function: VisiblePair) -> tuple[bool, bool]:
    """Whether a function looks at its first and at its second argument; true where it cannot be told."""
    try:
        graph = make_fx(function)(*(torch.zeros((), dtype=torch.int64) for _ in range(4))).graph
    except Exception:  # whatever a user's function does under tracing, evaluating it is still right
        return True, True
    row, head, *_ = (node for node in graph.nodes if node.op == "placeholder")
    return bool(row.users), bool(head.users)
