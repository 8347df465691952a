"""Draw a picture of each figure from its CSV.

Bars start at 0 and stand beside each other, so that none hides another. Where a measurement was repeated, each series
is a dot on the bar of the newest one. The distance between dots is the noise of a difference between two bars.
"""

from collections.abc import Iterable
from math import comb, inf
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import paper, results
from benchmarks.charts import CHARTS, PREDICTIONS, Chart, Prediction, Row

_CYCLE = 10  # colours in matplotlib's default cycle, "C0" to "C9"
_FIRST = ("lss", "lss-kept", "megatron", "ulysses", "ring", "ring-zigzag", "single")  # look alike in every figure
_PANEL_NAMES = {
    "kv_heads": "{:g} key/value heads",
    "length": "L = {:,.0f}",
    "ranks": "S = {:g}",
    "cap_mib": "cap of {:g} MiB a rank",
}
_WRONG = " (wrong gradients)"
_WORDS = {"ranks": "real ranks", "shapes": "on shapes"}  # values of the column measured_on


FIGURES = [*CHARTS, *PREDICTIONS, "overhead", "paper-scaling"]


def draw(name: str, rows: list[Row]) -> Figure:
    """Draw the figure called ``name`` (one of :data:`FIGURES`) from the rows of its CSV, oldest first."""
    if name in PREDICTIONS:
        return _draw_prediction(PREDICTIONS[name], rows)
    if name == "paper-scaling":
        return paper.draw(rows)
    return _draw_overhead(rows) if name == "overhead" else _draw_chart(CHARTS[name], rows)


def save(name: str, folder: Path = results.FOLDER) -> Path:
    """Draw a figure from its CSV into ``folder``."""
    path = folder / f"{name}.png"
    draw(name, results.read(name, folder)).savefig(path, dpi=110)
    return path


def _draw_chart(chart: Chart, rows: list[Row]) -> Figure:
    rows = [row for row in rows if row[chart.x] and row[chart.y]]
    shown = [row for row in rows if row["contestant"] not in (chart.reference, chart.left_out)]
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in shown:
        panels.setdefault(tuple(row[column] for column in chart.panels), []).append(row)
    order = sorted(panels, key=_by_number)
    labels = _labels(chart, shown)
    columns = 3 if len(panels) > 4 else max(len(panels), 1)
    lines = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(max(6.4, 3.8 * columns), 1.2 + 2.8 * lines), layout="constrained")
    # where all panels stand in one line, each is as wide as its bars need
    widths = [len(_newest(chart, panels[key])) + 1 for key in order] if lines == 1 else None
    grid = figure.subplots(
        lines, columns, squeeze=False, sharey=not chart.own_scales, width_ratios=widths or None
    ).ravel()
    for place, (axes, key) in enumerate(zip(grid, order)):
        _draw_bars(axes, chart, panels[key], labels)
        axes.set_title(_panel_title(chart.panels, key), fontsize=9)
        axes.set(xlabel=chart.x_label, ylabel="" if place % columns else chart.y_label)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle("\n".join([chart.title, *(_shared_cores(shown) if chart.timed else [])]))
    if shown:
        _add_legend(figure, [row for panel in panels.values() for row in _newest(chart, panel).values()])
    return figure


def _newest(chart: Chart, rows: list[Row]) -> dict[tuple[str, ...], Row]:
    """Find the newest row of each bar."""
    return {tuple(row[column] for column in (chart.x, *chart.series)): row for row in rows}


