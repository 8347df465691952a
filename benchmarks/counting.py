"""Counting what a rank receives: every collective that torch dispatches, by phase of the step and operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.training import Job, fit
from lightning_lss.planner.seeing import is_own_operator, run_inside

# Names in the c10d namespace (collectives in place) and in _c10d_functional (DTensor's), torch 2.11 to 2.13.
_KINDS = {
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "recv_": "receive",
    "irecv": "receive",
}
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_SILENT = {
    "send",
    "isend",
    "barrier",
    "monitored_barrier_",
    "wait_tensor",
    "_wrap_tensor_autograd",
}  # what receives no payload

Tally = Counter[tuple[str, str, int]]
"""(phase, kind, bytes that this rank receives) -> number of such collectives."""


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives dispatched while it is active; all groups must be the whole world.

    Bytes are the payload that a rank has to receive from others in a ring: (n - 1) / n of an all-gather's output, a
    reduce-scatter's input or an all-to-all's input, and twice that of an all-reduce's tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.tally: Tally = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes back with its local tensors
        if is_own_operator(func):
            return run_inside(self, func, args, kwargs)
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in _NAMESPACES and name not in _SILENT:
            if name not in _KINDS:
                raise RuntimeError(f"The counter does not know the collective {func}: add it to its table.")
            self.tally[self.phase, _KINDS[name], _received(_KINDS[name], args, out)] += 1
        return out


def _received(kind: str, args: Any, out: Any) -> int:
    """Bytes of payload that this rank receives.

    For gathers and scatters the larger of output and input is the whole, in whatever order the operation takes them.
    """
    ranks = dist.get_world_size()
    sizes = [_nbytes(part) for part in (*args, out)]
    if kind == "all_reduce":
        return 2 * _nbytes(args[0]) * (ranks - 1) // ranks
    if kind in ("receive", "broadcast"):
        return _nbytes(args[0])
    return max(sizes) * (ranks - 1) // ranks


def _nbytes(part: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(part) if isinstance(x, Tensor))


class _CountedStep(pl.Callback):
    """Counts one step, after those of the warm-up, with forward, backward and the rest apart."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.counter = CollectiveCounter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.counter.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.counter.phase = "backward"

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counter.phase = "optimizer"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.counter.__exit__(None, None, None)
        self.counter.phase = "forward"


def count_step(rank: int, name: str, size: int, job: Job) -> Tally:
    """Collectives of the job's last step."""
    counted = _CountedStep(job.steps - 1)
    fit(name, size, job, counted)
    return counted.counter.tally


def per_layer(run: Callable[[Job], Tally], job: Job) -> tuple[Tally, int]:
    """What one layer adds to a step: the collectives of its activations, and the bytes of its parameters.

    A layer's collectives are those of a model of two layers without those of a model of one. The ones of parameters are
    as large for a sequence of 2 L as for one of L, the ones of activations are not.

    Args:
        run: from a job to its tally.
        job: the model and L.
    """
    twice = job.with_model(seq_len=2 * job.length)
    one, two = (run(job.with_model(num_layers=layers)) for layers in (1, 2))
    long_one, long_two = (run(twice.with_model(num_layers=layers)) for layers in (1, 2))
    layer, long_layer = two - one, long_two - long_one
    activations = layer - (layer & long_layer)
    return activations, total_bytes(two) - total_bytes(one) - total_bytes(activations)


def total_bytes(tally: Tally, phase: str | None = None) -> int:
    """Bytes received, in one phase or all."""
    return sum(size * number for (own, _, size), number in tally.items() if phase in (None, own))


def describe(tally: Tally, phase: str) -> str:
    """The collectives of a phase, such as ``1 all_gather + 1 reduce_scatter``."""
    numbers: Counter[str] = Counter()
    for (own, kind, _), number in tally.items():
        if own == phase:
            numbers[kind] += number
    return " + ".join(f"{number} {kind}" for kind, number in sorted(numbers.items()))
