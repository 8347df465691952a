"""The planner's predictions against measurements: memory of a rank, and seconds of a step.

python -m benchmarks planner memory               # a rank of 1 to 3,456 under torch's memory tracker (10 minutes)
python -m benchmarks planner calibrate            # figures of this machine, as conf/hardware/cpu.yaml has them
python -m benchmarks planner time                 # steps of CPU ranks over gloo, against figures calibrated in the same run
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks import figures, results
from benchmarks.contestants import CONTESTANTS
from benchmarks.memory import measure
from benchmarks.training import Job
from benchmarks.turns import start_ranks
from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.planner import Hardware, Link, Options, Setup, load_hardware, rank_memory, step_time
from lightning_lss.planner.measure import make_model, make_step, measure_memory
from lightning_lss.sequence.collectives import all_gather
from lightning_lss.testing.fake_world import fake_world
from lightning_lss.testing.world import World

CPU = Path(__file__).parents[1] / "conf" / "hardware" / "cpu.yaml"


def config(**sizes: Any) -> TransformerConfig:
    """A small model, changed by ``sizes``."""
    return TransformerConfig(**{"width": 256, "num_layers": 3, "num_heads": 4, "positions": "rotary", **sizes})


# what, S, L, B, model, options; the rank with the widest tile is measured
MEMORY: list[tuple[str, int, int, int, dict[str, Any], dict[str, Any]]] = [
    ("whole sequence", 1, 2_048, 1, {}, {}),
    ("zigzag", 4, 8_192, 1, {}, {}),
    ("contiguous", 8, 8_192, 1, {}, {"layout": "contiguous"}),
    ("DDP's buckets", 4, 8_192, 1, {}, {"ddp": True}),
    ("buckets as gradients", 4, 8_192, 1, {}, {"ddp": True, "gradient_as_bucket_view": True}),
    ("learned positions", 2, 4_096, 1, {"positions": "learned"}, {}),
    ("dropout", 8, 8_192, 1, {"dropout": 0.1}, {}),
    ("swiglu, 2 of 8 heads", 8, 8_192, 1, {"mlp": "swiglu", "num_heads": 8, "num_kv_heads": 2}, {}),
    ("keep_gathered", 8, 8_192, 1, {"keep_gathered": True}, {}),
    ("8 chunks, 2 sequences", 2, 16_384, 2, {"num_heads": 8}, {}),
    ("8,192 tokens", 16, 8_192, 1, {"vocab_size": 8_192}, {}),
    ("encoder", 4, 8_192, 1, {"causal": False}, {}),
    ("float64, untied", 4, 4_096, 1, {"tie_embeddings": False}, {"precision": "64-true"}),
    ("bfloat16", 4, 8_192, 1, {}, {"precision": "bf16-true"}),
    ("autocast", 4, 8_192, 1, {}, {"precision": "bf16-mixed"}),
    ("full checkpointing", 4, 8_192, 1, {"activation_checkpointing": "full"}, {}),
    ("selective checkpointing", 8, 16_384, 1, {"activation_checkpointing": "selective"}, {}),
    ("selective, keep_gathered", 8, 16_384, 1, {"activation_checkpointing": "selective", "keep_gathered": True}, {}),
    ("full, keep_gathered", 8, 16_384, 1, {"activation_checkpointing": "full", "keep_gathered": True}, {}),
    ("full, MLP in tiles", 4, 8_192, 1, {"activation_checkpointing": "full", "mlp_tiles": 4, "mlp_width": 4096}, {}),
    ("4 chunks of heads", 4, 16_384, 1, {}, {"head_chunks": 4}),
    ("mostly parameters", 4, 512, 1, {"width": 512, "num_heads": 8}, {"ddp": True}),
    ("64 ranks", 64, 16_384, 1, {}, {}),
    ("144 ranks, 58 tokens each", 144, 8_352, 1, {}, {}),
    (
        "2 layers of 1b, 1M tokens",
        64,
        1_048_576,
        1,
        {"width": 2048, "num_layers": 2, "num_heads": 32, "num_kv_heads": 8},
        {},
    ),
    ("864 ranks, 58 tokens each", 864, 50_112, 1, {"num_layers": 1}, {}),
    ("3,456 ranks", 3_456, 221_184, 1, {"num_layers": 1, "num_heads": 2}, {}),
]


def compare_memory(quick: bool) -> list[dict[str, Any]]:
    """One step without the Trainer, also on ranks that do not exist; and training itself."""
    number = 1 if quick else None
    return memory(MEMORY[:number]) + trained_memory(RANKS[:number])


def memory(entries: Sequence[tuple[str, int, int, int, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Measure and predict ``entries`` of ``MEMORY``."""
    rows = []
    for what, size, length, batch, sizes, options in entries:
        setup = Setup(config(**sizes), "lss", 1, size, length, batch, Options(**{"ddp": False, **options}))
        fake = not setup.options.ddp and not setup.config.dropout and setup.config.positions == "rotary"
        with fake_world(0 if setup.options.layout == "zigzag" else size - 1, size) as group:
            measured = measure_memory(setup, group, fake_tensors=fake)["Total"]
        rows.append(_memory_row(what, setup, fake, measured, sizes, options))
    return rows