def _draw_bars(axes: Axes, chart: Chart, rows: list[Row], labels: dict[tuple[str, ...], str]) -> None:
    """Draw one panel: a group of bars for each x, of the contestants that have a value there."""
    groups = sorted({row[chart.x] for row in rows}, key=float)
    newest = _newest(chart, rows)
    members = [[key for key in labels if (x, *key) in newest] for x in groups]
    width = 0.84 / max(4, *map(len, members))  # a single bar is at most as wide as one of four
    styles = _styles(list(labels.values()))
    for center, (x, bars) in enumerate(zip(groups, members)):
        for place, key in enumerate(bars):
            at = center + (place - (len(bars) - 1) / 2) * width
            heights = [_height(chart, row) for row in rows if (row[chart.x], *_key(chart, row)) == (x, *key)]
            color, hatch = styles[labels[key]]
            axes.bar(at, heights[-1], 0.92 * width, color=color, hatch=hatch, edgecolor="white", label=labels[key])
            if chart.timed and len(heights) > 1:
                axes.plot([at] * len(heights), heights, "k.", markersize=4, alpha=0.6, label="each series")
            _write_height(axes, at, heights[-1], max(heights) if chart.timed else heights[-1])
        if chart.limit is not None:
            best = chart.limit.value(newest[(x, *bars[0])])
            axes.hlines(best, center - 0.46, center + 0.46, "k", "--", linewidth=1, label=chart.limit.label)
    if chart.reference is not None:
        axes.axhline(1.0, color="k", linestyle="--", linewidth=1, label=chart.reference)
    axes.set_xticks(range(len(groups)), [f"{float(x):,.10g}" for x in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.22)


def _write_height(axes: Axes, x: float, height: float, top: float) -> None:
    """Write the height of a bar above its highest dot."""
    box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.4)
    options: dict[str, Any] = dict(rotation=90, ha="center", va="bottom", fontsize=7, bbox=box)
    axes.annotate(f"{height:.3g}", (x, top), (0, 4), "data", "offset points", **options)


def _height(chart: Chart, row: Row) -> float:
    return float(row[chart.y]) / chart.unit


def _key(chart: Chart, row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in chart.series)


def _labels(chart: Chart, rows: list[Row]) -> dict[tuple[str, ...], str]:
    """Name each bar in the order of drawing: its contestant, and the values in which the bars differ."""
    wrong = {row["contestant"] for row in rows if row.get("gradients") == "wrong"}
    keys = {_key(chart, row) for row in rows}
    differ = [len(set(values)) > 1 for values in zip(*keys)]

    def label(key: tuple[str, ...]) -> str:
        parts = [key[0] + _WRONG if key[0] in wrong else key[0]]
        for column, value, differs in zip(chart.series[1:], key[1:], differ[1:]):
            if differs and value:
                parts.append(f"{column.replace('_', ' ')} {value}" if value.isdecimal() else _WORDS.get(value, value))
        return ", ".join(parts)

    ordered = sorted(keys, key=lambda key: (_FIRST.index(key[0]) if key[0] in _FIRST else len(_FIRST), _by_number(key)))
    return {key: label(key) for key in ordered}


def _styles(labels: list[str]) -> dict[str, tuple[str, str | None]]:
    """Choose the colour and hatching of each bar; wrong gradients are hatched."""
    places = {
        label: _FIRST.index(label.removesuffix(_WRONG)) for label in labels if label.removesuffix(_WRONG) in _FIRST
    }
    others = [label for label in labels if label not in places]
    places |= {label: place for place, label in enumerate(others, len(_FIRST) if places else 0)}
    return {label: (f"C{place % _CYCLE}", "///" if label.endswith(_WRONG) else None) for label, place in places.items()}


