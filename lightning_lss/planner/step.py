"""Run one training step of a user's own LightningModule on tensors without contents, as one rank of a world of fakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_lss.attention.module import LSSAttention
from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.nn.recompute import ActivationCheckpointing
from lightning_lss.parallel.fsdp import units_of
from lightning_lss.planner.blocks import skip_repeated
from lightning_lss.planner.fakes import MissingError, StandInTrainer, host_memory, resized, without_contents
from lightning_lss.planner.fingerprint import structure
from lightning_lss.planner.kernels import stand_in
from lightning_lss.planner.trace import Trace
from lightning_lss.planner.tracker import Tracker
from lightning_lss.sequence.batch import SequenceDims, map_tensors, split_batch, tensors_by_path
from lightning_lss.sequence.dtypes import resolve_communication_dtype
from lightning_lss.sequence.layout import LAYOUTS, check_positive
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_local_names, segment_modules
from lightning_lss.strategy.memory import MemoryOptions
from lightning_lss.testing.fake_world import fake_world

_DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
PRECISIONS = ("64-true", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Options:
    """Choices of a run that change a rank's step, and are not the module's.

    Args:
        precision: Lightning's name of it, one of :data:`PRECISIONS`.
        layout: how a sequence is split, ``"zigzag"`` or ``"contiguous"``.
        sequence_dims: see :func:`lightning_lss.sequence.batch.split_batch`.
        communication_dtype: ``"bfloat16"`` or ``"float16"``, in which keys, values and gradients are sent; None for their own.
        accumulate_grad_batches: batches of one step, one after the other.
        sharding: None, every rank has all parameters; ``"fsdp"``, parameters, gradients and optimizer state are in equal
            parts on all ranks; ``"hybrid"``, on the ranks of a sequence group.
        activation_checkpointing, checkpointed_modules, mlp_tiles, tiled_modules: see :class:`~lightning_lss.LSSStrategy`.
    """

    precision: str = "32-true"
    layout: str = "zigzag"
    sequence_dims: SequenceDims | None = None
    communication_dtype: str | None = None
    accumulate_grad_batches: int = 1
    sharding: str | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    checkpointed_modules: Sequence[str] | None = None
    mlp_tiles: int = 1
    tiled_modules: Sequence[str] | None = None

    @property
    def memory(self) -> MemoryOptions:
        """What is applied to the module."""
        return MemoryOptions(
            self.activation_checkpointing, self.checkpointed_modules, self.mlp_tiles, self.tiled_modules
        )

    def shards(self, data_size: int, size: int) -> int:
        """On how many ranks the parts of a parameter lie."""
        return {None: 1, "hybrid": size, "fsdp": data_size * size}[self.sharding]

    def __post_init__(self) -> None:
        known = {"precision": PRECISIONS, "layout": LAYOUTS, "sharding": (None, "fsdp", "hybrid")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                choices = ", ".join(map(repr, values))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {choices}.")
        resolve_communication_dtype(self.communication_dtype)
        _ = self.memory  # refuses what it cannot be
        check_positive(accumulate_grad_batches=self.accumulate_grad_batches)


class Scheme(Protocol):
    """Another way than LSS to share a sequence among S ranks, in contiguous segments."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def check(self, module: pl.LightningModule, length: int, size: int) -> None:
        """Raise ``ValueError`` if ``size`` ranks cannot share the module, or a sequence of ``length``."""

    def prepare(self, module: pl.LightningModule, rank: int, group: dist.ProcessGroup) -> None:
        """Make a module without contents that of ``rank`` in ``group``, the S ranks."""

    def after_backward(self, module: pl.LightningModule) -> None:
        """What happens between backward and the optimizer's step."""


