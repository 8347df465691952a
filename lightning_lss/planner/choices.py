"""Compare every way to divide devices between data and sequence parallelism, and recommend one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lss.planner.fakes import batch_size_of, length_of
from lightning_lss.planner.hardware import Hardware
from lightning_lss.planner.memory import Memory, longest_below, memory_of, moments_of
from lightning_lss.planner.step import Options, Scheme
from lightning_lss.planner.timing import Grid, StepTime, step_time, utilization
from lightning_lss.planner.trace import Trace
from lightning_lss.planner.traces import Traces, cache_folder
from lightning_lss.sequence.layout import check_length, check_positive, chunks_per_rank

_MOST_TOKENS = 2**36  # longest sequence to look for


@dataclass(frozen=True)
class Impossible:
    """A (D, S) that cannot be trained, and the reason."""

    scheme: str
    data_size: int
    size: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """One way to train: D = ``data_size`` groups of S = ``size`` ranks, each group on ``batch_size`` sequences.

    ``longest`` is the length of the longest sequence that fits with the same D and S. All times are estimates.
    """

    scheme: str
    data_size: int
    size: int
    batch_size: int
    memory: Memory
    time: StepTime
    tokens_per_second: float
    utilization: float
    fits: bool
    longest: int


@dataclass(frozen=True)
class Plan:
    """All choices for a number of devices."""

    seq_len: int
    devices: int
    hardware: Hardware
    options: Options
    choices: list[Choice]
    impossible: list[Impossible]

    @property
    def recommended(self) -> Choice | None:
        """The best choice of all schemes; None if nothing fits."""
        return self.best()

    def best(self, scheme: str | None = None) -> Choice | None:
        """Return the fastest choice that fits, and among equals the leanest; None if nothing of ``scheme`` fits."""
        fitting = [choice for choice in self.choices if choice.fits and scheme in (None, choice.scheme)]
        return max(fitting, key=lambda choice: (choice.tokens_per_second, -choice.memory.total), default=None)


def plan(
    module: pl.LightningModule | Callable[[], pl.LightningModule],
    batch: Any,
    devices: int,
    hardware: Hardware,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    global_batch: int | None = None,
    baselines: Sequence[Scheme] = (),
    cache: bool = True,
    on_trace: Callable[[str], None] = lambda description: None,
    **options: Any,
) -> Plan:
    """Predict memory and traffic, and estimate the time, of a training run for every (D, S) with D x S = ``devices``.

    The module's own ``training_step`` and ``configure_optimizers`` run on tensors without contents, as one rank of a
    group of stand-ins. Planning needs neither devices nor memory for the model.

    Args:
        module: a LightningModule that trains under LSS, or a function that builds one. The function is called with the
            meta device as torch's default, so a model may be larger than this machine.
        batch: an example of what ``training_step`` receives, with whole sequences [B, L, ...] of any contents.
        devices: number of devices W.
        hardware: the kind of devices, for example ``load_hardware("conf/hardware/h100.yaml")``.
        seq_len: global sequence length L; None for that of ``batch``.
        batch_size: sequences that a sequence group trains on at a time; None for those of ``batch``.
        global_batch: sequences in a whole step. It replaces ``batch_size``; D, times the batches that a step
            accumulates, must divide it.
        baselines: other schemes to compare with.
        cache: whether to keep traces on disk, see :func:`~lightning_lss.planner.traces.cache_folder`.
        on_trace: called with a description before each new trace.
        **options: fields of :class:`~lightning_lss.planner.Options`; the precision is by default that of the hardware.

    Raises:
        ValueError: if an argument is invalid, if no (D, S) is possible, or if the module cannot be traced.
    """
    module = _built(module)
    if not isinstance(hardware, Hardware):
        raise ValueError(f'hardware={hardware!r} is not a Hardware: use load_hardware("conf/hardware/h100.yaml").')
    chosen = Options(**{"precision": hardware.precision, **options})
    hardware.peak_of(chosen.precision)  # refuses a precision without a figure
    each = batch_size_of(batch) if batch_size is None else batch_size
    length = length_of(batch, chosen.sequence_dims) if seq_len is None else seq_len
    check_positive(devices=devices, seq_len=length, batch_size=each)
    if global_batch is not None:
        check_positive(global_batch=global_batch)
    folder = cache_folder() if cache else None
    planner = _Planner(length, devices, hardware, chosen, each, global_batch)
    own = Traces(module, batch, chosen, hardware.kernel, None, folder, on_trace)
    found = planner.choices(own, own)
    for scheme in baselines:
        found += planner.choices(Traces(module, batch, chosen, hardware.kernel, scheme, folder, on_trace), own)
    impossible = [choice for choice in found if isinstance(choice, Impossible)]
    choices = [choice for choice in found if isinstance(choice, Choice)]
    if not choices:
        first = impossible[0]
        raise ValueError(
            f"No (D, S) is possible for {devices} devices. With D = {first.data_size}, S = {first.size}: {first.reason}"
        )
    return Plan(length, devices, hardware, chosen, choices, impossible)


def _built(module: Any) -> pl.LightningModule:
    if callable(module) and not isinstance(module, torch.nn.Module):
        with torch.device("meta"):
            module = module()
    if not isinstance(module, pl.LightningModule):
        raise ValueError(
            f"module is a {type(module).__name__}, not a LightningModule: give the module that the Trainer would train, or a"
            " function that builds it."
        )
    return module


@dataclass(frozen=True)
class _Planner:
    """Evaluate every (D, S) for one length, number of devices, hardware and set of options."""

    length: int
    devices: int
    hardware: Hardware
    options: Options
    batch_size: int
    global_batch: int | None

    def choices(self, traces: Traces, whole: Traces) -> list[Choice | Impossible]:
        """Evaluate every (D, S) of one scheme; ``whole`` has the step of one rank."""
        least = 2 if traces.scheme else 1  # one rank leaves a baseline nothing to divide
        sizes = [size for size in range(least, self.devices + 1) if self.devices % size == 0]
        found = [self._choice(traces, whole, size) for size in sizes]
        extrapolated = (choice for choice in found if isinstance(choice, Choice) and choice.size > 4)
        if traces.scheme is None and (first := next(extrapolated, None)) is not None:
            traces.check(first.size, self.length, first.batch_size)
        return found

    def _choice(self, traces: Traces, whole: Traces, size: int) -> Choice | Impossible:
        scheme = traces.scheme.name if traces.scheme else "lss"
        data_size = self.devices // size
        try:
            batch_size = self._batch_size(data_size)
            self._check(traces, data_size, size)
            trace = traces.at(size, self.length, batch_size)
        except ValueError as error:
            return Impossible(scheme, data_size, size, str(error))
        grid, batches = Grid(data_size, size, self.hardware), self.options.accumulate_grad_batches
        shards = 1 if traces.scheme else self.options.shards(data_size, size)
        time = step_time(trace, self.options, grid, shards, shared="data" if traces.scheme else "world")
        memory = memory_of(self._moments(trace, traces, shards))
        steps = data_size * batches  # steps of one rank with whole sequences that do the work of this one
        speed = steps * batch_size * self.length / time.total
        used = utilization(whole.taken(1, self.length, batch_size), self.options, grid, steps, time.total)
        fits = memory.total <= self.hardware.usable_memory
        longest = self._longest(traces, size, batch_size, shards, memory)
        return Choice(scheme, data_size, size, batch_size, memory, time, speed, used, fits, longest)

    def _batch_size(self, data_size: int) -> int:
        groups = data_size * self.options.accumulate_grad_batches
        if self.global_batch is None:
            return self.batch_size
        if self.global_batch % groups:
            times = f" {self.options.accumulate_grad_batches} times" if groups > data_size else ""
            raise ValueError(
                f"global_batch={self.global_batch} cannot be divided evenly among D={data_size} sequence groups{times}."
            )
        return self.global_batch // groups

    def _check(self, traces: Traces, data_size: int, size: int) -> None:
        if traces.scheme is not None:
            check_length(self.length, size, "contiguous")
            traces.scheme.check(traces.module, self.length, size)
            return
        check_length(self.length, size, self.options.layout)
        if self.options.sharding == "hybrid" and size == 1 < data_size:
            raise ValueError("sharding='hybrid' shards over the sequence group, which has one rank here: use 'fsdp'.")

    def _moments(self, trace: Trace, traces: Traces, shards: int) -> Any:
        return moments_of(trace, shards, ddp=traces.scheme is None and self.devices > 1)

    def _longest(self, traces: Traces, size: int, batch_size: int, shards: int, memory: Memory) -> int:
        """Return the length of the longest sequence that fits, a multiple of the number of chunks; 0 if none fits.

        Memory is affine in the local length as long as attention gathers the same number of head chunks. Two lengths
        near the answer therefore give it; a first guess is that all but the state is proportional to the length. They
        are powers of two, so that other S share their traces.
        """
        step = chunks_per_rank(size, "contiguous" if traces.scheme else self.options.layout)
        usable = self.hardware.usable_memory
        share = max(0.0, usable - memory.total + memory.beside_state) / memory.beside_state
        power, seen = _power_below(int(self.length * share) // size // step), set()
        while True:
            seen.add(power)
            lengths = (power * step, 2 * power * step)
            near, far = (traces.at(size, size * length, batch_size) for length in lengths)
            start, end = (self._moments(trace, traces, shards) for trace in near.aligned(far))
            steps = int(max(0.0, min(longest_below(usable, start, end, lengths), _MOST_TOKENS / size))) // step
            power = _power_below(steps)
            if power in seen or steps < 2:
                return steps * step * size


def _power_below(number: int) -> int:
    """Return the largest power of two that is at most ``number``; 1 if there is none."""
    return 1 << max(0, number.bit_length() - 1)
