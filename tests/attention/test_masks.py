"""What masks mean, that their structure is what they mean, and what is refused."""

import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lss import AttentionMask, lss_attention
from lightning_lss.attention.bands import Bands
from lightning_lss.attention.kinds import Sizes
from lightning_lss.attention.packing import PackedMask, unpack
from lightning_lss.attention.plan import forget_plans
from lightning_lss.attention.structure import chunk_work
from tests.attention.masks import masks

BATCH, HEADS, LENGTH = 2, 2, 24


def paint(found: Bands, length: int = LENGTH) -> torch.Tensor:
    q, k = torch.arange(length)[:, None], torch.arange(length)
    painted = torch.zeros(length, length, dtype=torch.int64)
    for q0, q1, k0, k1, low, high in found.tolist():
        painted += (q >= q0) & (q < q1) & (k >= k0) & (k < k1) & (q - k >= low) & (q - k <= high)
    return painted


def shown(mask: AttentionMask, length: int) -> list[str]:
    """The mask of the first row of the batch as a picture."""
    return ["".join("x" if seen else "." for seen in row) for row in mask.dense(length)[0, 0]]


def test_what_masks_show() -> None:
    ids = torch.tensor([[7, 7, 7, 2, 2]])
    valid = torch.tensor([[0, 1, 1, 1, 0]])
    assert shown(AttentionMask.causal(), 3) == ["x..", "xx.", "xxx"]
    assert shown(AttentionMask.full(), 2) == ["xx", "xx"]
    assert shown(AttentionMask.sliding_window(1, 2), 5) == ["xxx..", "xxxx.", ".xxxx", "..xxx", "...xx"]
    assert shown(AttentionMask.chunked(2), 5) == ["xx...", "xx...", "..xx.", "..xx.", "....x"]
    assert shown(AttentionMask.prefix(torch.tensor([2])), 4) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert shown(AttentionMask.documents(ids), 5) == ["xxx..", "xxx..", "xxx..", "...xx", "...xx"]
    assert shown(AttentionMask.documents(ids) & AttentionMask.causal(), 5) == [
        "x....",
        "xx...",
        "xxx..",
        "...x.",
        "...xx",
    ]
    assert shown(AttentionMask.padding(valid), 5) == [".....", ".xxx.", ".xxx.", ".xxx.", "....."]
    assert shown(AttentionMask.key_padding(valid), 5) == [".xxx."] * 5
    for same in (
        AttentionMask.documents(ids[0]),
        AttentionMask.documents(cu_seqlens=torch.tensor([0, 3, 5])),
        AttentionMask.from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])),
        AttentionMask.from_function(lambda b, h, q, k: (q < 3) == (k < 3)),
        AttentionMask.from_dense(AttentionMask.documents(ids).dense(5)),
    ):
        assert torch.equal(same.dense(5), AttentionMask.documents(ids).dense(5))
    assert shown(AttentionMask.causal() | AttentionMask.padding(valid), 3 + 2)[1] == "xxxx."


def test_documents_of_one_token_each_are_told_apart_by_their_positions() -> None:
    assert shown(AttentionMask.from_position_ids(torch.tensor([[0, 0, 1, 0]])), 4) == ["x...", ".xx.", ".xx.", "...x"]


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(masks(BATCH, HEADS, LENGTH))
def test_bands_and_words_say_what_the_dense_mask_says(mask) -> None:
    sizes = Sizes(BATCH, HEADS, LENGTH, LENGTH)
    dense = mask.dense(LENGTH, batch=BATCH, heads=HEADS)
    again = unpack(PackedMask(mask.words.clone()))
    assert torch.equal(again.visible(torch.arange(LENGTH), sizes), dense)
    found = mask.kind.bands(sizes)
    if found is not None:
        painted = torch.stack([paint(row) for row in found])[:, None]
        assert torch.equal(painted.expand(BATCH, -1, -1, -1), dense.long().expand(BATCH, 1, -1, -1))


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(masks(BATCH, HEADS, LENGTH), st.sampled_from([1, 2, 6]))
def test_the_work_of_chunks_is_that_of_the_dense_mask(mask, num_chunks) -> None:
    sizes = Sizes(BATCH, HEADS, LENGTH, LENGTH)
    dense = mask.dense(LENGTH, batch=BATCH, heads=HEADS)  # of the rows that it tells apart
    work = chunk_work(mask.packed, sizes, num_chunks)
    exact = mask.kind.bands(sizes) is not None
    width = LENGTH // num_chunks
    for row in range(num_chunks):
        rows = dense[:, :, row * width : (row + 1) * width]
        assert not exact or work.pairs[row] == rows[:, 0].sum()
        for column in range(num_chunks):
            seen = np.flatnonzero(rows[..., column * width : (column + 1) * width].sum((0, 1, 2)))
            wanted = (seen[-1] - seen[0] + 1, seen[0] + column * width) if len(seen) else (0, None)
            if exact or not len(seen):
                assert work.keys[row, column] == wanted[0]
                assert not len(seen) or work.first[row, column] == wanted[1]
            else:  # blocks are looked at as a whole
                assert work.keys[row, column] >= wanted[0]


