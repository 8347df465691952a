"""A plan on the terminal, as CSV, and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_lss.planner.choices import Choice, Plan
from lightning_lss.planner.ledger import PARTS

_NAMES = {"kv_buffers": "K/V"}
_COLORS = dict(zip(PARTS, ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"]))  # Paul Tol's bright scheme


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """A table with a row for each way to train, what it recommends, and how it compares."""
    console = console or Console(soft_wrap=True)
    console.print(_table(plan))
    for line in _remarks(plan):
        console.print(line)


def _table(plan: Plan) -> Table:
    cap = plan.hardware.usable_memory
    title = f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}, memory of a rank in GiB (usable: {cap / 2**30:.1f})"
    table = Table(title=title, header_style="bold")
    names = [_NAMES.get(part, part) for part in PARTS]
    for name in ["scheme", "D", "S", "B", *names, "total", "GiB received", "seconds", "tokens/s", "MFU", "longest L"]:
        table.add_column(name, justify="left" if name == "scheme" else "right", no_wrap=True)
    for choice in plan.choices:
        table.add_row(*_cells(choice), style=_style(choice, plan))
    return table


def _style(choice: Choice, plan: Plan) -> str:
    if choice is plan.recommended:
        return "bold green"
    return "" if choice.fits else "dim"


def _cells(choice: Choice) -> list[str]:
    places = [choice.scheme, str(choice.data_size), str(choice.size), str(choice.batch_size or "")]
    if choice.memory is None or choice.time is None:
        return [*places, "impossible"]
    parts = [f"{getattr(choice.memory, part) / 2**30:.2f}" for part in PARTS]
    total = f"{choice.memory.total / 2**30:.2f}" + ("" if choice.fits else " !")
    rate = f"{choice.tokens_per_second:,.0f}"
    figures = [f"{choice.received / 2**30:.2f}", f"{choice.time.total:.3g}", rate, f"{100 * choice.utilization:.0f} %"]
    return [*places, *parts, total, *figures, f"{choice.longest:,}"]


def _remarks(plan: Plan) -> list[str]:
    lines = []
    if any(choice.memory and not choice.fits for choice in plan.choices):
        lines.append("! does not fit")
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
        f"[bold green]Recommended:[/] strategy={best.scheme} sequence_parallel_size={best.size} (D = {best.data_size}):"
        f" {best.time.total:.3g} s a step, {best.tokens_per_second:,.0f} tokens/s, {100 * best.utilization:.0f} % of the peak."
    )
    return lines + _comparison(plan)


def _comparison(plan: Plan) -> list[str]:
    lss, other = plan.best("lss"), plan.best("megatron")
    if lss is None or other is None:
        return []
    assert lss.memory is not None
    assert other.memory is not None
    return [
        f"Best lss against best megatron: {lss.tokens_per_second / other.tokens_per_second:.2f}x the speed,"
        f" {lss.memory.total / other.memory.total:.2f}x the memory of a rank, {lss.longest / max(1, other.longest):.2f}x the"
        " longest sequence."
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
    colors = ["#228833" if choice is plan.recommended else "#4477aa" if choice.fits else "#bbbbbb" for choice in choices]
    bars = speed.bar(range(len(choices)), [choice.tokens_per_second for choice in choices], color=colors)
    speed.bar_label(bars, [f"{100 * choice.utilization:.0f} %" for choice in choices], fontsize=8)
    speed.set(ylabel="tokens / s", title="predicted speed and model FLOP/s utilization (green: recommended, grey: does not fit)")
    speed.set_xticks(range(len(choices)), [f"{c.scheme}\nD={c.data_size}\nS={c.size}" for c in choices], fontsize=8)
    speed.margins(y=0.12)
    figure.suptitle(f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}")
    return figure


def _draw_memory(axes: Axes, choices: list[Choice], plan: Plan) -> None:
    bottom = [0.0] * len(choices)
    for part in PARTS:
        sizes = [getattr(choice.memory, part) / 2**30 for choice in choices]
        axes.bar(range(len(choices)), sizes, bottom=bottom, color=_COLORS[part], label=_NAMES.get(part, part))
        bottom = [below + size for below, size in zip(bottom, sizes)]
    axes.axhline(plan.hardware.usable_memory / 2**30, color="black", linestyle="--", linewidth=1, label="usable")
    if max(bottom) > 20 * min(bottom):
        axes.set_yscale("symlog", linthresh=plan.hardware.usable_memory / 2**30)
    axes.set(ylabel="GiB of a rank", title="predicted memory")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
