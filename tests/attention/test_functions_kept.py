"""How long functions of masks live, and that their changes are noticed where they are used: in backward, in compiled code."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_lss import AttentionMask, lss_attention
from lightning_lss.attention.plan import forget_plans
from lightning_lss.testing.compare import assert_equal
from tests.attention.functions import CHANGED, LENGTH, QUERIES, Visible, attend, closure


def forward(wrap: Callable[[Visible], Visible]) -> tuple[Tensor, Tensor, weakref.ref[Any]]:
    """Attend with a mask that is gone on return."""
    mask, x = AttentionMask.from_function(closure()[0]), QUERIES.clone().requires_grad_()
    out = wrap(lambda x, mask: lss_attention(x, x, x, mask=mask))(x, mask)
    return x, out, weakref.ref(mask.kind)


def checkpointed(function: Visible) -> Visible:
    return lambda *args: checkpoint(function, *args, use_reentrant=False)


def offloaded(function: Visible) -> Visible:
    def run(*args: Any) -> Tensor:
        with saved_tensors_hooks(torch.clone, lambda x: x):
            return function(*args)

    return run


def compiled(function: Visible) -> Visible:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def plain(function: Visible) -> Visible:
    return function


@pytest.mark.parametrize("wrap", [plain, checkpointed, offloaded, pytest.param(compiled, marks=pytest.mark.slow)])
def test_a_function_lives_until_its_backward_pass_is_over(wrap: Callable[[Visible], Visible]) -> None:
    x, out, alive = forward(wrap)
    gc.collect()
    forget_plans()
    out.sum().backward()
    reference = QUERIES.clone().requires_grad_()
    visible = AttentionMask.from_function(closure()[0]).dense(LENGTH)
    scores = (reference @ reference.transpose(-1, -2) / 2).masked_fill(~visible, float("-inf"))
    (scores.softmax(-1) @ reference).sum().backward()
    assert_equal({"grad": x.grad}, {"grad": reference.grad}, 1e-12)
    del x, out
    gc.collect()
    assert alive() is None


def test_masks_that_are_gone_keep_nothing() -> None:
    gc.disable()  # nothing waits for the garbage collector
    try:
        kept = []
        for _ in range(3):
            table = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
            mask = AttentionMask.from_function(lambda b, h, q, k, table=table: table[q, k])
            attend(mask)
            kept.append(weakref.ref(table))
            del mask, table
        assert [x() for x in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.slow
def test_compiled_code_refuses_in_the_same_words() -> None:
    attend = compiled(lambda x, mask: lss_attention(x, x, x, mask=mask))
    (function, changes), x = closure(), QUERIES.clone().requires_grad_()
    mask = AttentionMask.from_function(function)
    out = attend(x, mask)
    changes()
    with pytest.raises(ValueError, match=CHANGED):
        attend(x, mask)
    with pytest.raises(ValueError, match=CHANGED):
        out.sum().backward()
    with pytest.raises(
        ValueError, match="is for sequences of length 18; attention was given queries of global length 16"
    ):
        attend(x, AttentionMask.padding(torch.ones(1, LENGTH + 2)))
    with pytest.raises(ValueError, match="is for a batch of 3"):
        attend(x, AttentionMask.padding(torch.ones(3, LENGTH)))


def test_a_change_between_forward_and_backward_is_refused() -> None:
    function, changes = closure()
    out = lss_attention(*[QUERIES.clone().requires_grad_()] * 3, mask=AttentionMask.from_function(function))
    changes()
    with pytest.raises(ValueError, match=CHANGED):
        out.sum().backward()
