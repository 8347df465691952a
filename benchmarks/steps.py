"""Measure whole training steps: step time, scaling, overhead, and slow links."""

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.attention import verdict
from benchmarks.contestants import CONTESTANTS
from benchmarks.network import bytes_received
from benchmarks.training import Job, checking_job, gradient_error, gradients, time_steps, time_steps_in_turn
from benchmarks.turns import in_turn, median_ratio
from lightning_lss.testing.world import World

Row = dict[str, Any]


def ranks_and_threads(name: str, size: int) -> tuple[int, int]:
    """Return a contestant's processes, and the threads of each: one process gets the threads of all, up to the
    cores."""
    single = CONTESTANTS[name].strategy == "single"
    return (1, min(size, os.cpu_count() or 1)) if single else (size, 1)


def who_takes_part(names: Sequence[str], size: int, heads: int, kv_heads: int) -> list[str]:
    """Select the contestants that can take part; print why the others cannot."""
    able = []
    for name in names:
        obstacle = CONTESTANTS[name].obstacle(size, heads, kv_heads)
        if obstacle is None:
            able.append(name)
        else:
            print(f"{name} is left out at S = {size}: {obstacle}.")
    return able


def compare_steps(world: World, names: Sequence[str], size: int, job: Job, rounds: int) -> list[Row]:
    """Measure a row for each contestant: median step, ratios within a round to ``single``, ``ddp`` and ``megatron``,
    and whether gradients are right (against one process, on a small model of the same kind)."""
    heads, kv_heads = job.model["num_heads"], job.model.get("num_kv_heads") or job.model["num_heads"]
    names = who_takes_part(names, size, heads, kv_heads)
    errors = _gradient_errors(world, names, size, job)
    received: dict[str, int] = {}
    runs = {name: partial(_one_turn, world, name, size, job, received) for name in names}
    seconds = in_turn(runs, rounds, warm_up=0)  # every turn has its own warm-up steps
    return [_row(name, size, job, rounds, seconds, errors, received) for name in names]


def compare_single_ranks(world: World, names: Sequence[str], job: Job, runs: int) -> list[Row]:
    """Measure the rows of :func:`compare_steps` for one rank; runs take turns step by step, one step of each a round.

    Other load on the machine affects such runs even more alike, so that a hundredth can be seen. The first to train
    changes from run to run, since that alone makes some hundredths. Rows keep the runs apart: their spread is the error
    of the median of all rounds.
    """
    errors = _gradient_errors(world, names, 1, job)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    against_ddp: dict[str, list[float]] = {name: [] for name in names}  # of each run
    for index in range(runs):
        first = index % len(names)
        order = [*names[first:], *names[:first]]
        with tempfile.TemporaryDirectory() as folder:
            for place in range(len(order)):
                os.mkfifo(Path(folder) / str(place))
            found = world.run(len(order), time_steps_in_turn, order, job, Path(folder), group=False)
        in_run = dict(zip(order, found))
        for name, own in in_run.items():
            seconds[name] += own
            if "ddp" in in_run and name != "ddp":
                against_ddp[name].append(median_ratio(own, in_run["ddp"]))
    rounds, one_step = len(seconds[names[0]]), replace(job, steps=job.warm_up + 1)
    rows = [_row(name, 1, one_step, rounds, seconds, errors, dict.fromkeys(names, 0)) for name in names]
    for row in rows:
        row["seconds_against_ddp_by_run"] = " ".join(f"{ratio:.4f}" for ratio in against_ddp[row["contestant"]])
    return rows


def _gradient_errors(world: World, names: Sequence[str], size: int, job: Job) -> dict[str, float]:
    small = checking_job(job, size)
    expected = world.run(1, gradients, "single", 1, small, group=False)[0]
    errors = {}
    for name in names:
        ranks, threads = ranks_and_threads(name, size)
        group = CONTESTANTS[name].strategy != "single"
        own = world.run(ranks, gradients, name, ranks, small, threads=threads, group=group)[0]
        errors[name] = gradient_error(own, expected)
    return errors


def time_steps_and_bytes(rank: int, name: str, size: int, job: Job) -> tuple[list[float], int]:
    """Call :func:`~benchmarks.training.time_steps`, and add the bytes that the kernel counted on the link, per step."""
    before = bytes_received()
    seconds = time_steps(rank, name, size, job)
    return seconds, (bytes_received() - before) // job.steps


def _one_turn(world: World, name: str, size: int, job: Job, received: dict[str, int]) -> float:
    """Return the median seconds of a step in one run; the slowest rank gives the seconds of each step."""
    ranks, threads = ranks_and_threads(name, size)
    group = CONTESTANTS[name].strategy != "single"
    answers = world.run(ranks, time_steps_and_bytes, name, ranks, job, threads=threads, group=group)
    received[name] = max(count for _, count in answers)
    return statistics.median(max(step) for step in zip(*(seconds for seconds, _ in answers)))


def _row(
    name: str,
    size: int,
    job: Job,
    rounds: int,
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    received: dict[str, int],
) -> Row:
    ranks, threads = ranks_and_threads(name, size)
    median = statistics.median(seconds[name])
    config = job.config
    against = {other: seconds[other] for other in ("single", "ddp", "megatron") if other in seconds}
    ratio = {other: median_ratio(own, seconds[name]) for other, own in against.items()}
    return {
        "contestant": name,
        "ranks": size,
        "processes": ranks,
        "threads": threads,
        "length": job.length,
        "width": config.width,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "rounds": rounds,
        "steps_a_round": job.steps - job.warm_up,
        "seconds": round(median, 5),
        "tokens_per_second": round(job.length / median, 1),
        "flops_per_second": round(config.training_flops(1, job.length) / median),
        "speed_against_single": _rounded(ratio.get("single")),
        "speed_against_megatron": _rounded(ratio.get("megatron")),
        "seconds_against_ddp": _rounded(None if "ddp" not in ratio else 1 / ratio["ddp"]),
        "gradients": verdict(errors[name]),
        "gradient_error": f"{errors[name]:.1e}",
        "received_bytes_a_step": received[name] or "",
    }


def _rounded(value: float | None) -> Any:
    return "" if value is None else round(value, 4)
