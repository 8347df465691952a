"""Which layout each batch is given, by the work of its masks."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lss import (
    AttentionMask,
    LSSAttention,
    LSSStrategy,
    RotaryEmbedding,
)
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.strategy.balancing import BatchLayouts


class SplitsItself(nn.Module):
    """Splits its own batches."""

    def shard_batch(self, batch: Any, shard: SequenceShard) -> Any:
        return batch


def choose(layout: str, batch: Any, size: int = 4, dims: Any = None, module: nn.Module | None = None) -> SequenceShard:
    return BatchLayouts(layout).shard_for(batch, module or RotaryEmbedding(2), SequenceShard(1, size, "zigzag"), dims)


@pytest.mark.parametrize(("length", "own"), [(64, 8), (16, 4), (56, 7), (44, 1), (36, 3), (46, None)])
def test_a_rank_has_as_many_chunks_as_the_length_allows_up_to_eight(length, own) -> None:
    chosen = choose("balanced", torch.zeros(2, length)).assignment
    assert (chosen and chosen.per_rank) == own


def test_all_sequences_of_a_batch_can_be_cut_into_the_chunks() -> None:
    batch = {"tokens": torch.zeros(1, 64), "frames": torch.zeros(1, 3, 24)}
    assert choose("balanced", batch, dims={"frames": 2}).assignment.per_rank == 2  # of 16 and of 6


def test_masks_of_a_memory_are_not_this_attention() -> None:
    memory = AttentionMask.key_padding(torch.ones(1, 5))
    batch = {"tokens": torch.zeros(1, 64), "memory": memory}
    assert choose("balanced", batch) == choose("balanced", torch.zeros(1, 64))


def test_modules_own_masks_count_where_the_batch_has_none() -> None:
    module = nn.ModuleList([RotaryEmbedding(2), LSSAttention(mask=AttentionMask.sliding_window(3))])
    near = choose("balanced", torch.zeros(1, 64), module=module).assignment
    assert near.chunks == tuple(tuple(range(8 * rank, 8 * rank + 8)) for rank in range(4))
    assert choose("balanced", torch.zeros(1, 64), module=LSSAttention()).assignment != near


@pytest.mark.parametrize(("left", "layout"), [(8, "zigzag"), (12, "balanced")])  # uneven by 7 and by 10.3 percent
def test_auto_bears_a_tenth_too_much(left, layout) -> None:
    batch = {"tokens": torch.zeros(1, 64), "mask": AttentionMask.sliding_window(left)}
    assert choose("auto", batch).layout == layout


def test_the_mask_of_a_pooled_sequence_does_not_count_under_auto() -> None:
    pooled = AttentionMask.documents(torch.arange(32)[None])
    uneven = AttentionMask.documents((torch.arange(64) - 32).clamp(min=0)[None]) & AttentionMask.causal()
    batch = {"tokens": torch.zeros(1, 64), "coarse": pooled}
    assert choose("auto", batch).layout == "zigzag"
    assert choose("auto", {**batch, "mask": uneven}).assignment.per_rank == 8  # pairs stay in one chunk: 32 / 4 = 8
    short = AttentionMask.documents(torch.arange(16)[None])
    assert choose("auto", {**batch, "coarse": short, "mask": uneven}).assignment.per_rank == 4


def test_auto_leaves_the_batch_to_a_module_that_splits_it() -> None:
    module = SplitsItself()
    uneven = AttentionMask.documents((torch.arange(64) - 32).clamp(min=0)[None]) & AttentionMask.causal()
    batch = {"tokens": torch.zeros(1, 64), "frames": torch.zeros(1, 2), "mask": uneven}
    assert choose("auto", batch, module=module).layout == "zigzag"
    assert choose("balanced", batch, module=module).layout == "balanced"


def test_a_mask_of_one_row_stands_for_all_rows() -> None:
    padding = AttentionMask.padding((torch.arange(64) < 36).expand(16, 64)) & AttentionMask.causal()
    same = [
        AttentionMask.causal() & AttentionMask.padding(torch.ones(16, 64)),  # 16 rows
        AttentionMask.causal(),
        AttentionMask.from_function(lambda b, h, q, k: k <= q),
    ]
    chosen = {choose("balanced", {"x": torch.zeros(16, 64), "a": x, "b": padding}).assignment for x in same}
    assert len(chosen) == 1


def test_a_function_of_the_row_is_counted_over_the_batch() -> None:
    ids = torch.stack([torch.zeros(64, dtype=torch.int64), *[(torch.arange(64) - 32).clamp(min=0)] * 7])
    function = AttentionMask.from_function(lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (k <= q))
    documents = AttentionMask.documents(ids) & AttentionMask.causal()
    function, documents = (
        {"x": torch.zeros(8, 64), "mask": x} for x in (function, AttentionMask.from_dense(documents.dense(64)))
    )
    assert choose("auto", function).assignment == choose("auto", documents).assignment is not None


def test_a_choice_is_made_once() -> None:
    layouts, place = BatchLayouts("balanced"), SequenceShard(0, 2, "balanced")
    batch = {"x": torch.zeros(1, 64), "mask": AttentionMask.documents(torch.ones(1, 64, dtype=torch.int64))}
    first, again = (layouts.shard_for(batch, RotaryEmbedding(2), place, None) for _ in range(2))
    assert first.assignment is again.assignment


def test_one_rank_holds_everything() -> None:
    place = SequenceShard(0, 1, "balanced")
    assert BatchLayouts("balanced").shard_for(torch.zeros(1, 64), RotaryEmbedding(2), place, None) is place


def test_the_layout_is_shown_as_it_was_asked_for() -> None:
    assert "layout='balanced'" in repr(LSSStrategy(layout="balanced"))
