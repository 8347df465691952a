"""FlexAttention on a machine without a GPU: torch computes it eagerly, compiled as far as autograd's graphs. The numbers of
its Triton kernels are in test_gpu_kernels.py."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention.kernels import KERNELS, Scores, flex, select_kernel
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.fake_world import recorded_ranks
from tests.kernel_checks import (
    ROUNDING,
    SCALE,
    check,
    check_kernel,
    cuda_tensor,
    finite,
    make_bias,
    make_inputs,
    textbook,
)

pytestmark = pytest.mark.slow  # compiles

compilations: list[Any] = []


def _count_and_compile(graph: Any, inputs: Any) -> Any:
    compilations.append(graph)
    return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch) -> None:
    """Let torch's eager implementation compute gradients on CPU, where torch refuses to, and cut tiles to small strips."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    compile_eagerly = partial(torch.compile, fullgraph=True, dynamic=True, backend=_count_and_compile)
    monkeypatch.setattr(flex, "compile_function", compile_eagerly)
    monkeypatch.setattr(flex, "_ROWS", 8)
    monkeypatch.setattr(flex, "_compiled", cache(lambda: flex.compile_function(flex._attend)))


@pytest.mark.parametrize(
    ("m", "n", "options"),
    [
        (20, 33, {"bias": make_bias(20, 33)}),
        (20, 33, {"causal": True, "softcap": 2.0, "window": (9, -1)}),
        (30, 12, {"softcap": 2.0, "window": (4, 2)}),
        (12, 30, {"softcap": 2.0, "window": (-1, 3)}),
        (20, 33, {"bias": make_bias(20, 33, 2, 4), "causal": True, "softcap": 2.0}),
        (20, 33, {"bias": make_bias(20, 33, 1, 4).float(), "window": (11, 3), "softcap": 2.0}),
    ],
)
def test_the_scores_that_it_takes(m, n, options) -> None:
    check_kernel("flex", make_inputs(m, n, 4, 2, 8), Scores(SCALE, **options))


def test_heads_of_any_width() -> None:
    check_kernel("flex", make_inputs(9, 20, 4, 1, 20, value_width=9), Scores(SCALE, softcap=2.0))


def test_a_lower_precision() -> None:
    inputs = make_inputs(24, 40, 4, 2, 16, torch.bfloat16)
    how = Scores(SCALE, True, make_bias(24, 40, dtype=torch.bfloat16), softcap=2.0)
    check_kernel("flex", inputs, how, 8 * ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("cut", [2, 20])
def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(cut) -> None:
    q, k, v, grad = inputs = make_inputs(24, 24, heads=4, kv_heads=2, value_width=5)
    bias = make_bias(24, 24, heads=4)
    bias[..., 0, :cut] = bias[..., 1, cut:] = float("-inf")  # hidden in one part only
    how = Scores(SCALE, bias=bias, softcap=2.0)
    out, lse, dq, dk, dv = textbook(inputs, how)
    parts = [
        KERNELS["flex"].backward(
            grad, q, k[:, :, keys], v[:, :, keys], out, finite(lse), how._replace(bias=bias[..., keys])
        )
        for keys in (slice(0, cut), slice(cut, None))
    ]
    summed = [parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts], 2) for i in (1, 2))]
    assert_equal(summed, [dq, dk, dv], 30 * ROUNDING[torch.float64])


def test_tiles_of_all_sizes_share_a_few_compilations() -> None:
    torch._dynamo.reset()
    compilations.clear()
    for m, n in ((16, 31), (45, 45), (24, 45), (31, 16), (45, 16), (40, 50), (50, 70)):
        check_kernel("flex", make_inputs(m, n, 4, 2, 16), Scores(SCALE, window=(6, 0), softcap=2.0))
    # without gradients and with; strips with as many rows as keys, with another number, and with one
    assert len(compilations) <= 6


