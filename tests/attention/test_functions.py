"""Masks made of functions: what these read is known by its content, or refused where it cannot be known."""

import functools
import itertools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss import AttentionMask
from lightning_lss.sequence.batch import is_same_batch
from tests.attention.functions import CASES, CHANGED, LENGTH, Case, Net, Visible, attend, closure, ids, same_id


@pytest.mark.parametrize("make", CASES)
def test_what_a_function_reads_is_known_by_its_content(make: Callable[[], Case]) -> None:
    function, changes = make()
    mask = AttentionMask.from_function(function)
    attend(mask)
    assert mask.content_digest == AttentionMask.from_function(make()[0]).content_digest
    changes()
    with pytest.raises(ValueError, match=CHANGED):
        attend(mask)
    for use in (lambda: mask.select(torch.arange(4)), lambda: pickle.dumps(mask), lambda: mask.chunk_work(LENGTH, 2)):
        with pytest.raises(ValueError, match=CHANGED):
            use()
    assert AttentionMask.from_function(function).content_digest != mask.content_digest


def digests(rank: int = 0) -> list[int]:
    return [AttentionMask.from_function(make()[0]).content_digest for make in CASES]


def compared(rank: int) -> bool:
    mask = AttentionMask.from_function(functools.partial(same_id, ids(4 + rank)))
    assert dist.group.WORLD is not None
    return is_same_batch({"mask": mask}, dist.group.WORLD, torch.device("cpu"))


@pytest.mark.slow
def test_processes_find_the_same_digest_for_the_same_content(world) -> None:
    here = digests()
    assert len(set(here)) == len(CASES) - 6  # five are one closure, and two each one method, before something changes
    assert world.run(2, digests) == [here, here]
    assert world.run(2, compared) == [False, False]


def test_selected_positions_count_and_are_the_masks_own() -> None:
    mask, positions = AttentionMask.from_function(closure()[0]), torch.arange(3, 6)
    one, other = mask.select(positions), mask.select(positions + 1)
    before = one.dense(3)
    assert one.content_digest == mask.select(positions).content_digest != other.content_digest
    positions.zero_()
    assert torch.equal(one.dense(3), before)


def test_what_a_function_does_not_read_may_change() -> None:
    net, batch = Net(), {"ids": ids()}
    mask = AttentionMask.from_function(net.visible)
    net.norm(torch.randn(4, 3))
    net.scores[0].weight.data.zero_()
    attend(mask)
    batch["mask"] = AttentionMask.from_function(lambda b, h, q, k: batch["ids"][q] == batch["ids"][k])
    attend(batch["mask"])


SPARSE = torch.eye(2).to_sparse()


@functools.cache
def cached() -> int:
    return 3


def opaque(x: Any) -> Visible:
    return lambda b, h, q, k: q >= next(x)


def importing(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    import lightning_lss

    return q >= k + 0 * len(lightning_lss.__all__)


class OfAMetaclass(type):
    def __getitem__(cls, place: Tensor) -> Tensor:
        return ids()[place]


class Table(metaclass=OfAMetaclass):
    pass


def holding_a_lock(lock: Any) -> Visible:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        with lock:
            return q >= k

    return visible


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (opaque(itertools.cycle([1])), "itertools.cycle object"),
        (opaque(1 for _ in itertools.count()), "generator object"),
        (importing, "the module 'lightning_lss' that it imports itself"),
        (holding_a_lock(threading.Lock()), "lock object"),
        (lambda b, h, q, k: q >= random.random(), "random of the standard library"),
        (lambda b, h, q, k: q >= cached(), "_lru_cache_wrapper object"),
        (lambda b, h, q, k: eval("q >= k"), "eval"),
        (lambda b, h, q, k: Table[q] == Table[k], "what __getitem__ .* reads"),
        (lambda b, h, q, k: (q >= k) & (SPARSE is not None), "values cannot be read"),
    ],
)
def test_what_cannot_be_known_is_refused(function: Visible, named: str) -> None:
    with pytest.raises(
        ValueError, match=f"cannot be known whether it changes.*{named}.* or use AttentionMask.from_dense"
    ):
        AttentionMask.from_function(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda b, h, q, k: torch.where(q >= k, 0.0, float("-inf")), "returned torch.float32: .* where it is not -inf"),
        (lambda b, h, q, k: (q >= k) - 1, "must return whether a pair is visible.* torch.int64"),
        (lambda b, h, q, k: (q >= k)[None], r"must return one bool, of shape \(\); it returned shape \(1,\)"),
        (lambda b, h, q, k: (q >= k, k), "it returned tuple"),
        (lambda b, h, q, k: True, "failed under torch.vmap"),
    ],
)
def test_a_function_must_say_whether_a_pair_is_visible(function: Visible, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMask.from_function(function).dense(3)


def test_zero_and_one_are_taken_and_other_numbers_found_where_they_occur() -> None:
    assert torch.equal(
        AttentionMask.from_function(lambda b, h, q, k: (q >= k).long()).dense(3), AttentionMask.causal().dense(3)
    )
    mask = AttentionMask.from_function(lambda b, h, q, k: q - k)
    with pytest.raises(ValueError, match="or 0 and 1; it returned"):
        attend(mask)


def test_writing_to_what_a_mask_shows_does_not_change_it() -> None:
    for mask in (AttentionMask.key_padding(torch.ones(1, 1)), AttentionMask.from_dense(torch.ones(1, 1, 1, 1).bool())):
        mask.dense(1).zero_()
        assert mask.dense(1).all()
    mask = AttentionMask.key_padding(torch.ones(1, 4))
    mask.dense(4).zero_()
    assert mask.dense(4).all()
