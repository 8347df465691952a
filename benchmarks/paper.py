"""Predict the weak scaling of the LSS paper (arXiv 2311.02382), where the sequence grows with the ranks.

python -m benchmarks paper-scaling                  # --set keep_gathered=True, --sharding fsdp, --batch-size 8

The figures of the paper's abstract: 5.6x faster and 10.2x leaner than Nvidia's sequence parallelism on 144 V100s,
and 50,112 tokens on 3,456 GPUs at 161 % parallel efficiency and 32 PFLOP/s. 3,456 does not divide 50,112, so not all of
those GPUs can have shared one sequence equally. Here they are four sequence groups of 864, with 58 tokens a rank at
every size.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.training import model_options
from lightning_lss import LSSTransformer
from lightning_lss.megatron import MegatronScheme
from lightning_lss.planner import Hardware, Options, load_hardware
from lightning_lss.planner.memory import memory_of, moments_of
from lightning_lss.planner.timing import Grid, step_time
from lightning_lss.planner.trace import Trace
from lightning_lss.planner.traces import Traces

V100 = Path(__file__).parents[1] / "conf" / "hardware" / "v100.yaml"
TOKENS_A_RANK, LARGEST_GROUP, COMPARED_AT = 58, 864, 144
DEVICES = (6, 36, 144, 432, 864, 3456)
TRACED = (2, 4, 8)  # ranks to trace the baseline for: its 8 heads can be divided evenly among them
PAPER = {"efficiency": 1.61, "petaflops": 32.0}  # of the abstract, on 3,456 GPUs

SCHEMES = {
    "lss": "LSS",
    "lss, collectives free": "LSS, if collectives took no time",
    "baseline without limit": "baseline, heads split without limit",
    "baseline": "baseline, groups that the heads allow",
}


def without_limit(traces: Sequence[Trace], size: int) -> Trace:
    """Predict the baseline's step on ``size`` ranks as if heads could be divided among any number of them. At a fixed
    local length, all that a rank holds, sends and computes is a sum of shares of the model (1 / S), of its own tokens
    (1), and of all tokens (S)."""
    basis = np.array([[1, n, 1 / n] for n in TRACED])
    weights = np.array([1, size, 1 / size]) @ np.linalg.inv(basis)
    names = [field.name for field in fields(Trace)]
    first = traces[0]
    return Trace(
        **{
            name: getattr(first, name)
            if name in ("kinds", "stages")
            else sum(weight * getattr(trace, name) for weight, trace in zip(weights, traces))
            for name in names
        }
    )


@dataclass(frozen=True)
class Study:
    """A comparison: ``batch_size`` sequences a group, on ``hardware``."""

    lss: Traces
    baseline: Traces
    batch_size: int
    hardware: Hardware

    def row(self, scheme: str, devices: int) -> dict[str, Any]:
        """Predict one scheme at one number of devices; seconds are those of one sequence."""
        length = TOKENS_A_RANK * min(devices, LARGEST_GROUP)
        own, size = scheme.startswith("lss"), min(devices, LARGEST_GROUP)
        if own:
            trace = self.lss.at(size, length, self.batch_size)
        elif scheme == "baseline":
            size = max(n for n in TRACED if devices % n == 0)
            trace = self.baseline.at(size, length, self.batch_size)
        else:
            trace = without_limit([self.baseline.at(n, TOKENS_A_RANK * n, self.batch_size) for n in TRACED], size)
        options, grid = self.lss.options, Grid(devices // size, size, self.hardware)
        shards = options.shards(grid.data_size, size) if own else 1
        time = step_time(trace, options, grid, shards, shared="world" if own else "data")
        memory = memory_of(moments_of(trace, shards, ddp=own))
        seconds = time.total - (time.exposed if scheme.endswith("free") else 0)
        sequences = self.batch_size * grid.data_size
        flops = 3 * self.lss.at(1, length, 1).work[0, :2].sum()
        return {
            "scheme": scheme,
            "devices": devices,
            "length": length,
            "data_size": grid.data_size,
            "size": size,
            "batch_size": self.batch_size,
            "seconds": seconds / sequences,
            "total_bytes": round(memory.total),
            "beside_state_bytes": round(memory.beside_state),
            "petaflops": sequences * flops / seconds / 1e15,
        }


def run(args: Namespace) -> list[dict[str, Any]]:
    """Predict the weak scaling of the LSS paper from traces."""
    sizes = {**model_options("enwik8-small"), **dict(args.set)}
    with torch.device("meta"):
        module = LSSTransformer(**sizes, seq_len=TOKENS_A_RANK * 2)
    batch = {key: torch.zeros(1, TOKENS_A_RANK * 2, dtype=torch.int64) for key in ("inputs", "targets")}
    hardware, options = load_hardware(V100), Options("32-true", sharding=args.sharding)
    lss, baseline = (Traces(module, batch, options, hardware.kernel, scheme) for scheme in (None, MegatronScheme()))
    study = Study(lss, baseline, args.batch_size, hardware)
    rows = [study.row(scheme, devices) for scheme in SCHEMES for devices in args.devices]
    for row in rows:
        first = next(x for x in rows if x["scheme"] == row["scheme"])
        row["efficiency"] = row["petaflops"] / row["devices"] / (first["petaflops"] / first["devices"])
        row["setting"] = " ".join(
            [*(f"{name}={x}" for name, x in args.set), *([args.sharding] if args.sharding else [])]
        )
    for name in ("baseline without limit", "baseline"):
        tell_ratios(rows, name)
    return rows


def tell_ratios(rows: list[dict[str, Any]], name: str) -> None:
    """Print the time and memory of the baseline called ``name`` at 144 devices, as multiples of those of LSS."""
    found = {row["scheme"]: row for row in rows if row["devices"] == COMPARED_AT}
    if found:
        own, other = found["lss"], found[name]
        columns = ("seconds", "total_bytes", "beside_state_bytes")
        time, memory, work = (other[column] / own[column] for column in columns)
        print(
            f"At {COMPARED_AT} GPUs, {SCHEMES[name]}: {time:.1f}x the time, {memory:.1f}x the memory ({work:.1f}x beside parameters,"
            " gradients and optimizer state). The paper's abstract: 5.6x and 10.2x."
        )


def draw(rows: list[dict[str, str]]) -> Figure:
    """Draw time, memory, efficiency and throughput over the number of GPUs, of the newest run."""
    newest = [row for row in rows if row["date"] == rows[-1]["date"]]
    devices = sorted({int(row["devices"]) for row in newest})
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = {
        "seconds": ("seconds of one sequence", 1.0),
        "total_bytes": ("memory of a rank, GiB", 2**30),
        "efficiency": ("operations a second and GPU, % of those at 6", 0.01),
        "petaflops": ("PFLOP/s of the model", 1.0),
    }
    for axes, (column, (label, unit)) in zip(figure.subplots(2, 2).flat, panels.items()):
        for (scheme, words), style in zip(SCHEMES.items(), ("o-", "o:", "s--", "^:")):
            points = [row for row in newest if row["scheme"] == scheme]
            places, heights = ([float(row[x]) for row in points] for x in ("devices", column))
            axes.plot(places, [height / unit for height in heights], style, label=words)
        if column in PAPER:
            axes.plot([DEVICES[-1]], [PAPER[column] / unit], "k*", markersize=10, label="paper's abstract")
        scale = "linear" if column == "efficiency" or not newest else "log"
        axes.set(xscale="log" if newest else "linear", yscale=scale, xlabel="GPUs", ylabel=label)
        axes.set_xticks(devices, [f"{n:,}" for n in devices], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Weak scaling on V100, predicted: {TOKENS_A_RANK} tokens a rank, groups of up to {LARGEST_GROUP}")
    return figure
