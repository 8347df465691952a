"""Measure each figure: turn the arguments of a command line into rows."""

import os
import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import lightning_lss.nn.loss
from benchmarks import attention, counting, memory
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.network import Network, measured_megabits, obstacle
from benchmarks.steps import Row, compare_single_ranks, compare_steps, who_takes_part
from benchmarks.training import Job, model_options
from benchmarks.turns import in_turn, median_ratio, start_ranks
from lightning_lss import LSSTransformer
from lightning_lss.testing.collectives import Tally, describe, total_bytes
from lightning_lss.testing.world import World

MIB = 2**20


def make_job(args: Namespace, length: int) -> Job:
    """Build the job that the arguments describe, for sequences of ``length``."""
    options = dict(width=args.width, num_layers=args.layers, num_heads=args.heads, num_kv_heads=args.kv_heads)
    model = model_options(args.model, seq_len=length, **options, **dict(args.set))
    try:
        with torch.device("meta"):
            LSSTransformer(**model)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{error} See --width, --layers, --heads, --kv-heads and --set.") from None
    return Job(model, steps=args.warm_up + args.steps, warm_up=args.warm_up)


def run_attention(args: Namespace) -> list[Row]:
    """Time attention forward and backward, against one single-threaded process."""
    rows = []
    shape = attention.Shape(
        args.length, args.heads, args.kv_heads or args.heads, args.head_width, not args.bidirectional
    )
    with start_ranks(max(args.ranks)) as world:
        for size in args.ranks:
            names = _only(args.contestants, lambda c: c.splits_sequence, "whose ranks have no segment to attend from")
            names = who_takes_part(names, size, shape.heads, shape.kv_heads)
            names = ["single", *names]
            small = shape._replace(length=64 * size)
            errors = {name: _attention_errors(world, name, size, small) for name in names}
            runs = {name: partial(_attention_turn, world, name, size, shape) for name in names}
            seconds = in_turn(runs, args.rounds)
            for name in names:
                ideal = median_ratio([single / size for single in seconds["single"]], seconds[name])
                worst = max(value for key, value in errors[name].items() if key != "out")
                rows.append(
                    {
                        "contestant": name,
                        "ranks": size,
                        **shape._asdict(),
                        "rounds": args.rounds,
                        "seconds": round(statistics.median(seconds[name]), 5),
                        "fraction_of_ideal": "" if name == "single" else round(ideal, 4),
                        "gradients": attention.verdict(worst),
                        "gradient_error": f"{worst:.1e}",
                        "output_error": f"{errors[name]['out']:.1e}",
                    }
                )
    return rows


def _attention_turn(world: World, name: str, size: int, shape: attention.Shape) -> float:
    ranks = 1 if name == "single" else size
    return max(world.run(ranks, attention.run_attention, name, ranks, shape, group=ranks > 1))


def _attention_errors(world: World, name: str, size: int, shape: attention.Shape) -> dict[str, float]:
    ranks = 1 if name == "single" else size
    answers = world.run(ranks, attention.check_attention, name, ranks, shape, group=ranks > 1)
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def run_steps(args: Namespace) -> list[Row]:
    """Time whole training steps on sequences of the same length; also strong scaling."""
    with start_ranks(max(args.ranks)) as world:
        return _flat(
            compare_steps(world, args.contestants, s, make_job(args, args.length), args.rounds) for s in args.ranks
        )


def run_overhead(args: Namespace) -> list[Row]:
    """Time whole training steps of one rank; contestants take turns step by step."""
    if args.ranks != [1]:
        raise SystemExit(f"overhead is measured on one rank: leave out --ranks {' '.join(map(str, args.ranks))}.")
    with start_ranks(len(args.contestants)) as world:
        return compare_single_ranks(world, args.contestants, make_job(args, args.length), args.rounds)


def run_weak_scaling(args: Namespace) -> list[Row]:
    """Time whole training steps on ``length`` positions a rank; efficiency compares FLOP/s a rank with the fewest
    ranks."""
    with start_ranks(max(args.ranks)) as world:
        jobs = {size: make_job(args, args.length * size) for size in args.ranks}
        rows = _flat(compare_steps(world, args.contestants, size, jobs[size], args.rounds) for size in args.ranks)
    first = {row["contestant"]: row for row in sorted(rows, key=lambda row: -row["ranks"])}
    for row in rows:
        least = first[row["contestant"]]
        rates = [x["flops_per_second"] / x["ranks"] for x in (row, least)]
        row["efficiency"] = round(rates[0] / rates[1], 4)
    return rows


