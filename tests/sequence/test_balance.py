"""Chunks are given to ranks so that all have the same work, and those of one document stay together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.sequence.assignment import static_assignment
from lightning_lss.sequence.balance import TOLERANCE, _Search, balance, causal_work, imbalance


def documents(length: int, num_chunks: int, seed: int):
    """Work of packed causal documents of lognormal lengths."""
    random, lengths = np.random.default_rng(seed), []
    while (rest := length - sum(lengths)) > 0:
        lengths.append(min(rest, max(1, int(random.lognormal(np.log(2048), 1.2)))))
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each position's document
    pairs = (np.arange(length) - first + 1).reshape(num_chunks, -1).sum(1)
    chunk = length // num_chunks
    start, stop = np.arange(num_chunks) * chunk, np.arange(1, num_chunks + 1) * chunk
    return pairs, np.clip(np.minimum(stop[:, None], stop) - np.maximum(first[::chunk, None], start), 0, None)


def window(length: int, num_chunks: int, left: int):
    work = AttentionMask.sliding_window(left).chunk_work(length, num_chunks)
    return work.pairs, work.keys


def keys_received(keys, assignment):
    """How many keys each rank receives, int64 [S], where chunk i looks at keys[i, j] of chunk j."""
    most = np.stack([keys[list(own)].max(0) for own in assignment.chunks])
    return np.array([row.sum() - row[list(own)].sum() for row, own in zip(most, assignment.chunks)])


def test_documents_are_even_and_keep_together() -> None:
    length, size, found = 131_072, 8, []
    for seed in range(50):
        pairs, keys = documents(length, 8 * size, seed)
        assignment = balance(pairs, keys, size)
        received = keys_received(keys, assignment).mean() / (length - length // size)
        found.append((imbalance(pairs, assignment), received))
        assert imbalance(pairs, static_assignment(size, "zigzag").refined(4)) > 1.1
    uneven, received = np.array(found).T
    assert uneven.max() < 1 + TOLERANCE + 0.002
    assert received.mean() < 0.16  # heaviest first, which does not mind documents: 0.30


def test_a_window_keeps_neighbours_together() -> None:
    length, size = 32_768, 8
    pairs, keys = window(length, 8 * size, 1024)
    assignment = balance(pairs, keys, size)
    assert imbalance(pairs, assignment) < 1.03
    assert keys_received(keys, assignment).max() / (length - length // size) < 0.04  # one window from the neighbour


@pytest.mark.parametrize("size", [2, 3, 8])
def test_causal_is_even(size) -> None:
    pairs, keys = causal_work(960, 8 * size)
    expected = AttentionMask.causal().chunk_work(960, 8 * size)
    assert (pairs == expected.pairs).all()
    assert (keys == expected.keys).all()
    assert imbalance(pairs, balance(pairs, keys, size)) < 1.001


def test_full_attention_is_left_contiguous_and_so_is_a_batch_without_work() -> None:
    contiguous = static_assignment(4, "contiguous").refined(8)
    assert balance(np.full(32, 100), np.full((32, 32), 10), 4) == contiguous
    assert balance(np.zeros(32, np.int64), np.zeros((32, 32), np.int64), 4) == contiguous
    assert imbalance(np.zeros(32, np.int64), contiguous) == 1


@given(size=st.integers(1, 9), own=st.integers(1, 8), seed=st.integers(0, 1000), scale=st.sampled_from([1, 100, 2**40]))
def test_any_work_is_no_less_even_than_what_static_layouts_make_of_it(size, own, seed, scale) -> None:
    random, count = np.random.default_rng(seed), size * own
    pairs, keys = random.integers(0, 50, count) * scale, random.integers(0, 9, (count, count))
    assignment = balance(pairs, keys, size)  # refuses what is no assignment
    assert assignment == balance(pairs.copy(), keys.copy(), size)
    assert assignment.per_rank == own
    for layout in ("contiguous", *(["zigzag"] if own % 2 == 0 else [])):
        static = static_assignment(size, layout)
        other = static.refined(own // static.per_rank)
        if imbalance(pairs, other) <= 1 + TOLERANCE:
            assert keys_received(keys, assignment).sum() <= keys_received(keys, other).sum() + 0.1 * count * 8


def test_sums_are_integers_that_every_processor_adds_alike() -> None:
    # products of two, summed over the columns, must stay below 2^24, wherever the search rounds to float32
    for count, size in ((16, 2), (64, 8), (192, 24), (512, 64), (1024, 128)):
        search = _Search(*causal_work(count * 64, count), size)
        levels, columns = float(search.levels), count // search.group
        assert columns * (levels * search.group) ** 2 < 2**24
        assert search.work.sum() <= 2**20
        assert (search.work % 1 == 0).all()
        assert (search.columns % 1 == 0).all()


def test_many_chunks_are_even_too() -> None:
    pairs, keys = documents(131_072, 512, 3)
    assert imbalance(pairs, balance(pairs, keys, 64)) < 1.035