def test_attention_over_ranks(monkeypatch) -> None:
    # within an operator autograd does not record, unless it is told to
    inputs = make_inputs(32, 32, 2, 1, 16)
    mask = AttentionMask.sliding_window(9) & AttentionMask.documents(cu_seqlens=torch.tensor([0, 5, 6, 20, 32]))

    def work(shard: SequenceShard) -> list[Tensor]:
        q, k, v, grad = (shard.split(x, 2) for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = lss_attention(*leaves, shard, mask=mask, softcap=2.0, kernel="reference")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = recorded_ranks(work, 2, "zigzag", late=True)
    monkeypatch.setitem(KERNELS, "reference", KERNELS["flex"])
    for ours, theirs in zip(recorded_ranks(work, 2, "zigzag", late=True), expected):
        check(ours, theirs, 1e-13, names=("out", "dq", "dk", "dv"))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_compiled_model_calls_it(monkeypatch) -> None:
    monkeypatch.setitem(KERNELS, "reference", KERNELS["flex"])
    q, k, v, grad = make_inputs(16, 16, 2, 2, 16)
    attend = partial(lss_attention, shard=SequenceShard(0, 1), softcap=2.0, kernel="reference")
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset_code(flex._attend.__code__)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with _Mode():  # in which torch does not compile
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert_equal(*results, 1e-13)


def test_a_failure_names_the_remedy(monkeypatch) -> None:
    def fail(*inputs: Any) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    q, k, v, _ = make_inputs(4, 4)
    with pytest.raises(RuntimeError, match="shared memory") as caught:
        KERNELS["flex"].forward(q, k, v, Scores(SCALE))
    assert caught.value.__notes__ == ["kernel='flex' could not be compiled or run here. Use kernel='reference'."]


# -- which kernel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(flex, "is_available", lambda: True)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("dtype", "width", "needs", "choice"),
    [
        (torch.bfloat16, 64, {"softcap"}, "flex"),
        (torch.bfloat16, 64, {"softcap", "bias", "windows", "offset_diagonal"}, "flex"),
        (torch.float32, 96, {"softcap"}, "flex"),
        (torch.bfloat16, 64, {"bias"}, "efficient"),
        (torch.bfloat16, 64, {"bias", "windows"}, "flex"),
        (torch.bfloat16, 64, {"softcap", "dropout"}, "reference"),
        (torch.float64, 64, {"softcap"}, "reference"),
        (torch.float32, 264, {"softcap"}, "reference"),
    ],
)
def test_soft_capping_on_cuda_does_not_fall_to_the_reference(dtype, width, needs, choice) -> None:
    assert select_kernel(cuda_tensor(dtype, width), needs=frozenset(needs)).name == choice


@pytest.mark.parametrize(
    ("q", "available", "words"),
    [
        (torch.empty(1, 1, 2, 4), True, "'flex' runs on CUDA tensors, not on cpu"),
        (cuda_tensor(), False, "'flex' needs torch.compile and Triton"),
        (cuda_tensor(torch.float64), True, "'flex' computes in float32, float16 and bfloat16, not in torch.float64"),
        (cuda_tensor(width=257), True, "'flex' takes heads of width up to 256, not 257"),
    ],
)
def test_what_it_cannot_take_is_refused(monkeypatch, on_cuda, q, available, words) -> None:
    monkeypatch.setattr(flex, "is_available", lambda: available)
    with pytest.raises(ValueError, match=words):
        select_kernel(q, "flex")
    with pytest.raises(ValueError, match="does not take dropout"):
        select_kernel(q, "flex", frozenset({"dropout"}))


def test_without_triton_there_is_none() -> None:
    if not torch.cuda.is_available():
        assert not flex.is_available()


def test_what_is_padded() -> None:
    x = torch.empty(1, 2, 3, 256)
    assert [flex._padded(x[..., :width])[0].size(-1) for width in (1, 16, 17, 96, 256)] == [16, 16, 32, 128, 256]
    assert flex._padded(x)[0] is x


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30), (20, 20), (1, 1)])
@pytest.mark.parametrize("window", [(4, 2), (0, -1), (-1, 0), (-1, 3)])
def test_strips_hold_what_their_rows_see(m, n, window) -> None:
    how = Scores(SCALE, window=window)
    seen = torch.zeros(m, n).bool()
    for rows, keys, (low, high) in flex._parts(how, m, n):
        past = torch.arange(rows.stop - rows.start)[:, None] - torch.arange(keys.stop - keys.start)
        seen[rows, keys] = (low <= past) & (past <= high)
    assert seen.equal(~how.hidden(m, n))


def test_a_tile_without_a_diagonal_is_not_cut() -> None:
    assert list(flex._parts(Scores(SCALE), 30, 12)) == [(slice(0, 30), slice(0, 12), None)]
