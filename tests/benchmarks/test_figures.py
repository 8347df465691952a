"""The pictures of the benchmarks: what they draw of a CSV's rows, and that nothing in them is hidden."""

from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import figures, results
from benchmarks.charts import CHARTS, PREDICTIONS

STEP = {"contestant": "lss", "ranks": "2", "length": "64", "cores": "2", "gradients": "right", "commit": "new"}


def bars(picture: Figure) -> list[Rectangle]:
    return [bar for axes in picture.axes for container in axes.containers for bar in container]


def legend(picture: Figure) -> list[str]:
    return [text.get_text() for text in picture.legends[0].get_texts()]


def dots(picture: Figure) -> list[float]:
    """Heights of all points that are series."""
    lines = [line for axes in picture.axes for line in axes.lines if line.get_label() == "each series"]
    return [float(y) for line in lines for y in line.get_ydata()]


def test_bars_start_at_0_and_have_the_newest_height() -> None:
    rows = [{**STEP, "speed_against_megatron": speed} for speed in ("0.9", "1.1", "1.05")]
    (bar,) = bars(picture := figures.draw("step", rows))
    assert (bar.get_y(), bar.get_height()) == (0, 1.05)
    assert picture.axes[0].get_ylim()[0] == 0
    assert dots(picture) == [0.9, 1.1, 1.05]


def test_what_all_are_compared_with_is_a_line() -> None:
    rows = [{**STEP, "speed_against_megatron": "1.1"}]
    rows.append({**STEP, "contestant": "megatron", "speed_against_megatron": "1.0"})
    picture = figures.draw("step", rows)
    assert len(bars(picture)) == 1
    assert legend(picture) == ["megatron", "lss"]


def test_bars_stand_beside_each_other() -> None:
    names = ["lss", "lss-kept", "ulysses", "ring", "ring-zigzag", "single", "lss-2chunks", "lss-8chunks"]
    rows = [
        {**STEP, "contestant": name, "ranks": ranks, "speed_against_megatron": "1"}
        for name in names
        for ranks in ("2", "8")
    ]
    drawn = sorted(bars(figures.draw("step", rows)), key=Rectangle.get_x)
    assert len(drawn) == 2 * len(names)
    assert all(left.get_x() + left.get_width() <= right.get_x() for left, right in pairwise(drawn))
    assert len({bar.get_facecolor() for bar in drawn}) == len(names)


def test_the_title_says_where_ranks_share_cores() -> None:
    rows = [{**STEP, "ranks": ranks, "speed_against_megatron": "1"} for ranks in ("2", "8", "4")]
    assert figures.draw("step", rows).get_suptitle() == "Training step\n(4 and 8 ranks on 2 cores)"
    assert figures.draw("step", rows[:1]).get_suptitle() == "Training step"


def test_wrong_gradients_are_named_and_hatched() -> None:
    picture = figures.draw("step", [{**STEP, "gradients": "wrong", "speed_against_megatron": "1"}])
    assert legend(picture) == ["megatron", "lss (wrong gradients)"]
    assert bars(picture)[0].get_hatch()


@pytest.mark.parametrize("name", ["step", "memory", "overhead"])
def test_the_legend_hides_nothing(name) -> None:
    picture = figures.draw(name, results.read(name))
    picture.draw_without_rendering()
    box = picture.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in picture.axes)
    assert box.x0 >= 0
    assert box.x1 <= picture.bbox.x1


def test_a_panel_for_each_number_of_heads() -> None:
    rows = [{**STEP, "kv_heads": heads, "bytes_per_layer": str(2**20)} for heads in ("8", "2")]
    assert [axes.get_title() for axes in figures.draw("communication", rows).axes] == [
        "2 key/value heads",
        "8 key/value heads",
    ]


def test_a_prediction_is_drawn_as_last_measured() -> None:
    own = PREDICTIONS["planner_memory"]
    common = {**dict.fromkeys(own.configuration, "same"), own.predicted: str(2.1 * own.unit)}
    rows = [{**common, own.measured: str(real * own.unit), "commit": str(real)} for real in (9.0, 2.0)]
    picture = figures.draw("planner_memory", rows)
    (points,) = (line for line in picture.axes[0].lines if line.get_marker() == "o")
    assert list(points.get_xdata()) == [2.0]
    assert list(points.get_ydata()) == pytest.approx([5.0])
    assert picture.legends[0].get_title().get_text() == "measured at 2.0"


def test_overhead_shows_every_run() -> None:
    row = {"contestant": "lss", "length": "64", "width": "32", "rounds": "8", "seconds": "0.02", "commit": "new"}
    runs = ["0.98", "1.01", "1.03"]
    row |= {"seconds_against_ddp": "1.01", "seconds_against_ddp_by_run": " ".join(runs)}
    picture = figures.draw("overhead", [row, {**row, "contestant": "ddp"}])
    (points,) = (line for line in picture.axes[0].lines if line.get_label() == "each run")
    assert list(points.get_xdata()) == pytest.approx([-2, 1, 3])
    assert len(set(points.get_ydata())) == len(runs)


@pytest.mark.parametrize(("n", "ranks"), [(5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (48, (17, 32))])
def test_an_interval_of_the_median_has_the_tabulated_order_statistics(n, ranks) -> None:
    assert figures.median_interval([float(x) for x in range(n, 0, -1)]) == ranks


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_has_a_picture(tmp_path, name) -> None:
    rows = results.read(name)
    if not rows:  # nothing measured yet
        chart = CHARTS[name]
        columns = [chart.x, chart.y, *chart.series, *chart.panels, "contestant", "commit"]
        rows = [{column: str(2.0**n) for column in columns} for n in range(1, 4)]
    figures.draw(name, rows).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_without_rows_is_empty(name) -> None:
    figures.draw(name, []).draw_without_rendering()
