"""Attention forward and backward on S single-threaded ranks against one single-threaded process, taken in turn.

    python benchmarks/attention.py                       # L = 16,384, 8 heads of 64, S = 2, zigzag and contiguous

Prints, for each contestant, the median time and the fraction of the ideal (the single process's time / S), and appends
a row with environment and commit to benchmarks/results/attention.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_lss import SequenceShard, lss_attention

RESULTS = Path(__file__).parent / "results" / "attention.csv"


def time_rank(
    rank: int, size: int, meeting: str, args: argparse.Namespace, contestants: list[dict[str, Any]], queue: Any
) -> None:
    """Time every contestant in turn, ``args.rounds`` times; rank 0 sends the seconds of each, the slowest rank's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    alone = [dist.new_group([r]) for r in range(size)]
    seconds: list[list[float]] = [[] for _ in contestants]
    for round_ in range(args.rounds + 1):
        for index, contestant in enumerate(contestants):
            elapsed = time_contestant(rank, alone[0], args, **contestant)
            slowest = torch.tensor(elapsed)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if round_:  # the first is a warm-up
                seconds[index].append(slowest.item())
    dist.barrier()
    if rank == 0:
        queue.put(seconds)
    dist.destroy_process_group()


def time_contestant(rank: int, alone: Any, args: argparse.Namespace, ranks: int, **options: Any) -> float:
    """Seconds of one forward and backward pass; ranks beyond ``ranks`` stand by."""
    dist.barrier()
    if rank >= ranks:
        return 0.0
    layout = options.pop("layout", "zigzag")
    shard = SequenceShard(rank, ranks, layout, dist.group.WORLD) if ranks > 1 else SequenceShard()
    local = args.length // ranks
    shapes = [(1, heads, local, args.width) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    q, k, v, grad = (torch.randn(shape) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if ranks > 1:
        dist.barrier()
    start = time.perf_counter()
    lss_attention(*leaves, shard, causal=not args.bidirectional, **options).backward(grad)
    return time.perf_counter() - start


def commit() -> str:
    """The commit that is measured, with a plus if the tree has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return name + ("+" if dirty else "")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--size", type=int, default=2, help="number of ranks S")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bidirectional", action="store_true")
    args = parser.parse_args()
    names = {
        "single": {"ranks": 1},
        "zigzag": {"ranks": args.size, "layout": "zigzag"},
        "zigzag, keep_gathered": {"ranks": args.size, "layout": "zigzag", "keep_gathered": True},
        "contiguous": {"ranks": args.size, "layout": "contiguous"},
    }
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        meeting = os.path.join(folder, "meeting")
        mp.spawn(time_rank, args=(args.size, meeting, args, list(names.values()), queue), nprocs=args.size)
        seconds = queue.get()
    report(args, dict(zip(names, seconds)))


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """Print the medians and append them to the CSV."""
    shape = {
        "length": args.length,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "width": args.width,
        "size": args.size,
    }
    environment = {
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = None
        for name, own in seconds.items():
            ideal = [single / args.size / mine for single, mine in zip(seconds["single"], own)]
            row = {
                "contestant": name,
                **shape,
                "causal": not args.bidirectional,
                "rounds": args.rounds,
                "median_seconds": round(statistics.median(own), 4),
                "median_fraction_of_ideal": round(statistics.median(ideal), 4) if name != "single" else "",
                "commit": commit(),
                **environment,
            }
            writer = writer or csv.DictWriter(file, row)
            if fresh:
                writer.writeheader()
                fresh = False
            writer.writerow(row)
            print(f"{name:24} {row['median_seconds']:8.3f} s   fraction of ideal {row['median_fraction_of_ideal']}")


if __name__ == "__main__":
    main()
