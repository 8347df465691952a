"""``LSSStrategy`` connects the parts of LSS to Lightning's Trainer.

Two objects are chosen once: one distributes parameters over the ranks (:mod:`lightning_lss.parallel`), one writes
checkpoints (:mod:`lightning_lss.checkpoint`). Hooks delegate to them.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.file import AtomicCheckpointIO, FileCheckpoints
from lightning_lss.checkpoint.folder import FOLDER_KEY, FolderCheckpoints, is_folder, load_folder, read_parts
from lightning_lss.checkpoint.state import Owners, own_parts
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.nn.recompute import ActivationCheckpointing
from lightning_lss.parallel.broadcast import assign_segments, reset_segments, share_random_state
from lightning_lss.parallel.fsdp import FullyShard, Sharding
from lightning_lss.parallel.replicated import Replicated
from lightning_lss.parallel.segment_local import SegmentLocal
from lightning_lss.sequence.batch import SequenceDims
from lightning_lss.sequence.dtypes import resolve_communication_dtype
from lightning_lss.sequence.grid import SequenceGrid, build_grid
from lightning_lss.sequence.padding import PadValues, cut_padding
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules
from lightning_lss.strategy import validation
from lightning_lss.strategy.balancing import BatchLayouts
from lightning_lss.strategy.memory import MemoryOptions
from lightning_lss.strategy.proving import ProvedRuns
from lightning_lss.strategy.view import showing_segments, showing_whole, wants_whole
from lightning_lss.tensor.batch import gather_whole, show_whole


class LSSStrategy(ProvedRuns):
    """Distributed training of one long sequence (LSS Transformer, arXiv 2311.02382), combined with data parallelism.

    The world of W processes is a grid of D sequence groups of S ranks each. The ranks of a group share one batch: each
    runs the LightningModule on its segment, and :class:`~lightning_lss.LSSAttention` modules see the whole sequence.
    The training is the same as on one device.

    Args:
        sequence_parallel_size: S, a divisor of the world size; ``"auto"`` puts all ranks into one sequence group.
        layout: which positions of a sequence a rank holds, ``"contiguous"``, ``"zigzag"`` (balances causal attention),
            ``"balanced"`` or ``"auto"``.

            - ``"balanced"``: for each batch, up to 8 chunks a rank are chosen by the work of the batch's
              :class:`~lightning_lss.AttentionMask` (without one, of the module's own masks), so that all ranks have the
              same and receive few keys. Segment-local parameters need a static layout.
            - ``"auto"``: zigzag; balanced for a batch with a mask under which zigzag gives a rank over 10 % more work
              than the mean, unless the module has segment-local parameters or its own ``shard_batch``. Where a balanced
              batch is not proved to be trained exactly, and zigzag is, the run stays with zigzag. In evaluation a batch
              is balanced only within ``fit``, after a balanced training step was proved; with ``verify=False``, always.
        sequence_dims: for batch entries by key, the dimension of the sequence, or None to leave an entry whole; see
            :func:`lightning_lss.sequence.batch.split_batch`.
        pad_values: what fills sequences up whose length cannot be divided, by key of the batch entry, such as
            ``{"inputs": 0, "targets": -100}``, where the module is shown segments; see :class:`~lightning_lss.SequenceShard`.
            With ``layout="auto"`` such batches keep zigzag.
        check_batches: how many of the first batches of each data loader are compared over a sequence group, in every
            epoch.
        view: what a module is shown of a sequence: ``"segment"``, its rank's, for modules that are written with the parts
            of this package; ``"whole"``, all of it, as on one device, in :class:`~lightning_lss.SplitTensor`, for any
            other; ``"auto"``: whole, unless the module contains a
            :class:`~lightning_lss.ShardedModule`, such as ``LSSAttention``, or has its own ``shard_batch``.
        convert: where the module is shown segments, whether its ``nn.Conv1d`` see across their borders during a run, as
            :class:`~lightning_lss.SegmentConv1d`; or the names of those that are along the sequence, as in
            ``checkpointed_modules``. Where it is shown whole sequences none needs it.
        communication_dtype: ``torch.bfloat16`` or ``torch.float16`` (or its name). Keys, values and gradients are sent
            in it, for half the bytes of float32, and gradients are summed in it. Gradients of positional tables keep
            their dtype. The training then equals that of one device only up to the rounding of ``communication_dtype``.
            None sends every tensor in the dtype that it is computed in.
        sharding: how parameters, gradients and optimizer state are distributed.

            - None: whole on every rank; DistributedDataParallel averages gradients.
            - ``"fsdp"``: sharded over all W = D x S ranks by torch's ``fully_shard``, for the least memory.
            - ``"hybrid"``: sharded over the S ranks of a sequence group, with D copies. Parameters are gathered within
              a group; only gradients are sent between groups, once a step. Use it where the links between groups are
              slower than those within. With D = 1 it is the same as ``"fsdp"``.

            Positional tables are not sharded, since a rank has only its own rows. After a run the LightningModule holds a
            rank's parts: use ``trainer.test`` and the like, or a checkpoint.
        sharding_units: with ``sharding``, the classes of modules whose parameters are gathered together (they must be
            called as modules, not through their children); None takes the repeated blocks, as below.
        save_distributed_checkpoint: write checkpoints as folders instead of one file. Every rank writes its own part,
            and all ranks must see the same file system. Both kinds can be resumed with any number of ranks, layout and
            sharding; :func:`lightning_lss.checkpoint.consolidate` converts a folder to a file.
        activation_checkpointing: what autograd keeps of the module's blocks: ``"full"``, ``"selective"`` or ``"offload"``,
            see :func:`lightning_lss.nn.recompute.apply_checkpointing`. None does not change the blocks.
        checkpointed_modules: names of the blocks, as in ``named_modules()``; an ``nn.ModuleList`` stands for its
            children, and ``*`` matches any part of a name. None takes the repeated blocks of every ``nn.ModuleList``
            and ``nn.Sequential``.
        mlp_tiles: in how many parts along the sequence to compute ``tiled_modules``, each again in the backward pass.
        tiled_modules: names of modules that map [B, l, E] token by token. None takes all that are called ``mlp``.
        verify: prove every run on its first batch, shortened where the module allows it: the module's own training step,
            whole on every rank alone and split, must give every parameter the same gradient. A run that is not the
            training of one device ends with :class:`~lightning_lss.InexactError`, which names the cause.
        **ddp_kwargs: arguments of :class:`~lightning.pytorch.strategies.DDPStrategy` and of torch's
            ``DistributedDataParallel``; with ``sharding``, of the latter only ``broadcast_buffers``.

    Raises:
        ValueError: at once, if the layout, the sharding or the kind of checkpointing is unknown, a size is not
            positive, or arguments are incompatible.
        MisconfigurationException: from the Trainer, before the first step, if S does not divide W, a named submodule
            does not exist, or the module uses a feature that cannot be split.
    """

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        layout: Literal["contiguous", "zigzag", "balanced", "auto"] = "auto",
        sequence_dims: SequenceDims | None = None,
        pad_values: PadValues | None = None,
        check_batches: int = 2,
        view: Literal["segment", "whole", "auto"] = "auto",
        convert: bool | Sequence[str] = False,
        communication_dtype: torch.dtype | str | None = None,
        sharding: Sharding | None = None,
        sharding_units: Collection[type[nn.Module]] | None = None,
        save_distributed_checkpoint: bool = False,
        activation_checkpointing: ActivationCheckpointing | None = None,
        checkpointed_modules: Sequence[str] | None = None,
        mlp_tiles: int = 1,
        tiled_modules: Sequence[str] | None = None,
        verify: bool = True,
        **ddp_kwargs: Any,
    ) -> None:
        super().__init__(sequence_parallel_size, sequence_dims, check_batches, verify=verify, **ddp_kwargs)
        validation.check_arguments(sharding, view, save_distributed_checkpoint, communication_dtype, ddp_kwargs)
        validation.warn_of_other_lightning()
        self._layouts, self._view, self._convert = BatchLayouts(layout, pad_values), view, convert
        self._communication_dtype = resolve_communication_dtype(communication_dtype)
        self._memory = MemoryOptions(activation_checkpointing, checkpointed_modules, mlp_tiles, tiled_modules)
        self._parameters: Replicated | FullyShard = Replicated(validation.keeps_frozen(ddp_kwargs))
        if sharding is not None:
            broadcast_buffers = bool(ddp_kwargs.get("broadcast_buffers", True))
            self._parameters = FullyShard(sharding, sharding_units, broadcast_buffers, self._communication_dtype)
        self._checkpoints: FileCheckpoints | FolderCheckpoints = FileCheckpoints(self._parameters.keep_for_checkpoint)
        if save_distributed_checkpoint:
            self._checkpoints = FolderCheckpoints()
        self._grid: SequenceGrid | None = None
        self._shard = self._place = WHOLE_SEQUENCE  # with the batch at hand, and without one
        self._segment_local: SegmentLocal | None = None
        self._running = self._failed = self._shows_whole = False

    def __repr__(self) -> str:  # shown by pytorch_lightning.Trainer when it refuses the object
        size = self._requested_size
        return f"LSSStrategy(sequence_parallel_size={size!r}, layout={self._layouts.requested!r}) for lightning.pytorch.Trainer"

    # -- who this process is -------------------------------------------------------------------------------------------

    @property
    def sequence_shard(self) -> SequenceShard:
        """This process's place in its sequence group; its process group exists from the first run on."""
        if self._grid is not None or self.cluster_environment is None or not self.num_processes:
            return self._shard
        size = self.sequence_parallel_size
        return SequenceShard(self.global_rank % size, size, self._layouts.base)

    @property
    def shard_of_run(self) -> SequenceShard:
        """The shard that modules run under now: the trivial one outside of a run, when they take whole sequences."""
        return self._shard if self._running else WHOLE_SEQUENCE

    @property
    @override
    def shard_of_module(self) -> SequenceShard:
        return WHOLE_SEQUENCE if self._shows_whole else self.shard_of_run

    @property
    @override
    def data_group_of_run(self) -> ProcessGroup | None:
        return self._grid.data_group if self._running and self._grid is not None else None

    @property
    def device_mesh(self) -> DeviceMesh:
        """The process groups as torch's DeviceMesh, with the dimensions ``data`` and ``sequence`` where larger than 1; raises
        ``RuntimeError`` before the first run."""
        if self._grid is None:
            raise RuntimeError("The process groups do not exist yet: the Trainer creates them when it starts a run.")
        return self._grid.device_mesh(self.root_device.type)

    @property
    def _interrupted(self) -> bool:
        """Whether this rank is shutting down after an exception."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return self._failed or (trainer is not None and trainer.interrupted)

    # -- setting up and tearing down -----------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._failed = False
        if self.lightning_module is not None:
            validation.check_module(self._module, self.sequence_parallel_size, self._layouts)
            validation.check_communication_dtype(self._communication_dtype, self.precision_plugin)
            self._parameters.check(self._module, self.sequence_parallel_size, self.num_ranks)
        super().setup_environment()
        size, grid = self.sequence_parallel_size, self._grid
        if grid is None:
            self._grid = grid = build_grid(self.world_size, self.global_rank, size, self._timeout)
        group, dtype = grid.sequence_group, self._communication_dtype
        self._layouts.forget()
        is_current = self._is_current if self._layouts.vary and size > 1 else None
        self._shard = self._place = SequenceShard(
            grid.sequence_rank, size, self._layouts.base, group, dtype, is_current=is_current
        )
        self._running = True
        if group is not None:
            share_random_state(group, self.root_device)
        if self.lightning_module is not None:
            self._assign_segments()  # before any callback's setup: weight averaging copies the module there

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        with super().tensor_init_context(empty_init), self._parameters.init_context():
            yield

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        with super().model_sharded_context():
            yield
        self._assign_segments()  # to modules made in configure_model

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self._grid is not None
        self._assign_segments()  # to modules made in LightningModule.setup
        self._parameters.check(self._module, self._shard.size, self.num_ranks)  # with what configure_model has made
        self._shows_whole = wants_whole(self._module, self._view)  # now that all of it exists
        if self._shard.size > 1:
            show = partial(showing_segments, convert=self._convert)
            if self._shows_whole:
                show = partial(showing_whole, data_group=self._grid.data_group)
            self._adapted = self._at_teardown.enter_context(show(self._module, lambda: self._shard))
        self._at_teardown.callback(self._memory.reset)
        self._memory.apply(self._module)
        self._segment_local = local = SegmentLocal(self._module, self._grid)
        chosen = self._layer_sync
        self._layer_sync = self._parameters.layer_sync(self._module, chosen)
        super().setup(trainer)
        self._layer_sync = chosen
        local.start_equally()
        if self._shard.size > 1:
            if not self._verification.wanted:
                validation.warn_of_batch_norm(self._module)
            owners = Owners(self._module)
            unsaved = [x for x in local.names if not isinstance(owners(("state_dict", x)), SegmentPositionalEmbedding)]
            validation.warn_of_unsaved_state(unsaved)
            validation.warn_of_requeue(self.cluster_environment, self._checkpoints.needs_all_ranks(owners))
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._start_proof()
        self._at_teardown.callback(self._stop_averaging)
        self._average_gradients(local)

    @override
    def teardown(self) -> None:
        with self._at_teardown:
            self._part_from_ranks()
            self._parameters.release()
            module, optimizers = self._lightning_module, self.optimizers
            if self._parameters.stay_on_device:
                self._lightning_module, self.optimizers = None, []  # else Lightning would move them to the CPU
            try:
                super().teardown()
            finally:
                self._lightning_module = self.model = module
                self.optimizers = optimizers
        self._running = self._shows_whole = False
        self._segment_local, self._shard = None, self._place
        self._layouts.forget()
        if module is not None:
            reset_segments(module)

    def _part_from_ranks(self) -> None:
        # The first rank to leave closes its connections, so all wait here until none still waits for data. After a
        # failure there is no barrier: the other ranks may hang in a collective of the step and never arrive.
        if self._failed:
            return
        if self._start_method != "popen" and self.lightning_module is not None:
            for table in Owners(self._module).tables.values():  # to be taken over by the parent process
                table.become_whole()
            self._parameters.hand_over(self._module)
        self.barrier("LSSStrategy.teardown")

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._interrupted:  # the other ranks would not arrive
            super().barrier(*args, **kwargs)

    @override
    def split_entries(self, batch: Any) -> Any:
        if self._shows_whole:
            return show_whole(batch, self._shard, self._sequence_dims) if self._shard.size > 1 else batch
        return super().split_entries(batch)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        outputs = gather_whole(super().predict_step(*args, **kwargs))
        return cut_padding(outputs, self._shard, args[0], self._sequence_dims)

    def _assign_segments(self) -> None:
        validation.check_view(self._module, self._view)
        validation.check_segment_local(self._module, self._place.size, self._place.layout)
        assign_segments(segment_modules(self._module), self._shard, self.root_device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # ignored by a wrapper that has one already
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = super().lightning_module_state_dict()
        return state if self._interrupted else self._checkpoints.collect(state, Owners(self._module))

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        if self._interrupted:
            return state
        return self._checkpoints.collect(state, Owners(self._module, [optimizer]), ("optimizer_states", 0))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        owners = Owners(self._module, self.optimizers)
        if self._interrupted and self._checkpoints.needs_all_ranks(owners):
            rank_zero_warn(
                f"The checkpoint {filepath} was not written: after an exception on one rank, the other ranks' rows of positional"
                " tables and parts of sharded parameters cannot be collected."
            )
            return
        self._checkpoints.write(checkpoint, filepath, storage_options, owners, super().save_checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        if not is_folder(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        torch.cuda.empty_cache()
        return load_folder(Path(checkpoint_path), Owners(self._module), weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = own_parts(checkpoint["state_dict"], Owners(self._module), ("state_dict",))
        super().load_model_state_dict({**checkpoint, "state_dict": own}, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states, path = checkpoint["optimizer_states"], ("optimizer_states",)
        owners = Owners(self._module, self.optimizers)
        if FOLDER_KEY in checkpoint:
            states = read_parts(checkpoint[FOLDER_KEY], states, owners, path)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own_parts(states, owners, path)})

    # -- names ---------------------------------------------------------------------------------------------------------

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        methods = {"lss": "popen", "lss_spawn": "spawn", "lss_fork": "fork", "lss_notebook": "fork"}
        entries: dict[str, dict[str, Any]] = {name: {"start_method": method} for name, method in methods.items()}
        for name in methods:  # as DDPStrategy does
            for value in (True, False):
                options = {**entries[name], "find_unused_parameters": value}
                entries[f"{name}_find_unused_parameters_{str(value).lower()}"] = options
        for name, options in {**entries, "lss_fsdp": {"sharding": "fsdp"}}.items():
            strategy_registry.register(name, cls, description=f"LSS sequence parallelism with {options}", **options)