@dataclass(frozen=True)
class Rank:
    """Whose step is traced: the busiest of S ranks, on a batch of sequences of ``length``, sharing them by ``scheme`` (None is
    LSS). ``skips_blocks``: see :func:`~lightning_lss.planner.blocks.skip_repeated`."""

    size: int
    length: int
    batch_size: int
    options: Options
    kernel: str
    scheme: Scheme | None = None
    skips_blocks: bool = True

    @property
    def shard(self) -> SequenceShard:
        """Its place, without a group. Under a causal mask the last of contiguous segments sees the most keys."""
        layout = "contiguous" if self.scheme else self.options.layout
        return SequenceShard(self.size - 1 if layout == "contiguous" else 0, self.size, layout)


def trace_step(module: pl.LightningModule, batch: Any, rank: Rank) -> Trace:
    """Trace the second step of a run, when the optimizer has its state, without computing anything.

    Args:
        module: the user's own; it is left as it is. Its parameters may lie anywhere, on the meta device as well.
        batch: an example with whole sequences, of any length, batch size and device.
        rank: whose step.

    Raises:
        ValueError: if the module does what can only be done with numbers, naming it.
    """
    if not module.automatic_optimization:
        raise ValueError("A module with automatic_optimization=False cannot be planned: its steps are its own.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _group_of(rank) as group, _default_dtype(rank.options.precision):
        try:
            if rank.scheme is not None:  # DTensor works out whole shapes the first time, in operators that no rank runs
                _Step(module, batch, rank, mode, group).run()
            return _Step(module, batch, rank, mode, group).run()
        except MissingError as error:
            raise ValueError(str(error)) from error
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ValueError(
                f"{type(module).__name__} asks for the value of a tensor ({error}), but the planner runs it on tensors without"
                " contents. Leave out `.item()`, `if` on tensors and boolean indexing in training_step."
            ) from error


class _Step:
    """One traced step."""

    def __init__(
        self, module: pl.LightningModule, batch: Any, rank: Rank, mode: FakeTensorMode, group: dist.ProcessGroup | None
    ) -> None:
        self.rank, self.mode, self.group = rank, mode, group
        self.shard = SequenceShard(
            rank.shard.rank,
            rank.size,
            rank.shard.layout,
            group,
            resolve_communication_dtype(rank.options.communication_dtype) if rank.scheme is None else None,
        )
        self.tracker = Tracker()
        self.module = without_contents(module, mode, _dtype_of(rank.options.precision))
        self.trainer = StandInTrainer(self.shard)
        self._prepare()
        with mode:
            self.batch = self._own_batch(batch)
            self.optimizers = _optimizers(self.module.configure_optimizers())

    def _prepare(self) -> None:
        module = self.module
        module.trainer = self.trainer  # type: ignore[assignment]
        module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        module.train()
        for table in [x for x in module.modules() if isinstance(x, SegmentPositionalEmbedding)]:
            table.num_positions = self.rank.length
            with self.mode:
                table.weight = nn.Parameter(torch.empty(self.rank.length, table.dim))
        if self.rank.scheme is not None:
            assert self.group is not None
            # outside of the mode, in which a device mesh would have no contents either
            self.rank.scheme.prepare(module, self.shard.rank, self.group)
        else:
            with self.mode:
                module.configure_model()
                for segmented in segment_modules(module):
                    segmented.set_shard(self.shard)
        self.rank.options.memory.apply(module)
        for part in module.modules():
            if isinstance(part, SegmentDropout):  # draws a seed; torch's own dropout allocates the same
                part.set_shard(WHOLE_SEQUENCE)
            elif isinstance(part, LSSAttention) and part.kernel != "reference":
                part.kernel = "auto"

    def _own_batch(self, batch: Any) -> Any:
        whole = resized(batch, self.rank.length, self.rank.batch_size, self.rank.options.sequence_dims)
        split_by_module = getattr(self.module, "shard_batch", None)
        if split_by_module is not None and self.shard.size > 1:
            part = split_by_module(whole, self.shard)
        else:
            part = split_batch(whole, self.shard, self.rank.options.sequence_dims)
        dtype = _dtype_of(self.rank.options.precision)
        return map_tensors(part, lambda _, x: x.to(dtype) if dtype and x.is_floating_point() else x)

    def run(self) -> Trace:
        """Forward, backward and the optimizer's step, in Lightning's order: the last step's gradients are freed after the
        forward pass."""
        tracker, module = self.tracker, self.module
        trained = [x for x in module.parameters() if x.requires_grad]
        with self.mode:
            for x in trained:
                x.grad = torch.empty_like(x)
            self._update()  # allocates the optimizer's state
            tracker.hold(_local([*module.parameters(), *module.buffers()]), "parameters")
            tracker.hold(_local(x.grad for x in trained), "gradients")
            tracker.hold(_local(tree_leaves([dict(x.state) for x in self.optimizers])), "optimizer")
            tracker.hold(x for _, x in tensors_by_path(self.batch))
            for x in trained:
                x.register_post_accumulate_grad_hook(lambda x: tracker.hold(_local([x.grad]), "gradients"))
            runs = skip_repeated(module, tracker, structure) if self.rank.skips_blocks else []
            with tracker, host_memory(self.rank.kernel), stand_in(self.rank.kernel, self.rank.length, tracker):
                with _autocast(self.rank.options.precision):
                    loss = _loss_of(module.training_step(self.batch, 0))
                if self.rank.options.accumulate_grad_batches == 1:
                    module.zero_grad()
                tracker.stage = 1
                for run in runs:
                    run.begin_backward()
                loss.backward()
                del loss
                tracker.stage = 2
                if self.rank.scheme is not None:
                    self.rank.scheme.after_backward(module)
                self._update()
        for run in runs:
            run.add_work()
        return tracker.result(self._parameters())

    def _update(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                plain = not group.get("fused") and not any(isinstance(x, DTensor) for x in group["params"])
                if plain and group.get("foreach", True) is None:
                    group["foreach"] = self.rank.kernel != "cpu_flash"  # torch's choice, which goes by the device
            optimizer.step()

    def _parameters(self) -> np.ndarray:
        own = set(segment_local_names(self.module)) if self.shard.size > 1 else set()
        shared = {x: _bytes(x) for name, x in self.module.named_parameters() if name not in own}
        local = sum(_bytes(x) for name, x in self.module.named_parameters() if name in own)
        units = [[shared[x] for x in unit.parameters() if x in shared] for unit in units_of(self.module)]
        in_units = [sum(unit) for unit in units]
        total = sum(shared.values())
        return np.array([total, local, total - sum(in_units), max(in_units, default=0), len(units)], dtype=float)


def _group_of(rank: Rank) -> AbstractContextManager[dist.ProcessGroup | None]:
    """The group of a sequence, None of one rank. On CPUs it is called as if it were gloo."""
    if rank.size == 1:
        return nullcontext()
    if dist.is_initialized():
        raise ValueError("plan cannot run within a process group: call it before the Trainer, or in another process.")
    return fake_world(rank.shard.rank, rank.size, like_gloo=rank.kernel == "cpu_flash")


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step must return a loss, or a dict with one; it returned {type(output).__name__}.")
    return loss


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in whatever ``configure_optimizers`` returns."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return [configured["optimizer"]]
    if isinstance(configured, (list, tuple)):
        return [x for entry in configured for x in _optimizers(entry)]
    return []


def _local(tensors: Any) -> list[Tensor]:
    """Tensors of this rank's own memory."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


def _dtype_of(precision: str) -> torch.dtype | None:
    """The dtype of parameters with a "true" precision other than the usual one."""
    name, _, kind = precision.partition("-")
    return _DTYPES[name] if kind == "true" and name != "32" else None


@contextmanager
def _default_dtype(precision: str) -> Iterator[None]:
    """Make tensors of the dtype of a "true" precision, as Lightning does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype_of(precision) or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameter_bytes(precision: str) -> int:
    """Bytes of a number in parameters and gradients."""
    return (_dtype_of(precision) or torch.float32).itemsize


def _autocast(precision: str) -> Any:
    name, _, kind = precision.partition("-")
    return torch.autocast("cpu", _DTYPES[name]) if kind == "mixed" else nullcontext()
