"""Which chunks of each batch every rank works on, chosen by the work of its masks."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from torch import nn

from lightning_lss.sequence.assignment import ChunkAssignment, static_assignment
from lightning_lss.sequence.balance import Integers, balance, causal_work, imbalance
from lightning_lss.sequence.batch import Path, SequenceDims, masks_by_path, sequences_by_path
from lightning_lss.sequence.layout import STATIC_LAYOUTS, check_layout
from lightning_lss.sequence.padding import PadValues, check_values, padding_of
from lightning_lss.sequence.segment import SequenceShard, segment_modules

CHUNKS = 8
"""How many chunks a rank holds at most: with more, tiles are too small; with four, the busiest rank has a tenth too much."""

UNEVEN = 1.1
"""With how much work of the busiest rank over the mean ``layout="auto"`` leaves zigzag."""

_KEPT = 32  # choices that are kept: a batch may come again, and modules' own masks are always the same


class BatchLayouts:
    """Chooses the layout of every batch.

    Args:
        layout: ``"contiguous"``, ``"zigzag"``, ``"balanced"`` or ``"auto"``, see :class:`~lightning_lss.LSSStrategy`.
        pad_values: what fills sequences up that cannot be divided, see there.

    Raises:
        ValueError: if the layout is unknown, or the values are not numbers by key.
    """

    def __init__(self, layout: str, pad_values: PadValues | None = None) -> None:
        if layout != "auto":
            check_layout(layout)
        check_values(pad_values)
        self.requested, self.pad_values = layout, pad_values or {}
        self.base = "zigzag" if layout == "auto" else layout
        """The layout of a run while it has no batch."""
        self.stays = False
        """Whether a run with ``layout="auto"`` has the base layout only, from now on."""
        self._choices: dict[Any, ChunkAssignment | None] = {}
        self._at_hand: _Positions = None, 0
        self._of_stage: dict[Any, set[_Positions]] = {}  # of its batches
        self._first_of_stage: Any = None  # of which the batch at hand is the first with its positions

    @property
    def vary(self) -> bool:
        """Whether batches may have different layouts, or different padding."""
        return self.requested not in STATIC_LAYOUTS or bool(self.pad_values)

    def forget(self) -> None:
        """Forget all batches: no shard of them is current any more."""
        self.stays, self._at_hand = False, (None, 0)
        self._of_stage.clear()

    def stay(self) -> None:
        """Give the batch at hand, and all that follow in the run, the base layout."""
        self.stays = True
        self._of_stage.get(self._first_of_stage, set()).discard(self._at_hand)

    def follow(self, shard: SequenceShard, stage: Any) -> None:
        """Take note that the batch at hand, one of ``stage``, is split under ``shard``."""
        self._at_hand, known = _positions_of(shard), self._of_stage.setdefault(stage, set())
        self._first_of_stage = None if self._at_hand in known else stage
        known.add(self._at_hand)

    def is_current(self, shard: SequenceShard, between: Any) -> bool:
        """Whether ``shard`` is that of the batch at hand; between the batches of a stage, that of all its batches.

        An equal shard of another batch is current too, for it has the same positions.
        """
        return self._of_stage.get(between, {self._at_hand}) == {_positions_of(shard)}

    def shard_for(
        self, batch: Any, module: nn.Module, place: SequenceShard, dims: SequenceDims | None
    ) -> SequenceShard:
        """Return the shard under which ``module`` works on the whole ``batch``; ``place`` is the rank's in the base layout.

        Raises:
            ValueError: if a mask in the batch is for sequences of another length than the batch has, or nothing says how
                long they are.
        """
        masks = dict(masks_by_path(batch))
        if place.size == 1 or self.requested in STATIC_LAYOUTS or (self.requested == "auto" and not masks):
            return place
        if self.requested == "auto" and (self.stays or _needs_static(module)):
            return place
        if hasattr(module, "shard_batch"):
            lengths = _lengths_of_masks(masks.values())
        else:
            lengths = _lengths(batch, dims or {})
            if self.requested == "balanced":
                _check_lengths(masks, lengths)
        others = {x.num_queries for x in masks.values() if x.num_queries is not None}  # of a pooled sequence, say
        own = _chunks_per_rank({*lengths, *others}, place.size, even=self.requested == "auto")
        if own == 0:  # the batch cannot be divided: split_batch says so
            return place
        wanted = Counter(x for x in masks.values() if _is_square(x, lengths))
        if not wanted and self.requested == "auto" and not others <= {*lengths}:
            return place
        wanted = wanted or _of_modules(module, lengths)
        rows = _rows(batch, wanted, dims or {})
        key = (tuple(sorted((x.digest, n) for x, n in wanted.items())), rows, lengths[0], own, place.size)
        if key not in self._choices:
            if len(self._choices) == _KEPT:
                del self._choices[next(iter(self._choices))]
            self._choices[key] = self._choose(_work(wanted, rows, lengths[0], own * place.size), own, place.size)
        assignment = self._choices[key]
        return place if assignment is None else _on(place, assignment)

    def for_any_length(self, place: SequenceShard) -> SequenceShard:
        """Return the balanced shard for sequences whose length cannot be divided, as if attention were causal."""
        chunks = CHUNKS * place.size
        if chunks not in self._choices:
            self._choices[chunks] = balance(*causal_work(chunks, chunks), place.size)
        assignment = self._choices[chunks]
        assert assignment is not None
        return _on(place, assignment)

    def padded(self, shard: SequenceShard, batch: Any, dims: SequenceDims | None) -> SequenceShard:
        """Return the shard with the padding that the sequences of ``batch`` need; raises as :func:`padding_of`."""
        if not self.pad_values or shard.size == 1:
            return shard
        return replace(shard, padding=padding_of(batch, shard.num_chunks, self.pad_values, dims))

    def _choose(self, work: tuple[Integers, Integers], own: int, size: int) -> ChunkAssignment | None:
        """Return who holds which of ``own`` chunks a rank; None for the base layout."""
        pairs, keys = work
        if self.requested == "balanced":
            return balance(pairs, keys, size)
        zigzag = imbalance(pairs, static_assignment(size, "zigzag").refined(own // 2))
        if zigzag <= UNEVEN:
            return None
        assignment = balance(pairs, keys, size)
        return assignment if imbalance(pairs, assignment) < zigzag else None


def static_shard(shard: SequenceShard) -> SequenceShard:
    """Return the rank's place in a static layout that can cut whatever ``shard`` can."""
    if shard.assignment is None:
        return shard
    layout = "zigzag" if shard.assignment.per_rank % 2 == 0 else "contiguous"
    return replace(shard, layout=layout, assignment=None, is_current=None)


