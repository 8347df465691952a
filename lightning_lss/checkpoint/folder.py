"""Checkpoints as folders: every rank writes and reads its own part with ``torch.distributed.checkpoint``.

A folder holds the standard Lightning checkpoint in two pieces. torch stores the tensors of models and optimizers, by
their paths in the checkpoint and by position in the whole tensor. ``meta.pt`` holds everything else, with a tensor
without values (on the meta device) in place of each of them. Neither depends on the number of ranks that wrote it,
their layout, or whether parameters were sharded.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from lightning_lss.checkpoint.state import KeyPath, Owner, Owners, map_tensors, own_part
from lightning_lss.nn.positions import SegmentPositionalEmbedding

FOLDER_KEY = "lightning_lss_folder"
"""Entry of a loaded checkpoint: the folder that still holds the tensors of its optimizers."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a distributed checkpoint."""
    return (Path(path) / _METADATA_FILENAME).is_file()


class FolderCheckpoints:
    """How :class:`~lightning_lss.LSSStrategy` writes checkpoints as folders: every rank writes its own part.

    :class:`~lightning_lss.checkpoint.file.FileCheckpoints` has the same methods.
    """

    def collect(self, state: Any, owners: Owners, path: KeyPath = ()) -> Any:
        """Return this rank's part, ``state`` itself."""
        return state

    def needs_all_ranks(self, owners: Owners) -> bool:
        """True: torch writes a folder with collectives."""
        return True

    def write(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None,
        owners: Owners,
        write_file: Callable[..., None],
    ) -> None:
        """Write a folder; every rank must call it.

        Raises:
            TypeError: if ``storage_options`` are given.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} are for a CheckpointIO, and save_distributed_checkpoint=True does not use"
                " one. Leave them out, or save one file."
            )
        folder = Path(_same_on_all_ranks(str(path)))  # ranks may have composed different names
        save_folder(checkpoint, folder.expanduser().absolute(), owners)


def save_folder(checkpoint: dict[str, Any], folder: Path, owners: Owners) -> None:
    """Write a checkpoint, with this rank's parts of tensors, completely or not at all, in place of an existing one.

    Every rank of the world must call it with the same ``folder``.
    """
    stored: dict[str, Tensor] = {}

    def take_out(path: KeyPath, tensor: Tensor) -> Tensor:
        part = _as_stored(tensor.detach(), owners(path))
        spread = isinstance(part, DTensor)
        if not spread and path[0] not in ("state_dict", "optimizer_states"):
            return tensor
        if spread or dist.get_rank() == 0:  # what is not spread is equal on all ranks, or rank 0's counts
            stored[_key(path)] = part
        return torch.empty(part.shape, dtype=tensor.dtype, device="meta")

    rest = map_tensors(checkpoint, take_out)
    part = folder.with_name(f".{folder.name}.{_same_on_all_ranks(uuid.uuid4().hex)}.part")
    try:
        dcp.save(stored, checkpoint_id=part)
        if dist.get_rank() == 0:
            with open(part / _METADATA_FILENAME, "xb") as file:
                torch.save(rest, file)
                file.flush()
                os.fsync(file.fileno())
            _replace_folder(folder, part)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


def load_folder(folder: Path, owners: Owners | None = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Load the checkpoint in a folder; raise ``ValueError`` if it is not a distributed checkpoint of LSSStrategy.

    With the owners of a model only this rank's parts of the model's tensors are read, and none of optimizers, which
    :func:`read_parts` reads from the folder ``checkpoint[FOLDER_KEY]``. Without them a single process reads all tensors
    whole.
    """
    checkpoint = load_meta(folder, weights_only)
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"{folder} was written by another strategy: convert it to one file with"
            f" lightning_lss.checkpoint.consolidate({str(folder)!r}, file), and load that."
        )
    if owners is None:
        return read_parts(folder, checkpoint, lambda path: None)
    left = {key: checkpoint.pop(key) for key in ["optimizer_states"] if key in checkpoint}
    return {**read_parts(folder, checkpoint, owners), **left, FOLDER_KEY: str(folder)}


def read_parts(
    folder: str | os.PathLike[str], state: Any, owners: Callable[[KeyPath], Owner], path: KeyPath = ()
) -> Any:
    """Copy a state, which lies at ``path`` in the checkpoint in ``folder``, with this rank's parts of stored tensors."""
    targets: dict[str, Tensor] = {}

    def allocate(path: KeyPath, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        owner = owners(path)
        device = owner.device if isinstance(owner, DTensor) else "cpu"
        part = torch.empty_like(own_part(tensor, owner), device=device)
        targets[_key(path)] = _as_stored(part, owner)
        return part

    state = map_tensors(state, allocate, path)
    dcp.load(targets, checkpoint_id=folder, no_dist=True)  # ranks read different parts
    return state


def load_meta(folder: Path, weights_only: bool | None) -> dict[str, Any]:
    """Load the checkpoint in ``folder`` without its tensors; raise ``ValueError`` if it is not a distributed
    checkpoint."""
    if not is_folder(folder):
        raise ValueError(
            f"{folder} is not a distributed checkpoint: {_METADATA_FILENAME} is missing. Give the path of a folder that was"
            " saved with LSSStrategy(save_distributed_checkpoint=True), or of a file."
        )
    rest: dict[str, Any] = _load(folder / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only)
    return rest


def _key(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _as_stored(tensor: Tensor, owner: Owner) -> Tensor:
    """Return this rank's part of a tensor in a form that tells torch which part of the whole it is.

    A DTensor alone cannot represent a table's rows in two separate places, as in the zigzag layout.
    """
    if not isinstance(owner, SegmentPositionalEmbedding) or tensor.shape != owner.weight.shape:
        return tensor
    runs, width = owner.row_ranges(), tensor.shape[1:]
    offsets = [(run.start, *(0 for _ in width)) for run in runs]
    parts = LocalShardsWrapper(list(tensor.split([len(run) for run in runs])), offsets)
    whole = torch.empty(owner.num_positions, *width, device="meta")
    mesh = DeviceMesh.from_group(owner.shard.require_group(), tensor.device.type)
    return DTensor.from_local(parts, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def _replace_folder(folder: Path, part: Path) -> None:
    """Rename ``part`` to ``folder``. One rename cannot replace a folder, so the old one keeps another name for an
    instant."""
    old = folder.with_name(f"{part.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _same_on_all_ranks(text: str) -> str:
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]
