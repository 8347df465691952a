"""Weak scaling as in the LSS paper (arXiv 2311.02382): the sequence grows with the ranks, LSS against its baseline.

Of the paper only the abstract is taken: 5.6x faster and 10.2x leaner than Nvidia's sequence parallelism on 144 V100s, and
50,112 tokens on 3,456 GPUs at 161 % parallel efficiency and 32 PFLOP/s. 3,456 does not divide 50,112, so not all of those GPUs can
have shared one sequence equally: here they are four sequence groups of 864, which makes 58 tokens a rank at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.planner.hardware import Hardware
from lightning_lss.planner.memory import Memory, rank_memory
from lightning_lss.planner.setup import Options, Setup, unsharded
from lightning_lss.planner.timing import step_time

TOKENS_A_RANK = 58
LARGEST_GROUP = 864
DEVICES = (6, 36, 144, 432, 864, 3456)
COMPARED_AT = 144
FASTER, LEANER, EFFICIENCY, PETAFLOPS = 5.6, 10.2, 1.61, 32.0  # the abstract's


@dataclass(frozen=True)
class Point:
    """One scheme at one number of devices; the rates are per device or of all, the seconds of one sequence."""

    devices: int
    setup: Setup
    memory: Memory
    seconds: float
    petaflops: float


@dataclass(frozen=True)
class WeakScaling:
    """LSS, the same if collectives took no time, the baseline as if heads and widths could be split without limit, and the
    baseline in groups that the heads allow, at growing numbers of devices."""

    hardware: Hardware
    lss: list[Point]
    compute: list[Point]
    baseline: list[Point]
    possible: list[Point]

    def efficiency(self, points: Sequence[Point]) -> list[float]:
        """Operations a second and device, as a fraction of those at the smallest number of devices."""
        rates = [point.petaflops / point.devices for point in points]
        return [rate / rates[0] for rate in rates]

    def ratios(self, points: Sequence[Point], devices: int = COMPARED_AT) -> tuple[float, float, float]:
        """How much longer than LSS, how much more memory, and how much more beside parameters and their like, ``points`` need
        at ``devices``."""
        (own,) = (point for point in self.lss if point.devices == devices)
        (other,) = (point for point in points if point.devices == devices)
        return (
            other.seconds / own.seconds,
            other.memory.total / own.memory.total,
            other.memory.most_work / own.memory.most_work,
        )


def weak_scaling(
    config: TransformerConfig,
    hardware: Hardware,
    options: Options,
    batch_size: int = 1,
    devices: Sequence[int] = DEVICES,
) -> WeakScaling:
    """Predict it; every group trains on ``batch_size`` sequences of 58 tokens for each of its ranks."""
    baseline = unsharded(options)
    free = replace(baseline, fractional_heads=True)

    def point(scheme: str, count: int, group: int, chosen: Options, links: bool = True) -> Point:
        length = TOKENS_A_RANK * min(count, LARGEST_GROUP)
        setup = Setup(config, scheme, count // group, group, length, batch_size, chosen)  # type: ignore[arg-type]
        time = step_time(setup, hardware)
        seconds = time.total - (0 if links else time.exposed)
        sequences = batch_size * setup.data_size
        rate = sequences * config.training_flops(1, length) / seconds / 1e15
        return Point(count, setup, rank_memory(setup), seconds / sequences, rate)

    groups = {count: min(count, LARGEST_GROUP) for count in devices}
    shared = {count: _largest_divisor(count, config) for count in devices}
    return WeakScaling(
        hardware,
        [point("lss", count, groups[count], options) for count in devices],
        [point("lss", count, groups[count], options, links=False) for count in devices],
        [point("megatron", count, groups[count], free) for count in devices],
        [point("megatron", count, shared[count], baseline) for count in devices],
    )


def _largest_divisor(devices: int, config: TransformerConfig) -> int:
    """The largest tensor-parallel group for which heads and hidden width come out even."""
    sizes = (config.num_heads, config.hidden_width, TOKENS_A_RANK * min(devices, LARGEST_GROUP))
    return max(n for n in range(1, config.num_heads + 1) if devices % n == 0 and not any(size % n for size in sizes))


_STYLES = {
    "LSS": ("lss", "#4477aa", "o-"),
    "LSS, if collectives took no time": ("compute", "#66ccee", "o:"),
    "baseline, heads split without limit": ("baseline", "#ee6677", "s--"),
    "baseline, groups that the heads allow": ("possible", "#aa3377", "^:"),
}


def draw_weak_scaling(scaling: WeakScaling) -> Figure:
    """Time, memory, efficiency and throughput over the number of devices, logarithmic."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    time, memory, efficiency, throughput = figure.subplots(2, 2).flat
    for label, (name, color, style) in _STYLES.items():
        points = getattr(scaling, name)
        devices = [point.devices for point in points]
        time.loglog(devices, [point.seconds for point in points], style, color=color, label=label)
        memory.loglog(devices, [point.memory.total / 2**30 for point in points], style, color=color)
        efficiency.semilogx(devices, [100 * x for x in scaling.efficiency(points)], style, color=color)
        throughput.loglog(devices, [point.petaflops for point in points], style, color=color)
    memory.axhline(scaling.hardware.usable_memory / 2**30, color="black", linestyle="--", linewidth=1)
    memory.annotate("usable", (devices[0], scaling.hardware.usable_memory / 2**30), va="bottom", fontsize=8)
    efficiency.axhline(100, color="grey", linewidth=0.8)
    efficiency.plot([devices[-1]], [100 * EFFICIENCY], "k*", markersize=10, label="paper's abstract")
    throughput.plot([devices[-1]], [PETAFLOPS], "k*", markersize=10)
    efficiency.legend(fontsize=8)
    time.legend(fontsize=8)
    for axes, title in (
        (time, "seconds for one sequence"),
        (memory, "GiB of a rank"),
        (efficiency, "operations a second and GPU, % of those at 6 GPUs"),
        (throughput, "PFLOP/s of the model"),
    ):
        _finish(axes, title, scaling)
    figure.suptitle(
        f"Predicted weak scaling on {scaling.hardware.name}: {TOKENS_A_RANK} tokens a rank, groups of up to {LARGEST_GROUP}"
    )
    return figure


