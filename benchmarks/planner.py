"""Compare the planner's memory of a rank with torch's memory tracker, under the real Trainer on real ranks.

python -m benchmarks planner
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from benchmarks import figures, results
from benchmarks.memory import TrackedStep
from benchmarks.own_modules import GPT, ByteModel
from lightning_lss import LSSStrategy, LSSTransformer
from lightning_lss.planner import Hardware, Link, plan
from lightning_lss.testing.world import World

# only the kernel affects memory
CPU = Hardware(
    "CPU",
    1e10,
    1e10,
    {"float32": 1e11, "bfloat16": 1e11},
    Link(1e9, 1e-4),
    Link(1e9, 1e-4),
    64,
    1.0,
    1.0,
    kernel="cpu_flash",
)
STEPS = 4  # DDP arranges its buckets in the first two


@dataclass(frozen=True)
class Case:
    """A module and its training; a function at the top level of a module builds it, so that ranks can too.

    Args:
        what: name of the row.
        size: ranks S.
        length: global sequence length L.
        build: function that builds the module from ``model``.
        model: arguments of ``build``.
        strategy: arguments of :class:`~lightning_lss.LSSStrategy`; ``size`` 1 trains without one.
        precision: Lightning's name of the precision.
        pair: whether a batch is a pair instead of a dict.
    """

    what: str
    size: int
    length: int
    model: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    build: Callable[..., pl.LightningModule] = LSSTransformer
    pair: bool = False

    def samples(self, number: int) -> list[Any]:
        """Draw random tokens and their successors."""
        tokens = torch.randint(256, (self.length + 1,), generator=torch.Generator().manual_seed(1))
        pair = (tokens[:-1], tokens[1:])
        return [pair if self.pair else dict(zip(("inputs", "targets"), pair))] * number

    def module(self) -> pl.LightningModule:
        """Build the module."""
        return self.build(**self.model)


def transformer(what: str, size: int, length: int, strategy: dict[str, Any] | None = None, **options: Any) -> Case:
    """Return a case of LSSTransformer with three layers, changed by ``options``."""
    precision = options.pop("precision", "32-true")
    sizes = {"seq_len": length, "width": 256, "num_layers": 3, "num_heads": 4, "positions": "rotary", **options}
    return Case(what, size, length, sizes, strategy or {}, precision)


CASES = [
    transformer("single", 1, 4096),
    transformer("zigzag", 4, 4096),
    transformer("contiguous, learned positions", 4, 4096, {"layout": "contiguous"}, positions="learned"),
    transformer("mostly parameters", 2, 256, width=512, num_heads=8),
    transformer("full checkpointing", 4, 4096, {"activation_checkpointing": "full"}, num_layers=6),
    transformer(
        "selective checkpointing, MLP in tiles",
        4,
        4096,
        {"activation_checkpointing": "selective", "mlp_tiles": 4},
        num_layers=6,
        mlp_width=2048,
    ),
    transformer("keep_gathered", 4, 4096, keep_gathered=True),
    transformer("4 head chunks", 2, 8192, head_chunks=4),
    transformer("8,192 tokens", 2, 4096, vocab_size=8192),
    transformer("dropout, swiglu, 2 of 8 heads", 4, 4096, mlp="swiglu", num_heads=8, num_kv_heads=2, dropout=0.1),
    transformer("bf16-mixed", 2, 4096, precision="bf16-mixed"),
    transformer("fsdp", 4, 2048, {"sharding": "fsdp"}, num_layers=6),
    Case("own module: ByteModel", 4, 4096, {}, build=ByteModel),
    Case(
        "own module: GPT", 2, 4096, {"num_positions": 4096}, {"activation_checkpointing": "full"}, build=GPT, pair=True
    ),
]


def track(rank: int, case: Case) -> int:
    """Measure the bytes at the peak of the last of a few steps on this rank."""
    tracked = TrackedStep(STEPS - 1)
    strategy: Any = "auto"
    if case.size > 1:
        strategy = LSSStrategy(case.size, cluster_environment=LightningEnvironment(), verify=False, **case.strategy)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.size,
        strategy=strategy,
        precision=case.precision,  # type: ignore[arg-type]
        callbacks=[tracked],
        max_steps=STEPS,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(case.module(), DataLoader(case.samples(STEPS), batch_size=1))
    return tracked.tracker.peak().total


def predict(case: Case) -> float:
    """Predict the bytes with the planner."""
    (batch,) = DataLoader(case.samples(1), batch_size=1)
    planned = plan(case.module(), batch, case.size, CPU, precision=case.precision, **case.strategy)
    (choice,) = (choice for choice in planned.choices if choice.size == case.size)
    return choice.memory.total


def compare(world: World, case: Case) -> dict[str, Any]:
    """Measure a case, and predict it."""
    measured, predicted = max(world.run(case.size, track, case, group=case.size > 1)), predict(case)
    error = predicted / measured - 1
    print(
        f"{case.what:40} S {case.size} L {case.length:6,} {measured / 2**20:8,.1f} {predicted / 2**20:8,.1f} MiB"
        f" {100 * error:+6.1f} %",
        flush=True,
    )
    return {
        "what": case.what,
        "size": case.size,
        "length": case.length,
        "module": case.build.__name__,
        "model": case.model,
        "strategy": case.strategy,
        "precision": case.precision,
        "measured_bytes": measured,
        "predicted_bytes": round(predicted),
        "error": round(error, 4),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`run`."""
    parser.add_argument("--quick", action="store_true", help="one configuration, for a smoke test; no figure")
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the CSV")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the planner's memory of a rank with torch's memory tracker on real ranks."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    cases = CASES[1:2] if args.quick else CASES
    with World(max(case.size for case in cases), timeout=600) as world:
        rows = [compare(world, case) for case in cases]
    print(f"worst error {100 * max(abs(row['error']) for row in rows):.1f} % of {len(rows)}")
    print(f"{results.append('planner_memory', rows, args.output)}\n{figures.save('planner_memory', args.output)}")
    return []
