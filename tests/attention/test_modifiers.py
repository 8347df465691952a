"""What else models ask of attention, over ranks against the textbook formula in float64: soft-capping, sinks, biases,
slopes, values of another width, attention to a memory, dropout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lss import AttentionMask, LSSAttention, SequenceShard, lss_attention
from lightning_lss.attention import scores
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.layout import LAYOUTS
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.fake_world import fake_world, recorded_ranks


@pytest.fixture(autouse=True, params=[(256, 1024), (5, 7)], ids=["whole tiles", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles with a number for each pair are computed in parts, which short sequences would not need."""
    monkeypatch.setattr(scores, "_ROWS", request.param[0])
    monkeypatch.setattr(scores, "_KEYS", request.param[1])


BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 24, 4
SIZE, SCALE = 3, 0.7
ASSIGNMENT = ChunkAssignment(((0, 5), (1, 2), (3, 4)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_inputs(value_width: int = WIDTH, memory: int = LENGTH) -> list[Tensor]:
    """Queries, keys, values, the gradient of the output, and sinks."""
    return [
        draw(BATCH, HEADS, LENGTH, WIDTH, seed=1),
        draw(BATCH, KV_HEADS, memory, WIDTH, seed=2),
        draw(BATCH, KV_HEADS, memory, value_width, seed=3),
        draw(BATCH, HEADS, LENGTH, value_width, seed=4),
        draw(HEADS, seed=5),
    ]


def textbook(
    inputs: list[Tensor],
    visible: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    with_sinks: bool = False,
) -> dict[str, Tensor]:
    q, k, v, sinks = (inputs[i].clone().requires_grad_() for i in (0, 1, 2, 4))
    k_all, v_all = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ k_all.mT * SCALE
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    if with_sinks:
        scores = torch.cat((scores, sinks[:, None, None].expand(BATCH, HEADS, LENGTH, 1)), -1)
    blind = scores.isneginf().all(-1, keepdim=True)  # softmax of nothing is NaN
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)[..., : k.size(2)]
    out = (weights if kept is None else weights * kept) @ v_all
    wanted = [q, k, v, *([sinks] if with_sinks else [])]
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, wanted, inputs[3]))))


NAMES = ("out", "dq", "dk", "dv", "dsinks")


