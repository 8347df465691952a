"""An estimate of the time of a training step, from operations, bytes and links: a roofline with collectives behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_lss.planner.hardware import Hardware, Link
from lightning_lss.planner.step import Options, parameter_bytes
from lightning_lss.planner.trace import PARAMETERS, Trace
from lightning_lss.testing.collectives import received_of

_TOUCHES = 3  # what a kernel writes is read about twice
_BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default


@dataclass(frozen=True)
class Grid:
    """D x S ranks, and the traffic between them.

    Args:
        data_size: D.
        size: S.
        hardware: what they are.
    """

    data_size: int
    size: int
    hardware: Hardware

    def link(self, group: str, ranks: int) -> Link:
        """The link that bounds a ring of ``ranks``. Neighbouring ranks form a sequence group, so a ring of many enters each node
        once and has the node's link for itself, unless groups do not line up with nodes and two of them share it; a data
        group has one rank in each sequence group, and so many rings pass through a node."""
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
    """Collectives of one kind: how often, the bytes of their payload, and the seconds of work that each can hide behind."""

    kind: str
    group: str
    ranks: int
    calls: float
    payload: float
    work: float

    @property
    def received(self) -> float:
        """Bytes that a rank receives."""
        return received_of(self.kind, self.payload, self.ranks)

    def seconds(self, grid: Grid) -> float:
        """In a ring: rounds of latency, and the bytes over the slowest link."""
        link = grid.link(self.group, self.ranks)
        rounds = {"all_reduce": 2 * (self.ranks - 1), "receive": 1, "broadcast": 1}.get(self.kind, self.ranks - 1)
        return self.calls * rounds * link.latency + self.received / link.bandwidth

    def exposed(self, grid: Grid) -> float:
        """Seconds that no work hides."""
        seconds = self.seconds(grid)
        return seconds - min(seconds * grid.hardware.overlap, self.work)


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step: ``matmul``, ``attention``, ``memory`` (norms, activation functions, copies, the loss),
    ``launch``, ``optimizer``, and of the collectives what is not hidden behind work; ``communication`` is all of theirs,
    hidden or not. ``received`` are the bytes that the rank receives."""

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
        """The step."""
        return self.matmul + self.attention + self.memory + self.launch + self.optimizer + self.exposed


def step_time(trace: Trace, options: Options, grid: Grid, shards: int = 1, shared: str = "world") -> StepTime:
    """Estimate the seconds of a training step of the busiest rank.

    Args:
        trace: its step.
        options: choices of the run.
        grid: the ranks.
        shards: see :func:`~lightning_lss.planner.memory.moments_of`.
        shared: the group over which gradients of shared parameters are averaged, ``"world"`` or ``"data"``.
    """
    hardware, batches = grid.hardware, options.accumulate_grad_batches
    rates = _rates(hardware, options)
    forward, backward, update = (stage / rates for stage in trace.work)
    matmul, attention, memory, launch = (batches * (forward + backward)).tolist()
    optimizer = float(update[2] + update[3]) / shards
    transfers = _traced(trace, grid, rates, batches) + _of_parameters(trace, options, grid, shards, shared)
    transfers = [transfer for transfer in transfers if transfer.ranks > 1 and transfer.payload]
    return StepTime(
        matmul,
        attention,
        memory,
        launch,
        optimizer,
        exposed=sum(transfer.exposed(grid) for transfer in transfers),
        communication=sum(transfer.seconds(grid) for transfer in transfers),
        received=sum(transfer.received for transfer in transfers),
    )


def utilization(whole: Trace, options: Options, grid: Grid, batch: int, seconds: float) -> float:
    """Model FLOP/s utilization: the operations that the model needs, three times those of its forward pass (PaLM, arXiv
    2204.02311, appendix B), over those that the devices could do.

    Args:
        whole: the step of one rank that holds whole sequences.
        options: choices of the run.
        grid: the ranks.
        batch: how many such steps one step of the grid comes to.
        seconds: of a step of the grid.
    """
    flops = 3.0 * batch * whole.work[0, :2].sum()
    return flops / (seconds * grid.data_size * grid.size * grid.hardware.peak_of(options.precision))


def _rates(hardware: Hardware, options: Options) -> np.ndarray:
    """Of each kind of work, how much of it is done a second."""
    peak = hardware.peak_of(options.precision)
    launches = 1 / hardware.launch if hardware.launch else np.inf
    return np.array([peak * hardware.matmul, peak * hardware.attention, hardware.bandwidth / _TOUCHES, launches])


def _traced(trace: Trace, grid: Grid, rates: np.ndarray, batches: int) -> list[Transfer]:
    """What a sequence group sends; the update once a step, all else for each batch."""
    transfers = []
    for kind, (calls, payload, *work, stage) in zip(trace.kinds, trace.collectives):
        times = 1 if round(stage) == 2 else batches
        hidden = times * float((np.array(work) / rates[:3]).sum())
        transfers.append(Transfer(str(kind), "sequence", grid.size, times * calls, times * payload, hidden))
    return transfers


def _of_parameters(trace: Trace, options: Options, grid: Grid, shards: int, shared: str) -> list[Transfer]:
    """Gradients of shared parameters are averaged over the world, those of a segment's own over the data group. With FSDP
    parameters are gathered for the forward and again for the backward pass, and gradients scattered."""
    sizes, world = dict(zip(PARAMETERS, trace.parameters.tolist())), grid.data_size * grid.size
    forward, backward = (float((stage / _rates(grid.hardware, options)).sum()) for stage in trace.work[:2])
    grads = sizes["shared"] * (2 / parameter_bytes(options.precision) if options.communication_dtype else 1.0)
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
