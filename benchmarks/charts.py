"""Describe each picture: the columns of a CSV that it shows, and their labels. :mod:`benchmarks.figures` draws it."""

from collections.abc import Callable
from typing import NamedTuple

Row = dict[str, str]


class Limit(NamedTuple):
    """The best value that a bar could reach, drawn as a short line over each group of bars."""

    value: Callable[[Row], float]
    label: str


class Chart(NamedTuple):
    """Groups of bars of ``y`` at each ``x``, one bar for each combination of the ``series`` columns.

    Args:
        title: title of the picture.
        x: column of the groups; ``x_label`` is its label.
        y: column of the heights, divided by ``unit``; ``y_label`` is its label.
        series: columns that tell bars of one group apart.
        panels: columns whose combinations of values have their own axes.
        reference: the contestant of the comparison; it has a line at 1 instead of bars of height 1.
        left_out: a contestant without bars.
        limit: the ideal.
        timed: whether ``y`` comes from a clock. Then repeated series are dots, and the title names shared cores.
        own_scales: whether panels show different quantities, each on a scale of its own.
    """

    title: str
    x: str
    x_label: str
    y: str
    y_label: str
    series: tuple[str, ...] = ("contestant",)
    panels: tuple[str, ...] = ()
    unit: float = 1.0
    reference: str | None = None
    left_out: str | None = None
    limit: Limit | None = None
    timed: bool = True
    own_scales: bool = False


CHARTS = {
    "attention": Chart(
        "Attention alone, forward and backward",
        x="ranks",
        x_label="ranks S",
        y="fraction_of_ideal",
        y_label="speed, fraction of S times one process",
        panels=("length",),
        left_out="single",
        limit=Limit(lambda row: min(1.0, int(row["cores"]) / int(row["ranks"])), "most that the cores allow"),
    ),
    "step": Chart(
        "Training step",
        x="ranks",
        x_label="ranks S",
        y="speed_against_megatron",
        y_label="speed, multiples of megatron",
        panels=("length",),
        reference="megatron",
    ),
    "models": Chart(
        "Training step of models as they are, against our own of the same sizes",
        x="ranks",
        x_label="ranks S",
        y="seconds_against_lss",
        y_label="seconds, multiples of lss",
        panels=("length",),
        reference="lss",
    ),
    "strong-scaling": Chart(
        "Strong scaling: training steps on the same sequence",
        x="ranks",
        x_label="ranks S",
        y="tokens_per_second",
        y_label="tokens per second, all ranks",
        panels=("length",),
    ),
    "weak-scaling": Chart(
        "Weak scaling: training steps on a sequence that grows with S",
        x="ranks",
        x_label="ranks S",
        y="flops_per_second",
        y_label="model GFLOP/s, all ranks",
        unit=1e9,
    ),
    "slow-network": Chart(
        "Training step over links of limited rate",
        x="megabits",
        x_label="rate of each rank's link, Mbit/s",
        y="speed_against_megatron",
        y_label="speed, multiples of megatron",
        panels=("kv_heads",),
        reference="megatron",
    ),
    "communication": Chart(
        "What a rank receives for one layer, forward and backward",
        x="ranks",
        x_label="ranks S",
        y="bytes_per_layer",
        y_label="MiB received",
        panels=("kv_heads",),
        unit=2**20,
        timed=False,
    ),
    "memory": Chart(
        "Peak activation memory of a rank",
        x="ranks",
        x_label="ranks S",
        y="activations_against_single",
        y_label="fraction of one process",
        panels=("model", "length", "measured_on"),
        left_out="single",
        limit=Limit(lambda row: 1 / int(row["ranks"]), "1 / S"),
        timed=False,
    ),
    "longest": Chart(
        "Longest sequence under a cap of activation memory",
        x="ranks",
        x_label="ranks S",
        y="longest",
        y_label="thousand tokens",
        panels=("cap_mib",),
        unit=1e3,
        limit=Limit(
            lambda row: float(row["longest"]) / float(row["longest_against_single"]) * int(row["ranks"]) / 1e3,
            "S times one process",
        ),
        timed=False,
    ),
    "loss": Chart(
        "Peak memory of the loss, forward and backward",
        x="tokens",
        x_label="tokens",
        y="peak_mib",
        y_label="GiB",
        series=("contestant", "measured_on"),
        unit=2**10,
        timed=False,
    ),
    "masks": Chart(
        "Masks: even work, keys that are received, speed and planning",
        x="ranks",
        x_label="ranks S",
        y="value",
        y_label="",
        panels=("check", "mask"),
        limit=Limit(lambda row: float(row["bar"]), "bar to reach"),
        own_scales=True,
    ),
    "gpu": Chart(
        "One rank's attention on a GPU",
        x="length",
        x_label="sequence length L",
        y="fraction_of_plain",
        y_label="speed by query-key pair, fraction of plain attention",
        series=("contestant", "kernel", "head_chunks"),
        panels=("figure", "ranks"),
    ),
}


class Prediction(NamedTuple):
    """Errors of ``predicted`` against ``measured``, in percent, for the newest row of each ``configuration``.

    The horizontal axis is the measured value, divided by ``unit``; ``bar`` is the largest accepted error.
    """

    configuration: tuple[str, ...]
    measured: str
    predicted: str
    title: str
    x_label: str
    unit: float
    bar: float


PREDICTIONS = {
    "planner_memory": Prediction(
        configuration=("what",),
        measured="measured_bytes",
        predicted="predicted_bytes",
        title="The planner's memory of a rank",
        x_label="measured, MiB",
        unit=2**20,
        bar=0.10,
    ),
}
