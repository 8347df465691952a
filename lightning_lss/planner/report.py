"""Show a plan on the terminal, as CSV, and as a picture."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_lss.planner.choices import Choice, Impossible, Plan
from lightning_lss.planner.trace import PARTS

_NAMES = dict(zip(PARTS, ["params", "grads", "optim", "acts", "K/V", "logits"]))
# Paul Tol's bright scheme
_COLORS = dict(zip(PARTS, ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"]))


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print two tables with a row for each choice, the recommendation, and a comparison with the baselines."""
    console = console or Console(soft_wrap=True)
    for part in (_memory_table(plan), _speed_table(plan), *_remarks(plan)):
        console.print(part)


def _memory_table(plan: Plan) -> Table:
    small = max(choice.memory.total for choice in plan.choices) < 2**30
    unit, size = ("MiB", 2**20) if small else ("GiB", 2**30)
    cap = f"{plan.hardware.usable_memory / size:,.1f} {unit} usable"
    title = f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}: {unit} of a rank at its peak ({cap})"
    table = _table(title, "B", *_NAMES.values(), "total", "fits")
    for choice in plan.choices:
        sizes = [value / size for value in (*(choice.memory.most[part] for part in PARTS), choice.memory.total)]
        cells = (f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in sizes)
        _add(table, plan, choice, str(choice.batch_size), *cells, "yes" if choice.fits else "no")
    return table


def _speed_table(plan: Plan) -> Table:
    short = EngFormatter(places=1, sep="")  # 85.5k
    title = "a step, estimated: GiB that a rank receives, seconds"
    table = _table(title, "received", "time", "not hidden", "tokens/s", "MFU", "longest L")
    for choice in plan.choices:
        time = choice.time
        cells = (f"{time.received / 2**30:.3g}", f"{time.total:.3g}", f"{100 * time.exposed / time.total:.0f} %")
        speed = (short(choice.tokens_per_second), f"{100 * choice.utilization:.0f} %")
        _add(table, plan, choice, *cells, *speed, f"{choice.longest:,}")
    return table


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
        "Memory: each part has its own peak; total is the highest sum of all parts at one moment.",
        '"not hidden": share of a step that a rank waits for others. All times are estimates; see docs/planner.md.',
    ]
    if plan.impossible:
        first, *others = plan.impossible
        more = f" ({len(others)} more like it)" if others else ""
        lines.append(f"impossible: {first.scheme} with D={first.data_size}, S={first.size}: {first.reason}{more}")
    best = plan.recommended
    if best is None:
        longest = max(plan.choices, key=lambda choice: choice.longest)
        lines.append(
            f"[bold red]Nothing fits.[/] The longest sequence that would fit has {longest.longest:,} tokens ({longest.scheme},"
            f" D={longest.data_size}, S={longest.size}); or use more devices, activation_checkpointing or sharding."
        )
        return lines
    lines.append(
        f"[bold green]Recommended:[/] strategy={_strategy(best, plan)} sequence_parallel_size={best.size} (D = {best.data_size}):"
        f" an estimated {best.time.total:.3g} s a step, {best.tokens_per_second:,.0f} tokens/s,"
        f" {100 * best.utilization:.0f} % of the peak."
    )
    return lines + _comparison(plan)


def _strategy(choice: Choice, plan: Plan) -> str:
    """Return the value of ``strategy=`` that runs a choice."""
    sharding = plan.options.sharding
    if sharding is None or choice.scheme != "lss":
        return choice.scheme
    return "lss_fsdp" if sharding == "fsdp" else f"lss_fsdp strategy.sharding={sharding}"


def _comparison(plan: Plan) -> list[str]:
    schemes = dict.fromkeys(choice.scheme for choice in plan.choices)
    longest = {scheme: max(x.longest for x in plan.choices if x.scheme == scheme) for scheme in schemes}
    lengths = ", ".join(f"{tokens:,} tokens ({scheme})" for scheme, tokens in longest.items())
    lines = []
    own = plan.best("lss")
    for scheme in schemes:
        other = plan.best(scheme)
        if scheme != "lss" and own is not None and other is not None:
            lines.append(
                f"Best lss against best {scheme}: {own.tokens_per_second / other.tokens_per_second:.2f}x the estimated speed,"
                f" {own.memory.total / other.memory.total:.2f}x the memory of a rank."
            )
    return [*lines, f"The longest sequence of any D and S: {lengths}."]


