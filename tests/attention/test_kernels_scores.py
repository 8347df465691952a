"""What kernels do with scores: bias, soft-capping, dropout, windows, values of another width; and what they refuse."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lss.attention.kernels import KERNELS, Scores, select_kernel
from lightning_lss.testing.compare import assert_equal
from tests.kernel_checks import (
    ROUNDING,
    SCALE,
    Inputs,
    check_kernel,
    compute,
    finite,
    make_bias,
    make_inputs,
    make_kept,
    textbook,
)

INF = float("inf")
CPU_KERNELS = ["cpu_flash", "reference"]
SIZES = st.integers(1, 40)


def broadcastable(draw, heads: int) -> tuple[int, int]:
    return draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, heads]))


@st.composite
def cases(draw) -> tuple[str, Inputs, Scores]:
    """A kernel, a tile and whatever the kernel takes."""
    name = draw(st.sampled_from(CPU_KERNELS))
    takes = KERNELS[name].takes
    m, n, causal = draw(SIZES), draw(SIZES), draw(st.booleans())
    if causal:
        n = max(m, n) if "offset_diagonal" in takes else m
    kv_heads, width, value_width = (draw(st.sampled_from(x)) for x in ((1, 2, 4), (4, 7, 16), (4, 7, 16)))
    inputs = make_inputs(m, n, 4, kv_heads, width, value_width=value_width)
    return (
        name,
        inputs,
        Scores(
            SCALE,
            causal,
            bias=make_bias(m, n, *broadcastable(draw, 4)) if draw(st.booleans()) else None,
            softcap=draw(st.sampled_from([None, 0.5, 30.0])) if "softcap" in takes else None,
            kept=make_kept(m, n, *broadcastable(draw, 4)) if "dropout" in takes and draw(st.booleans()) else None,
            window=draw(st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
            if draw(st.booleans()) and "windows" in takes
            else None,
        ),
    )


@settings(max_examples=200)
@given(cases())
def test_any_scores_that_a_kernel_takes(case) -> None:
    # the floor: a row with one visible key has a gradient of 0 up to rounding, which has no relative error
    results, expected = compute(*case), textbook(*case[1:])
    assert torch.equal(results[1].isneginf(), expected[1].isneginf())
    assert_equal([*map(finite, results)], [*map(finite, expected)], 1e-13, floor=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_bias_in_lower_precisions(name, dtype) -> None:
    inputs = make_inputs(40, 40, 4, 2, 16, dtype, value_width=8)
    how = Scores(SCALE, bias=make_bias(40, 40, 2, 4, dtype=dtype))
    assert how.bias.dtype == torch.float32
    check_kernel(name, inputs, how, (10 if dtype == torch.float32 else 4) * ROUNDING[dtype])


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_bias_of_float32_is_not_read_as_float64(name) -> None:
    how = Scores(SCALE, bias=make_bias(24, 24).float())
    check_kernel(name, make_inputs(24, 24), how)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_bias_of_any_stride(name) -> None:
    inputs, bias = make_inputs(20, 24, heads=4), make_bias(20, 24, heads=4)
    larger = bias.new_full((1, 6, 24, 30), 7.0)
    transposed = bias.mT.contiguous().mT
    for other in (
        larger[:, 1:5, 3:23, 5:29].copy_(bias),
        transposed,
        larger[:, 1:2, 3:4, 5:29].expand(2, 4, 20, 24),
        larger[:, 1:2, 3:23, 5:6].expand(-1, -1, -1, 24),
    ):
        check_kernel(name, inputs, Scores(SCALE, bias=other))


@pytest.mark.parametrize("hidden", [slice(0, 600), slice(600, None), slice(None)])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_hidden_rows_of_many_keys(name, hidden) -> None:
    # torch's kernel for CPUs takes 512 keys at a time: all keys of its first or last block are hidden, or all
    bias = torch.zeros(1, 1, 8, 700, dtype=torch.float64)
    bias[..., ::2, hidden] = -INF
    check_kernel(name, make_inputs(8, 700), Scores(SCALE, bias=bias))


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_bias_and_diagonal_together_hide_a_row(name) -> None:
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 3, :4] = -INF  # the diagonal hides keys 4 and 5
    inputs, how = make_inputs(6, 6), Scores(SCALE, True, bias=bias)
    assert compute(name, inputs, how)[1][..., 3].isneginf().all()
    check_kernel(name, inputs, how)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_visible_row_with_a_sum_of_one_is_no_hidden_row(name) -> None:
    # torch's kernel for CPUs gives hidden rows the log-sum-exp 0, as the only key with the score 0 has
    q, k, v, _ = make_inputs(3, 4)
    bias = torch.full((1, 1, 3, 4), -INF, dtype=torch.float64)
    bias[..., 0, 2] = 0
    out, lse = KERNELS[name].forward(torch.zeros_like(q), k, v, Scores(SCALE, bias=bias))
    assert lse[0, 0].tolist() == [0, -INF, -INF]
    assert torch.equal(out[..., 0, :], v[..., 2, :])
    assert not out[..., 1:, :].any()


@pytest.mark.parametrize("cut", [1, 9, 20])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(name, cut) -> None:
    q, k, v, grad = inputs = make_inputs(24, 24, heads=4, kv_heads=2, value_width=5)
    bias = make_bias(24, 24, heads=4)
    bias[..., 0, :cut] = bias[..., 1, cut:] = -INF  # hidden in one part only
    options = {"bias": bias}
    if name == "reference":
        options |= {"kept": make_kept(24, 24, heads=4)}
    whole = Scores(SCALE, softcap=2.0 if name == "reference" else None, **options)
    out, lse, dq, dk, dv = textbook(inputs, whole)
    parts = []
    for keys in (slice(0, cut), slice(cut, None)):
        how = whole._replace(**{option: x[..., keys] for option, x in options.items()})
        parts.append(KERNELS[name].backward(grad, q, k[:, :, keys], v[:, :, keys], out, finite(lse), how))
    summed = [parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts], 2) for i in (1, 2))]
    assert_equal(summed, [dq, dk, dv], 30 * ROUNDING[torch.float64])


def test_the_reference_cuts_bias_and_dropout_into_its_blocks_of_rows(monkeypatch) -> None:
    monkeypatch.setattr("lightning_lss.attention.kernels.reference._ROWS", 8)
    how = Scores(SCALE, False, make_bias(20, 33, 2, 4), 2.0, make_kept(20, 33, 1, 4), (9, 3))
    check_kernel("reference", make_inputs(20, 33, 4, 2), how)


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, (3, -1)), (False, (2, 1)), (False, (-1, 4))]
)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 12), (12, 5), (8, 8)])
def test_pairs_are_those_that_are_not_hidden(causal, window, m, n) -> None:
    how = Scores(SCALE, causal, window=window)
    hidden = how.hidden(m, n)
    assert how.pairs(m, n) == m * n - (0 if hidden is None else int(hidden.sum()))


# -- which kernel ------------------------------------------------------------------------------------------------------

FULL = frozenset({"bias", "softcap", "dropout", "windows", "offset_diagonal"})


@pytest.mark.parametrize(
    ("name", "needs", "words"),
    [
        ("cpu_flash", {"softcap"}, "kernel='cpu_flash' does not take soft-capping. Use kernel='auto' or 'reference'."),
        ("cpu_flash", {"dropout"}, "kernel='cpu_flash' does not take dropout. Use kernel='auto' or 'reference'."),
        (
            "cpu_flash",
            FULL,
            "does not take soft-capping or dropout or a window or a causal tile that is not square. Use",
        ),
        (
            "cuda_flash",
            {"bias"},
            "kernel='cuda_flash' does not take an additive mask. Use kernel='auto' or 'reference'.",
        ),
        ("cudnn", {"windows"}, "kernel='cudnn' does not take a window. Use kernel='auto' or 'reference'."),
        ("cudnn", {"offset_diagonal"}, "kernel='cudnn' does not take a causal tile that is not square. Use"),
        (
            "efficient",
            {"dropout", "bias"},
            "kernel='efficient' does not take dropout. Use kernel='auto' or 'reference'.",
        ),
    ],
)
def test_a_named_kernel_refuses_what_it_does_not_take(name, needs, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        select_kernel(torch.empty(1, 1, 2, 4), name, frozenset(needs))


@pytest.mark.parametrize(
    ("needs", "choice"), [({"bias"}, "cpu_flash"), ({"softcap"}, "reference"), (FULL, "reference")]
)
def test_the_best_kernel_that_takes_the_needs(needs, choice) -> None:
    assert select_kernel(torch.empty(1, 1, 2, 4), needs=frozenset(needs)).name == choice
    assert select_kernel(torch.empty(1, 1, 2, 4), choice, frozenset(needs)).name == choice


@pytest.mark.parametrize("name", ["cpu_flash", "cuda_flash", "cudnn", "efficient"])
def test_a_kernel_computes_nothing_that_it_does_not_take(name) -> None:
    q, k, v, grad = make_inputs(6, 6)
    for how in (
        Scores(SCALE, bias=make_bias(6, 6)),
        Scores(SCALE, softcap=1.0),
        Scores(SCALE, kept=make_kept(6, 6)),
        Scores(SCALE, window=(1, 1)),
    ):
        if how.needs(6, 6) <= KERNELS[name].takes:
            continue
        with pytest.raises(AssertionError):
            KERNELS[name].forward(q, k, v, how)
        with pytest.raises(AssertionError):
            KERNELS[name].backward(grad, q, k, v, q, q[..., 0], how)
