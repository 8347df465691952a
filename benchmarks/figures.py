"""A picture of each figure, drawn from its CSV."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results

_COLORS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000"]  # Paul Tol's bright
_MARKS = "osD^vPX*"
_LINES = ["-", "--", "-.", ":"]


class Chart(NamedTuple):
    """Lines of ``y`` over ``x``, one for each combination of the ``series`` columns, of which the first has a colour for
    each of its values. Each combination of the ``panels`` columns has axes of its own."""

    x: str
    y: str
    title: str
    series: tuple[str, ...] = ("contestant",)
    ideal: float | None = None  # a line to compare with
    logarithmic: bool = False
    panels: tuple[str, ...] = ()


CHARTS = {
    "attention": Chart(
        "ranks", "fraction_of_ideal", "attention alone: fraction of the ideal", ("contestant", "length"), ideal=1.0
    ),
    "step": Chart(
        "ranks", "speed_against_megatron", "training step: speed against megatron", ("contestant", "length"), ideal=1.0
    ),
    "strong-scaling": Chart(
        "ranks", "tokens_per_second", "strong scaling: the same sequence on more ranks", ("contestant", "length")
    ),
    "weak-scaling": Chart("ranks", "flops_per_second", "weak scaling: the sequence grows with the ranks"),
    "slow-network": Chart(
        "megabits",
        "speed_against_megatron",
        "step over limited links: speed against megatron",
        ideal=1.0,
        panels=("kv_heads",),
    ),
    "overhead": Chart("length", "seconds_against_ddp", "overhead of the strategy on one rank: step time", ideal=1.0),
    "communication": Chart(
        "ranks", "bytes_per_layer", "bytes that a rank receives per layer", logarithmic=True, panels=("kv_heads",)
    ),
    "memory": Chart(
        "ranks",
        "activations_mib",
        "peak activation memory of a rank, MiB",
        logarithmic=True,
        panels=("model", "length"),
    ),
    "longest": Chart("ranks", "longest", "longest sequence under a cap of activation memory", logarithmic=True),
    "loss": Chart(
        "tokens", "peak_mib", "peak memory of the loss, MiB", ("contestant", "measured_on"), logarithmic=True
    ),
    "gpu": Chart(
        "length",
        "fraction_of_plain",
        "one rank's attention on a GPU: fraction of the plain kernel's speed",
        ("figure", "contestant", "ranks", "kernel"),
        ideal=1.0,
    ),
}


class Prediction(NamedTuple):
    """Points of ``predicted`` over ``measured``, the newest of each ``configuration``, with the line of equality and the
    bar on either side of it."""

    configuration: tuple[str, ...]
    measured: str
    predicted: str
    title: str
    bar: float


PREDICTIONS = {
    "planner_memory": Prediction(
        ("what",), "measured_bytes", "predicted_bytes", "the planner's memory of a rank, bytes", 0.10
    ),
    "planner_time": Prediction(
        ("model", "size", "length"), "measured_seconds", "predicted_seconds", "the planner's seconds of a step", 0.25
    ),
}


def draw(name: str, rows: list[dict[str, str]]) -> Figure:
    """The figure called ``name`` from the rows of its CSV."""
    if name in PREDICTIONS:
        return _draw_prediction(PREDICTIONS[name], rows)
    return _draw_chart(CHARTS[name], rows)


def _draw_prediction(prediction: Prediction, rows: list[dict[str, str]]) -> Figure:
    newest = {tuple(row[column] for column in prediction.configuration): row for row in rows}.values()
    measured, predicted = (
        [float(row[column]) for row in newest] for column in (prediction.measured, prediction.predicted)
    )
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    span = [min(measured) / 1.5, max(measured) * 1.5]
    axes.plot(span, span, color="gray", linestyle=":", linewidth=1)
    low, high = ([factor * x for x in span] for factor in (1 - prediction.bar, 1 + prediction.bar))
    axes.fill_between(span, low, high, color="gray", alpha=0.2, linewidth=0, label=f"within {prediction.bar:.0%}")
    axes.plot(measured, predicted, "o", color=_COLORS[0], markersize=4, label=f"{len(newest)} configurations")
    axes.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted", title=prediction.title)
    axes.legend(fontsize=8)
    _sign(figure, newest)
    return figure


def _draw_chart(chart: Chart, rows: list[dict[str, str]]) -> Figure:
    """The newest point of every series at every ``x``."""
    newest: dict[tuple[str, ...], dict[tuple[str, ...], dict[float, dict[str, str]]]] = {}
    for row in rows:
        if row[chart.x] and row[chart.y]:
            panel, key = (tuple(row[column] for column in columns) for columns in (chart.panels, chart.series))
            newest.setdefault(panel, {}).setdefault(key, {})[float(row[chart.x])] = row
    shown = [row for lines in newest.values() for own in lines.values() for row in own.values()]
    styles, labels = _styles(chart, shown), _labels(chart, shown)
    ticks = sorted({float(row[chart.x]) for row in shown})
    down, across = -(-len(newest) // 2) or 1, min(len(newest), 2) or 1
    size = (4.4 * across, 2.2 * down + (2 if down == 1 else 1)) if chart.panels else (6.4, 4.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, panel in zip(grid, sorted(newest, key=_by_number)):
        for key, own in sorted(newest[panel].items()):
            xs = sorted(own)
            axes.plot(xs, [float(own[x][chart.y]) for x in xs], label=labels[key], **styles[key])
        named = (
            f"{column.replace('_', ' ')} {value}" if value.isdecimal() else value
            for column, value in zip(chart.panels, panel)
        )
        axes.set_title(", ".join(named), fontsize=7)
    for axes in grid[: len(newest) or 1]:
        _lay_out(axes, chart, ticks)
    for axes in grid[len(newest) or 1 :]:
        axes.set_axis_off()
    figure.suptitle(chart.title)
    if shown:
        _add_legend(figure, apart=bool(chart.panels))
        _sign(figure, shown)
    return figure


def _by_number(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """To sort 8,192 before 65,536 and words after numbers."""
    return [(float(value), "") if value.isdecimal() else (inf, value) for value in values]


def _add_legend(figure: Figure, apart: bool) -> None:
    """Every name once: below the panels, or within the only axes."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if apart:
        figure.legend(handles.values(), handles, loc="outside lower left", ncols=4, fontsize=8)
    else:
        figure.axes[0].legend(handles.values(), handles, fontsize=8)


