"""Every kernel for CUDA against the textbook formula in float64: output, log-sum-exp and every gradient.

Tolerances are in roundings of the dtype, see ``ROUNDING`` in test_kernels.py. Inputs are rounded before the formula sees
them, so what remains is the kernel's own arithmetic: in two-byte types probabilities and their gradients are rounded on
their way into the tensor cores and the result once more, everything is summed in float32, and errors of different terms
have different signs, so norms differ by 2 to 4 roundings; 8 leave room. In float32 the memory-efficient kernel multiplies
in three TF32 passes, which lose some bits: 60 roundings (4e-6) are far below the 5e-4 of plain TF32.
"""

import pytest
import torch
from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, Scores, select_kernel
from tests import kernel_checks
from tests.kernel_checks import (
    ROUNDING,
    SCALE,
    Inputs,
    check,
    check_packed,
    compute,
    laid_out_as_in_attention,
    make_bias,
    make_inputs,
    textbook,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="computes on a CUDA device, and there is none"),
]

TWO_BYTES = [torch.bfloat16, torch.float16]
COMBINATIONS = [
    *((name, dtype) for name in ("cuda_flash", "cudnn", "efficient") for dtype in TWO_BYTES),
    ("efficient", torch.float32),
    *(("flex", dtype) for dtype in (torch.bfloat16, torch.float32)),
    ("reference", torch.bfloat16),
    ("reference", torch.float32),
]
kernels = pytest.mark.parametrize(("name", "dtype"), COMBINATIONS)


def bound(dtype: torch.dtype) -> float:
    return (60 if dtype == torch.float32 else 8) * ROUNDING[dtype]


def check_kernel(name: str, inputs: Inputs, how: Scores) -> None:
    takes_it(name, inputs.q)
    kernel_checks.check_kernel(name, inputs, how, bound(inputs.q.dtype))


def takes_it(name: str, q: Tensor) -> None:
    try:
        select_kernel(q, name)
    except ValueError as reason:
        pytest.skip(f"this GPU cannot: {reason}")


@pytest.fixture(autouse=True)
def no_tf32_in_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@kernels
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("width", [64, 128, 96, 20])
@pytest.mark.parametrize("rows", [256, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_square_tiles(name, dtype, causal, rows, width, kv_heads) -> None:
    check_kernel(name, make_inputs(rows, rows, 8, kv_heads, width, dtype, "cuda"), Scores(SCALE, causal))


@kernels
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize(("m", "n"), [(64, 256), (100, 333), (256, 64), (2, 130)])
def test_rectangles(name, dtype, m, n, kv_heads) -> None:
    check_kernel(name, make_inputs(m, n, 8, kv_heads, 64, dtype, "cuda"), Scores(SCALE))


@pytest.mark.parametrize(
    ("name", "dtype"), [pair for pair in COMBINATIONS if "offset_diagonal" in KERNELS[pair[0]].takes]
)
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize(("m", "n"), [(64, 256), (100, 333), (129, 130), (1, 77)])
def test_offset_diagonals_end_in_the_bottom_right_corner(name, dtype, m, n, kv_heads) -> None:
    check_kernel(name, make_inputs(m, n, 8, kv_heads, 64, dtype, "cuda"), Scores(SCALE, True))


@kernels
@pytest.mark.parametrize(("width", "value_width"), [(64, 128), (192, 128), (96, 20)])
def test_values_of_another_width(name, dtype, width, value_width) -> None:
    inputs = make_inputs(200, 200, 8, 2, width, dtype, "cuda", value_width)
    try:
        select_kernel(inputs.q, name, value_width=value_width)
    except ValueError as reason:
        pytest.skip(f"this kernel cannot: {reason}")
    check_kernel(name, inputs, Scores(SCALE, True))


@pytest.mark.parametrize(("name", "dtype"), [pair for pair in COMBINATIONS if "bias" in KERNELS[pair[0]].takes])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 8), (2, 8)])
@pytest.mark.parametrize(
    ("m", "n", "causal"), [(256, 256, True), (100, 333, False), (100, 333, True), (65, 1100, False)]
)
def test_a_bias_that_hides_whole_rows(name, dtype, m, n, causal, shape) -> None:
    # the operator rounds the bias to the dtype of the queries, so it is rounded before the formula sees it
    bias = make_bias(m, n, *shape).to("cuda", dtype).float()
    bias[..., 1, : n // 2] = bias[..., 3, n // 2 :] = float("-inf")
    check_kernel(name, make_inputs(m, n, 8, 2, 64, dtype, "cuda"), Scores(SCALE, causal, bias))


@pytest.mark.parametrize(("name", "dtype"), [pair for pair in COMBINATIONS if "windows" in KERNELS[pair[0]].takes])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (64, 0)), (True, (100, -1)), (False, (30, 20)), (False, (-1, 40))]
)
@pytest.mark.parametrize(("m", "n"), [(256, 256), (100, 333), (333, 100)])
def test_windows(name, dtype, m, n, causal, window) -> None:
    check_kernel(name, make_inputs(m, n, 8, 2, 64, dtype, "cuda"), Scores(SCALE, causal and m <= n, window=window))