def _finish(axes: Axes, title: str, scaling: WeakScaling) -> None:
    devices = [point.devices for point in scaling.lss]
    lengths = [point.setup.seq_len for point in scaling.lss]
    axes.set_title(title, fontsize=10)
    axes.set_xticks(devices, [f"{n:,}\n{length:,}" for n, length in zip(devices, lengths)], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("GPUs, and tokens of a sequence below", fontsize=9)
    axes.grid(alpha=0.3)


def print_weak_scaling(scaling: WeakScaling, console: Console | None = None) -> None:
    """The same as a table, with the ratios at 144 devices."""
    console = console or Console(soft_wrap=True)
    table = Table(title=f"Weak scaling on {scaling.hardware.name}, predicted", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "GPUs", "L", "D", "S", "seconds", "GiB", "work", "PFLOP/s", "efficiency"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, _, _ in _STYLES.values():
        points = getattr(scaling, name)
        for point, efficiency in zip(points, scaling.efficiency(points)):
            setup = point.setup
            sizes = (name, f"{point.devices:,}", f"{setup.seq_len:,}", str(setup.data_size), str(setup.size))
            figures = (
                f"{point.seconds:.4f}",
                f"{point.memory.total / 2**30:.2f}",
                f"{point.memory.most_work / 2**30:.3f}",
            )
            table.add_row(*sizes, *figures, f"{point.petaflops:.3g}", f"{100 * efficiency:.0f} %")
        table.add_section()
    console.print(table)
    console.print(
        "seconds: of one sequence; work: GiB beside parameters, gradients and optimizer state, when it is most."
    )
    console.print(*(f"{name}: {label}." for label, (name, _, _) in _STYLES.items()), sep="\n")
    for label, points in (
        ("heads split without limit", scaling.baseline),
        ("groups that the heads allow", scaling.possible),
    ):
        faster, leaner, work = scaling.ratios(points)
        console.print(
            f"At {COMPARED_AT} GPUs, baseline with {label}: {faster:.1f}x the time, {leaner:.1f}x the memory ({work:.1f}x beside"
            f" parameters and their like). The paper's abstract: {FASTER}x and {LEANER}x."
        )
