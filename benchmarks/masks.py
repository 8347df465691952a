"""Measure what masks cost: how even the work is, what ranks receive, the speed of documents, and the time of planning."""

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks.attention import Shape
from benchmarks.mask_counts import (
    LAYOUTS,
    check_traffic,
    count,
    even_documents,
    lognormal,
    packed_documents,
    places,
    traffic,
    uniform,
)
from benchmarks.turns import in_turn, start_ranks
from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention.kinds import Sizes
from lightning_lss.attention.plan import Call, forget_plans, plan_call
from lightning_lss.attention.structure import chunk_work, structure_of
from lightning_lss.sequence.balance import balance
from lightning_lss.strategy.balancing import CHUNKS
from lightning_lss.testing.compare import worst_difference
from lightning_lss.testing.world import World

Row = dict[str, Any]

LOGNORMAL, SHORT, MANY = "documents, lognormal", "short documents", "64 documents"
WINDOW = "window of 1,024"
WORK, RECEIVED = "busiest rank / mean", "received / everything"
SPEED, PROCESSOR = "fraction of ideal", "fraction of ideal, processor time"
AGAINST_CAUSAL, PLANNING = "times as fast as causal", "ms to plan"
BARS: dict[str, Any] = {
    WORK: 1.05,
    RECEIVED: {WINDOW: 0.20, LOGNORMAL: 0.37},
    SPEED: 0.90,
    PROCESSOR: 0.90,
    AGAINST_CAUSAL: 8,
    PLANNING: 20,
}

MEDIAN = 2048  # of the lognormal lengths of documents


# -- counted -----------------------------------------------------------------------------------------------------------


def count_documents(args: Namespace) -> list[Row]:
    """Count work and keys of packed documents, on 8 ranks, without running any."""
    length, size = 131_072 // args.shorten, 8
    drawn = [packed_documents(lognormal(seed, MEDIAN / args.shorten), length) for seed in range(args.draws)]
    rows = []
    for layout in LAYOUTS:
        counted = [count(mask, length, places(mask, length, size, layout)) for mask in drawn]
        about = (layout, LOGNORMAL, length, size, "plan")
        rows.append(_row(WORK, *about, [x.imbalance for x in counted], statistics.mean))
        rows.append(_row(RECEIVED, *about, [y for x in counted for y in x.fraction_received], statistics.mean))
    return rows


