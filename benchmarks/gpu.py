"""Measure one rank's share of a long sequence on one GPU: attention, kernels, and a training step.

    python -m benchmarks gpu                      # all three figures
    python -m benchmarks gpu --figures attention --ranks 8 --lengths 131072
    python -m benchmarks gpu --device cpu --quick # smoke test: the same code, tiny, nothing written

Rank 0 of S runs by itself with its real kernels, sizes and memory; collectives are copies of the same size, see
:func:`lightning_lss.testing.fake_world.one_rank_of`.

- ``attention``: forward and backward of one rank's attention, against plain attention on a shorter sequence of as many
  query-key pairs, in turn; ``fraction_of_plain`` is the ratio of their speeds by pair. The same for torch's own
  ``context_parallel``.
- ``kernels``: the same at one length for every kernel that runs here and several numbers of head chunks.
- ``step``: a training step of :class:`~lightning_lss.LSSTransformer` with the Trainer and
  :class:`~lightning_lss.LSSStrategy`, for every mode of activation checkpointing: time, utilization, memory.
"""

import argparse
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import attention as torch_attention

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import figures, results
from benchmarks.gpu_attention import BACKENDS, CONTEXT_PARALLEL, Call, compare
from benchmarks.gpu_step import time_steps
from benchmarks.training import model_options
from lightning_lss.attention.kernels import select_kernel
from lightning_lss.testing.fake_world import one_rank_of

_COLUMNS = [
    *(
        "figure",
        "contestant",
        "ranks",
        "length",
        "layout",
        "heads",
        "kv_heads",
        "head_width",
        "layers",
        "dtype",
        "kernel",
    ),
    *(
        "head_chunks",
        "checkpointing",
        "collectives",
        "forward_seconds",
        "backward_seconds",
        "seconds",
        "fraction_of_plain",
    ),
    *("tflops_per_second", "utilization", "peak_mib", "rounds", "note"),
]
_SHOWN = (
    "contestant",
    "ranks",
    "length",
    "kernel",
    "checkpointing",
    "seconds",
    "fraction_of_plain",
    "utilization",
    "peak_mib",
)


