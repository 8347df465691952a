"""The benchmark of one rank on one device: it runs at tiny sizes, and says what it cannot do."""

import argparse

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu, gpu_attention
from lightning_lss.attention.kernels import KERNELS, select_kernel
from lightning_lss.testing.fake_world import one_rank_of

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="computes on a CUDA device, and there is none"),
]


@pytest.mark.parametrize("kernel", [pytest.param(x, marks=GPU) for x in ("cuda_flash", "efficient", "cudnn")])
def test_torchs_context_parallel_takes_part_on_cuda(kernel) -> None:
    call = gpu_attention.Call(1024, 2, 2, 64, torch.bfloat16, torch.device("cuda"))
    with one_rank_of(4, call.device):
        contestants = {gpu_attention.CONTEXT_PARALLEL: {"layout": "zigzag"}}
        rows = {row["contestant"]: row for row in gpu_attention.compare(call, 4, kernel, contestants, 1, 5.0)}
    row = rows[gpu_attention.CONTEXT_PARALLEL]
    assert (row["ranks"], row["collectives"]) == (4, "copies")
    assert row["seconds"] > 0


@pytest.mark.parametrize("figure", list(gpu.FIGURES))
def test_the_benchmark_runs_at_tiny_sizes_and_writes_nothing(monkeypatch, capsys, figure) -> None:
    monkeypatch.setattr(gpu.results, "append", lambda *args: pytest.fail("a smoke test is no result"))
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    checkpointing = ["--checkpointing", "selective"] if figure == "step" else []
    gpu.run(parser.parse_args(["--device", "cpu", "--quick", "--figures", figure, *checkpointing]))
    shown = capsys.readouterr().out
    assert "4" in shown
    assert "time on links is not" in shown


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate"), "out of memory"),
        (RuntimeError("no such width\nmore"), "failed: no such width"),
    ],
)
def test_what_does_not_run_has_a_row_that_says_so(error, note) -> None:
    def rows() -> list[dict[str, object]]:
        raise error

    args = argparse.Namespace(device=torch.device("cpu"), quick=False)
    assert gpu._guarded(args, rows, ranks=4, length=8) == [{"ranks": 4, "length": 8, "contestant": "lss", "note": note}]
    with pytest.raises(RuntimeError):
        gpu._guarded(argparse.Namespace(device=torch.device("cpu"), quick=True), rows, ranks=4)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.run(parser.parse_args([]))


def test_every_kernel_of_the_benchmark_exists() -> None:
    assert set(gpu.BACKENDS) <= set(KERNELS)
    assert select_kernel(torch.empty(1, 1, 1, 8)).name in gpu.BACKENDS
