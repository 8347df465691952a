"""Masks of every kind, drawn by hypothesis."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_lss import AttentionMask


def _rows(draw: st.DrawFn, batch: int, length: int, values: int) -> Tensor:
    seed = draw(st.integers(0, 2**16))
    return torch.randint(0, values, (batch, length), generator=torch.Generator().manual_seed(seed))


def _runs(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Ids of packed documents: runs of equal numbers."""
    return (_rows(draw, batch, length, 12) == 0).cumsum(1)


@st.composite
def leaves(draw: st.DrawFn, batch: int, heads: int, length: int) -> AttentionMask:
    """A mask of one kind, with rows that differ where the kind has them."""
    offset, rows = st.integers(0, length), draw(st.sampled_from([1, batch]))
    kind = draw(st.sampled_from(KINDS))
    match kind:
        case "causal":
            return AttentionMask.causal()
        case "full":
            return AttentionMask.full()
        case "window":
            return AttentionMask.sliding_window(draw(offset), draw(offset))
        case "chunked":
            return AttentionMask.chunked(draw(st.integers(1, length)))
        case "prefix":
            return AttentionMask.prefix(_rows(draw, rows, 1, length + 5).flatten())
        case "documents":
            return AttentionMask.documents(_runs(draw, rows, length))
        case "scattered documents":
            return AttentionMask.documents(_rows(draw, rows, length, 3))
        case "cu_seqlens":
            cuts = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
            return AttentionMask.documents(cu_seqlens=torch.tensor([0, *cuts, length]))
        case "positions":
            ids = _runs(draw, rows, length)
            starts = torch.stack([(row[:, None] > row).sum(1) for row in ids])
            return AttentionMask.from_position_ids(torch.arange(length) - starts)
        case "padding":
            return AttentionMask.padding(_rows(draw, rows, length, 4) > 0)
        case "left padding":
            return AttentionMask.padding(torch.arange(length) >= _rows(draw, rows, 1, length + 1))
        case "key padding":
            return AttentionMask.key_padding(torch.arange(length) < _rows(draw, rows, 1, length + 1))
        case "dense":
            table = _rows(draw, rows * length, length * draw(st.sampled_from([1, heads])), 2)
            return AttentionMask.from_dense(table.bool().view(rows, length, -1, length).transpose(1, 2))
        case _:
            return AttentionMask.from_function(FUNCTIONS[draw(st.integers(0, len(FUNCTIONS) - 1))])


KINDS = [
    *("causal", "full", "window", "chunked", "prefix", "documents", "scattered documents", "cu_seqlens", "positions"),
    *("padding", "left padding", "key padding", "dense", "function"),
]
FUNCTIONS = [
    lambda b, h, q, k: (q - k).abs() <= 3 + h,
    lambda b, h, q, k: (q * k + b) % 3 != 0,
    lambda b, h, q, k: k <= q,
]


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, length: int) -> AttentionMask:
    """One mask, or two or three combined."""
    mask = draw(leaves(batch, heads, length))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(leaves(batch, heads, length))
        mask = mask & other if draw(st.booleans()) else mask | other
    return mask