@kernels
@pytest.mark.parametrize("causal", [True, False])
def test_heads_and_rows_of_larger_tensors(name, dtype, causal) -> None:
    inputs = make_inputs(128, 128, 8, 2, 64, dtype, "cuda")
    takes_it(name, inputs.q)
    check(
        compute(name, laid_out_as_in_attention(inputs), Scores(SCALE, causal)),
        textbook(inputs, Scores(SCALE, causal)),
        bound(dtype),
    )


@kernels
def test_the_same_shapes_in_another_layout_of_the_gradient(name, dtype) -> None:
    # a kernel that keeps a plan for shapes must not read the second gradient with the strides of the first
    q, k, v, grad = inputs = make_inputs(128, 128, 8, 8, 64, dtype, "cuda")
    takes_it(name, q)
    out, lse, *_ = compute(name, inputs, Scores(SCALE, True))
    _, _, *expected = textbook(inputs, Scores(SCALE, True))
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)):
        inverse = torch.tensor(order).argsort().tolist()
        others = [x.permute(order).contiguous().permute(inverse) for x in (grad, out)]
        own = KERNELS[name].backward(others[0], q, k, v, others[1], lse, Scores(SCALE, True))
        check([out, lse, *own], [out, lse, *expected], bound(dtype))


@kernels
def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(name, dtype) -> None:
    q, k, v, grad = inputs = make_inputs(128, 128, 8, 2, 64, dtype, "cuda")
    takes_it(name, q)
    kernel = KERNELS[name]
    out, lse, *whole = compute(name, inputs, Scores(SCALE))
    parts = [
        kernel.backward(grad, q, k[:, :, keys], v[:, :, keys], out, lse, Scores(SCALE))
        for keys in (slice(0, 32), slice(32, None))
    ]
    summed = [out, lse, parts[0][0] + parts[1][0], *(torch.cat([p[i] for p in parts], 2) for i in (1, 2))]
    check(summed, [out, lse, *whole], bound(dtype))


@kernels
def test_a_long_row_of_keys(name, dtype) -> None:
    # 16,384 keys: the log-sum-exp is about log(16,384) + 1, and a probability about 6e-5
    inputs = make_inputs(64, 16_384, 2, 1, 64, dtype, "cuda")
    check_kernel(name, inputs, Scores(SCALE))


SEGMENTS = [
    ((0, 100, 101, 300, 512), (0, 100, 101, 300, 512)),
    ((0, 100, 100, 150, 300, 512), (0, 333, 444, 444, 600, 900)),  # one without rows, one without keys
    ((0, 1, 2, 3), (0, 77, 300, 301)),  # of one row each
]


@pytest.mark.parametrize("dtype", TWO_BYTES)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("rows", "keys"), SEGMENTS)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, (64, 0)), (False, (-1, 32))])
def test_segments_by_one_call(dtype, kv_heads, rows, keys, causal, window) -> None:
    inputs = make_inputs(rows[-1], keys[-1], 8, kv_heads, 64, dtype, "cuda")
    takes_it("cuda_flash", inputs.q)
    check_packed("cuda_flash", rows, keys, inputs, Scores(SCALE, causal, window=window), bound(dtype))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (300, 0)}])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (100, 333), (1500, 3000)])
def test_soft_capping(dtype, m, n, options) -> None:
    check_kernel("flex", make_inputs(m, n, 8, 2, 128, dtype, "cuda"), Scores(SCALE, softcap=2.0, **options))


def test_float32_and_wide_heads_do_not_fall_back_to_the_reference() -> None:
    assert select_kernel(torch.empty(1, 1, 2, 64, device="cuda")).name == "efficient"
    assert select_kernel(torch.empty(1, 1, 2, 288, device="cuda", dtype=torch.float16)).name == "efficient"


@pytest.mark.parametrize("impl", ["FA3", "FA4"])
def test_newer_flash_attention_where_it_is_installed(impl) -> None:
    from torch.nn import attention

    try:
        attention.activate_flash_attention_impl(impl)
    except (AttributeError, ImportError, RuntimeError, ValueError) as reason:
        pytest.skip(f"{impl} cannot be activated: {reason}")
    try:
        for kv_heads in (8, 2):
            for m, n, causal in ((256, 256, True), (100, 333, False), (100, 333, True)):
                check_kernel(
                    "cuda_flash", make_inputs(m, n, 8, kv_heads, 64, torch.bfloat16, "cuda"), Scores(SCALE, causal)
                )
            for rows, keys in SEGMENTS:
                inputs = make_inputs(rows[-1], keys[-1], 8, kv_heads, 64, torch.bfloat16, "cuda")
                check_packed("cuda_flash", rows, keys, inputs, Scores(SCALE, True), bound(torch.bfloat16))
    finally:
        attention.restore_flash_attention_impl()