def test_a_mask_is_a_value() -> None:
    one, other = (AttentionMask.documents(torch.tensor([[5, 5, x]])) & AttentionMask.causal() for x in (5, 6))
    same = AttentionMask.documents(torch.tensor([[1, 1, 1]])) & AttentionMask.causal()
    assert one == same != other
    assert one.content_digest == same.content_digest != other.content_digest
    assert len({one, same, other}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.to("meta") is one


def test_a_mask_is_made_of_any_strides_and_of_numbers_of_numpy() -> None:
    column = torch.tensor([[2, 7, 7]])[:, 0]
    assert AttentionMask.prefix(column) == AttentionMask.prefix(2)
    assert AttentionMask.chunked(np.int64(4)) == AttentionMask.chunked(4)
    assert AttentionMask.sliding_window(np.int64(4)) == AttentionMask.sliding_window(4)


def test_a_mask_does_not_follow_the_tensors_that_it_was_made_of() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    mask, table = AttentionMask.key_padding(valid), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    dense = AttentionMask.from_dense(table)
    valid[0, 1] = table[..., 1] = False
    assert mask.dense(4).all()
    assert dense.dense(4).all()


def test_positions_are_selected() -> None:
    positions = torch.tensor([0, 1, 4, 5])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    mask = (AttentionMask.documents(ids) & AttentionMask.causal()) | AttentionMask.prefix(torch.tensor([1, 5]))
    expected = (AttentionMask.documents(ids[:, positions]) & AttentionMask.causal()) | AttentionMask.prefix(
        torch.tensor([1, 3])
    )
    assert torch.equal(mask.select(positions).dense(4), expected.dense(4))
    function = AttentionMask.from_function(lambda b, h, q, k: q + k == 5)
    for one in (function, AttentionMask.from_dense(function.dense(6))):
        assert torch.equal(one.select(positions).dense(4), function.dense(6)[..., positions, :][..., positions])


def test_a_function_is_asked_for_rows_and_heads_only_if_it_looks_at_them() -> None:
    for function, shape in (
        (lambda b, h, q, k: k <= q, (1, 1)),
        (lambda b, h, q, k: k <= q + h, (1, 2)),
        (lambda b, h, q, k: (k <= q) & (b > 0), (3, 1)),
    ):
        assert AttentionMask.from_function(function).dense(4, batch=3, heads=2).shape == (*shape, 4, 4)


def even(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q + k) % 2 == 0


def test_a_function_is_sent_to_other_processes_by_itself_and_compared_by_name() -> None:
    mask = AttentionMask.from_function(even) & AttentionMask.causal()
    sent = pickle.dumps(mask)
    number = mask.kind.one.number
    AttentionMask.from_function(lambda b, h, q, k: q == k)  # takes the next number
    arrived = pickle.loads(sent)
    assert arrived.kind.one.number not in (number, number + 1)
    assert torch.equal(arrived.dense(6), mask.dense(6))
    assert arrived.content_digest == mask.content_digest != AttentionMask.causal().content_digest


def test_a_function_that_reads_something_else_than_before_is_refused() -> None:
    ids, least = torch.tensor([[0, 0, 1, 1]]), 0
    mask = AttentionMask.from_function(lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (k >= least))
    q = torch.randn(1, 1, 4, 4)
    lss_attention(q, q, q, mask=mask)
    ids[0, 1] = 1
    with pytest.raises(
        ValueError, match=r"reads something that has changed.* make a new one with AttentionMask.from_function"
    ):
        lss_attention(q, q, q, mask=mask)
    mask = AttentionMask.from_function(lambda b, h, q, k: k >= least)
    least = 1
    with pytest.raises(ValueError, match="reads something that has changed"):
        mask.dense(4)


def test_functions_are_compared_by_what_they_read() -> None:
    def of(ids: torch.Tensor) -> AttentionMask:
        return AttentionMask.from_function(lambda b, h, q, k: ids[q] == ids[k])

    assert of(torch.tensor([0, 0, 1])).content_digest == of(torch.tensor([0, 0, 1])).content_digest
    assert of(torch.tensor([0, 0, 1])).content_digest != of(torch.tensor([0, 1, 1])).content_digest


def test_a_function_that_cannot_be_mapped_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        ValueError, match=r"failed under torch.vmap.* It must return a bool tensor.* & \| ~ instead of and"
    ):
        AttentionMask.from_function(lambda b, h, q, k: bool(q > k)).dense(4)


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_function_is_asked_under_the_modes_of_a_proof() -> None:
    q = torch.randn(1, 1, 8, 4)
    mask = AttentionMask.from_function(even)
    with Watched():
        watched = lss_attention(q, q, q, mask=mask)
    forget_plans()
    assert torch.equal(watched, lss_attention(q, q, q, mask=mask))


