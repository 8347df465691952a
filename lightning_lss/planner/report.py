"""A plan on the terminal, as CSV, and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_lss.planner.choices import Choice, Plan
from lightning_lss.planner.ledger import PARTS

_NAMES = {
    "kv_buffers": "K/V",
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "acts",
}
_COLORS = dict(
    zip(PARTS, ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"])
)  # Paul Tol's bright scheme


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Two tables with a row for each way to train, what it recommends, and how it compares."""
    console = console or Console(soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_speed_table(plan))
    for line in _remarks(plan):
        console.print(line)


def _memory_table(plan: Plan) -> Table:
    possible = [choice for choice in plan.choices if choice.memory is not None]
    small = max(choice.memory.total for choice in possible if choice.memory) < 2**30
    unit, size = ("MiB", 2**20) if small else ("GiB", 2**30)
    cap = f"{plan.hardware.usable_memory / size:,.1f} {unit} usable"
    title = f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}: {unit} of a rank at its peak ({cap})"
    table = _table(title, *(_NAMES.get(part, part) for part in PARTS), "total", "longest L")
    for choice in possible:
        assert choice.memory is not None
        sizes = [value / size for value in (*(choice.memory.most[part] for part in PARTS), choice.memory.total)]
        _add(
            table,
            plan,
            choice,
            *(f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in sizes),
            f"{choice.longest:,}",
        )
    return table


def _speed_table(plan: Plan) -> Table:
    table = _table("a step", "B", "GiB received", "seconds", "not hidden", "tokens/s", "MFU", "fits")
    for choice in plan.choices:
        if choice.time is None:
            continue
        hidden = f"{100 * choice.time.exposed / choice.time.total:.0f} %"
        sizes = (str(choice.batch_size), f"{choice.received / 2**30:.3g}", f"{choice.time.total:.3g}", hidden)
        rate, share = _short(choice.tokens_per_second), f"{100 * choice.utilization:.0f} %"
        _add(table, plan, choice, *sizes, rate, share, "yes" if choice.fits else "no")
    return table


def _short(number: float) -> str:
    """Three digits, with k, M or G for thousands."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = number / size
            return f"{digits:.0f}{unit}" if digits >= 100 else f"{digits:.3g}{unit}"
    return f"{number:.0f}"


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    table.add_column("scheme", no_wrap=True)
    for name in ("D", "S", *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, plan: Plan, choice: Choice, *cells: str) -> None:
    style = "bold green" if choice is plan.recommended else "" if choice.fits else "dim"
    table.add_row(choice.scheme, str(choice.data_size), str(choice.size), *cells, style=style)


def _remarks(plan: Plan) -> list[str]:
    lines = [
        "Memory: each part when it is most; total: the most that they come to at one moment.",
        '"not hidden": share of a step in which a rank waits for others. Predictions; see docs/planner.md.',
    ]
    obstacles = [choice for choice in plan.choices if choice.obstacle]
    if obstacles:
        first = obstacles[0]
        more = f" ({len(obstacles) - 1} more like it)" if len(obstacles) > 1 else ""
        lines.append(f"impossible: {first.scheme} with D={first.data_size}, S={first.size}: {first.obstacle}{more}")
    best = plan.recommended
    if best is None:
        longest = max(plan.choices, key=lambda choice: choice.longest)
        lines.append(
            f"[bold red]Nothing fits.[/] The longest sequence that would is {longest.longest:,} tokens ({longest.scheme},"
            f" D={longest.data_size}, S={longest.size}); or use more devices, activation_checkpointing or sharding."
        )
        return lines
    assert best.time is not None
    lines.append(
        f"[bold green]Recommended:[/] strategy={_strategy(best)} sequence_parallel_size={best.size} (D = {best.data_size}):"
        f" {best.time.total:.3g} s a step, {best.tokens_per_second:,.0f} tokens/s, {100 * best.utilization:.0f} % of the peak."
    )
    return lines + _comparison(plan)


def _strategy(choice: Choice) -> str:
    """What train.py takes to run it."""
    assert choice.setup is not None
    sharding = choice.setup.options.sharding
    if sharding is None:
        return choice.scheme
    return "lss_fsdp" if sharding == "fsdp" else f"lss_fsdp strategy.sharding={sharding}"


def _comparison(plan: Plan) -> list[str]:
    lss, other = plan.best("lss"), plan.best("megatron")
    longest = {c.scheme: max(x.longest for x in plan.choices if x.scheme == c.scheme) for c in plan.choices}
    lengths = (
        "The longest sequence of any D and S: " + ", ".join(f"{n:,} tokens ({s})" for s, n in longest.items()) + "."
    )
    if lss is None or other is None:
        return [lengths]
    assert lss.memory is not None
    assert other.memory is not None
    return [
        f"Best lss against best megatron: {lss.tokens_per_second / other.tokens_per_second:.2f}x the speed,"
        f" {lss.memory.total / other.memory.total:.2f}x the memory of a rank.",
        lengths,
    ]


def write_csv(plan: Plan, path: str | Path) -> None:
    """One row for each choice; bytes and seconds."""
    rows = [choice.as_row() for choice in plan.choices]
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw_plan(plan: Plan) -> Figure:
    """Memory by part and tokens a second, for each choice that is possible."""
    choices = [choice for choice in plan.choices if choice.memory is not None]
    figure = Figure(figsize=(max(8.0, 1.5 + 0.75 * len(choices)), 7.0), layout="constrained")
    memory, speed = figure.subplots(2, 1, sharex=True)
    _draw_memory(memory, choices, plan)
    colors = [
        "#228833" if choice is plan.recommended else "#4477aa" if choice.fits else "#bbbbbb" for choice in choices
    ]
    bars = speed.bar(range(len(choices)), [choice.tokens_per_second for choice in choices], color=colors)
    speed.bar_label(bars, [f"{100 * choice.utilization:.0f} %" for choice in choices], fontsize=8)
    speed.set(
        ylabel="tokens / s",
        title="predicted speed and model FLOP/s utilization (green: recommended, grey: does not fit)",
    )
    speed.set_xticks(range(len(choices)), [f"{c.scheme}\nD={c.data_size}\nS={c.size}" for c in choices], fontsize=8)
    speed.margins(y=0.12)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}")
    return figure


def _draw_memory(axes: Axes, choices: list[Choice], plan: Plan) -> None:
    cap = plan.hardware.usable_memory / 2**30
    bottom = [0.0] * len(choices)
    for part in PARTS:
        sizes = [getattr(choice.memory, part) / 2**30 for choice in choices]
        axes.bar(range(len(choices)), sizes, bottom=bottom, color=_COLORS[part], label=part.replace("kv_", "K/V "))
        bottom = [below + size for below, size in zip(bottom, sizes)]
    top = min(1.1 * max(bottom), 2.5 * cap)  # bars that are far from fitting are cut off
    for index, total in enumerate(bottom):
        axes.annotate(
            f"{total:.3g}" if total < 100 else f"{total:,.0f}",
            (index, min(total, 0.94 * top)),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.axhline(cap, color="black", linestyle="--", linewidth=1, label="usable")
    axes.set(ylabel="GiB of a rank", title="predicted memory", ylim=(0, max(top, 1.1 * cap)))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
