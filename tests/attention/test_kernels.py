"""Each kernel against the textbook formula in float64: output, log-sum-exp and every gradient."""

import pytest
import torch

from lightning_lss.attention.kernels import KERNELS, Scores, reference, select_kernel
from lightning_lss.testing.compare import assert_equal
from tests.kernel_checks import (
    ROUNDING,
    SCALE,
    Inputs,
    check,
    check_kernel,
    compute,
    cuda_tensor,
    make_inputs,
    textbook,
)

CPU_KERNELS = ["cpu_flash", "reference"]


@pytest.mark.parametrize("width", [4, 5, 64])
@pytest.mark.parametrize("rows", [1, 7, 33, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_square_tiles_of_even_and_odd_sizes(name, causal, rows, width) -> None:
    inputs = make_inputs(rows, rows, width=width)
    if rows == 1:  # one key: the gradient of a softmax over it is 0, up to rounding, which has no relative error
        assert_equal(
            compute(name, inputs, Scores(SCALE, causal)), textbook(inputs, Scores(SCALE, causal)), 1e-14, floor=1
        )
        return
    check_kernel(name, inputs, Scores(SCALE, causal))


@pytest.mark.parametrize(("m", "n"), [(3, 17), (17, 3), (1, 40), (33, 34), (64, 200)])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_rectangles_without_a_mask(name, m, n) -> None:
    inputs = make_inputs(m, n)
    check_kernel(name, inputs, Scores(SCALE))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_grouped_query_heads(name, causal, kv_heads) -> None:
    inputs = make_inputs(24, 24, heads=6, kv_heads=kv_heads)
    check_kernel(name, inputs, Scores(SCALE, causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_lower_precisions_are_off_by_a_few_roundings(name, causal, dtype) -> None:
    # rounded first, so that the formula sees the same numbers
    inputs = make_inputs(40, 40, heads=4, kv_heads=2, dtype=dtype)
    check_kernel(name, inputs, Scores(SCALE, causal), (10 if dtype == torch.float32 else 4) * ROUNDING[dtype])


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_inputs_of_any_stride(name) -> None:
    # as attention passes them: heads and lengths cut out of larger tensors, [B, l, H, D] in memory
    whole = make_inputs(20, 20, heads=4, kv_heads=4)
    strided = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:3, 4:13] for x in whole))
    plain = Inputs(*(x.contiguous() for x in strided))
    check(
        compute(name, strided, Scores(SCALE, True)), textbook(plain, Scores(SCALE, True)), 30 * ROUNDING[torch.float64]
    )


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_large_scores_do_not_overflow(name) -> None:
    inputs = make_inputs(16, 16)
    inputs = inputs._replace(q=inputs.q * 1000)  # scores of about 1,000, whose exponentials exceed float64
    # a probability carries the roundings of its score, 1,000 x 1e-16, and dk multiplies it by the 1,000 of q
    assert_equal(compute(name, inputs, Scores(SCALE, True)), textbook(inputs, Scores(SCALE, True)), 1e-9, floor=1)


@pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 12), (1, 9)])
def test_an_offset_diagonal_gives_the_last_rows_of_the_square(m, n) -> None:
    square = make_inputs(n, n)
    square.grad[:, :, : n - m] = 0  # so that keys and values hear of the last rows only
    last_rows = Inputs(square.q[:, :, n - m :], square.k, square.v, square.grad[:, :, n - m :])
    out, lse, dq, dk, dv = compute("reference", square, Scores(SCALE, True))
    expected = [*(x[:, :, n - m :] for x in (out, lse, dq)), dk, dv]
    check(compute("reference", last_rows, Scores(SCALE, True)), expected, 10 * ROUNDING[torch.float64])
    check_kernel("reference", last_rows, Scores(SCALE, True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (20, 33), (17, 17)])
