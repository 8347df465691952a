"""What only a GPU can show: streams, pinned memory, peaks of the caching allocator, NCCL, compiled kernels. The checks
that do not depend on the device run on CPU too. Kernels are in attention/test_gpu_kernels.py, whole attention
in attention/test_one_device.py.
"""

import gc
import shutil
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_lss import lss_attention
from lightning_lss.attention.kernels import KERNELS, select_kernel
from lightning_lss.models.transformer import ExecutionConfig, Transformer, TransformerConfig
from lightning_lss.nn.loss import linear_cross_entropy
from lightning_lss.sequence import collectives
from lightning_lss.sequence.random import draw_seed, kept
from lightning_lss.sequence.segment import segment_modules
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.fake_world import GATHER, SCATTER, one_rank_of, shard_of
from tests.kernel_checks import make_inputs
from tests.traces import read_trace, streams, windows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="computes on a CUDA device, and there is none")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
CUDA = torch.device("cuda")


def peak_of(function: Callable[[], Any]) -> int:
    """Bytes on the GPU at the peak of a call, beyond what was there before."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (4, 1500, 1024)])  # the last in pieces
def test_a_gpu_drops_what_a_cpu_drops(shape) -> None:
    seed = draw_seed()
    indices = [torch.arange(n).view([-1 if i == j else 1 for j in range(len(shape))]) for i, n in enumerate(shape)]
    on_gpu = kept(seed, *(x.cuda() for x in indices), p=0.3)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), kept(seed, *indices, p=0.3))


# -- communication behind computation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_next_chunk_travels_while_tiles_are_computed(monkeypatch, tmp_path, device, layout) -> None:
    chunks = 4
    q, k, v, grad = make_inputs(512, 512, 8, 4, 64, torch.bfloat16, device)
    kernel = select_kernel(q)

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with record_function(name):
                return function(*args)

        return call

    named_kernel = kernel._replace(forward=named("tile", kernel.forward), backward=named("back", kernel.backward))
    monkeypatch.setitem(KERNELS, kernel.name, named_kernel)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with one_rank_of(4, torch.device(device)):

        def step() -> None:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            lss_attention(*leaves, shard_of(4, layout), kernel=kernel.name, head_chunks=chunks).backward(grad)
            torch.get_device_module(device).synchronize()

        step()
        with profile(activities=activities) as profiler:
            step()
    events = read_trace(profiler, tmp_path)
    gathers, scatters = windows(events, GATHER), windows(events, SCATTER)
    tiles, backs = windows(events, "tile"), windows(events, "back")
    assert (len(gathers), len(scatters)) == (2 * chunks, chunks)
    assert len(tiles) % chunks == len(backs) % chunks == 0
    forward, backward = (found[:: len(found) // chunks] for found in (tiles, backs))  # the first of each chunk
    for index in range(chunks - 1):
        assert gathers[index + 1].end <= forward[index].start, "forward: the next gather comes first"
        assert gathers[chunks + index + 1].end <= backward[index].start, "backward: the next gather comes first"
        assert scatters[index].end <= backward[index + 1].start, "gradients leave before the next tiles"
    if device == "cuda":
        communication, computation = streams(events, [*gathers, *scatters]), streams(events, [*tiles, *backs])
        assert communication
        assert computation
        assert not communication & computation


def test_streams_are_read_from_launches() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "user_annotation", "name": "copy", "ts": 10.0, "dur": 5.0},
        {"cat": "gpu_user_annotation", "name": "copy", "ts": 90.0, "dur": 5.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 11.0, "args": {"correlation": 1}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 20.0, "args": {"correlation": 2}},
        {"cat": "kernel", "name": "a", "ts": 100.0, "args": {"correlation": 1, "stream": 13}},
        {"cat": "kernel", "name": "b", "ts": 101.0, "args": {"correlation": 2, "stream": 7}},
        {"name": "process_name", "ph": "M"},
    ]
    assert windows(events, "copy") == [(10.0, 15.0)]
    assert streams(events, windows(events, "copy")) == {13}


@pytest.mark.gpu
@needs_gpu
def test_collectives_over_nccl(tmp_path) -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    torch.cuda.set_device(0)
    meeting = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        x = torch.randn(3, 5, device=CUDA, dtype=torch.bfloat16)
        out = torch.empty(1, 3, 5, device=CUDA, dtype=torch.bfloat16)
        pending = collectives.all_gather(x, dist.group.WORLD, out)
        assert pending.works
        assert pending.wait()[0].equal(x)
        assert pending.tensor is out
        assert collectives.all_gather(out[0], dist.group.WORLD, out).wait()[0].equal(x), "in its own place"
        assert collectives.reduce_scatter(out, dist.group.WORLD).wait().equal(x)
    finally:
        dist.destroy_process_group()


# -- memory ------------------------------------------------------------------------------------------------------------

CONFIG = TransformerConfig(vocab_size=256, seq_len=8192, width=512, num_layers=4, num_heads=8, positions="rotary")
STREAM = CONFIG.seq_len * CONFIG.width * 2  # bytes of a block's input in bfloat16


def pinned_bytes() -> int:
    tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu"]
    return sum(x.nbytes for x in tensors if x.is_pinned())


class Step:
    """One forward and backward pass of the model with a mode of activation checkpointing."""

    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.model = Transformer(CONFIG, ExecutionConfig(activation_checkpointing=mode)).to(CUDA, torch.bfloat16)
        tokens = torch.randint(256, (1, CONFIG.seq_len), generator=torch.Generator().manual_seed(1)).to(CUDA)
        self.run(tokens)  # libraries take their workspaces
        self.model.zero_grad(set_to_none=True)
        self.peak = peak_of(lambda: self.run(tokens))
        self.gradients = {name: x.grad.double() for name, x in self.model.named_parameters()}

    def run(self, tokens: Tensor) -> None:
        before = torch.cuda.memory_allocated()
        pinned = pinned_bytes()
        features = self.model.features(tokens)
        self.held = torch.cuda.memory_allocated() - before
        self.pinned = pinned_bytes() - pinned
        features.square().sum().backward()


@pytest.mark.gpu
@needs_gpu
def test_activation_checkpointing_moves_and_frees_what_it_says() -> None:
    layers = CONFIG.num_layers
    steps = {mode: Step(mode) for mode in ("none", "selective", "full", "offload")}
    held = {mode: step.held for mode, step in steps.items()}
    assert held["none"] > 8 * layers * STREAM
    assert layers * STREAM <= held["full"] < (layers + 4) * STREAM
    # beside a block's input the output of attention, and its log-sum-exp: 4 bytes for 64 elements of 2
    assert held["selective"] - held["full"] == pytest.approx(layers * STREAM * (1 + 4 / 128), rel=0.1)
    assert held["offload"] <= held["full"] - (layers - 1) * STREAM
    assert steps["offload"].pinned >= layers * STREAM
    assert steps["full"].pinned == 0
    assert steps["full"].peak < 0.6 * steps["none"].peak
    assert steps["offload"].peak < steps["full"].peak
    for mode, step in steps.items():
        # the flash kernel adds up the gradient of the queries in any order: some roundings of bfloat16
        assert_equal(step.gradients, steps["none"].gradients, 2e-2, what=mode)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-4)])
def test_the_loss_never_holds_all_logits(dtype, limit) -> None:
    tokens, width, vocabulary = 4096, 256, 65_536
    generator = torch.Generator(CUDA).manual_seed(0)
    features, weight = (
        torch.randn(n, width, generator=generator, device=CUDA).mul(width**-0.5).to(dtype) for n in (tokens, vocabulary)
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=CUDA)
    targets[::7] = -100
    results: list[list[Tensor]] = []

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (features, weight)]
        value = loss(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")

    run(plain)
    peaks = [peak_of(lambda loss=loss: run(loss)) for loss in (plain, lambda x, w: linear_cross_entropy(x, w, targets))]
    assert peaks[1] <= 0.25 * peaks[0]  # 256 of 4,096 rows of logits at a time, and the gradients
    assert_equal(results[2], results[1], limit)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_block_has_the_same_gradients(device, mode) -> None:
    if device == "cuda" and shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("Triton needs a C compiler to launch kernels")
    dtype, limit = (torch.bfloat16, 3e-2) if device == "cuda" else (torch.float64, 1e-12)
    config = TransformerConfig(seq_len=512, width=256, num_layers=1, num_heads=4, num_kv_heads=2, positions="rotary")
    with one_rank_of(4, torch.device(device)):
        torch.manual_seed(0)
        model = Transformer(config, ExecutionConfig(activation_checkpointing=mode)).to(device, dtype)
        for module in segment_modules(model):
            module.set_shard(shard_of(4))
        tokens = torch.randint(256, (1, config.seq_len // 4), generator=torch.Generator().manual_seed(1)).to(device)

        def gradients() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            model(tokens).square().sum().backward()
            return {name: x.grad.double() for name, x in model.named_parameters()}

        expected = gradients()
        for block in model.blocks:
            block.compile(backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
        assert_equal(gradients(), expected, limit)
