"""Measure the memory of a rank by part with torch's own tracker, on real ranks or on shapes alone.

The tracker counts the storages of tensors, in the categories of
:class:`torch.distributed._tools.mem_tracker.MemTracker`. Activations are everything beside parameters, buffers,
gradients of parameters and optimizer state: tensors that forward keeps for backward, and all temporaries of either,
received keys and values included. The buckets of DistributedDataParallel, as large as the gradients, count as gradients
as soon as they are used. Not counted are a kernel's own buffers, freed before it returns, buffers inside gloo, and the
interpreter.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.steps import ranks_and_threads
from benchmarks.training import Job, fit, make_module
from lightning_lss import LSSTransformer, SequenceShard
from lightning_lss.megatron.parallelize import DATA, TENSOR, parallelize
from lightning_lss.sequence.segment import segment_local_names, segment_modules
from lightning_lss.testing.collectives import is_own_operator, run_inside
from lightning_lss.testing.fake_world import fake_world
from lightning_lss.testing.world import World

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
    """Track one training step, for the peak of each part.

    Lightning calls forward and backward from within the optimizer's step, so the caller has to announce the optimizer's
    own part, with :attr:`in_optimizer`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks = {"activations": 0, "parameters": 0, "gradients": 0, "optimizer": 0, "total": 0}

    @property
    def in_optimizer(self) -> bool:
        """Tell whether allocations count as optimizer state now."""
        return self._in_opt

    @in_optimizer.setter
    def in_optimizer(self, value: bool) -> None:
        self._in_opt = value

    def peak(self) -> Peak:
        """Return the peak so far."""
        return Peak(**self.peaks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and track; count DDP's buckets as gradients, since its reducer scales gradients into them."""
        if func is torch.ops.aten.mul.out and self._mod_tracker.is_bw:
            bucket = (kwargs or {})["out"]
            if bucket.untyped_storage() not in self._WINFO:
                self._update_and_maybe_create_winfos(bucket, _MemRefType.GRAD)
        if is_own_operator(func):
            return run_inside(self, func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        """Track every parameter; the base class would miss the gradients of those used without their module's forward,
        such as the head's weight in the loss."""
        return super()._track_module_params_and_buffers(module, install_grad_hooks=True)

    def _register_global_optimizer_hook(self) -> None:
        """Register nothing: the base class would take everything within ``optimizer.step`` for optimizer state."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        sizes = {"activations": 0, "parameters": 0, "gradients": 0, "optimizer": 0, "total": 0}
        for parts in self._curr_mem_snap.values():
            sizes["activations"] += sum(parts[kind] for kind in _ACTIVATIONS)
            for name, kinds in _PARTS.items():
                sizes[name] += sum(parts[kind] for kind in kinds)
        sizes["total"] = sum(sizes.values())
        for name, size in sizes.items():
            self.peaks[name] = max(self.peaks[name], size)


class TrackedStep(pl.Callback):
    """Track one step after the warm-up: by then optimizer state exists, and the tracker has met DDP's buckets in the
    step before."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.tracker = StepTracker()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to track in the step before."""
        if batch_idx == self.step - 1:
            optimizers = [optimizer.optimizer for optimizer in trainer.strategy._lightning_optimizers]
            self.tracker.track_external(pl_module, *optimizers, *tree_leaves(batch))
            self.tracker.__enter__()
        elif batch_idx == self.step:
            self.tracker.reset_mod_stats()  # it takes one call of each module at a time
            self.tracker.peaks = dict.fromkeys(self.tracker.peaks, 0)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Announce that the optimizer allocates from now on."""
        self.tracker.in_optimizer = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the step."""
        if batch_idx == self.step:
            self.tracker.__exit__(None, None, None)
        self.tracker.in_optimizer = False


def measure(world: World, name: str, size: int, job: Job, shapes: bool) -> Peak:
    """Measure the peak of the rank that needs most, in the job's last step. The warm-up must be three steps or more:
    DDP arranges its buckets in the first two."""
    if shapes:
        return world.run(1, track_shapes, name, size, job, group=False)[0]
    ranks, threads = ranks_and_threads(name, size)
    group = CONTESTANTS[name].strategy != "single"
    return max(world.run(ranks, track_ranks, name, ranks, job, threads=threads, group=group))


def track_ranks(rank: int, name: str, size: int, job: Job) -> Peak:
    """Measure the peak of the job's last step on this rank, under the real Trainer."""
    tracked = TrackedStep(job.steps - 1)
    fit(name, size, job, tracked)
    return tracked.tracker.peak()


def track_shapes(_: int, name: str, size: int, job: Job) -> Peak:
    """Measure the peak of rank 0 of ``size`` without computing: on fake tensors in a fake process group.

    The step runs without the Trainer, for ``single``, ``megatron`` and contestants under LSSStrategy without options.
    """
    with fake_world(0, size):
        module = _split_module(CONTESTANTS[name], size, job)
        mode = FakeTensorMode()
        _make_fake(module, mode)
        with mode:
            peak = _fake_step(module, job.length // size)
            buckets = 0 if CONTESTANTS[name].strategy in ("single", "megatron") else _bucket_bytes(module)
            return peak._replace(gradients=peak.gradients + buckets, total=peak.total + buckets)


def _bucket_bytes(module: nn.Module) -> int:
    """Count the bytes of DistributedDataParallel's buckets; they exist throughout a step."""
    own = segment_local_names(module)
    return sum(x.nbytes for name, x in module.named_parameters() if name not in own)


def _split_module(contestant: Contestant, size: int, job: Job) -> LSSTransformer:
    """Build the module of rank 0 of ``size``."""
    module = make_module(contestant, job)
    if contestant.strategy == "megatron":
        parallelize(module.model, init_device_mesh("cpu", (1, size), mesh_dim_names=(DATA, TENSOR)))
    else:
        for part in segment_modules(module):
            part.set_shard(SequenceShard(0, size, contestant.layout, dist.group.WORLD))
    return module


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones; tied ones stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None and not isinstance(part, Metric):
                    fakes[x] = fakes[x] if x in fakes else _fake_like(x, mode)
                    tensors[name] = fakes[x]


def _fake_like(x: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(x, DTensor):
        local = mode.from_tensor(x.to_local().detach())
        fake: Tensor = DTensor.from_local(
            local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
    else:
        fake = mode.from_tensor(x.detach())
    return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake


def _fake_step(module: LSSTransformer, local_length: int) -> Peak:
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    batch = {key: torch.zeros(1, local_length, dtype=torch.int64) for key in ("inputs", "targets")}
    tracker = StepTracker()
    for last in (False, True):  # the first step creates the optimizer's state
        if last:
            tracker.track_external(module, optimizer, *batch.values())
            tracker.__enter__()
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        tracker.in_optimizer = True
        optimizer.step()
        tracker.in_optimizer = False
    tracker.__exit__(None, None, None)
    return tracker.peak()


def track_loss(loss: Callable[..., Tensor], tokens: int, width: int, vocabulary: int, shapes: bool) -> int:
    """Measure the peak bytes of ``loss(features, weight, targets)`` and its backward pass, beyond the inputs.

    Args:
        loss: function of features [N, E] and weight [V, E], float32, and targets [N].
        tokens: N.
        width: E.
        vocabulary: V.
        shapes: whether to track fake tensors instead of computing. A C++ operator's own buffers are seen only when it
            computes.
    """
    with FakeTensorMode() if shapes else nullcontext():
        features, weight = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocabulary))
        targets = torch.randint(vocabulary, (tokens,))
        if not shapes:
            return allocated_peak(lambda: loss(features, weight, targets).backward())
        tracker = StepTracker()
        tracker.track_external(features, weight, targets)
        with tracker:
            loss(features, weight, targets).backward()
    return tracker.peaks["activations"]


def allocated_peak(function: Callable[[], Any]) -> int:
    """Measure the peak bytes that ``function`` holds of torch's CPU allocator beyond those before, kernels' own buffers
    included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def longest_length(peak: Callable[[int], int], cap: int, step: int, start: int) -> int:
    """Find the longest multiple of ``step`` whose ``peak`` (bytes, by length) is at most ``cap``; 0 if there is none.

    Double from ``start`` until the cap is passed, then bisect; this assumes that ``peak`` grows with the length.
    """
    low, high = 0, max(1, start // step)
    while peak(high * step) <= cap:
        low, high = high, 2 * high
    while high - low > max(1, low // 256):  # to 0.4 %
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * step) <= cap else (low, middle)
    return low * step