def test_the_reference_works_in_blocks_of_rows(monkeypatch, m, n, causal) -> None:
    monkeypatch.setattr(reference, "_ROWS", 8)
    inputs = make_inputs(m, n)
    check_kernel("reference", inputs, Scores(SCALE, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_more_rows_than_one_block_of_the_reference(causal) -> None:
    inputs = make_inputs(reference._ROWS + 1, 600, heads=1, kv_heads=1, width=2)
    check_kernel("reference", inputs, Scores(SCALE, causal), 100 * ROUNDING[torch.float64])  # sums of hundreds


@pytest.mark.parametrize("cut", [1, 8, 20])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(name, cut) -> None:
    q, k, v, grad = inputs = make_inputs(24, 24, heads=4, kv_heads=2)
    kernel = KERNELS[name]
    out, lse, dq, dk, dv = compute(name, inputs, Scores(SCALE))
    parts = [
        kernel.backward(grad, q, k[:, :, keys], v[:, :, keys], out, lse, Scores(SCALE))
        for keys in (slice(0, cut), slice(cut, None))
    ]
    summed = [out, lse, parts[0][0] + parts[1][0], *(torch.cat([p[i] for p in parts], 2) for i in (1, 2))]
    check(summed, [out, lse, dq, dk, dv], 10 * ROUNDING[torch.float64])


# -- which kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_cpu_flash_is_chosen_for_every_dtype(dtype) -> None:
    assert select_kernel(torch.empty(1, 1, 2, 4, dtype=dtype)).name == "cpu_flash"


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "choice"),
    [
        (torch.float16, 64, (8, 0), "cuda_flash"),
        (torch.bfloat16, 256, (9, 0), "cuda_flash"),
        (torch.bfloat16, 264, (9, 0), "efficient"),
        (torch.float32, 64, (9, 0), "efficient"),
        (torch.float16, 64, (7, 5), "efficient"),
        (torch.bfloat16, 64, (7, 5), "reference"),
        (torch.float64, 64, (9, 0), "reference"),
    ],
)
def test_on_cuda_the_choice_follows_dtype_width_and_capability(monkeypatch, dtype, width, capability, choice) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_kernel(cuda_tensor(dtype, width)).name == choice


def test_any_other_device_gets_the_reference() -> None:
    assert select_kernel(torch.empty(1, 1, 2, 4, device="meta")).name == "reference"


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_kernel_is_found_by_name(name) -> None:
    assert select_kernel(torch.empty(1, 1, 2, 4), name) is KERNELS[name]


@pytest.mark.parametrize(
    ("q", "name", "words"),
    [
        (torch.empty(1, 1, 2, 4), "magic", "kernel='magic' is unknown: choose 'auto' or one of 'cpu_flash'"),
        (torch.empty(1, 1, 2, 4), "cuda_flash", "'cuda_flash' runs on CUDA tensors, not on cpu"),
        (cuda_tensor(), "cpu_flash", "'cpu_flash' runs on CPU tensors, not on cuda"),
        (cuda_tensor(torch.float32), "cudnn", r"in float16 and bfloat16, not in torch\.float32.*'reference'"),
        (cuda_tensor(width=136), "cudnn", "heads of width up to 128, not 136"),
        (cuda_tensor(width=264), "cuda_flash", "heads of width up to 256, not 264"),
        (cuda_tensor(torch.float64), "efficient", r"in float32, float16 and bfloat16, not in torch\.float64"),
        (torch.empty(1, 1, 2, 4), "efficient", "'efficient' runs on CUDA tensors, not on cpu"),
    ],
)
def test_a_kernel_that_cannot_take_the_tensor_says_why(monkeypatch, q, name, words) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=words):
        select_kernel(q, name)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "cuda_flash"), (torch.bfloat16, "efficient")])
def test_old_gpus_are_refused(monkeypatch, dtype, name) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        select_kernel(cuda_tensor(dtype), name)


def test_gpus_of_amd_have_no_efficient_kernel(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert select_kernel(cuda_tensor(torch.float32)).name == "reference"
    assert select_kernel(cuda_tensor(torch.bfloat16)).name == "cuda_flash"
