"""Measure a figure: ``python -m benchmarks FIGURE [options]``; ``--help`` after a figure lists its options."""

import argparse
import ast
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, figures, gpu, masks, models, paper, planner, results
from benchmarks.contestants import CONTESTANTS
from lightning_lss.sequence.layout import check_length

_LSS = ["lss", "lss-kept"]
_OTHERS = ["megatron", "ring", "ulysses"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.quick:
        args.command.set_defaults(**args.smoke)  # arguments on the command line stay
        args = parser.parse_args(arguments)
    _check_lengths(parser, args)
    results.environment()  # read the commit and the load of the machine before anything runs
    rows = args.run(args)
    if not rows:
        return
    if "model" in args and "set" in args:  # sizes have columns of their own
        model = " ".join([args.model, *(f"{name}={value}" for name, value in args.set)])
        rows = [{**row, "model": model} for row in rows]
    results.show(rows)
    path = results.append(args.figure, rows, args.output)
    print(f"{path}\n{figures.save(args.figure, args.output)}")


def _check_lengths(parser: ArgumentParser, args: Namespace) -> None:
    """End with a sentence if a sequence cannot be split, before anything is measured."""
    if "contestants" not in args:
        return
    for size in args.ranks:
        length = args.length * size if args.figure == "weak-scaling" else args.length
        try:
            check_length(length, size, "zigzag")
        except ValueError as error:
            parser.error(f"--length {args.length} --ranks {size}: {error}")


def make_parser() -> ArgumentParser:
    """Build the parser of all figures and their options."""
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands_ = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def figure(
        name: str, run: Callable[[Namespace], list[Any]], smoke: dict[str, Any], **defaults: Any
    ) -> ArgumentParser:
        command = commands_.add_parser(
            name, help=run.__doc__, description=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--quick", action="store_true", help="sizes for a smoke test, in seconds; no figure")
        command.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the CSV and the picture")
        command.set_defaults(run=run, command=command, smoke=smoke, **defaults)
        return command

    tiny = dict(model="tiny", length=256, ranks=[2], rounds=1, steps=2, width=64, heads=4, kv_heads=4, layers=2)
    step = figure("step", commands.run_steps, tiny)
    _add_training(step, [2, 4, 8], ["single", *_LSS, *_OTHERS])
    strong = figure("strong-scaling", commands.run_steps, {**tiny, "ranks": [1, 2]})
    _add_training(strong, [1, 2, 4, 8], ["lss", "megatron", "ulysses"])
    weak = figure("weak-scaling", commands.run_weak_scaling, {**tiny, "ranks": [1, 2]})
    _add_training(weak, [1, 2, 4, 8], ["lss", "megatron", "ulysses"], length=2048)
    overhead = figure("overhead", commands.run_overhead, {**tiny, "ranks": [1]})
    small = {"length": 64, "width": 32, "layers": 6, "heads": 4}
    _add_training(overhead, [1], ["ddp", "lss"], **small, rounds=8, steps=150, warm_up=5)
    slow = figure("slow-network", commands.run_slow_network, {**tiny, "megabits": [1000], "kv_heads_list": [4]})
    _add_training(slow, [4], ["lss", "lss-kept", "megatron"], rounds=3, steps=2, width=256, layers=6, heads=8)
    slow.add_argument("--megabits", type=_count, nargs="+", default=[100, 1000, 10_000], help="rates of the links")
    slow.add_argument("--kv-heads-list", type=_count, nargs="+", default=[8, 2], help="numbers of key/value heads")

    as_they_are = figure("models", models.run, tiny)
    _add_training(as_they_are, [2], ["lss"], rounds=3, steps=3, width=256, layers=4, heads=4)

    communication = figure("communication", commands.run_communication, {**tiny, "length": 128})
    _add_training(communication, [2, 4, 8], [*_LSS, "lss-2chunks", *_OTHERS], length=512, width=128)
    peak = figure("memory", commands.run_memory, tiny)
    _add_training(peak, [2, 4, 8], [*_LSS, *_OTHERS])
    peak.add_argument("--shapes", action="store_true", help="track fake tensors instead of real ranks")
    longest = figure("longest", commands.run_longest, {**tiny, "ranks": [1, 2], "cap_mib": 64.0})
    _add_training(longest, [1, 8], ["single", "lss", "megatron"], length=2048)
    longest.add_argument("--cap-mib", type=float, default=2048.0, help="MiB of activations on a rank")

    alone = figure("attention", commands.run_attention, {**tiny, "head_width": 16})
    _add_sizes(alone, [2], ["lss", "lss-kept", "lss-contiguous", "ring", "ring-zigzag", "ulysses"], 32_768)
    alone.add_argument("--rounds", type=_count, default=5, help="turns of every contestant")
    alone.add_argument("--heads", type=_count, default=8)
    alone.add_argument("--kv-heads", type=_count, help="key/value heads; by default as many as heads")
    alone.add_argument("--head-width", type=_count, default=64)
    alone.add_argument("--bidirectional", action="store_true", help="without a causal mask")

    shown = figure("masks", masks.run, dict(draws=2, rounds=1, window_ranks=2, shorten=16))
    masks.add_arguments(shown, _count)

    loss = figure("loss", commands.run_loss, dict(tokens=2048, tokens_checked=512, width=64, vocabulary=4096))
    loss.add_argument("--tokens", type=_count, default=65_536, help="tracked on shapes")
    loss.add_argument("--tokens-checked", type=_count, default=4096, help="tracked on shapes and computed")
    loss.add_argument("--width", type=_count, default=1024)
    loss.add_argument("--vocabulary", type=_count, default=131_072)

    study = figure("paper-scaling", paper.run, {"devices": [6, 144]})
    study.add_argument("--devices", type=_count, nargs="+", default=list(paper.DEVICES), help="numbers of GPUs")
    study.add_argument("--batch-size", type=_count, default=1, help="sequences per sequence group")
    study.add_argument("--sharding", choices=["fsdp", "hybrid"], help="how LSS divides parameters")
    study.add_argument(
        "--set", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model"
    )

    on_gpu = commands_.add_parser("gpu", help=gpu.run.__doc__, description=gpu.run.__doc__)
    gpu.add_arguments(on_gpu)
    on_gpu.set_defaults(run=gpu.run, smoke={}, command=on_gpu)

    predicted = commands_.add_parser("planner", help=planner.run.__doc__, description=planner.run.__doc__)
    planner.add_arguments(predicted)
    predicted.set_defaults(run=planner.run, smoke={}, command=predicted)
    return parser


def _count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def _add_sizes(command: ArgumentParser, ranks: list[int], contestants: list[str], length: int) -> None:
    command.add_argument("--ranks", type=_count, nargs="+", default=ranks, help="numbers of ranks S")
    command.add_argument("--contestants", nargs="+", default=contestants, choices=list(CONTESTANTS), metavar="NAME")
    command.add_argument(
        "--length", type=_count, default=length, help="sequence length L (weak scaling: local length l)"
    )


def _add_training(
    command: ArgumentParser,
    ranks: list[int],
    contestants: list[str],
    length: int = 8192,
    rounds: int = 5,
    steps: int = 2,
    warm_up: int = 2,
    width: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
) -> None:
    _add_sizes(command, ranks, contestants, length)
    command.add_argument("--rounds", type=_count, default=rounds, help="turns of every contestant")
    command.add_argument("--steps", type=_count, default=steps, help="timed steps of a turn")
    command.add_argument("--warm-up", type=_count, default=warm_up, help="steps before the timed ones")
    command.add_argument("--model", default="enwik8-small", help="a file in conf/model, for other arguments")
    command.add_argument("--width", type=_count, default=width)
    command.add_argument("--layers", type=_count, default=layers)
    command.add_argument("--heads", type=_count, default=heads)
    command.add_argument("--kv-heads", type=_count)
    command.add_argument(
        "--set", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="other arguments of the model"
    )


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