def attend(
    inputs: list[Tensor],
    layout: str,
    attention: Callable[..., Tensor] = lss_attention,
    with_sinks: bool = False,
    whole_memory: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The same by ranks that take turns; gradients of what every rank holds whole are summed."""
    assignment = ASSIGNMENT if layout == "balanced" else None
    split = [True, not whole_memory, not whole_memory]

    def work(shard: SequenceShard) -> list[Tensor]:
        parts = [shard.split(x, 2) if cut else x for x, cut in zip(inputs, split)]
        leaves = [x.clone().requires_grad_() for x in parts]
        sinks = inputs[4].clone().requires_grad_()
        if with_sinks:
            options["sinks"] = sinks
            leaves.append(sinks)
        own = {"whole_memory": True} if whole_memory else {}
        out = attention(*leaves[:3], shard=shard, scale=SCALE, **own, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, shard.split(inputs[3], 2))]

    by_rank = recorded_ranks(work, SIZE, layout, late=True, assignment=assignment)
    results = {}
    for name, parts, cut in zip(NAMES, zip(*by_rank), (True, *split, False)):
        results[name] = in_order(parts, layout) if cut else sum(parts)
    return results


def in_order(parts: tuple[Tensor, ...], layout: str) -> Tensor:
    assignment = ASSIGNMENT if layout == "balanced" else None
    shards = [SequenceShard(rank, SIZE, layout, assignment=assignment) for rank in range(SIZE)]
    order = torch.cat([shard.positions(parts[0].size(2)) for shard in shards]).argsort()
    return torch.cat(parts, 2)[:, :, order]


MASKS = {
    "causal": AttentionMask.causal(),
    "documents": AttentionMask.documents(torch.arange(LENGTH)[None] // 9) & AttentionMask.causal(),
    "window and padding": AttentionMask.sliding_window(3, 2) & AttentionMask.padding(torch.arange(LENGTH)[None] > 2),
}


def visible(mask: AttentionMask) -> Tensor:
    return mask.dense(LENGTH)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_capping_sinks_biases_and_slopes(layout, mask) -> None:
    inputs, bias, slopes = make_inputs(), draw(1, HEADS, LENGTH, LENGTH), draw(HEADS, seed=6).abs()
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    whole_bias = bias - slopes[:, None, None] * distance
    expected = textbook(inputs, visible(mask), 0.8, whole_bias, with_sinks=True)
    found = attend(inputs, layout, mask=mask, softcap=0.8, bias=bias, alibi_slopes=slopes, with_sinks=True)
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("options", [{}, {"head_chunks": 2}, {"keep_gathered": True}, {"kernel": "reference"}])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sinks_beside_head_chunks(mask, options) -> None:
    inputs = make_inputs()
    expected = textbook(inputs, visible(mask), with_sinks=True)
    assert_equal(attend(inputs, "zigzag", mask=mask, with_sinks=True, **options), expected, 1e-10)


def test_a_bias_by_row_of_the_batch_that_hides_whole_rows() -> None:
    inputs = make_inputs()
    bias = draw(BATCH, 1, LENGTH, LENGTH)
    bias[1, :, 5] = bias[0, :, :, 3] = float("-inf")
    expected = textbook(inputs, visible(AttentionMask.full()), bias=bias)
    found = attend(inputs, "zigzag", mask=AttentionMask.full(), bias=bias)
    assert_equal(found, expected, 1e-10)
    assert not found["out"][1, :, 5].any()


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_least_number_of_a_bias_hides(dtype, kernel) -> None:
    inputs = make_inputs()
    hidden = draw(BATCH, 1, LENGTH, LENGTH) > 0.5
    hidden[1, :, 5] = hidden[0, :, :, 3] = True
    bias = draw(BATCH, 1, LENGTH, LENGTH, seed=7).to(dtype)
    expected = textbook(inputs, ~hidden & visible(MASKS["documents"]), bias=bias)
    least = torch.finfo(dtype).min
    for value in (least, least / 2, max(least, torch.finfo(torch.float32).min)):  # the last may be of another dtype
        given = bias.masked_fill(hidden, value)
        assert_equal(attend(inputs, "zigzag", mask=MASKS["documents"], bias=given, kernel=kernel), expected, 1e-10)


def test_a_bias_that_hides_whole_rows_of_a_long_sequence() -> None:
    """Past the keys of one part, the least number would be lost in the log-sum-exp."""
    length, padding = 60, 10
    q, k, v, grad = (torch.randn(1, 1, length, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (torch.arange(length) < padding)
    given = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    results = []
    for options in ({"bias": given}, {"mask": AttentionMask.from_dense(~hidden[None, None])}):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = lss_attention(*leaves, causal=False, **options)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert_equal(*results, 1e-6)
    assert not results[0][0][:, :, :padding].any()


@pytest.mark.parametrize("value_width", [2, 6])
@pytest.mark.parametrize("kernel", ["cpu_flash", "reference"])
def test_values_of_another_width_than_keys(kernel, value_width) -> None:
    inputs = make_inputs(value_width)
    for mask in MASKS.values():
        expected = textbook(inputs, visible(mask))
        for options in ({}, {"keep_gathered": True}):
            assert_equal(attend(inputs, "zigzag", mask=mask, kernel=kernel, **options), expected, 1e-10)


@pytest.mark.parametrize("whole_memory", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_to_a_memory(layout, whole_memory) -> None:
    memory = 18 if not whole_memory else 7  # a split one is divided into as many chunks as the sequence
    inputs = make_inputs(value_width=2, memory=memory)
    padding = torch.arange(memory) < torch.tensor([[5], [memory]])
    everything = torch.ones(1, 1, LENGTH, memory, dtype=torch.bool)
    dense = draw(1, HEADS, LENGTH, memory) > 0
    attentions: list[tuple[dict[str, Any], Tensor]] = [
        ({"causal": False}, everything),
        ({"mask": AttentionMask.key_padding(padding)}, padding[:, None, None]),
        ({"mask": AttentionMask.from_dense(dense)}, dense),
    ]
    for options, shown in attentions:
        found = attend(inputs, layout, whole_memory=whole_memory, **options)
        assert_equal(found, textbook(inputs, shown), 1e-10)


def test_dropout_is_that_of_the_whole_sequence() -> None:
    inputs = make_inputs()
    mask = MASKS["documents"]
    torch.manual_seed(3)
    whole = lss_attention(*inputs[:3], scale=SCALE, mask=mask, dropout=0.4)
    # with values that are the identity, the output is the weights
    identity = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, KV_HEADS, -1, -1)
    torch.manual_seed(3)
    weights = lss_attention(*inputs[:2], identity, scale=SCALE, mask=mask, dropout=0.4)
    undropped = lss_attention(*inputs[:2], identity, scale=SCALE, mask=mask)
    kept = torch.where(undropped > 0, weights / undropped, 0.0)
    assert 0.3 < (kept[undropped > 0] == 0).double().mean() < 0.5
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / 0.6, dtype=torch.float64))
    assert not torch.equal(kept[0, 0], kept[0, 1])  # heads differ, and so do
    assert not torch.equal(kept[0, 0], kept[1, 0])  # the rows of a batch
    expected = textbook(inputs, visible(mask), kept=kept)
    assert_equal([whole], [expected["out"]], 1e-10)

    def seeded(*tensors: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(3)
        return lss_attention(*tensors, **options)

    for layout in LAYOUTS:
        for options in ({"head_chunks": 2}, {"keep_gathered": True}):
            assert_equal(attend(inputs, layout, seeded, mask=mask, dropout=0.4, **options), expected, 1e-10)


def test_the_module_drops_in_training_only() -> None:
    q, k, v, *_ = make_inputs()
    module = LSSAttention(dropout=0.5, mask=MASKS["documents"], softcap=2.0)
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), lss_attention(q, k, v, mask=MASKS["documents"], softcap=2.0))
    shown = AttentionMask.full()
    assert torch.equal(module(q, k, v, shown), lss_attention(q, k, v, mask=shown, softcap=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cpu_flash", "softcap": 1.0}, "kernel='cpu_flash' does not take soft-capping. Use kernel='auto'"),
        ({"kernel": "cpu_flash", "dropout": 0.1}, "kernel='cpu_flash' does not take dropout. Use kernel='auto'"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\], one for each query head; got \(3,\)"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must be \[4\]"),
        ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, "alibi_slopes has no gradient in lss_attention"),
        ({"bias": torch.zeros(1, 1, 24, 24, requires_grad=True)}, r"would never be trained. Pass bias.detach\(\)"),
        (
            {"bias": torch.ones(1, 1, 24, 24, dtype=torch.bool)},
            r"must be floating-point; got torch.bool. For what is visible use mask=AttentionMask.from_dense",
        ),
        ({"bias": torch.zeros(1, 1, 8, 24)}, r"bias must be \[2 or 1, 4 or 1, 24, 24\], of the whole sequence"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message) -> None:
    q, k, v, *_ = make_inputs()
    with pytest.raises(ValueError, match=message):
        lss_attention(q, k, v, **options)


def test_a_memory_is_not_causal() -> None:
    q, k, v, *_ = make_inputs(memory=18)
    with pytest.raises(ValueError, match=r"Causal attention needs as many keys as queries.* write causal=False"):
        lss_attention(q, k, v)


@pytest.mark.parametrize("whole_memory", [False, True])
def test_a_memory_has_positions(whole_memory) -> None:
    q, k, v, *_ = make_inputs(memory=0)
    with pytest.raises(ValueError, match=r"no keys: q .* k \(2, 2, 0, 4\).* Pass a memory of 1 or more positions"):
        lss_attention(q, k, v, causal=False, whole_memory=whole_memory)


def test_a_tensor_is_not_a_mask() -> None:
    q, k, v, *_ = make_inputs()
    with pytest.raises(
        TypeError, match=r"mask must be an AttentionMask, not Tensor: make one with AttentionMask.from_dense"
    ):
        lss_attention(q, k, v, mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("options", [{"whole_memory": True}, {"keep_gathered": True}, {}])
def test_segments_that_the_layout_cannot_have_are_refused(options) -> None:
    q = torch.zeros(1, 1, 3, 4)
    with fake_world(0, 2) as group:
        shard = SequenceShard(0, 2, "zigzag", group)
        with pytest.raises(ValueError, match="A sequence of length 6 cannot be split over 2 ranks"):
            lss_attention(q, q, q, shard, causal=False, **options)
