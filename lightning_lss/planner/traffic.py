"""What a rank receives from others in one training step, collective by collective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lightning_lss.planner.parameters import count
from lightning_lss.planner.setup import Setup

Group = Literal["sequence", "data", "world"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step.

    Args:
        name: what travels.
        group: over which ranks: those that share a sequence, those that hold the same segment, or all.
        ranks: how many they are.
        calls: number of collectives.
        received: bytes that a rank receives in all of them. An all-reduce counts as a reduce-scatter and an all-gather.
        rounds: messages that have to follow each other in a ring, for each call.
        hidden_behind: the work that it can overlap with, ``"attention"``, ``"backward"``, ``"compute"`` or None.
    """

    name: str
    group: Group
    ranks: int
    calls: int
    received: float
    rounds: int
    hidden_behind: str | None


def step_traffic(setup: Setup) -> list[Traffic]:
    """All collectives of a step but those of a few bytes (the number of tokens, metrics)."""
    every_batch = _lss(setup) if setup.scheme == "lss" else _megatron(setup)
    if setup.options.sharding is None:
        once = _gradients(setup)
    else:
        every_batch, once = every_batch + _sharded(setup), _after_sharded(setup)
    batches = setup.options.accumulate_grad_batches
    entries = [replace(entry, calls=entry.calls * batches, received=entry.received * batches) for entry in every_batch]
    return [entry for entry in entries + once if entry.ranks > 1 and entry.calls]


def _ring(
    name: str, group: Group, ranks: int, calls: int, whole: float, behind: str | None, passes: int = 1
) -> Traffic:
    """``whole``: bytes of all calls, of what is gathered or before it is scattered."""
    received = passes * whole * (ranks - 1) / ranks
    return Traffic(name, group, ranks, calls, received, passes * (ranks - 1), behind)


def _lss(setup: Setup) -> list[Traffic]:
    """K and V are gathered, their gradients scattered; K and V are gathered once more for the backward pass unless they were
    kept, and once more where the forward pass is computed again."""
    layers, chunks = setup.config.num_layers, setup.head_chunks
    size = setup.travelling(setup.precision.compute)
    whole = 2 * setup.batch_size * setup.seq_len * setup.kv_width * layers * size
    again = setup.activation_checkpointing in ("full", "offload")

    def collective(name: str, times: int) -> Traffic:
        return _ring(name, "sequence", setup.size, times * chunks * layers, times * whole, "attention")

    return [
        collective("gather keys, values", 1 + again),
        collective("gather keys, values again", 0 if setup.config.keep_gathered else 1),
        collective("scatter their gradients", 1),
    ]


def _megatron(setup: Setup) -> list[Traffic]:
    """Before attention and before the MLP the sequence is gathered and behind them partial sums are scattered; in the backward
    pass the other way round (arXiv 2205.05198, section 4.2.2)."""
    layers, tiles = setup.config.num_layers, setup.mlp_tiles
    whole = setup.batch_size * setup.seq_len * setup.config.width * setup.precision.compute * layers
    times = 2 if setup.activation_checkpointing != "none" else 1  # that a block's forward pass is computed
    mlp_times = times + (tiles > 1)  # tiles are computed once more by themselves
    forward, calls = times + mlp_times, (times + mlp_times * tiles) * layers
    return [
        _ring("gather activations", "sequence", setup.size, calls, forward * whole, None),
        _ring("scatter activations", "sequence", setup.size, calls, forward * whole, None),
        _ring("gather gradients", "sequence", setup.size, 2 * layers, 2 * whole, None),
        _ring("scatter gradients", "sequence", setup.size, 2 * layers, 2 * whole, None),
    ]


_BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default


def _gradients(setup: Setup) -> list[Traffic]:
    """Gradients of shared parameters are averaged over the world, those of one segment or one share over the data group."""
    parameters = count(setup)
    own = parameters.positions
    if setup.scheme == "megatron":
        own += parameters.num_layers * (parameters.attention + parameters.mlp)
    size = setup.travelling(setup.precision.parameter)

    # MegatronStrategy averages when the backward pass is over
    behind = None if setup.scheme == "megatron" else "backward"

    def average(name: str, group: Group, ranks: int, numbers: int) -> Traffic:
        whole = numbers * size
        return _ring(name, group, ranks, -(-whole // _BUCKET), whole, behind, passes=2)

    return [
        average("average gradients", "world", setup.world_size, parameters.total - own),
        average("average own gradients", "data", setup.data_size, own),
    ]


def _sharded(setup: Setup) -> list[Traffic]:
    """Parameters are gathered for the forward and again for the backward pass, gradients scattered."""
    parameters = count(setup)
    calls = parameters.num_layers + 1
    group: Group = "sequence" if setup.options.sharding == "hybrid" else "world"
    size = setup.precision.parameter
    whole, grads = parameters.shared * size, parameters.shared * setup.travelling(size)
    return [
        _ring("gather parameters", group, setup.shards, 2 * calls, 2 * whole, "compute"),
        _ring("scatter gradients", group, setup.shards, calls, grads, "backward"),
    ]


def _after_sharded(setup: Setup) -> list[Traffic]:
    """Hybrid sharding averages the shards over the data group, and so are the gradients of positions."""
    parameters, entries = count(setup), []
    size = setup.travelling(setup.precision.parameter)
    if setup.options.sharding == "hybrid":
        shard, calls = parameters.shared * size / setup.shards, parameters.num_layers + 1
        entries.append(_ring("average shards", "data", setup.data_size, calls, shard, "backward", passes=2))
    positions = parameters.positions * size
    own = _ring("average own gradients", "data", setup.data_size, int(positions > 0), positions, "backward", passes=2)
    return [*entries, own]