def _on(place: SequenceShard, assignment: ChunkAssignment) -> SequenceShard:
    return replace(place, layout="balanced", assignment=assignment)


_Positions = tuple[ChunkAssignment | None, int]
"""What tells the positions of a batch from those of another: its assignment and its padding."""


def _positions_of(shard: SequenceShard) -> _Positions:
    return shard.assignment, shard.padding


def _needs_static(module: nn.Module) -> bool:
    """Whether a rank has rows of its own segment only, or the module cuts sequences of which only it knows the lengths."""
    return hasattr(module, "shard_batch") or any(x.segment_local for x in segment_modules(module))


def _lengths_of_masks(masks: Collection[Any]) -> list[int]:
    lengths = sorted({x for mask in masks if (x := _length(mask)) is not None})
    if not lengths:
        raise ValueError(
            "layout='balanced' cannot know how long the sequences are that shard_batch will cut. Put the AttentionMask of the batch into"
            " it, made from these sequences, or use layout='zigzag'."
        )
    return lengths


def _lengths(batch: Any, dims: SequenceDims) -> list[int]:
    """Return the lengths of all sequences of a batch, that of most of its tensors first."""
    return [
        size for size, _ in Counter(x.size(dim) for x, dim in sequences_by_path(batch, dims).values()).most_common()
    ]


def _rows(batch: Any, masks: Mapping[Any, int], dims: SequenceDims) -> int:
    """Return how many rows a batch has: as many as its masks tell apart, or else as most of its sequences."""
    sizes = Counter(x.size(0) for x, dim in sequences_by_path(batch, dims).values() if dim % x.dim() > 0)
    told_apart = max((mask.rows for mask in masks), default=1)
    return told_apart if told_apart > 1 or not sizes else sizes.most_common(1)[0][0]


def _chunks_per_rank(lengths: Collection[int], size: int, even: bool) -> int:
    """Return into how many chunks a rank's part of every sequence can be cut; 0 where they cannot be divided."""
    common = gcd(*lengths)
    numbers = range(CHUNKS, 0, -2 if even else -1)
    return next((n for n in numbers if common and common % (n * size) == 0), 0)


def _length(mask: Any) -> int | None:
    """Return the length of the sequences that a mask is for; None for any."""
    return mask.num_keys if mask.num_queries is None else mask.num_queries


def _is_square(mask: Any, lengths: Collection[int]) -> bool:
    """Whether a mask is for queries and keys of one of the sequences, and not of a memory (cross-attention)."""
    length = _length(mask)
    return length is None or (mask.num_keys in (None, length) and length in lengths)


def _check_lengths(masks: Mapping[Path, Any], lengths: Collection[int]) -> None:
    for path, mask in masks.items():
        if mask.num_queries is not None and mask.num_queries not in lengths:
            has = " and ".join(map(str, sorted(lengths)))
            raise ValueError(
                f"Batch entry {'.'.join(map(str, path)) or 'batch'}: {mask} is for sequences of length {mask.num_queries}, and the batch"
                f" has sequences of length {has}. Make the mask from the whole sequences that are in the batch; if it is"
                " for another sequence that the module makes of them, such as a pooled one, use layout='zigzag'."
            )


def _of_modules(module: nn.Module, lengths: Collection[int]) -> Counter[Any]:
    """Return the masks of the module's own attention, and how many layers have each."""
    attention = (x for x in segment_modules(module) if not getattr(x, "whole_memory", False))
    masks = (getattr(part, "default_mask", None) for part in attention)
    return Counter(x for x in masks if x is not None and _is_square(x, lengths))


def _work(masks: Mapping[Any, int], rows: int, length: int, num_chunks: int) -> tuple[Integers, Integers]:
    """Add up what all masks make of each chunk of a batch of ``rows``; where nothing is known, attention is causal.

    A mask of one row stands for all. How many heads there are is not known here: a function that looks at the head is
    counted by the first.
    """
    if not masks:
        return causal_work(length, num_chunks)
    work = [
        (mask.chunk_work(_length(mask) or length, num_chunks, batch=rows if mask.rows == 1 else mask.rows), times)
        for mask, times in masks.items()
    ]
    return sum(x.pairs * times for x, times in work), sum(x.keys * times for x, times in work)
