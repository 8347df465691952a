"""The time of a training step, from operations, bytes and links: a roofline with collectives behind it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lss.attention.tiles import pairs_of_rank
from lightning_lss.planner.hardware import Hardware, Link
from lightning_lss.planner.parameters import count
from lightning_lss.planner.setup import Setup
from lightning_lss.planner.traffic import Traffic, step_traffic
from lightning_lss.planner.walk import Walk

_TOUCHES = 3  # every tensor that is made is written once and read about twice
_OPTIMIZER_TOUCHES = 7  # AdamW reads four tensors and writes three
_KERNELS = 90  # of a block, forward and backward, without attention


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: ``matmul``, ``attention``, ``memory`` (norms, activation functions, copies, the loss),
    ``launch``, ``optimizer``, and of the collectives what is not hidden behind computation; ``communication`` is all of
    theirs, hidden or not."""

    matmul: float
    attention: float
    memory: float
    launch: float
    optimizer: float
    exposed: float
    communication: float

    @property
    def total(self) -> float:
        """The step."""
        return self.matmul + self.attention + self.memory + self.launch + self.optimizer + self.exposed

    @property
    def compute(self) -> float:
        """What collectives can hide behind."""
        return self.matmul + self.attention + self.memory


def step_time(setup: Setup, hardware: Hardware) -> StepTime:
    """Predict the seconds of a training step of the busiest rank."""
    peak, batches = hardware.peak_of(setup.options.precision), setup.options.accumulate_grad_batches
    forward, backward = _matmul_flops(setup)
    matmul = batches * (forward + backward) / (peak * hardware.matmul)
    pairs = 12.0 * batches * setup.batch_size * setup.config.num_layers * setup.config.width * visible_pairs(setup)
    again = {"full": 4 / 12, "offload": 4 / 12}.get(setup.activation_checkpointing, 0.0)
    attention = pairs * (1 + again) / (peak * hardware.attention)
    memory = batches * _TOUCHES * _written(setup) / hardware.bandwidth
    shard = count(setup).held(setup.shards) * setup.precision.parameter
    launch = batches * hardware.launch * setup.config.num_layers * (_KERNELS + _attention_calls(setup))
    optimizer = _OPTIMIZER_TOUCHES * shard / hardware.bandwidth
    in_turn = 1 if setup.options.sharding else batches  # DDP's averages wait for the last batch
    room = {
        "attention": attention,
        "backward": (matmul + attention + memory) * 2 / 3 / in_turn,
        "compute": matmul + attention + memory,
    }
    traffic = step_traffic(setup)
    seconds = [collective_time(entry, setup, hardware) for entry in traffic]
    exposed = 0.0
    for entry, time in zip(traffic, seconds):
        hidden = _hidden(entry, time, room, setup, hardware)
        exposed += time - hidden
        room = {work: left - hidden for work, left in room.items()}  # what hides one collective hides no other
    return StepTime(matmul, attention, memory, launch, optimizer, exposed, sum(seconds))


def utilization(setup: Setup, hardware: Hardware, seconds: float) -> float:
    """Model FLOP/s utilization: the operations that the model needs over those that the devices could do."""
    flops = setup.config.training_flops(setup.sequences, setup.seq_len)
    return flops / (seconds * setup.world_size * hardware.peak_of(setup.options.precision))


def visible_pairs(setup: Setup) -> float:
    """Query-key pairs of one sequence that the busiest rank computes. Under Megatron a rank has its share of the heads and
    with them of all pairs."""
    length = setup.seq_len
    if not setup.config.causal:
        return length * length / setup.size
    if setup.scheme == "megatron" or setup.size == 1:
        return length * (length + 1) / 2 / setup.size
    return pairs_of_rank(length, setup.size - 1, setup.size, setup.options.layout, causal=True)


def _matmul_flops(setup: Setup) -> tuple[float, float]:
    """Operations of a rank's matrix multiplications, forward (with what is computed again) and backward."""
    config, parameters = setup.config, count(setup)
    rows = setup.batch_size * setup.seq_len if setup.scheme == "megatron" else setup.local_tokens
    attention, mlp = (2.0 * rows * config.num_layers * numbers for numbers in (parameters.attention, parameters.mlp))
    head = 2.0 * setup.local_tokens * config.width * config.vocab_size
    forward = attention + mlp + head
    again = 0.0
    if setup.activation_checkpointing != "none":
        again += attention + mlp
    if setup.mlp_tiles > 1:  # tiles are computed once more by themselves
        again += mlp
    return forward + again, 2 * forward


def _written(setup: Setup) -> float:
    """Bytes of all tensors that a step makes, but parameters and optimizer state."""
    walk = Walk(setup)
    walk.step()
    standing = count(setup).held(setup.shards) * 3 * setup.precision.parameter
    return walk.ledger.written - standing


def _attention_calls(setup: Setup) -> int:
    """Kernels of a layer's attention, forward and backward: a few for each chunk of heads and tile."""
    return 10 * setup.head_chunks if setup.scheme == "lss" and setup.size > 1 else 4


def collective_time(traffic: Traffic, setup: Setup, hardware: Hardware) -> float:
    """Seconds of collectives in rings: rounds of latency, and the bytes over the slowest link."""
    link = _link(traffic, setup, hardware)
    return traffic.calls * traffic.rounds * link.latency + traffic.received / link.bandwidth


def _link(traffic: Traffic, setup: Setup, hardware: Hardware) -> Link:
    """The link that bounds a ring. Neighbouring ranks form a sequence group, so a ring of many enters each node once and has
    the node's link for itself, unless groups do not line up with nodes and two of them share it; a data group has one rank
    in each sequence group, and so many rings pass through a node."""
    node = hardware.devices_per_node
    if traffic.group != "data":
        straddles = setup.world_size > node and node % traffic.ranks != 0 and traffic.ranks % node != 0
        crosses, rings = traffic.ranks > node or straddles, 2 if straddles else 1
    else:
        crosses, rings = setup.world_size > node, min(setup.size, node)
    if not crosses:
        return hardware.inside
    bandwidth = min(hardware.inside.bandwidth, hardware.between.bandwidth / rings)
    return Link(bandwidth, max(hardware.inside.latency, hardware.between.latency))


def _hidden(traffic: Traffic, seconds: float, room: dict[str, float], setup: Setup, hardware: Hardware) -> float:
    """Seconds of a collective that computation hides, of which there is ``room`` left."""
    if traffic.hidden_behind is None:
        return 0.0
    share = hardware.overlap
    if traffic.hidden_behind == "attention":  # the first chunk has nothing before it, the last no kernel behind it
        share *= 1 - 1 / setup.head_chunks
    return max(0.0, min(seconds * share, room[traffic.hidden_behind]))
