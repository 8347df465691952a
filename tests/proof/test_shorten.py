"""What is compared of a long batch: no more than a rank holds, and uneven where the batch is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.proof.evenness import by_rank, uneven_signs
from lightning_lss.proof.shorten import POSITIONS, short_length, shortened, window_starts

SHARDS = [SequenceShard(0, size, layout) for size in (2, 4, 8) for layout in ("contiguous", "zigzag")]


@given(st.sampled_from(SHARDS), st.integers(1, 5000))
def test_a_rank_computes_no_more_than_in_a_step(shard, runs) -> None:
    length = runs * shard.num_chunks
    short = short_length(length, shard)
    assert 0 < short <= length
    assert short % shard.num_chunks == 0
    few = max(min(POSITIONS, length // shard.size), shard.num_chunks)
    assert short <= few or few == shard.num_chunks == length // shard.size


@given(st.sampled_from(SHARDS), st.integers(1, 5000))
def test_a_shortened_chunk_can_be_cut_only_as_a_chunk_can(shard, chunk) -> None:
    length = chunk * shard.num_chunks
    short = short_length(length, shard)
    kept = short // shard.num_chunks
    for block in (2, 3, 4, 5, 7, 8, 16, 32):
        assert kept % block or chunk % block == 0, (block, kept)
    assert kept % 2 == chunk % 2 or kept == 1


@given(st.sampled_from(SHARDS), st.integers(1, 5000))
def test_one_device_never_has_the_positions_of_a_segment(shard, chunk) -> None:
    """Else what a module has cached by the length in the proof would be that of another segment."""
    length = chunk * shard.num_chunks
    assert short_length(length, shard) != length // shard.size


@given(st.sampled_from(SHARDS), st.integers(1, 5000))
def test_a_sequence_that_is_filled_up_is_shortened_alike(shard, length) -> None:
    unit, rest = shard.num_chunks, length % shard.num_chunks
    short, segment = short_length(length, shard) + rest, -(-length // unit) * unit // shard.size
    if short < length and rest:
        assert short != segment
        assert short - rest <= max(segment, 10 * unit)  # 11 cannot be cut into blocks
        for block in (2, 3, 4, 5, 7, 8, 16, 32):
            assert (short // unit + 1) % block or (length // unit + 1) % block == 0


def test_an_entry_may_be_longer_than_the_tokens() -> None:
    shard = SequenceShard(0, 2, "zigzag")
    targets = torch.arange(16)[None].masked_fill(torch.arange(16) < 6, -100)
    batch = {"targets": targets, "memory": torch.arange(24.0).view(1, 24, 1), "mask": AttentionMask.documents(targets)}
    for dims in ({"memory": 1}, {"memory": 1, "targets": 1}):
        counts = uneven_signs(batch, shard, dims)[("targets",), "negative"]
        starts = window_starts(24, 3, shard, counts)
        short = shortened(batch, 24, starts, 3, dims)
        assert short["memory"].flatten().tolist() == [start + x for start in starts for x in range(3)]
        positions = torch.cat([torch.arange(start * 16 // 24, start * 16 // 24 + 2) for start in starts])
        assert torch.equal(short["targets"], targets[:, positions])
        assert short["mask"] == batch["mask"].select(positions)
        assert uneven_signs(short, shard, dims)


@given(st.sampled_from(SHARDS), st.integers(0, 2**31))
def test_an_uneven_batch_stays_uneven(shard, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, kept = 32 * shard.num_chunks, 4
    targets = torch.randint(100, (3, length), generator=generator)
    few = torch.rand(3, length, generator=generator) < torch.rand((), generator=generator) / 20
    batch = {"inputs": torch.randint(100, (3, length), generator=generator), "targets": targets.masked_fill(few, -100)}
    counts = uneven_signs(batch, shard, {}).get((("targets",), "negative"))
    assert (counts is None) == (len(set(by_rank(few.sum(0), shard).tolist())) == 1)
    starts = window_starts(length, kept, shard, counts)
    assert [start // 32 for start in starts] == list(range(shard.num_chunks))  # every rank keeps positions of its own
    short = shortened(batch, length, starts, kept, {})
    assert short["inputs"].shape == (3, kept * shard.num_chunks)
    if counts is not None:
        assert (("targets",), "negative") in uneven_signs(short, shard, {})


@pytest.mark.parametrize(
    ("entry", "sign"),
    [
        (torch.tensor([[5, 6, 7, 8, 9, -100, 4, 3]]), "negative"),
        (torch.tensor([[5, 6, 7, 8, 9, 3, 0, 0]]), "padding"),
        (torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9]]), "padding"),
        (torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]), "mask"),
        (torch.tensor([[True] * 7 + [False]]), "mask"),
        (torch.tensor([[1.0] * 7 + [0.0]]), "mask"),
        (torch.tensor([[5, 6, 7, 8, 9, 3, 2, 1]]), None),
        (torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]]), None),
        (torch.rand(1, 8), None),
        (torch.zeros(1, 8, 3), None),
    ],
)
def test_signs_of_tokens_that_do_not_count(entry: Tensor, sign: str | None) -> None:
    found = uneven_signs({"x": entry}, SequenceShard(0, 2, "contiguous"), {})
    assert list(found) == ([(("x",), sign)] if sign else [])
    assert not uneven_signs({"x": entry}, SequenceShard(0, 2, "contiguous"), {}, known=found)


@pytest.mark.parametrize("starts", [[0, 8, 16, 24], [3, 8, 20, 28]])
def test_a_mask_is_shortened_with_its_sequences(starts) -> None:
    ids = torch.tensor([3, 10, 19]).repeat_interleave(torch.tensor([5, 12, 15]))[None]
    memory = AttentionMask.key_padding(torch.ones(1, 7))
    masks = {
        "documents": AttentionMask.documents(ids),
        "prefix": AttentionMask.prefix(11) & AttentionMask.documents(ids),
        "any length": AttentionMask.prefix(11),
    }
    short = shortened({"tokens": ids, "memory": memory, **masks}, 32, starts, 2, {})
    positions = torch.cat([torch.arange(start, start + 2) for start in starts])
    assert torch.equal(short["tokens"], ids[:, positions])
    assert short["memory"] is memory
    for name, mask in masks.items():
        assert short[name] == mask.select(positions), name
