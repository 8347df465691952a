"""Run one training step of a user's own LightningModule on tensors without contents, as one rank among stand-ins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_lss.attention.module import LSSAttention
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.nn.recompute import ActivationCheckpointing
from lightning_lss.parallel.fsdp import units_of
from lightning_lss.planner.fakes import MissingError, StandInTrainer, resized, stand_in, without_contents
from lightning_lss.planner.trace import Trace
from lightning_lss.planner.tracker import Tracker
from lightning_lss.sequence.batch import SequenceDims, split_batch, tensors_by_path
from lightning_lss.sequence.dtypes import resolve_communication_dtype
from lightning_lss.sequence.layout import STATIC_LAYOUTS, check_positive
from lightning_lss.sequence.segment import SequenceShard, segment_local_names, segment_modules
from lightning_lss.strategy.memory import MemoryOptions
from lightning_lss.strategy.view import wants_whole
from lightning_lss.testing.fake_world import fake_world

PRECISIONS: dict[str, Callable[[], Precision]] = {
    "64-true": DoublePrecision,
    "32-true": Precision,
    "bf16-true": partial(HalfPrecision, "bf16-true"),
    "16-true": partial(HalfPrecision, "16-true"),
    "bf16-mixed": partial(MixedPrecision, "bf16-mixed", "cpu"),
    "16-mixed": partial(MixedPrecision, "16-mixed", "cpu"),
}
"""Lightning's plugins by their names; steps are traced on CPU tensors."""


@dataclass(frozen=True)
class Options:
    """Options of a run, beside the module's own, that change a rank's step.

    Args:
        precision: a name in :data:`PRECISIONS`.
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
        if self.layout == "balanced":
            raise ValueError(
                "layout='balanced' is chosen for each batch by its mask, which a plan does not know. Plan with layout='zigzag', which is"
                " as even under a causal mask."
            )
        known = {"precision": PRECISIONS, "layout": STATIC_LAYOUTS, "sharding": (None, "fsdp", "hybrid")}
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

    ``kernel`` names the attention kernel.
    """

    size: int
    length: int
    batch_size: int
    options: Options
    kernel: str
    scheme: Scheme | None = None

    @property
    def index(self) -> int:
        """Index of the busiest rank: under a causal mask the last of contiguous segments sees the most keys."""
        return self.size - 1 if self.scheme or self.options.layout == "contiguous" else 0

    def shard(self, group: dist.ProcessGroup | None) -> SequenceShard:
        """Return the rank's place in ``group``."""
        layout = "contiguous" if self.scheme else self.options.layout
        dtype = None if self.scheme else resolve_communication_dtype(self.options.communication_dtype)
        return SequenceShard(self.index, self.size, layout, group, dtype)


def trace_step(module: pl.LightningModule, batch: Any, rank: Rank) -> Trace:
    """Trace the second step of a run, when the optimizer has its state, without computing anything.

    Args:
        module: the user's own; it stays unchanged. Its parameters may be on any device, the meta device included.
        batch: an example with whole sequences, of any length, batch size and device.
        rank: the rank whose step is traced.

    Raises:
        ValueError: if the module needs contents, optimizes manually, asks more of its Trainer than the stand-in has, or is one
            that would be shown whole sequences on several ranks.
    """
    if not module.automatic_optimization:
        raise ValueError("A module with automatic_optimization=False cannot be planned: its steps are unknown.")
    with _group_of(rank) as group, _untracked_shapes():
        try:
            return _Step(module, batch, rank, group).run()
        except MissingError as error:
            raise ValueError(str(error)) from error
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ValueError(
                f"{type(module).__name__} asks for the value of a tensor ({error}), but the planner runs it on tensors without"
                " contents. Leave out `.item()`, `if` on tensors and boolean indexing in training_step."
            ) from error


_SHOWN_WHOLE = (
    "{module} is not written for segments, so LSSStrategy shows it whole sequences; what its ranks then hold and send is not planned."
    " Plan an LSSTransformer of the same sizes, or write the module with LSSAttention."
)


class _Step:
    """One traced step."""

    def __init__(self, module: pl.LightningModule, batch: Any, rank: Rank, group: dist.ProcessGroup | None) -> None:
        self.rank, self.group, self.shard = rank, group, rank.shard(group)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker()
        self.precision = PRECISIONS[rank.options.precision]()
        self.module = without_contents(module, self.mode, self.precision)
        with self.precision.tensor_init_context():
            self._prepare()
            with self.mode:
                self.batch = self._own_batch(batch)
                configured: Any = self.module.configure_optimizers()
        self.optimizers = _configure_optimizers(configured)[0] if configured is not None else []

    def _prepare(self) -> None:
        module = self.module
        module.trainer = StandInTrainer(self.shard)  # type: ignore[assignment]
        module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        module.train()
        with self.mode:
            for table in [x for x in module.modules() if isinstance(x, SegmentPositionalEmbedding)]:
                table.num_positions = self.rank.length
                table.weight = nn.Parameter(torch.empty(self.rank.length, table.dim))
        if self.rank.scheme is not None:
            assert self.group is not None
            # outside the mode, since a device mesh needs contents
            self.rank.scheme.prepare(module, self.shard.rank, self.group)
        else:
            with self.mode:
                module.configure_model()
                if self.shard.size > 1 and wants_whole(module, "auto"):
                    raise ValueError(_SHOWN_WHOLE.format(module=type(module).__name__))
                for segmented in segment_modules(module):
                    segmented.set_shard(self.shard)
        self.rank.options.memory.apply(module)
        for part in module.modules():
            if isinstance(part, LSSAttention) and part.kernel != "reference":
                part.kernel = "auto"

    def _own_batch(self, batch: Any) -> Any:
        dims = self.rank.options.sequence_dims
        whole = resized(batch, self.rank.length, self.rank.batch_size, dims)
        split_by_module = getattr(self.module, "shard_batch", None) if self.shard.size > 1 else None
        part = split_by_module(whole, self.shard) if split_by_module else split_batch(whole, self.shard, dims)
        return self.precision.convert_input(part)

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
            with tracker, stand_in(self.rank.kernel, self.rank.length, tracker):
                with self.precision.forward_context():
                    loss = _loss_of(module.training_step(self.batch, 0))
                if self.rank.options.accumulate_grad_batches == 1:
                    module.zero_grad()
                tracker.stage = 1
                loss.backward()
                del loss
                tracker.stage = 2
                if self.rank.scheme is not None:
                    self.rank.scheme.after_backward(module)
                self._update()
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


def _local(tensors: Any) -> list[Tensor]:
    """Return the tensors in this rank's own memory."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, Tensor)]


@contextmanager
def _untracked_shapes() -> Iterator[None]:
    """Let DTensor derive shapes outside of all modes: it runs operators for that, and no rank runs them."""
    name = "_propagate_tensor_meta_non_cached"
    derive = getattr(ShardingPropagator, name)

    def derive_untracked(*args: Any) -> Any:
        with _disable_current_modes():
            return derive(*args)

    with patch.object(ShardingPropagator, name, derive_untracked):
        yield
