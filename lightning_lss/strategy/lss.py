"""``LSSStrategy`` connects the parts of LSS to Lightning's Trainer; each duty has a module of its own."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lss.checkpoint.state import tables_by_name
from lightning_lss.parallel.broadcast import broadcast_over_data_group, give_shards, share_random_state, take_shards
from lightning_lss.parallel.fsdp import Sharding
from lightning_lss.parallel.segment_local import (
    average_replicated_gradients,
    average_segment_local_gradients,
    ignore_in_ddp,
    leave_precision_plugin,
    total_norm,
    travel_in,
    watch_precision_plugin,
)
from lightning_lss.sequence.batch import SequenceDims
from lightning_lss.sequence.dtypes import resolve_communication_dtype
from lightning_lss.sequence.grid import build_mesh
from lightning_lss.sequence.layout import check_layout
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard
from lightning_lss.strategy.sharding import ShardingStrategy
from lightning_lss.strategy.validation import (
    check_communication_dtype,
    check_module,
    check_optimizers,
    check_sharded_optimizers,
    check_sharding,
    warn_of_batch_norm,
    warn_of_other_lightning,
    warn_of_unsaved_state,
)


class LSSStrategy(ShardingStrategy):
    """Distributed training of one long sequence (LSS Transformer, arXiv 2311.02382), combined with data parallelism.

    The world of W processes is a grid of D data-parallel groups x S ranks that share one sequence. Each rank runs the
    LightningModule on its segment; :class:`~lightning_lss.LSSAttention` modules see the whole sequence. The training is
    the same as on one device.

    Args:
        sequence_parallel_size: S, a divisor of the world size; ``"auto"`` puts all ranks into one sequence group.
        layout: ``"contiguous"``, ``"zigzag"`` or ``"auto"``, which is zigzag (balances causal attention).
        sequence_dims: for batch entries by key, the dimension that is the sequence or None to leave an entry whole; see
            :func:`lightning_lss.sequence.batch.split_batch`.
        check_batches: how many of the first batches of each data loader are compared over a sequence group.
        communication_dtype: ``torch.bfloat16`` or ``torch.float16`` (or its name): keys, values and gradients travel in it,
            for half the bytes of float32, and gradients are summed in it (but those of positional tables, which travel in
            full). The training is then that of one device
            only up to the rounding of that dtype. None sends everything in the dtype that it is computed in.
        sharding: how parameters, gradients and optimizer state are laid out, by torch's ``fully_shard``.

            - None: whole on every rank, averaged by DistributedDataParallel.
            - ``"fsdp"``: in equal parts over all W = D x S ranks of both dimensions: the least memory.
            - ``"hybrid"``: in equal parts over the S ranks of a sequence group, with D copies. Where D > 1 and sequence
              groups are joined by slower links than their own ranks, this keeps the gathering of parameters within a
              group; only gradients cross, once a step. With D = 1 the two are the same.

            Training is the same with all three. Positional tables are not sharded, since a rank has only its own rows.
            After a run the LightningModule holds a rank's parts: use ``trainer.test`` and the like, or a checkpoint.
        sharding_units: with ``sharding``, the classes of modules whose parameters are gathered together (they must be
            called as modules, not through their children); None takes the blocks of every ``nn.ModuleList`` and
            ``nn.Sequential``.
        save_distributed_checkpoint: write checkpoints as folders, every rank its own part, instead of one file; all
            ranks must see the same file system. Either can be resumed with any number of ranks, layout and sharding;
            :func:`lightning_lss.checkpoint.folder.consolidate` makes a file of a folder.
        **ddp_kwargs: arguments of :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`; with ``sharding`` of the latter only
            ``broadcast_buffers``.

    Raises:
        ValueError: at once, if the layout or the sharding is unknown, a size is not positive, or arguments do not go
            together.
        MisconfigurationException: from the Trainer, before any process communicates, if S does not divide W or the
            module uses a feature that cannot be split.
    """

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        layout: Literal["contiguous", "zigzag", "auto"] = "auto",
        sequence_dims: SequenceDims | None = None,
        check_batches: int = 2,
        communication_dtype: torch.dtype | str | None = None,
        sharding: Sharding | None = None,
        sharding_units: Collection[type[nn.Module]] | None = None,
        save_distributed_checkpoint: bool = False,
        **ddp_kwargs: Any,
    ) -> None:
        super().__init__(**ddp_kwargs)
        check_sharding(sharding, save_distributed_checkpoint, ddp_kwargs)
        self._communication_dtype = resolve_communication_dtype(communication_dtype)
        if self._communication_dtype is not None and ddp_kwargs.get("ddp_comm_hook") is not None:
            raise ValueError(
                f"communication_dtype={communication_dtype!r} and ddp_comm_hook both say how gradients travel: give one of"
                " them."
            )
        self._sharding = sharding
        self._sharding_units = sharding_units
        self._save_distributed_checkpoint = save_distributed_checkpoint
        if layout != "auto":
            check_layout(layout)
        self._request(sequence_parallel_size, check_batches)
        warn_of_other_lightning()
        self._layout = "zigzag" if layout == "auto" else layout
        self._sequence_dims = sequence_dims
        self._running = False
        self._handles: list[RemovableHandle] = []
        self._failed = False
        self._example_input: Any = None

    def __repr__(self) -> str:  # shown by pytorch_lightning.Trainer when it refuses the object
        size, layout = self._requested_size, self._layout
        return f"LSSStrategy(sequence_parallel_size={size!r}, layout={layout!r}) for lightning.pytorch.Trainer"

    # -- who this process is -------------------------------------------------------------------------------------------

    @property
    def sequence_shard(self) -> SequenceShard:
        """This process's place in its sequence group; it has a process group from the first run on."""
        if self._mesh is not None or self.cluster_environment is None or not self.num_processes:
            return self._shard
        size = self.sequence_parallel_size
        return SequenceShard(self.global_rank % size, size, self._layout)

    @property
    def shard_of_run(self) -> SequenceShard:
        """The shard that modules work under now: the trivial one before and after a run, when they take whole
        sequences."""
        return self._shard if self._running else WHOLE_SEQUENCE

    @property
    def device_mesh(self) -> DeviceMesh:
        """The process groups as torch's DeviceMesh; its dimensions are ``data`` and ``sequence`` where larger than
        1."""
        if self._mesh is None:
            raise RuntimeError(
                "The process groups do not exist yet: the strategy makes them when the Trainer starts a run."
            )
        return self._mesh.device_mesh(self.root_device.type)

    # -- setting up and tearing down -----------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        _ = self.sequence_parallel_size  # a size that does not divide the world is refused before processes are started
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        self._failed = False
        if self.lightning_module is not None:
            check_module(self.lightning_module, self.sequence_parallel_size, self._layout)
            check_communication_dtype(self._communication_dtype, self.precision_plugin)
            self._check_sharded_run()
        super().setup_environment()
        size = self.sequence_parallel_size
        if self._mesh is None:
            self._mesh = build_mesh(self.world_size, self.global_rank, size, self._timeout)
        self._shard = SequenceShard(
            self._mesh.sequence_rank, size, self._layout, self._mesh.sequence_group, self._communication_dtype
        )
        self._running = True
        self._batches_checked.clear()
        if self._mesh.sequence_group is not None:
            share_random_state(self._mesh.sequence_group, self.root_device)
        if self.lightning_module is not None:
            self._give_shards()  # before any callback's setup: weight averaging copies the module there

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        with super().model_sharded_context():
            yield
        self._give_shards()  # to modules made in configure_model

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._give_shards()  # to modules made in LightningModule.setup
        local = self._segment_local()
        if self._sharding is None:
            ignore_in_ddp(self._module, local)
        super().setup(trainer)
        assert self._mesh is not None
        if self._shard.size > 1:
            warn_of_batch_norm(self._module)
            warn_of_unsaved_state(set(local) - tables_by_name(self._module).keys())
            self._put_aside_example_input()
        parameters = self._segment_local_parameters()
        broadcast_over_data_group(self._module, local, self._mesh)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if parameters:
            check_optimizers(self.optimizers, self._model_averaging_period is not None, len(parameters))
            self._handles = average_segment_local_gradients(parameters, self._mesh, self._is_last_backward)
        group = self._shard.require_group() if parameters else None
        if self._root is not None:
            check_sharded_optimizers(self.optimizers)
            self._handles += average_replicated_gradients(self._root.scalars, self._is_last_backward)
            watch_precision_plugin(self.precision_plugin, set(parameters), group, torch.distributed.group.WORLD)
        elif parameters:
            watch_precision_plugin(self.precision_plugin, set(parameters), group, group)

    @override
    def teardown(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        leave_precision_plugin(self.precision_plugin)
        # Whoever leaves first closes its connections. No rank may do so while another still waits for data, but where a
        # rank has failed the others are lost in a collective of the step and never come here: then there is no waiting.
        if not self._failed:
            if self._start_method != "popen" and self.lightning_module is not None:
                for table in tables_by_name(self.lightning_module).values():
                    table.become_whole()  # the process that spawned this one takes the weights over from rank 0
            self.barrier("LSSStrategy.teardown")
        if self._example_input is not None:
            self._module.example_input_array = self._example_input
            self._example_input = None
        super().teardown()
        self._take_shards()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._interrupted:  # the other ranks will not come
            super().barrier(*args, **kwargs)

    def _put_aside_example_input(self) -> None:
        """Lightning would run it unsplit for the model summary, and on rank 0 alone to log a graph."""
        if self._module.example_input_array is not None:
            rank_zero_warn("`example_input_array` is not used under LSSStrategy: a forward pass takes all ranks.")
            self._example_input = self._module.example_input_array
            self._module.example_input_array = None

    def _give_shards(self) -> None:
        give_shards(self._module, self._shard, self.root_device)

    def _take_shards(self) -> None:
        self._running = False
        if self.lightning_module is not None:
            take_shards(self.lightning_module)

    def gradient_norm(self) -> torch.Tensor:
        """2-norm of the gradients of the whole model, segment-local ones of all ranks included; every rank must call
        it."""
        local = self._segment_local_parameters()
        if not local and self._root is None:
            return nn.utils.get_total_norm([x.grad for x in self._module.parameters() if x.grad is not None])
        parameters = self._module.parameters() if self._root is None else self._root.own_parameters
        return total_norm(parameters, set(local), self._shard.require_group() if local else None)

    # -- gradients -----------------------------------------------------------------------------------------------------

    @override
    def _register_ddp_hooks(self) -> None:
        super()._register_ddp_hooks()
        if self._communication_dtype is not None and isinstance(self.model, DistributedDataParallel):
            self.model.register_comm_hook(None, travel_in(self._communication_dtype))

    def _segment_local_parameters(self) -> list[nn.Parameter]:
        parameters = dict(self._module.named_parameters())
        return [parameters[name] for name in self._segment_local() if name in parameters]

    def _is_last_backward(self) -> bool:
        return bool(getattr(self.model, "require_backward_grad_sync", True))

    # -- names ---------------------------------------------------------------------------------------------------------

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for name, start_method in (
            ("lss", "popen"),
            ("lss_spawn", "spawn"),
            ("lss_fork", "fork"),
            ("lss_notebook", "fork"),
        ):
            description = f"LSS sequence parallelism with `start_method` '{start_method}'"
            strategy_registry.register(name, cls, description=description, start_method=start_method)
            for value in (True, False):
                strategy_registry.register(
                    f"{name}_find_unused_parameters_{str(value).lower()}",
                    cls,
                    description=f"{description} and `find_unused_parameters` as {value}",
                    start_method=start_method,
                    find_unused_parameters=value,
                )
        strategy_registry.register(
            "lss_fsdp",
            cls,
            description="LSS sequence parallelism with parameters sharded over all ranks",
            sharding="fsdp",
        )