def run_attention(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure ``attention``; torch's context parallel runs apart, so that its lack of memory costs no row of LSS."""
    lss = {layout: {"layout": layout, "head_chunks": "auto"} for layout in args.layouts}
    groups = {"lss": lss, CONTEXT_PARALLEL: {CONTEXT_PARALLEL: {"layout": "zigzag"}}}
    if args.device.type != "cuda":
        del groups[CONTEXT_PARALLEL]
        print(f"{CONTEXT_PARALLEL} is left out: it has no kernel for CPU")
    for size, length in itertools.product(args.ranks, args.lengths):
        call = _call(args, length)
        kernel = _kernel(args, call)
        for name, contestants in groups.items():
            where = dict(contestant=name, ranks=size, length=length, kernel=kernel)
            yield from _guarded(
                args, partial(compare, call, size, kernel, contestants, args.rounds, args.seconds), **where
            )


def run_kernels(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure ``kernels``."""
    size = args.ranks[0]
    for kernel, impl in [*((name, None) for name in BACKENDS), ("cuda_flash", "FA3"), ("cuda_flash", "FA4")]:
        call = _call(args, args.kernel_length)
        try:
            select_kernel(torch.empty(1, 1, 1, call.width, dtype=call.dtype, device=call.device), kernel)
        except ValueError as reason:
            print(f"{kernel} is left out: {reason}")
            continue
        with _flash_attention(impl) as active:
            if not active:
                continue
            chunks = [count for count in args.chunks if call.kv_heads % count == 0]
            contestants = {f"{count} head chunks": {"layout": "zigzag", "head_chunks": count} for count in chunks}
            where = dict(ranks=size, length=call.length, kernel=kernel)
            for row in _guarded(
                args, partial(compare, call, size, kernel, contestants, args.rounds, args.seconds), **where
            ):
                yield {**row, "note": row.get("note", "") or impl or ""}


@contextmanager
def _flash_attention(impl: str | None) -> Iterator[bool]:
    """Measure with the implementation ``impl`` in place of FlashAttention-2, if it is here."""
    if impl is None:
        yield True
        return
    try:
        torch_attention.activate_flash_attention_impl(impl)
    except (AttributeError, ImportError, RuntimeError, ValueError) as reason:
        print(f"{impl} is left out: {reason}")
        yield False
        return
    try:
        yield True
    finally:
        torch_attention.restore_flash_attention_impl()


def run_step(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure ``step``."""
    for size in args.ranks:
        length = args.step_length * size
        for mode in args.checkpointing:
            where = dict(ranks=size, length=length, checkpointing=mode)
            peak = args.peak_tflops * 1e12 if args.peak_tflops else None
            options = (model_options(args.model, positions="rotary"), args.rounds, args.device, peak)
            yield from _guarded(args, partial(time_steps, size, length, mode, *options), **where)


FIGURES = {"attention": run_attention, "kernels": run_kernels, "step": run_step}


def _guarded(
    args: argparse.Namespace, rows: Callable[[], Iterable[dict[str, Any]]], **where: Any
) -> list[dict[str, Any]]:
    """Measure the rows as one rank of S; return one row with the error where memory is short or a kernel refuses."""
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    try:
        with one_rank_of(where["ranks"], args.device):
            return list(rows())
    except RuntimeError as error:
        if args.quick:
            raise
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        note = "out of memory" if memory else f"failed: {str(error).splitlines()[0]}"
        return [{"contestant": "lss", **where, "note": note}]
    finally:
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def _call(args: argparse.Namespace, length: int) -> Call:
    return Call(length, args.heads, args.kv_heads, args.head_width, getattr(torch, args.dtype), args.device)


def _kernel(args: argparse.Namespace, call: Call) -> str:
    """Return the name of the kernel that ``args.kernel`` chooses."""
    return select_kernel(torch.empty(1, 1, 1, call.width, dtype=call.dtype, device=call.device), args.kernel).name


def _gpu(device: torch.device) -> dict[str, str]:
    """Name the device and its driver, which the environment of a row lacks."""
    if device.type != "cuda":
        return {"gpu": "", "driver": "", "cuda": "", "cudnn": ""}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        driver = "unknown"
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver, **versions}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`run`."""
    parser.add_argument("--figures", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes for a smoke test; nothing is written")
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the CSV and the picture")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="numbers of ranks S")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(17, 23)], help="L of attention")
    parser.add_argument("--layouts", nargs="+", choices=["zigzag", "contiguous"], default=["zigzag"])
    parser.add_argument("--kernel", default="auto", help="attention kernel of the figure attention")
    parser.add_argument("--kernel-length", type=int, default=2**18, help="L of the figure kernels")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of head chunks in the figure kernels"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--model", default="1b", help="a file in conf/model, of the figure step")
    parser.add_argument("--step-length", type=int, default=2**14, help="tokens of a rank, L / S, of the figure step")
    parser.add_argument(
        "--checkpointing", nargs="+", default=["none", "selective", "full", "offload"], help="of the figure step"
    )
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in bfloat16, for utilization")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after a warm-up")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds after which no further round begins")


_QUICK: dict[str, Any] = dict(
    ranks=[4],
    lengths=[512],
    kernel_length=256,
    chunks=[1, 2],
    heads=2,
    kv_heads=2,
    head_width=16,
    model="tiny",
    step_length=64,
)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one rank's share of a long sequence on one GPU."""
    if args.quick:
        vars(args).update(_QUICK, rounds=1)
    args.device = torch.device(args.device)
    if args.device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device. `--device cpu --quick` checks that the benchmark runs.")
        args.device = torch.device("cuda", args.device.index or 0)
        torch.cuda.set_device(args.device)
    written = args.device.type == "cuda" and not args.quick
    for figure in args.figures:
        rows = []
        for found in FIGURES[figure](args):
            row = dict.fromkeys(_COLUMNS, "") | found | {"figure": figure} | _gpu(args.device)
            rows.append(row)
            if written:
                results.append("gpu", [row], args.output)  # at once: a later one may not fit
        results.show([{key: row[key] for key in _SHOWN} for row in rows])
    if written:
        print(figures.save("gpu", args.output))
    print("Collectives were copies of the same size on this device; time on links is not in these figures.")
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())
