"""The part of the strategy that saves and loads: see :mod:`lightning_lss.checkpoint.state` for files and
:mod:`lightning_lss.checkpoint.folder` for folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.folder import (
    KEY_OF_FOLDER,
    is_folder,
    load_folder,
    load_optimizer_state,
    save_folder,
)
from lightning_lss.checkpoint.state import (
    AtomicCheckpointIO,
    Place,
    gather_model_state,
    gather_optimizer_state,
    on_rank_zero_only,
    own_optimizer_state,
    tables_by_name,
)
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import own_model_state, sharded_root


class SavingStrategy(DDPStrategy):
    """A DDPStrategy whose checkpoints do not know how many ranks there are, nor what each of them holds."""

    _save_distributed_checkpoint = False
    _failed = False

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _interrupted(self) -> bool:
        """Whether this rank is on its way out after an exception."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return self._failed or (trainer is not None and trainer.interrupted)

    @property
    def _is_sharded(self) -> bool:
        return sharded_root(self._module) is not None

    @property
    def _place(self) -> Place:
        """Sharded models are too large to be whole on every rank."""
        return on_rank_zero_only if self._is_sharded else lambda tensor: tensor

    def _tables(self) -> dict[nn.Parameter, SegmentPositionalEmbedding]:
        return {table.weight: table for table in tables_by_name(self._module).values()}

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # taken only by a wrapper that has none yet
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    # -- saving --------------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's state, whole; of a sharded model on rank 0 only, with None for sharded tensors elsewhere.

        With ``save_distributed_checkpoint`` each rank's own part.
        """
        state = super().lightning_module_state_dict()
        if self._interrupted or self._save_distributed_checkpoint:
            return state
        tables = tables_by_name(self._module)
        return gather_model_state(state, tables, self._place) if tables or self._is_sharded else state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state, whole or in parts as the model's."""
        state = super().optimizer_state(optimizer)
        if self._interrupted or self._save_distributed_checkpoint:
            return state
        tables = self._tables()
        return gather_optimizer_state(state, optimizer, tables, self._place) if tables or self._is_sharded else state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a file, or with ``save_distributed_checkpoint`` a folder."""
        tables = tables_by_name(self._module)
        if (tables or self._is_sharded or self._save_distributed_checkpoint) and self._interrupted:
            rank_zero_warn(
                f"The checkpoint {filepath} was not written: after an exception on one rank, what the other ranks hold (rows of"
                " positional tables, sharded parameters) cannot be collected."
            )
            return
        if not self._save_distributed_checkpoint:
            # Callbacks may have put copies of the model's state beside it (weight averaging).
            whole = gather_model_state(checkpoint, tables, self._place) if tables or self._is_sharded else checkpoint
            super().save_checkpoint(whole, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} are for a CheckpointIO, which has no part in saving a folder"
                " (save_distributed_checkpoint=True)."
            )
        folder = Path(self.broadcast(str(filepath)))  # ranks may have composed other names
        save_folder(checkpoint, folder.expanduser().absolute(), tables, self.optimizers)

    # -- loading -------------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what lies at the path, a file or the folder of a distributed checkpoint."""
        if not is_folder(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        torch.cuda.empty_cache()
        state = self._module.state_dict()
        return load_folder(Path(checkpoint_path), state, tables_by_name(self._module), weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, of which a module that is sharded already takes its part."""
        if self._is_sharded:
            checkpoint = {**checkpoint, "state_dict": own_model_state(checkpoint["state_dict"], self._module)}
        super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' state, of which each rank takes its part."""
        where, tables, own = checkpoint.get(KEY_OF_FOLDER), self._tables(), []
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"])):
            if where is not None:
                state = load_optimizer_state(where, number, state, optimizer, tables)
            own.append(own_optimizer_state(state, optimizer, tables) if tables or self._is_sharded else state)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own})