def run_slow_network(args: Namespace) -> list[Row]:
    """Time whole training steps, every rank behind a link of limited rate; no rows where links cannot be limited."""
    reason = obstacle()
    if reason is not None:
        print(f"slow-network is left out: {reason}")
        return []
    rows = []
    for size in args.ranks:
        for megabits in args.megabits:
            with Network(size, megabits) as network, start_ranks(size, network) as world:
                rate = round(world.run(size, measured_megabits, megabits)[0], 1)
                for kv_heads in args.kv_heads_list:
                    own = Namespace(**{**vars(args), "kv_heads": kv_heads})
                    found = compare_steps(world, args.contestants, size, make_job(own, args.length), args.rounds)
                    rows += [
                        {"contestant": row["contestant"], "megabits": megabits, "megabits_measured": rate, **row}
                        for row in found
                    ]
    return rows


def run_communication(args: Namespace) -> list[Row]:
    """Count the collectives and bytes that a layer adds to a rank's step."""
    rows: list[Row] = []
    with start_ranks(max(args.ranks)) as world:
        for size in args.ranks:
            job = replace(make_job(args, args.length), steps=4, warm_up=3)  # DDP arranges its buckets in the first two
            heads, kv_heads = job.model["num_heads"], job.model.get("num_kv_heads") or job.model["num_heads"]
            found = {}
            for name in who_takes_part(args.contestants, size, heads, kv_heads):
                found[name] = counting.per_layer(partial(_count, world, name, size), job)
            reference = total_bytes(found["megatron"][0]) if "megatron" in found else None
            for name, (activations, parameter_bytes) in found.items():
                received = total_bytes(activations)
                rows.append(
                    {
                        "contestant": name,
                        "ranks": size,
                        "length": job.length,
                        "width": job.model["width"],
                        "heads": heads,
                        "kv_heads": kv_heads,
                        "forward": describe(activations, "forward"),
                        "backward": describe(activations, "backward"),
                        "bytes_per_layer": received,
                        "bytes_forward": total_bytes(activations, "forward"),
                        "bytes_backward": total_bytes(activations, "backward"),
                        "bytes_against_megatron": round(received / reference, 4) if reference else "",
                        "parameter_bytes_per_layer": parameter_bytes,
                    }
                )
    return rows


def _count(world: World, name: str, size: int, job: Job) -> Tally:
    return world.run(size, counting.count_step, name, size, job)[0]


def run_memory(args: Namespace) -> list[Row]:
    """Measure the peak memory of a rank by part, on real ranks or (``--shapes``) without computing."""
    rows: list[Row] = []
    job = replace(make_job(args, args.length), steps=4, warm_up=3)
    heads, kv_heads = job.model["num_heads"], job.model.get("num_kv_heads") or job.model["num_heads"]
    if args.shapes:
        args.contestants = _on_shapes(args.contestants)
    with start_ranks(1 if args.shapes else max(args.ranks)) as world:
        alone = memory.measure(world, "single", 1, job, args.shapes)
        rows.append(_memory_row("single", 1, job, args.shapes, alone, alone, None))
        for size in args.ranks:
            names = [name for name in args.contestants if CONTESTANTS[name].strategy != "single"]
            names = who_takes_part(names, size, heads, kv_heads)
            peaks = {name: memory.measure(world, name, size, job, args.shapes) for name in names}
            rows += [
                _memory_row(n, size, job, args.shapes, peak, alone, peaks.get("megatron")) for n, peak in peaks.items()
            ]
    return rows


def _only(names: Sequence[str], takes_part: Callable[[Contestant], bool], why: str) -> list[str]:
    """Select the names that can take part; print why the others cannot."""
    left_out = [name for name in names if not takes_part(CONTESTANTS[name])]
    if left_out:
        print(f"left out: {', '.join(left_out)}, {why}.")
    return [name for name in names if name not in left_out]


