"""Checkpoints in one standard Lightning file, written completely or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.fabric.utilities.types import _PATH
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.folder import is_folder
from lightning_lss.checkpoint.state import (
    Destination,
    gather_optimizer_state,
    gather_state,
    tables_by_name,
    tables_by_weight,
)


class FileCheckpoints:
    """How :class:`~lightning_lss.LSSStrategy` writes checkpoints in one file: whole tensors, gathered from all ranks.

    :class:`~lightning_lss.checkpoint.folder.FolderCheckpoints` has the same methods; the strategy chooses between the
    two once.

    Args:
        keep: applied to each gathered tensor; its result goes into the checkpoint.
    """

    def __init__(self, keep: Destination) -> None:
        self._keep = keep

    def collect_model(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Return the model's ``state`` for a checkpoint; every rank must call it."""
        gathered: dict[str, Any] = gather_state(state, tables_by_name(module), self._keep)
        return gathered

    def collect_optimizer(self, module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's ``state`` for a checkpoint; every rank must call it."""
        return gather_optimizer_state(state, optimizer, tables_by_weight(module), self._keep)

    def needs_all_ranks(self, module: nn.Module) -> bool:
        """Whether a checkpoint of ``module`` takes more than rank 0."""
        return bool(tables_by_name(module)) or any(isinstance(x, DTensor) for x in module.parameters())

    def write(
        self,
        checkpoint: dict[str, Any],
        path: _PATH,
        storage_options: Any | None,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        write_file: Callable[[dict[str, Any], _PATH, Any | None], None],
    ) -> None:
        """Write the checkpoint that Lightning has collected; every rank must call it.

        Copies of the model's state that callbacks have added (weight averaging) are gathered here.
        """
        write_file(gather_state(checkpoint, tables_by_name(module), self._keep), path, storage_options)


class AtomicCheckpointIO(TorchCheckpointIO):
    """``TorchCheckpointIO`` that writes local files completely or not at all.

    It writes a file beside the target, flushes it to the disk and renames it. (Lightning writes to a temporary folder.
    On another file system the move from there is a copy, which may be interrupted.) Lightning writes remote paths.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            IsADirectoryError: if ``path`` is a folder that is not a distributed checkpoint.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(get_filesystem(path)._strip_protocol(str(path))).expanduser().absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not is_folder(target):
            raise IsADirectoryError(f"The checkpoint path {target} is a folder: give the path of a file.")
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with open(part, "xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.is_dir():
                shutil.rmtree(target)  # a distributed checkpoint of the same name
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