def _memory_row(
    what: str, setup: Setup, fake: bool, measured: int, sizes: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    predicted = rank_memory(setup).total
    error = predicted / measured - 1
    print(
        f"{what:36} S {setup.size:5} L {setup.seq_len:9,} {measured / 2**20:10,.1f} {predicted / 2**20:10,.1f} MiB"
        f" {100 * error:+6.1f} %",
        flush=True,
    )
    return {
        "what": what,
        "size": setup.size,
        "length": setup.seq_len,
        "batch_size": setup.batch_size,
        "fake_tensors": fake,
        "model": sizes,
        "options": options,
        "measured_bytes": measured,
        "predicted_bytes": round(predicted),
        "error": round(error, 4),
    }


# what, contestant, S, L, model; under the real Trainer, on real ranks
RANKS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("trained: single", "single", 1, 4_096, {}),
    ("trained: lss", "lss", 4, 4_096, {}),
    ("trained: lss, mostly parameters", "lss", 4, 512, {}),
    ("trained: lss, full", "lss", 4, 4_096, {"activation_checkpointing": "full"}),
    ("trained: lss, selective, tiles", "lss", 4, 4_096, {"activation_checkpointing": "selective", "mlp_tiles": 4}),
    ("trained: lss-kept", "lss-kept", 4, 4_096, {}),
    ("trained: lss-kept, full", "lss-kept", 4, 4_096, {"activation_checkpointing": "full"}),
    ("trained: lss-fsdp", "lss-fsdp", 4, 4_096, {}),
    ("trained: lss-fsdp, mostly parameters", "lss-fsdp", 4, 512, {}),
    ("trained: lss-fsdp, full", "lss-fsdp", 4, 4_096, {"activation_checkpointing": "full"}),
    ("trained: megatron", "megatron", 4, 4_096, {}),
    ("trained: megatron, mostly parameters", "megatron", 4, 512, {}),
    ("trained: megatron, full", "megatron", 4, 4_096, {"activation_checkpointing": "full"}),
    ("trained: megatron, selective", "megatron", 4, 4_096, {"activation_checkpointing": "selective"}),
    ("trained: megatron, full, tiles", "megatron", 4, 4_096, {"activation_checkpointing": "full", "mlp_tiles": 4}),
    *(
        (
            f"trained: {name}, other options",
            name,
            4,
            4_096,
            {"positions": "learned", "mlp": "swiglu", "num_kv_heads": 2, "dropout": 0.1},
        )
        for name in ("single", "lss", "lss-fsdp", "megatron")
    ),
]


