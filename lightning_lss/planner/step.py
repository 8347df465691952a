"""Run one training step of a user's own LightningModule on tensors without contents, as one rank among stand-ins."""

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
    """Options of a run, beside the module's own, that change a rank's step.

    Args:
        precision: one of :data:`PRECISIONS`, Lightning's names.
        layout: how a sequence is split, ``"zigzag"`` or ``"contiguous"``.
        sequence_dims: see :func:`lightning_lss.sequence.batch.split_batch`.
        communication_dtype: ``"bfloat16"`` or ``"float16"`` to send keys, values and gradients in; None: their own.
        accumulate_grad_batches: batches of one step.
        sharding: divide parameters, gradients and optimizer state among all ranks (``"fsdp"``) or among the ranks of a
            sequence group (``"hybrid"``); None gives every rank all of them.
        activation_checkpointing, checkpointed_modules, mlp_tiles, tiled_modules: see
            :class:`~lightning_lss.LSSStrategy`.
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
        """The options that change how the module's blocks are called."""
        checkpointing = self.activation_checkpointing
        return MemoryOptions(checkpointing, self.checkpointed_modules, self.mlp_tiles, self.tiled_modules)

    def shards(self, data_size: int, size: int) -> int:
        """Count the ranks that a parameter is divided among."""
        return {None: 1, "hybrid": size, "fsdp": data_size * size}[self.sharding]

    def __post_init__(self) -> None:
        known = {"precision": PRECISIONS, "layout": LAYOUTS, "sharding": (None, "fsdp", "hybrid")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                choices = ", ".join(map(repr, values))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {choices}.")
        resolve_communication_dtype(self.communication_dtype)
        _ = self.memory  # refuses invalid options
        check_positive(accumulate_grad_batches=self.accumulate_grad_batches)


class Scheme(Protocol):
    """A way other than LSS to divide a sequence among S ranks, in contiguous segments."""

    @property
    def name(self) -> str:
        """Name in tables."""

    def check(self, module: pl.LightningModule, length: int, size: int) -> None:
        """Raise ``ValueError`` if the module, or a sequence of ``length``, cannot be divided among ``size`` ranks."""

    def prepare(self, module: pl.LightningModule, rank: int, group: dist.ProcessGroup) -> None:
        """Give a module without contents the parameters of ``rank`` in ``group``, the S ranks."""

    def after_backward(self, module: pl.LightningModule) -> None:
        """Run what lies between backward and the optimizer's step."""


@dataclass(frozen=True)
class Rank:
    """The busiest of ``size`` ranks that share ``batch_size`` sequences of ``length`` under ``scheme`` (None is LSS).

    ``kernel`` names the attention kernel. ``skips_blocks``: see :func:`~lightning_lss.planner.blocks.skip_repeated`.
    """

    size: int
    length: int
    batch_size: int
    options: Options
    kernel: str
    scheme: Scheme | None = None
    skips_blocks: bool = True

    @property
    def index(self) -> int:
        """Index of the busiest rank: under a causal mask the last of contiguous segments sees the most keys."""
        return self.size - 1 if self.scheme or self.options.layout == "contiguous" else 0

    def shard(self, group: dist.ProcessGroup | None) -> SequenceShard:
        """Return the rank's place in ``group``."""
        if self.scheme:
            return SequenceShard(self.index, self.size, "contiguous", group)
        dtype = resolve_communication_dtype(self.options.communication_dtype)
        return SequenceShard(self.index, self.size, self.options.layout, group, dtype)


def trace_step(module: pl.LightningModule, batch: Any, rank: Rank) -> Trace:
    """Trace the second step of a run, when the optimizer has its state, without computing anything.

    Args:
        module: the user's own; it stays unchanged. Its parameters may be on any device, the meta device included.
        batch: an example with whole sequences, of any length, batch size and device.
        rank: the rank whose step is traced.

    Raises:
        ValueError: if the module needs contents, optimizes manually, or asks more of its Trainer than the stand-in has.
    """
    if not module.automatic_optimization:
        raise ValueError("A module with automatic_optimization=False cannot be planned: its steps are unknown.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _group_of(rank) as group, _default_dtype(rank.options.precision):
        try:
            if rank.scheme is not None:  # the first time DTensor derives shapes by operators that no rank runs
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
        self.shard = rank.shard(group)
        self.tracker = Tracker()
        self.module = without_contents(module, mode, _dtype_of(rank.options.precision))
        self._prepare()
        with mode:
            self.batch = self._own_batch(batch)
            self.optimizers = _optimizers(self.module.configure_optimizers())

    def _prepare(self) -> None:
        module = self.module
        module.trainer = StandInTrainer(self.shard)  # type: ignore[assignment]
        module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        module.train()
        for table in [x for x in module.modules() if isinstance(x, SegmentPositionalEmbedding)]:
            table.num_positions = self.rank.length
            with self.mode:
                table.weight = nn.Parameter(torch.empty(self.rank.length, table.dim))
        if self.rank.scheme is not None:
            assert self.group is not None
            # outside the mode, since a device mesh needs contents
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
        """Run forward, backward and the optimizer's step; as in Lightning, old gradients are freed after forward."""
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
                    group["foreach"] = self.rank.kernel != "cpu_flash"  # torch chooses by the device
            optimizer.step()

    def _parameters(self) -> np.ndarray:
        own = set(segment_local_names(self.module)) if self.shard.size > 1 else set()
        named = dict(self.module.named_parameters())
        sizes = {x: part.nbytes for x, part in zip(named.values(), _local(named.values()))}
        local = sum(sizes.pop(x) for name, x in named.items() if name in own)
        units = [sum(sizes.get(x, 0) for x in unit.parameters()) for unit in units_of(self.module)]
        total = sum(sizes.values())
        return np.array([total, local, total - sum(units), max(units, default=0), len(units)], dtype=float)


def _group_of(rank: Rank) -> AbstractContextManager[dist.ProcessGroup | None]:
    """Make the sequence group, None for one rank. For CPU kernels it is called as if it were gloo."""
    if rank.size == 1:
        return nullcontext()
    if dist.is_initialized():
        raise ValueError("plan cannot run within a process group: call it before the Trainer, or in another process.")
    return fake_world(rank.index, rank.size, like_gloo=rank.kernel == "cpu_flash")


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step must return a loss, or a dict with one; it returned {type(output).__name__}.")
    return loss


def _optimizers(configured: Any) -> list[Optimizer]:
    """Find the optimizers in whatever ``configure_optimizers`` returned."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return [configured["optimizer"]]
    if isinstance(configured, (list, tuple)):
        return [x for entry in configured for x in _optimizers(entry)]
    return []


def _local(tensors: Any) -> list[Tensor]:
    """Return the tensors in this rank's own memory."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, Tensor)]


def _dtype_of(precision: str) -> torch.dtype | None:
    """Return the dtype of parameters in a "true" precision; None for float32, the usual one."""
    name, _, kind = precision.partition("-")
    return _DTYPES[name] if kind == "true" and name != "32" else None


@contextmanager
def _default_dtype(precision: str) -> Iterator[None]:
    """Create tensors in the dtype of a "true" precision, as Lightning does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype_of(precision) or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameter_bytes(precision: str) -> int:
    """Return the bytes of one number in parameters and gradients."""
    return (_dtype_of(precision) or torch.float32).itemsize


def _autocast(precision: str) -> Any:
    name, _, kind = precision.partition("-")
    return torch.autocast("cpu", _DTYPES[name]) if kind == "mixed" else nullcontext()
