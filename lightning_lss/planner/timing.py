"""Estimate the time of a training step from operations, bytes and links: a roofline, with collectives behind the
work."""

from dataclasses import dataclass

import numpy as np

from lightning_lss.planner.hardware import Hardware, Link
from lightning_lss.planner.step import Options
from lightning_lss.planner.trace import PARAMETERS, Trace
from lightning_lss.testing.collectives import received_of

_TOUCHES = 3  # passes over memory for a byte that a kernel writes: it is read about twice
_PARAMETER_BYTES = {"64-true": 8, "bf16-true": 2, "16-true": 2}  # of one number; else 4
_BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default


@dataclass(frozen=True)
class Grid:
    """D = ``data_size`` times S = ``size`` ranks on ``hardware``."""

    data_size: int
    size: int
    hardware: Hardware

    def link(self, group: str, ranks: int) -> Link:
        """Return the slowest link of a ring of ``ranks`` in ``group``, ``"sequence"``, ``"data"`` or ``"world"``.

        Neighbouring ranks form a sequence group. Its ring enters a node once and has the node's link for itself; where
        groups do not line up with nodes, two share the link. A data group has one rank in each sequence group, so many
        rings share a node's link.
        """
        hardware, world = self.hardware, self.data_size * self.size
        node = hardware.devices_per_node
        if group == "data":
            crosses, rings = world > node, min(self.size, node)
        else:
            straddles = world > node and node % ranks != 0 and ranks % node != 0
            crosses, rings = ranks > node or straddles, 2 if straddles else 1
        if not crosses:
            return hardware.inside
        bandwidth = min(hardware.inside.bandwidth, hardware.between.bandwidth / rings)
        return Link(bandwidth, max(hardware.inside.latency, hardware.between.latency))


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind: calls, bytes of payload of all calls, and seconds of work that they can hide behind."""

    kind: str
    group: str
    ranks: int
    calls: float
    payload: float
    work: float

    @property
    def received(self) -> float:
        """Count the bytes that a rank receives."""
        return received_of(self.kind, self.payload, self.ranks)

    def seconds(self, grid: Grid) -> float:
        """Estimate the seconds in a ring: rounds of latency, and the bytes over the slowest link."""
        link = grid.link(self.group, self.ranks)
        rounds = {"all_reduce": 2 * (self.ranks - 1), "receive": 1, "broadcast": 1}.get(self.kind, self.ranks - 1)
        return self.calls * rounds * link.latency + self.received / link.bandwidth

    def exposed(self, grid: Grid) -> float:
        """Estimate the seconds that no work hides."""
        seconds = self.seconds(grid)
        return seconds - min(seconds * grid.hardware.overlap, self.work)


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step, by kind of work; ``received`` is in bytes.

    ``memory`` is norms, activation functions, copies and the loss. ``communication`` is the time of all collectives,
    and ``exposed`` the part that no work hides.
    """

    matmul: float
    attention: float
    memory: float
    launch: float
    optimizer: float
    exposed: float
    communication: float
    received: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.matmul + self.attention + self.memory + self.launch + self.optimizer + self.exposed


def step_time(trace: Trace, options: Options, grid: Grid, shards: int = 1, shared: str = "world") -> StepTime:
    """Estimate the seconds of a training step from the ``trace`` of the busiest rank.

    For ``shards`` see :func:`~lightning_lss.planner.memory.moments_of`. Gradients of shared parameters are averaged
    over the group ``shared``, ``"world"`` or ``"data"``.
    """
    hardware, batches = grid.hardware, options.accumulate_grad_batches
    rates = _rates(hardware, options)
    forward, backward, update = (stage / rates for stage in trace.work)
    matmul, attention, memory, launch = (batches * (forward + backward)).tolist()
    optimizer = float(update[2] + update[3]) / shards
    transfers = _traced(trace, grid, rates, batches) + _of_parameters(trace, options, grid, shards, shared)
    transfers = [transfer for transfer in transfers if transfer.ranks > 1 and transfer.payload]
    exposed = sum(transfer.exposed(grid) for transfer in transfers)
    communication = sum(transfer.seconds(grid) for transfer in transfers)
    received = sum(transfer.received for transfer in transfers)
    return StepTime(matmul, attention, memory, launch, optimizer, exposed, communication, received)


def utilization(whole: Trace, options: Options, grid: Grid, batch: int, seconds: float) -> float:
    """Return the model FLOP/s utilization: the operations of the model over those that the devices could do.

    A model's operations count as three times those of its forward pass (PaLM, arXiv 2204.02311, appendix B). ``whole``
    is the step of one rank with whole sequences; one step of the grid takes ``seconds`` and does the work of ``batch``
    such steps.
    """
    flops = 3.0 * batch * whole.work[0, :2].sum()
    return flops / (seconds * grid.data_size * grid.size * grid.hardware.peak_of(options.precision))


def _rates(hardware: Hardware, options: Options) -> np.ndarray:
    """Return how much of each kind of work is done a second, [work]."""
    peak = hardware.peak_of(options.precision)
    launches = 1 / hardware.launch if hardware.launch else np.inf
    return np.array([peak * hardware.matmul, peak * hardware.attention, hardware.bandwidth / _TOUCHES, launches])


def _traced(trace: Trace, grid: Grid, rates: np.ndarray, batches: int) -> list[Transfer]:
    """List what a sequence group sends: in the update once a step, else once a batch."""
    transfers = []
    for kind, (calls, payload, *work, stage) in zip(trace.kinds, trace.collectives):
        times = 1 if round(stage) == 2 else batches
        hidden = times * float((np.array(work) / rates[:3]).sum())
        transfers.append(Transfer(str(kind), "sequence", grid.size, times * calls, times * payload, hidden))
    return transfers


def _of_parameters(trace: Trace, options: Options, grid: Grid, shards: int, shared: str) -> list[Transfer]:
    """List the collectives of parameters and gradients.

    Gradients of shared parameters are averaged over the world, those of segment-local parameters over the data group.
    FSDP gathers parameters for the forward and again for the backward pass, and scatters gradients.
    """
    sizes, world = dict(zip(PARAMETERS, trace.parameters.tolist())), grid.data_size * grid.size
    forward, backward = (float((stage / _rates(grid.hardware, options)).sum()) for stage in trace.work[:2])
    grads = sizes["shared"] * (2 / _PARAMETER_BYTES.get(options.precision, 4) if options.communication_dtype else 1.0)
    own = Transfer("all_reduce", "data", grid.data_size, 1, sizes["own"], backward)
    if shards == 1:
        ranks = grid.data_size if shared == "data" else world
        return [own, Transfer("all_reduce", shared, ranks, -(-grads // _BUCKET), grads, backward)]
    group = "sequence" if options.sharding == "hybrid" else "world"
    calls, batches = sizes["units"] + 1, options.accumulate_grad_batches
    times, work = 2 * batches, batches * (forward + backward)
    transfers = [
        own,
        Transfer("all_gather", group, shards, times * calls, times * sizes["shared"], work),
        Transfer("reduce_scatter", group, shards, batches * calls, batches * grads, batches * backward),
    ]
    if options.sharding == "hybrid":
        transfers.append(Transfer("all_reduce", "data", grid.data_size, calls, grads / shards, backward))
    return transfers