def count_window(args: Namespace) -> list[Row]:
    """Count what ranks really receive under a window, and compare it with their plans."""
    length, size = 32_768 // args.shorten, args.window_ranks
    mask = AttentionMask.sliding_window(1024 // args.shorten - 1)
    shape = Shape(length, heads=2, kv_heads=2, width=16)
    unit = 2 * shape.kv_heads * shape.width * 4  # bytes of K and V of one position
    rows = []
    with start_ranks(size) as world:
        for layout in (name for name in LAYOUTS if name != "heaviest first"):
            ranks = places(mask, length, size, layout)
            counted = count(mask, length, ranks)
            # keys and values in both passes, and the gradients that come back
            planned = [unit * (2 * keys + own) for keys, own in zip(counted.received, counted.returned)]
            received = world.run(size, traffic, ranks, mask, shape)
            check_traffic(received, planned)
            everything = 3 * unit * counted.others
            bytes_ = {"received_bytes": round(statistics.mean(received))}
            about = (layout, WINDOW, length, size, "traffic")
            rows.append(_row(RECEIVED, *about, [x / everything for x in received], statistics.mean, **bytes_))
    return rows


# -- timed -------------------------------------------------------------------------------------------------------------


def time_documents(args: Namespace) -> list[Row]:
    """Time attention under short documents, forward and backward, on two ranks: against half of one process, and against
    causal attention over the whole sequence."""
    size = 2
    shape = Shape(16_384 // args.shorten, 8, 8, 64)
    lengths = partial(uniform, 0, 256 // args.shorten, 768 // args.shorten)
    mask = packed_documents(lengths(), shape.length)
    small, checked = shape._replace(length=1024), packed_documents(lengths(), 1024)
    rows = []
    with start_ranks(size) as world:
        runs = {"one": partial(_turn, world, [SequenceShard()], mask, shape)}
        for layout in ("balanced", "zigzag"):
            runs[layout] = partial(_turn, world, places(mask, shape.length, size, layout), mask, shape)
        errors = {
            layout: max(world.run(size, gradient_error, places(checked, 1024, size, layout), checked, small))
            for layout in runs
            if layout in LAYOUTS
        }
        seconds = in_turn(runs, args.rounds)
        # apart, since it takes ten times as long, and a quiet machine is seldom so for long
        runs["causal"] = partial(_turn, world, places(mask, shape.length, size, "zigzag"), None, shape)
        del runs["one"]
        against = in_turn(runs, min(args.rounds, 3))
    kinds = (
        (SPEED, "clock", seconds, "one", size),
        (PROCESSOR, "processor", seconds, "one", size),
        (AGAINST_CAUSAL, "clock", against, "causal", 1),
    )
    for check, time_of, found, other, shares in kinds:
        for layout, error in errors.items():
            own, others = ([getattr(x, time_of) for x in found[name]] for name in (layout, other))
            about = (layout, SHORT, shape.length, size, "ranks", [a / shares / b for a, b in zip(others, own)])
            more = {"seconds": round(statistics.median(own), 5), "gradient_error": f"{error:.1e}"}
            rows.append(_row(check, *about, statistics.median, **more))
    return rows


class Seconds(NamedTuple):
    """What a turn took, on the slowest rank."""

    clock: float
    processor: float
    """Time in which the rank computed: other processes on the machine change it less."""


def _turn(world: World, ranks: Sequence[SequenceShard], mask: AttentionMask | None, shape: Shape) -> Seconds:
    taken = world.run(len(ranks), time_attention, ranks, mask, shape, group=len(ranks) > 1)
    return Seconds(*map(max, zip(*taken)))


def time_attention(rank: int, ranks: Sequence[SequenceShard], mask: AttentionMask | None, shape: Shape) -> Seconds:
    """Time a forward and a backward pass on this rank, in seconds, causal without a mask; all ranks start together."""
    place = ranks[rank] if len(ranks) == 1 else replace(ranks[rank], group=dist.group.WORLD)
    *leaves, grad = shape.tensors(shape.length // place.size)
    for leaf in leaves:
        leaf.requires_grad_()
    if place.size > 1:
        dist.barrier()
    start, computed = time.perf_counter(), time.process_time()
    lss_attention(*leaves, place, mask=mask).backward(grad)
    return Seconds(time.perf_counter() - start, time.process_time() - computed)


def gradient_error(rank: int, ranks: Sequence[SequenceShard], mask: AttentionMask, shape: Shape) -> float:
    """Return the largest relative error of this rank's gradients against plain attention with the dense mask."""
    place = replace(ranks[rank], group=dist.group.WORLD)
    *whole, grad = shape.tensors(shape.length)
    whole = [x.requires_grad_() for x in whole]
    F.scaled_dot_product_attention(*whole, attn_mask=mask.dense(shape.length)).backward(grad)
    leaves = [place.split(x.detach(), 2).clone().requires_grad_() for x in whole]
    lss_attention(*leaves, place, mask=mask).backward(place.split(grad, 2))
    return worst_difference([x.grad for x in leaves], [place.split(x.grad, 2) for x in whole]).error


def time_planning(args: Namespace) -> list[Row]:
    """Time what is done once a batch: what the mask shows, the work of chunks, who gets them, and one rank's plan."""
    length, size = 131_072 // args.shorten, 64
    mask = even_documents(64, length)
    repeats = [plan_once(mask, length, size, rank) for rank in range(0, size, -(-size // 10))]
    return [
        _row(PLANNING, part, MANY, length, size, "one process", [repeat[part] for repeat in repeats], statistics.median)
        for part in repeats[0]
    ]


def plan_once(mask: AttentionMask, length: int, size: int, rank: int) -> dict[str, float]:
    """Plan ``mask`` for ``rank`` as for the first time; return the milliseconds of each part."""
    forget_plans()
    packed, sizes, chunks = mask.packed, Sizes(1, 8, length, length), CHUNKS * size
    times = [time.perf_counter()]
    structure_of(packed, sizes, chunks, chunks)
    times.append(time.perf_counter())
    work = chunk_work(packed, sizes, chunks)
    times.append(time.perf_counter())
    assignment = balance(work.pairs, work.keys, size)
    times.append(time.perf_counter())
    plan_call(packed, Call(sizes, rank, assignment.chunks))
    times.append(time.perf_counter())
    parts = dict(zip(("structure", "work of chunks", "assignment", "one rank's tiles"), np.diff(times).tolist()))
    return {name: 1000 * x for name, x in {**parts, "all of the plan": times[-1] - times[0]}.items()}


# -- the figure --------------------------------------------------------------------------------------------------------

CHECKS = {"documents": count_documents, "window": count_window, "speed": time_documents, "planning": time_planning}


def add_arguments(parser: ArgumentParser, count_: Callable[[str], int]) -> None:
    """Add the options of :func:`run`."""
    parser.add_argument(
        "--checks", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=" ".join(CHECKS)
    )
    parser.add_argument("--draws", type=count_, default=50, help="sequences of packed documents that are counted")
    parser.add_argument("--rounds", type=count_, default=7, help="turns of everyone that is timed")
    parser.add_argument("--window-ranks", type=count_, default=8, help="ranks whose traffic under a window is counted")
    parser.add_argument("--shorten", type=count_, default=1, help="divide all lengths, for a smoke test")


def run(args: Namespace) -> list[Row]:
    """Count work and traffic under masks, and time documents and planning."""
    return [row for name in args.checks for row in CHECKS[name](args)]


def _row(
    check: str,
    contestant: str,
    mask: str,
    length: int,
    ranks: int,
    measured_on: str,
    values: Sequence[float],
    average: Callable[[Sequence[float]], float],
    **more: Any,
) -> Row:
    bar = BARS[check]
    return {
        "check": check,
        "contestant": contestant,
        "mask": mask,
        "length": length,
        "ranks": ranks,
        "measured_on": measured_on,
        "samples": len(values),
        "value": round(average(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
        "bar": bar[mask] if isinstance(bar, dict) else bar,
        **dict.fromkeys(("received_bytes", "seconds", "gradient_error"), ""),
        **more,
    }
