"""Checkpoints in one standard Lightning file, written completely or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.fabric.utilities.types import _PATH
from torch import Tensor
from typing_extensions import override

from lightning_lss.checkpoint.folder import is_folder
from lightning_lss.checkpoint.state import KeyPath, Owners, gather, map_tensors


class FileCheckpoints:
    """How :class:`~lightning_lss.LSSStrategy` writes checkpoints in one file: whole tensors, gathered from all ranks.

    :class:`~lightning_lss.checkpoint.folder.FolderCheckpoints` has the same methods; the strategy chooses between the
    two once. What ``keep`` returns for a gathered tensor goes into the checkpoint.
    """

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        self._keep = keep

    def collect(self, state: Any, owners: Owners, path: KeyPath = ()) -> Any:
        """Gather the tensors of a state, which lies at ``path`` in the checkpoint, one after another.

        Every rank must call it, with the same structure.
        """

        def gather_and_keep(path: KeyPath, tensor: Tensor) -> Any:
            gathered = gather(tensor, owners(path))
            return tensor if gathered is tensor else self._keep(gathered)

        return map_tensors(state, gather_and_keep, path)

    def needs_all_ranks(self, owners: Owners) -> bool:
        """Whether a checkpoint takes more than rank 0."""
        return owners.are_spread

    def write(
        self,
        checkpoint: dict[str, Any],
        path: _PATH,
        storage_options: Any | None,
        owners: Owners,
        write_file: Callable[[dict[str, Any], _PATH, Any | None], None],
    ) -> None:
        """Write the checkpoint that Lightning has collected; every rank must call it.

        Copies of the model's state that callbacks have added (weight averaging) are gathered here.
        """
        write_file(self.collect(checkpoint, owners), path, storage_options)


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
