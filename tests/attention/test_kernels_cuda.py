"""The kernels for CUDA on a machine without one: stand-ins for torch's operators check what the real ones rely on
without a check of their own, and compute with the reference. The numbers of the real ones are in test_gpu_kernels.py.
"""

import pytest
import torch

from lightning_lss.attention.kernels import KERNELS, Scores, Segments
from lightning_lss.attention.kernels import cuda as kernels_cuda
from tests.attention.operators import Operators
from tests.kernel_checks import (
    BOUND,
    SCALE,
    Inputs,
    check,
    check_kernel,
    check_packed,
    compute,
    laid_out_as_in_attention,
    make_bias,
    make_inputs,
    textbook,
)

CUDA_KERNELS = ["cuda_flash", "cudnn", "efficient"]


@pytest.fixture(params=[3, 4])
def operators(request, monkeypatch) -> None:
    stand_ins = Operators()
    stand_ins.cudnn_dims = request.param
    monkeypatch.setattr(kernels_cuda, "aten", stand_ins)
    kernels_cuda._cudnn_keeps_last_dimension.cache_clear()
    yield
    kernels_cuda._cudnn_keeps_last_dimension.cache_clear()


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize(("m", "n", "causal"), [(33, 33, True), (32, 32, False), (20, 45, False), (20, 45, True)])
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_operators_are_given_what_they_rely_on(name, m, n, causal, width, kv_heads) -> None:
    if causal and m != n and "offset_diagonal" not in KERNELS[name].takes:
        n = m
    inputs = make_inputs(m, n, heads=4, kv_heads=kv_heads, width=width)
    how = Scores(SCALE, causal)
    check(compute(name, laid_out_as_in_attention(inputs), how), textbook(inputs, how), BOUND)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("widths", [(8, 16), (16, 8), (20, 9), (8, 20)])
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_values_of_another_width(name, widths) -> None:
    width, value_width = widths
    inputs, how = make_inputs(24, 24, 4, 4, width, value_width=value_width), Scores(SCALE, True)
    check(compute(name, laid_out_as_in_attention(inputs), how), textbook(inputs, how), BOUND)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("keys", [32, 45])
def test_a_bias_is_aligned_and_its_hidden_rows_are_zero(causal, shape, keys) -> None:
    bias = make_bias(20, keys, *shape)
    inputs = make_inputs(20, keys, 4, 2)
    room = bias.new_zeros(*shape, 21, keys + 19)
    for other in (bias, bias.float(), bias.mT.contiguous().mT, room[..., 1:, 3:-16].copy_(bias)):
        check_kernel("efficient", inputs, Scores(SCALE, causal, other))


def test_a_bias_is_copied_only_where_it_must_be() -> None:
    q, k, _, _ = make_inputs(20, 64, 4, 4)
    bias = make_bias(20, 128)[..., 16:80]
    aligned = kernels_cuda._bias(Scores(SCALE, bias=bias), q, k.size(2))
    assert aligned.data_ptr() == bias.data_ptr()
    assert aligned.shape == (2, 4, 20, 64)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("m", "n"), [(20, 20), (12, 30), (30, 12)])
@pytest.mark.parametrize(("causal", "window"), [(False, (4, 2)), (True, (4, 2)), (True, (4, -1)), (False, (-1, 3))])
def test_a_window_of_flash_attention(m, n, causal, window) -> None:
    causal = causal and m <= n
    check_kernel(
        "cuda_flash",
        laid_out_as_in_attention(make_inputs(m, n, 4, 2, 8, value_width=9)),
        Scores(SCALE, causal, window=window),
    )


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, (4, 0)), (False, (-1, 3))])
def test_segments_of_flash_attention(causal, window) -> None:
    # the third has no rows, the fourth no keys
    inputs = laid_out_as_in_attention(make_inputs(30, 42, 4, 2, 12, value_width=9))
    how = Scores(SCALE, causal, window=window)
    check_packed("cuda_flash", (0, 12, 13, 13, 20, 30), (0, 15, 20, 31, 31, 42), inputs, how, BOUND)


