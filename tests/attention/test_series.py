"""Tiles that one call of a kernel computes together, such as packed documents."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention import kernels
from lightning_lss.attention.kernels import KERNELS, Packed, cuda
from lightning_lss.attention.series import find_series
from lightning_lss.attention.tiles import RowGroup, Tile
from lightning_lss.testing.fake_world import recorded_ranks
from tests.attention.operators import Operators
from tests.kernel_checks import check, make_inputs, packed_loop

LENGTH, DOCUMENTS = 256, 30


def group(q: tuple[int, int], k: tuple[int, int], batch: int = 0, causal: bool = False, left: int = -1) -> RowGroup:
    corner = q[1] - q[0] - k[1] + k[0]
    limits = {"low": corner} if causal else {}
    tile = Tile(*q, *k, **limits) if left < 0 else Tile(*q, *k, **limits, high=corner + left)
    return RowGroup(slice(batch, batch + 1), *q, (tile,))


def test_segments_leave_out_rows_and_keys_between_groups() -> None:
    (series,) = find_series(
        [group((2, 5), (1, 4)), group((5, 6), (7, 9)), group((8, 9), (9, 10)), group((12, 13), (20, 21))]
    )
    assert (series.rows, series.keys, series.window) == (slice(2, 13), slice(1, 21), (-1, -1))
    assert series.row_bounds == (0, 3, 3, 4, 6, 7, 10, 10, 11)
    assert series.key_bounds == (0, 3, 6, 8, 8, 9, 9, 19, 20)


def test_one_window_for_all() -> None:
    causal, one_row = group((0, 4), (0, 6), causal=True), group((4, 5), (6, 9))
    windowed = group((5, 15), (9, 19), causal=True, left=4)
    assert [x.window for x in find_series([causal, one_row])] == [(-1, 0)]  # one row sees all under either
    assert [x.window for x in find_series([one_row, windowed])] == [(4, 0)]
    assert len(find_series([causal, windowed])) == 2  # the window would hide keys of the first
    assert len(find_series([causal, group((4, 8), (6, 10))])) == 2
    short = group((0, 4), (0, 5), causal=True)
    assert [x.window for x in find_series([short, windowed])] == [(4, 0)]
    assert len(find_series([windowed, group((15, 25), (19, 29), causal=True, left=5)])) == 2


def test_what_is_not_joined() -> None:
    first = group((0, 4), (0, 4))
    table = RowGroup(slice(0, 1), 4, 8, (Tile(4, 8, 4, 8, table=0),))
    two_tiles = RowGroup(slice(0, 1), 4, 8, (Tile(4, 8, 4, 8), Tile(4, 8, 8, 9)))
    two_rows = RowGroup(slice(0, 2), 4, 8, (Tile(4, 8, 4, 8),))
    for other in (group((4, 8), (3, 8)), group((4, 8), (4, 8), batch=1), table, two_tiles, two_rows):
        assert [x.groups for x in find_series([first, other])] == [(first,), (other,)]
        assert [x.groups for x in find_series([other])] == [(other,)]


# -- in attention ------------------------------------------------------------------------------------------------------


def documents(gaps: bool, rows: int = 2) -> AttentionMask:
    """30 causal documents, of other lengths in each row of the batch; with ``gaps``, some are padding."""
    generator = torch.Generator().manual_seed(5)
    cuts = torch.stack([torch.randperm(LENGTH - 1, generator=generator)[: DOCUMENTS - 1] + 1 for _ in range(rows)])
    ids = (torch.arange(LENGTH) >= cuts[..., None]).sum(1)
    mask = AttentionMask.documents(ids) & AttentionMask.causal()
    return mask & AttentionMask.padding(ids % 5 != 3) if gaps else mask


def attention(
    mask: AttentionMask, size: int = 1, layout: str = "zigzag", kernel: str = "reference"
) -> list[list[Tensor]]:
    """The output and the gradients of each rank."""
    inputs = make_inputs(LENGTH, LENGTH, 4, 2, 8, value_width=12)

    def work(shard: SequenceShard) -> list[Tensor]:
        *leaves, grad = (shard.split(x, 2).clone() for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out = lss_attention(*leaves, shard, mask=mask, kernel=kernel)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return recorded_ranks(work, size, layout, late=True)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Let the reference compute series by one call, and list these."""
    packed, listed = packed_loop("reference"), []

    def forward(*arguments: Any) -> Any:
        listed.append("forward")
        return packed.forward(*arguments)

    def backward(*arguments: Any) -> Any:
        listed.append("backward")
        return packed.backward(*arguments)

    kernel = KERNELS["reference"]._replace(skips_hidden=True, packed=Packed(forward, backward))
    monkeypatch.setitem(KERNELS, "packing", kernel._replace(name="packing"))
    monkeypatch.setattr(kernels, "_obstacle_of_tensors", lambda *arguments: None)
    return listed


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("size", "layout"), [(1, "zigzag"), (2, "zigzag"), (2, "contiguous")])
@pytest.mark.parametrize("window", [None, 6])
def test_all_gradients_are_those_of_one_tile_at_a_time(calls, size, layout, gaps, window) -> None:
    mask = documents(gaps) if window is None else documents(gaps) & AttentionMask.sliding_window(window)
    ours, expected = (attention(mask, size, layout, kernel=name) for name in ("packing", "reference"))
    assert calls
    for one, other in zip(ours, expected):
        check(one, other, 1e-13, names=("out", "dq", "dk", "dv"))


@pytest.mark.parametrize(("options", "expected"), [({"softcap": 2.0}, 1), ({"alibi_slopes": torch.rand(4)}, 0)])
@pytest.mark.parametrize("gaps", [False, True])
def test_thirty_documents_are_one_call(calls, gaps, options, expected) -> None:
    q, k, v, grad = (x[:1] for x in make_inputs(LENGTH, LENGTH, 4, 2, 8))
    out = lss_attention(
        q.requires_grad_(),
        k,
        v,
        SequenceShard(0, 1),
        mask=documents(gaps, rows=1),
        kernel="packing",
        head_chunks=1,
        **options,
    )
    out.backward(grad)
    assert calls == ["forward"] * expected + ["backward"] * expected


@pytest.mark.parametrize("window", [None, 6])
def test_documents_by_flash_attention(monkeypatch, window) -> None:
    # a stand-in for torch's operators leaves NaN in rows and keys between documents
    mask = documents(True) if window is None else documents(True) & AttentionMask.sliding_window(window)
    expected = attention(mask, 2)
    monkeypatch.setattr(cuda, "aten", Operators())
    monkeypatch.setitem(KERNELS, "reference", KERNELS["cuda_flash"])
    for ours, theirs in zip(attention(mask, 2), expected):
        check(ours, theirs, 1e-13, names=("out", "dq", "dk", "dv"))