def trained_memory(entries: Sequence[tuple[str, str, int, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Measure and predict ``entries`` of ``RANKS``."""
    with start_ranks(max(size for _, _, size, *_ in entries)) as world:
        return [_trained(world, *entry) for entry in entries]


def _trained(world: World, what: str, name: str, size: int, length: int, sizes: dict[str, Any]) -> dict[str, Any]:
    contestant, model = CONTESTANTS[name], config(seq_len=length, **sizes)
    size = 1 if contestant.strategy == "single" else size
    measured = measure(world, name, size, Job(vars(model), steps=4, warm_up=3), shapes=False).total
    options = Options(sharding=contestant.options.get("sharding"), ddp=contestant.strategy == "lss")
    scheme = "megatron" if contestant.strategy == "megatron" else "lss"
    setup = Setup(replace(model, **contestant.model), scheme, 1, size, length, 1, options)  # type: ignore[arg-type]
    return _memory_row(what, setup, False, measured, sizes, {"contestant": name})


# -- time --------------------------------------------------------------------------------------------------------------

# model, S, L; every rank has one thread
TIME: list[tuple[dict[str, Any], int, int]] = [
    (sizes, size, length)
    for sizes in ({"num_layers": 2}, {"width": 512, "num_layers": 2, "num_heads": 8})
    for size in (1, 2, 4)
    for length in (2_048, 4_096, 8_192)
]


def time_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and predict every entry of ``TIME`` that this machine has the cores for.

    What else runs on a machine comes and goes within a minute, and only adds: so the machine's figures are measured
    before each entry, the fastest of all predict, and they predict the fastest step of each.
    """
    cores = os.cpu_count() or 1
    entries = TIME[:1] if args.quick else [entry for entry in TIME if entry[1] <= cores]
    setups = [Setup(config(**sizes), "lss", 1, size, length) for sizes, size, length in entries]
    speeds, fastest = [], []
    for setup in setups:
        if not args.hardware:
            speeds.append(measure_speed())
        fastest.append(min(on_ranks(setup.size, _time_rank, setup, args.rounds)))
    hardware = load_hardware(args.hardware) if args.hardware else make_hardware(speeds)
    rows = []
    for (sizes, size, length), setup, seconds in zip(entries, setups, fastest):
        predicted = step_time(setup, hardware)
        error = predicted.total / seconds - 1
        print(f"{sizes!s:52} S {size} L {length:6,} {seconds:8.3f} {predicted.total:8.3f} s {100 * error:+6.1f} %")
        rows.append({"model": sizes, "size": size, "length": length, "measured_seconds": seconds, **vars(predicted)})
        rows[-1] |= {"predicted_seconds": predicted.total, "error": round(error, 4), "rounds": args.rounds}
    return rows


def _time_rank(rank: int, setup: Setup, rounds: int) -> list[float]:
    assert dist.group.WORLD is not None
    step = make_step(make_model(setup, dist.group.WORLD), setup)
    step()
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        step()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return seconds


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(rank, *args)`` returns on rank 0 of ``size`` single-threaded ranks of a gloo group."""
    with start_ranks(size) as world:
        return world.run(size, function, *args)[0]


# -- calibration -------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """What a rank of one thread comes to on this machine, in operations and bytes a second, and seconds."""

    multiply: float
    attention: float
    bandwidth: float
    link: float
    latency: float


def measure_speed() -> Speed:
    """Measure this machine once."""
    torch.set_num_threads(1)
    return Speed(_matmul_rate(), _attention_rate(), _bandwidth(), *on_ranks(2, _measure_link))


def make_hardware(speeds: Sequence[Speed]) -> Hardware:
    """The fastest of ``speeds``; what is not measured is as in conf/hardware/cpu.yaml."""
    multiply, attention, bandwidth, link, _ = (max(figures) for figures in zip(*speeds))
    return replace(
        load_hardware(CPU),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (os.cpu_count() or 1),
        bandwidth=bandwidth,
        peak={"float32": multiply},
        attention=attention / multiply,
        inside=Link(link, min(speed.latency for speed in speeds)),
    )


def calibrate() -> None:
    """Print conf/hardware/cpu.yaml with the figures of this machine."""
    found = make_hardware([measure_speed()])
    machine = f"{results.environment()['processor']}, {os.cpu_count()} cores, torch {torch.__version__}"
    source = f"python -m benchmarks planner calibrate, {datetime.date.today()}, {machine}"
    print(
        f"""# A CPU rank of one thread, in float32, over gloo on one machine. Make your own: python -m benchmarks planner calibrate
_target_: lightning_lss.planner.Hardware
name: CPU
memory: {found.memory:.3e} # of the machine, for each of its {os.cpu_count()} cores
bandwidth: {found.bandwidth:.3e} # bytes/s that norms, GELU and sums come to, forward and backward
peak: {{float32: {found.peak["float32"]:.3e}}} # of matrix multiplications
inside: {{bandwidth: {found.inside.bandwidth:.3e}, latency: {found.inside.latency:.1e}}}
between: {{bandwidth: 1.25e+9, latency: 1.0e-4}}
devices_per_node: 64
matmul: 1.0
attention: {found.attention:.3f}
overlap: 0.0 # the cores that compute also copy
launch: 1.0e-5
usable: 0.9
precision: 32-true
kernel: cpu_flash
optimizer_temporaries: largest
source:
  memory, bandwidth, peak, inside, attention: "{source}"
  between: "assumed: 10 Gbit/s Ethernet"
  matmul: "1 by definition: peak is what multiplications come to"
  devices_per_node: "as many ranks as one starts on a machine"
  overlap, launch, usable: "assumed"
""".strip()
    )


def _seconds(function: Callable[[], object], rounds: int = 9) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)  # what else runs on the machine only adds


def _matmul_rate() -> float:
    """Operations a second of a linear layer, forward and backward, of the shapes of a small transformer."""
    x, weight = torch.randn(4096, 256), torch.randn(1024, 256)
    grad = torch.randn(4096, 1024)
    seconds = _seconds(lambda: (F.linear(x, weight), grad @ weight, grad.t() @ x))
    return 6 * x.numel() * weight.size(0) / seconds


def _attention_rate() -> float:
    """Operations a second of causal attention, forward and backward, 12 for each visible pair and channel."""
    q, k, v, grad = (torch.randn(1, 4, 4096, 64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seconds = _seconds(lambda: F.scaled_dot_product_attention(*leaves, is_causal=True).backward(grad), rounds=9)
    return 12 * 256 * (4096 * 4097 / 2) / seconds


def _bandwidth() -> float:
    """Bytes a second by the planner's measure, three for each byte that is written: a norm, GELU of four times the width and
    a sum, forward and backward, write eleven tensors."""
    x, wide = torch.randn(4096, 256, requires_grad=True), torch.randn(4096, 1024, requires_grad=True)
    grad, wide_grad = torch.randn(4096, 256), torch.randn(4096, 1024)

    def run() -> None:
        F.layer_norm(x, (256,)).backward(grad)
        F.gelu(wide).backward(wide_grad)
        with torch.no_grad():
            x.add(grad)
        x.grad = wide.grad = None

    return 3 * 11 * x.nbytes / _seconds(run)


def _measure_link(rank: int) -> tuple[float, float]:
    """Bytes a second that a rank receives in an all-gather of two ranks, and the seconds of an empty one."""

    def gather(numbers: int) -> float:
        own, whole = torch.ones(numbers), torch.empty(2, numbers)
        return _seconds(lambda: all_gather(own, dist.group.WORLD, whole).wait(), rounds=11)

    latency = gather(1)
    return 4 * 2**22 / max(1e-9, gather(2**22) - latency), latency


# -- command line ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to compare."""
    parser.add_argument("what", choices=["memory", "time", "calibrate"])
    parser.add_argument("--hardware", type=Path, help="figures that `time` predicts with, if they are not measured")
    parser.add_argument("--rounds", type=int, default=5, help="steps that `time` takes the fastest of")
    parser.add_argument("--quick", action="store_true", help="one configuration, for a smoke test; no figure")
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the CSV")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The planner's predictions against measurements."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.what == "calibrate":
        calibrate()
        return []
    rows = compare_memory(args.quick) if args.what == "memory" else time_steps(args)
    print(f"worst error {100 * max(abs(row['error']) for row in rows):.1f} % of {len(rows)}")
    name = f"planner_{args.what}"
    print(f"{results.append(name, rows, args.output)}\n{figures.save(name, args.output)}")
    return []
