"""Memory of a rank by part, with torch's own tracker, on real ranks or on shapes alone.

What is counted are the storages of tensors, in the categories of :class:`torch.distributed._tools.mem_tracker.MemTracker`.
Activations are everything that is no parameter, buffer, gradient of a parameter or optimizer state: what forward keeps
for backward, and all temporaries of either, received keys and values included. Not counted: what a kernel allocates for
itself and frees before it returns, DistributedDataParallel's buckets (as large as the gradients, made beside torch's
dispatcher), buffers inside gloo, and the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils._pytree import tree_leaves

from benchmarks.contestants import CONTESTANTS
from benchmarks.training import Job, fit, place_attention
from lightning_lss import LSSTransformer, SequenceShard
from lightning_lss.model import Transformer, TransformerConfig
from lightning_lss.shard import sharded_modules

_PARTS = {
    "parameters": (_MemRefType.PARAM, _MemRefType.BUFFER),
    "gradients": (_MemRefType.GRAD,),
    "optimizer": (_MemRefType.OPT,),
}
_ACTIVATIONS = (_MemRefType.ACT, _MemRefType.TEMP)


class Peak(NamedTuple):
    """Bytes of one rank: the peak of each part, and the peak of their sum."""

    activations: int
    parameters: int
    gradients: int
    optimizer: int
    total: int


class StepTracker(MemTracker):
    """Tracks one training step, for the peak of each part.

    Lightning calls forward and backward from within the optimizer's step, so the optimizer's own part is the caller's
    to announce, with :attr:`in_optimizer`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks = {"activations": 0, "parameters": 0, "gradients": 0, "optimizer": 0, "total": 0}

    @property
    def in_optimizer(self) -> bool:
        """Whether what is allocated now is optimizer state."""
        return self._in_opt

    @in_optimizer.setter
    def in_optimizer(self, value: bool) -> None:
        self._in_opt = value

    def peak(self) -> Peak:
        """What was found."""
        return Peak(**self.peaks)

    def _register_global_optimizer_hook(self) -> None:
        """The base class would take everything within ``optimizer.step`` for optimizer state."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        sizes = {"activations": 0, "parameters": 0, "gradients": 0, "optimizer": 0, "total": 0}
        for parts in self._curr_mem_snap.values():
            sizes["activations"] += sum(parts[kind] for kind in _ACTIVATIONS)
            for name, kinds in _PARTS.items():
                sizes[name] += sum(parts[kind] for kind in kinds)
        sizes["total"] = sum(sizes.values())
        for name, size in sizes.items():
            self.peaks[name] = max(self.peaks[name], size)


class _TrackedStep(pl.Callback):
    """Tracks one step, after those of the warm-up: optimizer state and DDP's buckets exist by then."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.tracker = StepTracker()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            optimizers = [optimizer.optimizer for optimizer in trainer.strategy._lightning_optimizers]
            self.tracker.track_external(pl_module, *optimizers, *tree_leaves(batch))
            self.tracker.__enter__()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.tracker.in_optimizer = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.tracker.__exit__(None, None, None)
        self.tracker.in_optimizer = False


def track_ranks(rank: int, name: str, size: int, job: Job) -> Peak:
    """The peak of the job's last step on this rank, under the real Trainer."""
    tracked = _TrackedStep(job.steps - 1)
    fit(name, size, job, tracked)
    return tracked.tracker.peak()


def track_shapes(_: int, name: str, size: int, job: Job) -> Peak:
    """The same for rank 0 of ``size`` without computing anything: fake tensors and a fake process group.

    A step without the Trainer; for contestants ``single``, ``megatron`` and those that run under LSSStrategy without
    options.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        module = LSSTransformer(seq_len=size)  # outside, since metrics do not like fake tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _fake_step(module, name, size, job)
    finally:
        dist.destroy_process_group()


def _fake_step(module: LSSTransformer, name: str, size: int, job: Job) -> Peak:
    contestant = CONTESTANTS[name]
    module.model = Transformer(TransformerConfig(**{**job.model, **contestant.model}))
    place_attention(module, contestant)
    local = job.length // size
    if contestant.strategy == "megatron":
        from torch.distributed.device_mesh import init_device_mesh

        from lightning_lss.megatron import parallelize

        parallelize(module.model, init_device_mesh("cpu", (1, size), mesh_dim_names=("data_parallel", "tensor_parallel")))
    else:
        for part in sharded_modules(module):
            part.set_shard(SequenceShard(0, size, contestant.layout, dist.group.WORLD))
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    batch = {key: torch.zeros(1, local, dtype=torch.int64) for key in ("inputs", "targets")}
    tracker = None
    for last in (False, True):  # the first step makes the optimizer's state
        if last:
            tracker = StepTracker()
            tracker.track_external(module, optimizer, *batch.values())
            tracker.__enter__()
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        if tracker is not None:
            tracker.in_optimizer = True
        optimizer.step()
    assert tracker is not None
    tracker.__exit__(None, None, None)
    return tracker.peak()


def track_call(function: Callable[[], Tensor], *inputs: Tensor) -> int:
    """Peak bytes of a forward and backward pass beyond its inputs and their gradients."""
    tracker = StepTracker()
    tracker.track_external(*inputs)
    with tracker:
        function().backward()
    return tracker.peaks["activations"]


def longest_length(peak: Callable[[int], int], cap: int, step: int, start: int) -> int:
    """The longest multiple of ``step`` whose ``peak`` (bytes, by length) is at most ``cap``; 0 if there is none.

    Doubles from ``start`` until the cap is passed, then bisects; ``peak`` is taken to grow with the length.
    """
    low, high = 0, max(1, start // step)
    while peak(high * step) <= cap:
        low, high = high, 2 * high
    while high - low > max(1, low // 256):  # to 0.4 %
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * step) <= cap else (low, middle)
    return low * step
