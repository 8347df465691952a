"""Attention over ranks under any mask, against the textbook formula with the dense mask, in float64."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention import plan, scores, structure, tiles
from lightning_lss.attention.kernels import KERNELS
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.layout import LAYOUTS
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.fake_world import recorded_ranks
from tests.attention.masks import masks
from tests.kernel_checks import packed_loop

WIDTH = 4


class Case(NamedTuple):
    """One call of attention."""

    size: int
    layout: str
    assignment: ChunkAssignment | None
    padding: int  # at the end, so that the length can be divided
    mask: AttentionMask
    batch: int
    heads: int
    kv_heads: int
    length: int
    value_width: int
    seed: int
    options: dict[str, Any]
    block: int  # of masks without structure
    rows: int  # of tiles with a diagonal at the left
    wide: int  # keys of a strip that is cut further
    packed: bool  # whether the reference computes many tiles by one call

    def tensors(self) -> list[Tensor]:
        """Queries, keys, values, and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [
            (self.heads, WIDTH),
            (self.kv_heads, WIDTH),
            (self.kv_heads, self.value_width),
            (self.heads, self.value_width),
        ]
        return [torch.randn(self.batch, n, self.length, w, dtype=torch.float64, generator=generator) for n, w in shapes]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size, batch, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 2]))
    padded = 2 * size * draw(st.integers(-(-4 // size), 100 // size))
    layout, assignment = draw(st.sampled_from(LAYOUTS)), None
    if layout == "balanced" and size > 1:
        chunks = draw(st.permutations(range(size * draw(st.sampled_from([1, 2])))))
        assignment = ChunkAssignment(tuple(tuple(sorted(chunks[rank::size])) for rank in range(size)))
    most = SequenceShard(0, size, layout, assignment=assignment).num_chunks - 1
    padding = draw(st.sampled_from([0, 0, 0, 0, 0, 1, most])) if size > 1 else 0
    length = padded - padding
    options = {
        "kernel": draw(st.sampled_from(["cpu_flash", "reference"])),
        "head_chunks": draw(st.sampled_from(["auto", 1, groups])),
        "keep_gathered": False,
    }
    if draw(st.integers(0, 4)) == 0:
        options |= {"keep_gathered": True, "head_chunks": "auto"}
    return Case(
        size,
        layout,
        assignment,
        padding,
        draw(masks(batch, heads, length)),
        batch,
        heads,
        groups,
        length,
        draw(st.sampled_from([4, 2, 6])),
        draw(st.integers(0, 2**16)),
        options,
        draw(st.sampled_from([4, 16, 128])),
        draw(st.sampled_from([1, 3, 16, 128])),
        draw(st.sampled_from([0, 2048])),
        draw(st.booleans()),
    )


def textbook(case: Case) -> dict[str, Tensor]:
    """Output and gradients with the dense mask."""
    *inputs, grad = case.tensors()
    q, k, v = (x.requires_grad_() for x in inputs)
    repeat = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeat, 1).mT / q.size(-1) ** 0.5
    visible = case.mask.dense(q.size(2), batch=q.size(0), heads=q.size(1))
    blind = ~visible.any(-1, keepdim=True)  # softmax of nothing is NaN
    weights = scores.masked_fill(~visible & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0.0)
    out = weights @ v.repeat_interleave(repeat, 1)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads)))


def attend(case: Case) -> dict[str, Tensor]:
    """The same, by ranks that take turns."""

    *inputs, grad = case.tensors()
    grad = F.pad(grad, (0, 0, 0, case.padding))  # no loss depends on padding

    def work(shard: SequenceShard) -> list[Tensor]:
        shard = replace(shard, padding=case.padding)
        leaves = [shard.split(x, 2).clone().requires_grad_() for x in inputs]
        out = lss_attention(*leaves, shard, mask=case.mask, **case.options)
        return [out.detach(), *torch.autograd.grad(out, leaves, shard.split(grad, 2))]

    by_rank = recorded_ranks(work, case.size, case.layout, late=True, assignment=case.assignment)
    local_length = (case.length + case.padding) // case.size
    order = torch.cat(
        [
            SequenceShard(rank, case.size, case.layout, assignment=case.assignment).positions(local_length)
            for rank in range(case.size)
        ]
    )
    whole = {
        name: torch.cat(parts, 2)[:, :, order.argsort()]
        for name, parts in zip(("out", "dq", "dk", "dv"), zip(*by_rank))
    }
    for name in ("dq", "dk", "dv"):
        assert not whole[name][:, :, case.length :].any(), "gradients of padding"
    return {name: x[:, :, : case.length] for name, x in whole.items()}


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(cases())
def test_output_and_gradients_are_those_of_the_dense_mask(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # small ones, so that short sequences have as many tiles as long ones
        patch.setattr(structure, "BLOCK", case.block)
        patch.setattr(tiles, "ROWS", case.rows)
        patch.setattr(tiles, "WIDE", case.wide)
        patch.setattr(scores, "_ROWS", case.rows)
        if case.packed:
            packing = KERNELS["reference"]._replace(skips_hidden=True, packed=packed_loop("reference"))
            patch.setitem(KERNELS, "reference", packing)
        plan.forget_plans()
        # where every query sees a single key, gradients of queries and keys are 0 but for rounding
        assert_equal(attend(case), textbook(case), 1e-10, floor=1e-3)