def _panel_title(columns: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Compose the title of a panel; a model with options is named by these alone, on a line of their own."""
    parts = []
    for column, value in zip(columns, values):
        if column in _PANEL_NAMES:
            parts.append(_PANEL_NAMES[column].format(float(value)))
        elif column == "model":
            parts.append((value.partition(" ")[2] or value) + "\n")
        else:
            parts.append(_WORDS.get(value, value))
    return ", ".join(parts).replace("\n, ", "\n")


def _by_number(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Return a key that sorts 8,192 before 65,536 and words after numbers."""
    return [(float(value), "") if value.isdecimal() else (inf, value) for value in values]


def _shared_cores(rows: list[Row]) -> list[str]:
    """Compose a line such as "4 and 8 ranks on 2 cores", if ranks shared cores."""
    shared: dict[str, set[int]] = {}
    for row in rows:
        timed = not row.get("gpu") and row.get("measured_on", "ranks") == "ranks"
        if timed and row.get("ranks") and row.get("cores") and int(row["ranks"]) > int(row["cores"]):
            shared.setdefault(row["cores"], set()).add(int(row["ranks"]))
    return [f"({' and '.join(map(str, sorted(sizes)))} ranks on {cores} cores)" for cores, sizes in shared.items()]


def _add_legend(figure: Figure, rows: Iterable[Row]) -> None:
    """List every name once below the axes, where it hides nothing, under the commits of the measured ``rows``."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    legend = figure.legend(
        *(handles.values(), handles),
        title=f"measured at {commits}",
        loc="outside lower center",
        ncols=min(len(handles), 5 if figure.get_figwidth() > 8 else 4),
        fontsize=8,
        title_fontsize=7,
        frameon=False,
    )
    legend.get_title().set_color("gray")


def _draw_overhead(rows: list[Row]) -> Figure:
    """Draw the step time of ``lss`` against ``ddp`` on one rank: all runs of a series, their median, the bar of 1 %."""
    shown = [row for row in rows if row["contestant"] == "lss" and row["seconds_against_ddp"]]
    figure = Figure(figsize=(8, 1.8 + 0.7 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="gray", alpha=0.2, linewidth=0, label="within 1 %")
    for place, row in enumerate(shown):
        runs = [100 * (float(ratio) - 1) for ratio in row["seconds_against_ddp_by_run"].split()]
        # in the order of time, from below, so that runs do not hide each other
        heights = [place - 0.35 + 0.7 * (n + 0.5) / len(runs) for n in range(len(runs))]
        axes.plot(runs, heights, "C0.", markersize=5, alpha=0.7, label="each run")
        middle = 100 * (float(row["seconds_against_ddp"]) - 1)
        axes.plot(middle, place, "kD", markersize=5, label="median of all steps" if place == 0 else None)
        if len(runs) > 5:  # fewer runs have no such interval
            low, high = median_interval(runs)
            axes.plot([low, high], [place, place], "k-", linewidth=2, label="95 % interval of the median of the runs")
    names = [
        f"L = {row['length']}, width {row['width']}\n{row['rounds']} steps of {1e3 * float(row['seconds']):.3g} ms, {row['commit']}"
        for row in shown
    ]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.axvline(0, color="k", linestyle="--", linewidth=1)
    axes.set(xlabel="step time of lss against ddp, %", title="Overhead of the strategy on one rank")
    axes.set_xlim(*(sign * max(map(abs, [*axes.get_xlim(), 2.0])) for sign in (-1, 1)))
    if shown:
        _add_legend(figure, shown)
    return figure


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bound the median of the distribution of ``values`` by two of the values (order statistics).

    The k-th smallest of n values lies above the median with the probability that fewer than k of n fair coins show
    heads. Fewer than six values have no interval of 95 %: then the bounds are the smallest and the largest value.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and outside + comb(n, k) / 2**n <= (1 - confidence) / 2:
        outside += comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def _draw_prediction(prediction: Prediction, rows: list[Row]) -> Figure:
    newest = {tuple(row[column] for column in prediction.configuration): row for row in rows}.values()
    measured = [float(row[prediction.measured]) for row in newest]
    errors = [100 * (float(row[prediction.predicted]) / real - 1) for row, real in zip(newest, measured)]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    bar = 100 * prediction.bar
    axes.axhspan(-bar, bar, color="gray", alpha=0.2, linewidth=0, label=f"within {bar:g} %")
    axes.axhline(0, color="k", linestyle="--", linewidth=1)
    label = f"{len(newest)} configurations"
    axes.plot([real / prediction.unit for real in measured], errors, "C0o", markersize=5, alpha=0.6, label=label)
    axes.set(
        xscale="log",
        xlabel=prediction.x_label,
        ylabel="predicted minus measured, % of measured",
        title=prediction.title,
    )
    axes.xaxis.set_major_formatter("{x:,.4g}")
    axes.set_ylim(*(sign * 1.3 * max([bar, *map(abs, errors)]) for sign in (-1, 1)))
    _add_legend(figure, newest)
    return figure