def test_lightning_finds_no_batch_size_in_a_mask() -> None:
    batch = {"inputs": torch.zeros(3, 8), "mask": AttentionMask.causal()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_batch_size(batch) == 3
    assert move_data_to_device(batch, "meta")["mask"] is batch["mask"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionMask.sliding_window(-1), "left=-1 must be a number of positions"),
        (lambda: AttentionMask.chunked(0), "size=0 must be a positive integer"),
        (lambda: AttentionMask.prefix(torch.tensor([1, -2])), r"got lengths=\[1, -2\]"),
        (lambda: AttentionMask.prefix(torch.tensor([0.5])), "lengths must be integers"),
        (lambda: AttentionMask.documents(), "Give either the ids of documents"),
        (
            lambda: AttentionMask.documents(torch.zeros(2, 3)),
            r"ids must be integers \[B, L\]; got torch.float32 \(2, 3\)",
        ),
        (lambda: AttentionMask.documents(cu_seqlens=torch.tensor([1, 3])), "must start at 0"),
        (lambda: AttentionMask.documents(cu_seqlens=torch.tensor([0, 3, 2])), "must start at 0 and not decrease"),
        (lambda: AttentionMask.padding(torch.tensor([[0.0, -1e9]])), "valid must be bool, or 0 and 1"),
        (lambda: AttentionMask.from_dense(torch.zeros(1, 1, 2, 2)), "A dense mask is bool"),
        (
            lambda: AttentionMask.documents(torch.zeros(2, 3).long()) & AttentionMask.prefix(torch.ones(4).long()),
            "rows is 2 and 4",
        ),
        (lambda: AttentionMask.prefix(1).select(torch.tensor([1, 0])), r"positions=\[1, 0\] must ascend"),
        (lambda: AttentionMask.documents(torch.zeros(1, 3).long()).dense(4), "is for sequences of length 3"),
    ],
)
def test_what_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_a_segment_is_refused_with_the_remedy() -> None:
    from lightning_lss import SequenceShard

    q = torch.zeros(2, 1, 4, 4)
    with pytest.raises(
        ValueError, match=re.escape("length 4; attention was given queries of global length 8")
    ) as error:
        lss_attention(q, q, q, SequenceShard(0, 2), mask=AttentionMask.padding(torch.ones(2, 4)))
    assert "sequence_dims={key: None}" in str(error.value)
    with pytest.raises(ValueError, match="is for a batch of 3"):
        lss_attention(q, q, q, SequenceShard(0, 2), mask=AttentionMask.padding(torch.ones(3, 8)))