@pytest.mark.usefixtures("operators")
def test_segments_of_one_row() -> None:
    check_packed("cuda_flash", (0, 1, 2), (0, 5, 6), make_inputs(2, 6, 4, 2), Scores(SCALE), BOUND)


@pytest.mark.parametrize("causal", [True, False])
def test_the_operators_for_segments_take_the_arguments_as_they_are_passed(causal) -> None:
    inputs = make_inputs(16, 40, heads=4, kv_heads=2, width=12, dtype=torch.bfloat16, value_width=9)
    q, k, v, grad = (x[:1].to("meta") for x in inputs)
    packed, segments, how = KERNELS["cuda_flash"].packed, Segments((0, 4, 16), (0, 20, 40)), Scores(SCALE, causal)
    out, lse = packed.forward(q, k, v, segments, how)
    grads = packed.backward(grad, q, k, v, out, lse, segments, how)
    assert [x.shape for x in (out, lse, *grads)] == [grad.shape, q.shape[:3], q.shape, k.shape, v.shape]


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_backward_takes_results_laid_out_otherwise(name) -> None:
    q, k, v, grad = inputs = make_inputs(24, 24, heads=4, kv_heads=2)
    out, lse, *expected = compute(name, inputs, Scores(SCALE, True))
    others = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, out)]
    # attention passes the log-sum-exp of some rows and heads
    room = lse.new_zeros(*lse.shape[:2], 40)
    room[..., 5:29] = lse
    own = KERNELS[name].backward(others[0], q, k, v, others[1], room[..., 5:29], Scores(SCALE, True))
    for x, y in zip(own, expected):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("width", [64, 12])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (16, 40)])
@pytest.mark.parametrize("name", ["cuda_flash", "cudnn"])
def test_the_operators_take_the_arguments_as_they_are_passed(name, m, n, width) -> None:
    # on meta tensors torch checks schemas and gives the shapes without a GPU
    inputs = make_inputs(m, n, heads=4, kv_heads=2, width=width, dtype=torch.bfloat16)
    compute(name, Inputs(*(x.to("meta") for x in inputs)), Scores(SCALE, causal=m == n))


@pytest.mark.parametrize("window", [(4, 0), (-1, 3)])
def test_the_operators_with_a_window_take_the_arguments_as_they_are_passed(window) -> None:
    inputs = make_inputs(16, 40, heads=4, kv_heads=2, width=12, dtype=torch.bfloat16, value_width=9)
    compute("cuda_flash", Inputs(*(x.to("meta") for x in inputs)), Scores(SCALE, window=window))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_efficient_operators_take_the_arguments_as_they_are_passed(causal, with_bias) -> None:
    # the backward operator's meta function lacks an argument in torch 2.13; dispatch comes after the schema's check
    q, k, v, grad = make_inputs(16, 40, heads=4, kv_heads=2, dtype=torch.bfloat16)
    bias = make_bias(16, 40, dtype=torch.bfloat16) if with_bias else None
    how = Scores(SCALE, causal, bias)
    with pytest.raises(NotImplementedError, match="_efficient_attention_forward' with arguments from the 'CPU'"):
        KERNELS["efficient"].forward(q, k, v, how)
    with pytest.raises(NotImplementedError, match="_efficient_attention_backward' with arguments from the 'CPU'"):
        KERNELS["efficient"].backward(grad, q, k, v, q, q[..., 0].float(), how)
    how = how._replace(bias=bias.to("meta") if with_bias else None)
    out, lse = KERNELS["efficient"].forward(*(x.to("meta") for x in (q, k, v)), how)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_heads_of_a_width_that_fits_are_not_copied() -> None:
    x = torch.empty(1, 2, 8, 16)
    assert kernels_cuda._equal(x, x[..., :8])[0] is x
    assert kernels_cuda._aligned(x[..., 8:])[0].data_ptr() == x[..., 8:].data_ptr()
    assert kernels_cuda._aligned(x[..., :12])[0].shape == x.shape
    for unaligned in (x[..., 4:12], torch.empty(1, 2, 8, 20)[..., :16]):
        (copy,) = kernels_cuda._aligned(unaligned)
        assert copy.is_contiguous()
        assert copy.data_ptr() != unaligned.data_ptr()