def _lay_out(axes: Axes, chart: Chart, ticks: list[float]) -> None:
    if chart.ideal is not None:
        axes.axhline(chart.ideal, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    if chart.logarithmic:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.7g}")
    axes.set(xlabel=chart.x.replace("_", " "), ylabel=chart.y.replace("_", " "))
    axes.label_outer()


def _styles(chart: Chart, rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Of each series: a colour for its contestant, a line and a mark for the rest."""
    series = {tuple(row[column] for column in chart.series) for row in rows}
    names, variants = sorted({key[0] for key in series}), sorted({key[1:] for key in series})
    styles = {}
    for key in series:
        name, variant = names.index(key[0]), variants.index(key[1:])
        styles[key] = dict(
            color=_COLORS[name % len(_COLORS)],
            marker=_MARKS[(name + 3 * variant) % len(_MARKS)],
            linestyle=_LINES[variant % len(_LINES)],
        )
    return styles


def _labels(chart: Chart, rows: list[dict[str, str]]) -> dict[tuple[str, ...], str]:
    """Of each series: the contestant, and of the other columns what not all series have in common."""
    series = {tuple(row[column] for column in chart.series) for row in rows}
    wrong = {row["contestant"] for row in rows if row.get("gradients") == "wrong"}
    same = {column for column, values in zip(chart.series, zip(*series)) if len(set(values)) == 1}
    return {key: _label(key, chart.series, same, wrong) for key in series}


def _sign(figure: Figure, rows: Iterable[dict[str, str]]) -> None:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    figure.supxlabel(f"measured at {commits}", fontsize=6, color="gray", x=0.99, ha="right")


def _label(key: tuple[str, ...], series: tuple[str, ...], same: set[str], wrong: set[str]) -> str:
    name = f"{key[0]} (wrong gradients)" if key[0] in wrong else key[0]
    own = [(column, value) for column, value in zip(series[1:], key[1:]) if column not in same]
    return ", ".join([name, *(f"{column.replace('_', ' ')} {value}" for column, value in own)])


def save(name: str, folder: Path = results.FOLDER) -> Path:
    """Draw a figure from its CSV into ``folder``."""
    path = folder / f"{name}.png"
    draw(name, results.read(name, folder)).savefig(path, dpi=110)
    return path