def _on_shapes(names: Sequence[str]) -> list[str]:
    return _only(names, lambda c: not c.options, "since without the Trainer there is nobody to shard parameters")


def _memory_row(
    name: str, size: int, job: Job, shapes: bool, peak: memory.Peak, alone: memory.Peak, megatron: memory.Peak | None
) -> Row:
    return {
        "contestant": name,
        "ranks": size,
        "length": job.length,
        "width": job.model["width"],
        "layers": job.model["num_layers"],
        "heads": job.model["num_heads"],
        "kv_heads": job.model.get("num_kv_heads") or job.model["num_heads"],
        "measured_on": "shapes" if shapes else "ranks",
        **{f"{part}_mib": round(value / MIB, 3) for part, value in peak._asdict().items()},
        "activations_against_single": round(peak.activations / alone.activations, 4),
        "activations_against_megatron": round(peak.activations / megatron.activations, 4) if megatron else "",
    }


def run_longest(args: Namespace) -> list[Row]:
    """Find the longest sequence whose activations on a rank stay under the cap: search on shapes, then check one length
    on real ranks."""
    rows: list[Row] = []
    heads = make_job(args, 2 * max(args.ranks)).model["num_heads"]
    args.contestants = _on_shapes(args.contestants)
    with start_ranks(max(args.ranks)) as world:
        whole: int | None = None
        for size in args.ranks:
            names = [n for n in args.contestants if (CONTESTANTS[n].strategy == "single") == (size == 1)]
            for name in who_takes_part(names, size, heads, args.kv_heads or heads):

                def peak(length: int, shapes: bool = True, name: str = name, size: int = size) -> int:
                    return memory.measure(
                        world, name, size, replace(make_job(args, length), steps=4, warm_up=3), shapes
                    ).activations

                longest = memory.longest_length(peak, int(args.cap_mib * MIB), 2 * size, args.length)
                whole = longest if name == "single" else whole
                row = {
                    "contestant": name,
                    "ranks": size,
                    "cap_mib": args.cap_mib,
                    "width": make_job(args, longest).model["width"],
                    "longest": longest,
                    "longest_against_single": round(longest / whole, 4) if whole else "",
                    "measured_on": "shapes",
                    "checked_at": args.length,
                    "shapes_against_ranks": round(peak(args.length) / peak(args.length, False), 4),
                }
                rows.append(row)
    return rows


def run_loss(args: Namespace) -> list[Row]:
    """Measure the peak memory of the loss over a large vocabulary: plain cross entropy of all logits, or in chunks.

    The plain one is tracked on shapes, since its logits may not fit the machine. A run with fewer tokens confirms the
    tracked bytes. The chunked one is computed.
    """
    cases = [("plain", args.tokens, True), ("plain", args.tokens_checked, True), ("plain", args.tokens_checked, False)]
    if hasattr(lightning_lss.nn.loss, "linear_cross_entropy"):
        cases += [("chunked", args.tokens, False), ("chunked", args.tokens_checked, False)]
    with start_ranks(1) as world:
        sizes = args.width, args.vocabulary
        run = partial(world.run, 1, _loss_peak, group=False, threads=os.cpu_count() or 1)
        peaks = {(name, tokens, shapes): run(name, tokens, *sizes, shapes)[0] for name, tokens, shapes in cases}
    return [
        {
            "contestant": name,
            "tokens": tokens,
            "width": args.width,
            "vocabulary": args.vocabulary,
            "measured_on": "shapes" if shapes else "computed",
            "peak_mib": round(peak / MIB, 3),
            "peak_against_plain": round(peak / peaks["plain", tokens, True], 4),
        }
        for (name, tokens, shapes), peak in peaks.items()
    ]


def _plain(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(features, weight), targets, reduction="sum")


def _chunked(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return lightning_lss.nn.loss.linear_cross_entropy(features, weight, targets)


_LOSSES = {"plain": _plain, "chunked": _chunked}


def _loss_peak(_: int, name: str, tokens: int, width: int, vocabulary: int, shapes: bool) -> int:
    """Measure the peak bytes of forward and backward, with the gradients of features and weight, without the inputs."""
    return memory.track_loss(_LOSSES[name], tokens, width, vocabulary, shapes)


def _flat(lists: Any) -> list[Row]:
    return [row for rows in lists for row in rows]
