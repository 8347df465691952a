"""Every way to share a number of devices between data and sequence parallelism, side by side, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.planner.hardware import Hardware
from lightning_lss.planner.memory import Memory, rank_memory
from lightning_lss.planner.setup import SCHEMES, Options, Setup, unsharded
from lightning_lss.planner.timing import StepTime, step_time, utilization
from lightning_lss.planner.traffic import step_traffic
from lightning_lss.sequence.layout import check_positive, chunks_per_rank

_LONGEST = 2**36  # tokens; where to stop looking


@dataclass(frozen=True)
class Choice:
    """One way to train, and what it comes to. Where it is impossible ``obstacle`` says why and the rest is empty."""

    scheme: str
    data_size: int
    size: int
    batch_size: int
    obstacle: str | None = None
    setup: Setup | None = None
    memory: Memory | None = None
    time: StepTime | None = None
    received: float = 0.0  # bytes of a rank in a step
    tokens_per_second: float = 0.0
    utilization: float = 0.0
    fits: bool = False
    longest: int = 0  # tokens of the longest sequence that fits, of the same D and S

    def as_row(self) -> dict[str, Any]:
        """Everything as one flat mapping, for a table; bytes and seconds."""
        row: dict[str, Any] = {
            "scheme": self.scheme,
            "D": self.data_size,
            "S": self.size,
            "batch_size": self.batch_size,
        }
        row |= {"seq_len": self.setup.seq_len if self.setup else "", "fits": self.fits, "longest": self.longest}
        memory = {f"{name}_bytes": round(value) for name, value in _numbers(self.memory).items()}
        time = {f"{name}_seconds": value for name, value in _numbers(self.time).items()}
        row |= memory | {"total_bytes": round(self.memory.total) if self.memory else ""}
        row |= {f"most_{part}_bytes": round(value) for part, value in (self.memory.most if self.memory else {}).items()}
        row |= {"received_bytes": round(self.received)} | time
        row |= {"step_seconds": self.time.total if self.time else "", "tokens_per_second": self.tokens_per_second}
        return row | {"utilization": self.utilization, "obstacle": self.obstacle or ""}


def _numbers(figures: Memory | StepTime | None) -> dict[str, float]:
    return {name: value for name, value in vars(figures).items() if isinstance(value, float)} if figures else {}


@dataclass(frozen=True)
class Plan:
    """All choices for a number of devices; ``recommended`` is the fastest that fits, and among equals the leanest."""

    config: TransformerConfig
    seq_len: int
    devices: int
    hardware: Hardware
    choices: list[Choice]

    @property
    def recommended(self) -> Choice | None:
        """Of both schemes; None if nothing fits."""
        return self.best()

    def best(self, scheme: str | None = None) -> Choice | None:
        """The fastest choice that fits, of one scheme or of all."""
        fitting = [c for c in self.choices if c.fits and c.memory is not None and scheme in (None, c.scheme)]
        return max(fitting, key=lambda c: (c.tokens_per_second, -c.memory.total if c.memory else 0.0), default=None)


def plan(
    config: TransformerConfig,
    seq_len: int,
    devices: int,
    hardware: Hardware,
    *,
    batch_size: int = 1,
    global_batch: int | None = None,
    options: Options | None = None,
    schemes: Sequence[str] = SCHEMES,
) -> Plan:
    """Predict memory, traffic and time of every (D, S) with D x S = ``devices``, under LSS and under Megatron's tensor and
    sequence parallelism. It needs neither the devices nor a process group.

    Args:
        config: the model; its ``seq_len`` is of no account.
        seq_len: global sequence length L.
        devices: number of devices W.
        hardware: what they are, for example ``load_hardware("conf/hardware/h100.yaml")``.
        batch_size: sequences that a sequence group trains on at a time.
        global_batch: sequences in a step in all, which D (times the batches that a step accumulates) has to divide; it
            replaces ``batch_size``.
        options: precision, checkpointing, sharding and so on; by default what is usual on the hardware.
        schemes: which of ``"lss"`` and ``"megatron"`` to look at.

    Raises:
        ValueError: if an argument is not what it must be, or if no (D, S) is possible, in one sentence.
    """
    _check_kind("config", config, TransformerConfig, "give the `.model.config` of an LSSTransformer")
    _check_kind("hardware", hardware, Hardware, 'give one, such as load_hardware("conf/hardware/h100.yaml")')
    batches = {"batch_size": batch_size} if global_batch is None else {"global_batch": global_batch}
    check_positive(seq_len=seq_len, devices=devices, **batches)
    if options is None:
        options = usual_options(hardware)
    hardware.peak_of(options.precision)  # refuse what it has no figure for
    choices = [
        _choice(scheme, config, seq_len, devices // size, size, hardware, batch_size, global_batch, options)
        for scheme in schemes
        for size in range(1, devices + 1)
        if devices % size == 0 and (scheme == "lss" or size > 1)  # of one rank there is nothing to tell
    ]
    if not choices:
        raise ValueError(f"schemes={list(schemes)} leave nothing to plan on devices={devices}: add 'lss'.")
    if all(choice.obstacle for choice in choices):
        raise ValueError(f"No way to share {devices} devices out is possible; {_first_words(choices)}")
    return Plan(config, seq_len, devices, hardware, choices)


def _check_kind(name: str, value: Any, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}: {remedy}.")


def usual_options(hardware: Hardware, **chosen: Any) -> Options:
    """What is usual on the hardware, except where it is ``chosen``."""
    usual = {name: getattr(hardware, name) for name in ("precision", "kernel", "optimizer_temporaries")}
    return Options(**{**usual, **chosen})


def _first_words(choices: list[Choice]) -> str:
    first = choices[0]
    return f"D = {first.data_size}, S = {first.size}, for example: {first.obstacle}"


def _choice(
    scheme: Any,
    config: TransformerConfig,
    seq_len: int,
    data_size: int,
    size: int,
    hardware: Hardware,
    batch_size: int,
    global_batch: int | None,
    options: Options,
) -> Choice:
    if global_batch is not None:
        groups = data_size * options.accumulate_grad_batches
        if global_batch % groups:
            times = f" {options.accumulate_grad_batches} times" if groups > data_size else ""
            why = f"global_batch={global_batch} cannot be shared out over D={data_size} sequence groups{times}."
            return Choice(scheme, data_size, size, 0, obstacle=why)
        batch_size = global_batch // groups
    if scheme == "megatron":
        options = unsharded(options)
    try:
        setup = Setup(config, scheme, data_size, size, seq_len, batch_size, options)
    except ValueError as error:
        return Choice(scheme, data_size, size, batch_size, obstacle=str(error))
    memory, time = rank_memory(setup), step_time(setup, hardware)
    return Choice(
        scheme,
        data_size,
        size,
        batch_size,
        setup=setup,
        memory=memory,
        time=time,
        received=sum(entry.received for entry in step_traffic(setup)),
        tokens_per_second=setup.sequences * seq_len / time.total,
        utilization=utilization(setup, hardware, time.total),
        fits=memory.total <= hardware.usable_memory,
        longest=longest_sequence(setup, hardware.usable_memory),
    )


def longest_sequence(setup: Setup, memory: float) -> int:
    """Tokens of the longest sequence whose step fits ``memory`` bytes a rank with the same D, S and options, a multiple of
    what S needs; 0 if none does."""
    step = setup.size * (chunks_per_rank(setup.size, setup.options.layout) if setup.scheme == "lss" else 1)

    def fits(steps: int) -> bool:
        return rank_memory(replace(setup, seq_len=steps * step)).total <= memory

    above = 1
    while above * step <= _LONGEST and fits(above):
        above *= 2
    below = above // 2
    while above - below > max(1, below // 1000):  # to a tenth of a percent
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below * step