def write_csv(plan: Plan, path: str | Path) -> None:
    """Write a row for each choice, possible or not, in bytes and seconds."""
    rows = [_row(choice, plan) for choice in plan.choices]
    rows += [_key(x, plan) | {"impossible": x.reason} for x in plan.impossible]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "impossible"], restval="")
        writer.writeheader()
        writer.writerows(rows)


def _key(choice: Choice | Impossible, plan: Plan) -> dict[str, Any]:
    return {"scheme": choice.scheme, "D": choice.data_size, "S": choice.size, "seq_len": plan.seq_len}


def _row(choice: Choice, plan: Plan) -> dict[str, Any]:
    row = _key(choice, plan) | {"batch_size": choice.batch_size, "fits": choice.fits, "longest": choice.longest}
    row |= {f"{part}_bytes": round(getattr(choice.memory, part)) for part in PARTS}
    row |= {"total_bytes": round(choice.memory.total)}
    row |= {f"most_{part}_bytes": round(size) for part, size in choice.memory.most.items()}
    seconds = {name: value for name, value in vars(choice.time).items() if name != "received"}
    row |= {"received_bytes": round(choice.time.received)} | {f"{name}_seconds": x for name, x in seconds.items()}
    row |= {"step_seconds": choice.time.total, "tokens_per_second": choice.tokens_per_second}
    return row | {"utilization": choice.utilization}


def draw_plan(plan: Plan) -> Figure:
    """Draw memory by part, and tokens a second, of each choice."""
    choices, places = plan.choices, range(len(plan.choices))
    figure = Figure(figsize=(max(8.0, 1.5 + 0.75 * len(choices)), 7.0), layout="constrained")
    memory, speed = figure.subplots(2, 1, sharex=True)
    _draw_memory(memory, plan)
    colors = ["#228833" if x is plan.recommended else "#4477aa" if x.fits else "#bbbbbb" for x in choices]
    bars = speed.bar(places, [choice.tokens_per_second for choice in choices], color=colors)
    speed.bar_label(bars, [f"{100 * choice.utilization:.0f} %" for choice in choices], fontsize=8)
    title = "estimated speed and model FLOP/s utilization (green: recommended, grey: does not fit)"
    speed.set(ylabel="tokens / s", title=title)
    speed.set_xticks(places, [f"{c.scheme}\nD={c.data_size}\nS={c.size}" for c in choices], fontsize=8)
    speed.margins(y=0.12)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(f"{plan.devices} x {plan.hardware.name}, L = {plan.seq_len:,}")
    return figure


def _draw_memory(axes: Axes, plan: Plan) -> None:
    cap, places = plan.hardware.usable_memory / 2**30, range(len(plan.choices))
    bottom = [0.0] * len(plan.choices)
    for part in PARTS:
        sizes = [getattr(choice.memory, part) / 2**30 for choice in plan.choices]
        axes.bar(places, sizes, bottom=bottom, color=_COLORS[part], label=part.replace("kv_", "K/V "))
        bottom = [below + size for below, size in zip(bottom, sizes)]
    top = min(1.1 * max(bottom), 2.5 * cap)  # bars that are far from fitting are cut off
    for place, total in enumerate(bottom):
        text, height = f"{total:.3g}" if total < 100 else f"{total:,.0f}", min(total, 0.94 * top)
        axes.annotate(text, (place, height), ha="center", va="bottom", fontsize=8)
    axes.axhline(cap, color="black", linestyle="--", linewidth=1, label="usable")
    axes.set(ylabel="GiB of a rank", title="predicted memory", ylim=(0, max(top, 1.1 * cap)))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
