"""Checkpoints as folders, of which every rank writes and reads its own part with ``torch.distributed.checkpoint``.

A folder is the standard Lightning checkpoint in two pieces: the tensors of models and optimizers, which torch stores by
name and position in the whole tensor, and ``meta.pt`` with all the rest, in which None stands in their places. Neither
knows how many ranks wrote it, their layout, or whether parameters were sharded.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.state import parameters_by_index, tables_by_name
from lightning_lss.nn.positions import SegmentPositionalEmbedding

FOLDER_KEY = "lightning_lss_folder"
"""Entry of a loaded checkpoint: the folder in which the tensors of its optimizers still lie, and their places."""

PLACES = "lightning_lss_tensors"  # in meta.pt: where in the checkpoint each stored tensor belongs

Path_ = tuple[Any, ...]
Tables = Mapping[str, SegmentPositionalEmbedding]
TablesByWeight = Mapping[nn.Parameter, SegmentPositionalEmbedding]


@dataclass(frozen=True)
class SpreadRows:
    """Rows of a positional table, or of one of its moments, as a part of the whole [num_positions, ...].

    What ``torch.distributed.checkpoint`` asks of a sharded tensor. (A DTensor cannot say that a rank's rows lie in two
    places, as they do in the zigzag layout.)
    """

    rows: Tensor
    table: SegmentPositionalEmbedding

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        first, width = 0, self.rows.shape[1:]
        for run in self.table.row_ranges():
            offsets = torch.Size([run.start, *(0 for _ in width)])
            sizes = torch.Size([len(run), *width])
            yield ChunkStorageMetadata(offsets, sizes), self.rows[first : first + len(run)]
            first += len(run)

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        size = torch.Size([self.table.num_positions, *self.rows.shape[1:]])
        properties = TensorProperties.create_from_tensor(self.rows)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
            for chunk, _ in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return next(rows for chunk, rows in self._chunks() if chunk.offsets == index.offset)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a distributed checkpoint lies at ``path``."""
    return (Path(path) / _METADATA_FILENAME).is_file()


class FolderCheckpoints:
    """How :class:`~lightning_lss.LSSStrategy` writes checkpoints as folders: every rank its own part, so nothing is gathered.

    For the methods see :class:`~lightning_lss.checkpoint.file.FileCheckpoints`.
    """

    def collect_model(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part."""
        return state

    def collect_optimizer(self, module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part."""
        return state

    def needs_all_ranks(self, module: nn.Module) -> bool:
        """Always: torch writes a folder in collectives."""
        return True

    def write(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        write_file: Callable[..., None],
    ) -> None:
        """Write a folder.

        Raises:
            TypeError: if ``storage_options`` are given.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} are for a CheckpointIO, which has no part in saving a folder"
                " (save_distributed_checkpoint=True)."
            )
        folder = Path(_same_on_all_ranks(str(path)))  # ranks may have composed other names
        save_folder(checkpoint, folder.expanduser().absolute(), tables_by_name(module), optimizers)


# -- writing -----------------------------------------------------------------------------------------------------------


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes a flat dict as it is; the default one takes :class:`SpreadRows` for no tensor."""

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, SpreadRows) else super().lookup_object(index)


def save_folder(
    checkpoint: dict[str, Any],
    folder: Path,
    tables: Tables,
    optimizers: Iterable[Optimizer],
) -> None:
    """Write a checkpoint, complete or not at all; every rank of the world calls it with the same ``folder``.

    Args:
        checkpoint: what Lightning collected, with this rank's parts of tensors.
        folder: where to write; a checkpoint that lies there already is replaced.
        tables: positional tables that are spread over ranks, by the name of their weight.
        optimizers: those of ``checkpoint["optimizer_states"]``.
    """
    weights = {table.weight: table for table in tables.values()}
    rows: dict[Path_, SegmentPositionalEmbedding] = {}
    for number, (optimizer, state) in enumerate(zip(optimizers, checkpoint.get("optimizer_states", []))):
        for index, parameter in parameters_by_index(optimizer, state).items():
            if parameter in weights:
                rows["optimizer_states", number, "state", index] = weights[parameter]
    stored: dict[str, Any] = {}
    places: dict[str, Path_] = {}

    def take_out(value: Any, path: Path_) -> Any:
        if isinstance(value, Tensor):
            table = rows.get(path[:-1]) or tables.get(path[-1])
            if table is not None and value.dim() and value.size(0) == table.weight.size(0):
                part: Any = SpreadRows(value.detach(), table)
            elif isinstance(value, DTensor):
                part = value.detach()
            elif path[0] in ("state_dict", "optimizer_states"):
                part = value.detach() if dist.get_rank() == 0 else None  # the same everywhere, or rank 0's counts
            else:
                return value
            key = ".".join(map(str, path))
            places[key] = path
            if part is not None:
                stored[key] = part
            return None
        if isinstance(value, dict):
            copy = value.copy()
            copy.update({key: take_out(x, (*path, key)) for key, x in value.items()})
            return copy
        if type(value) is list:
            return [take_out(x, (*path, number)) for number, x in enumerate(value)]
        return value

    rest = take_out(checkpoint, ())
    part = folder.with_name(f".{folder.name}.{_same_on_all_ranks(uuid.uuid4().hex)}.part")
    try:
        dcp.save(stored, checkpoint_id=part, planner=_SavePlanner(flatten_state_dict=False))
        if dist.get_rank() == 0:
            with open(part / _METADATA_FILENAME, "xb") as file:
                torch.save({**rest, PLACES: places}, file)
                file.flush()
                os.fsync(file.fileno())
            _put_in_place(part, folder)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _put_in_place(part: Path, folder: Path) -> None:
    """Rename; a folder cannot replace another in one go, so the old one is complete under another name for an
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


# -- reading -----------------------------------------------------------------------------------------------------------


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads into a flat dict as it is; the default one takes :class:`SpreadRows` for no tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    @override
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, SpreadRows) else super().lookup_tensor(index)


def load_folder(
    folder: Path, model: Mapping[str, Any] | None = None, tables: Tables | None = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """The checkpoint in a folder.

    Args:
        folder: where it lies.
        model: the state dict of the model that will take it; of its sharded tensors, and of spread tables, only this
            rank's part is read. None reads all tensors whole, those of optimizers too, in a single process.
        tables: the positional tables that are spread over ranks, by the name of their weight.
        weights_only: as for ``torch.load``.

    Returns:
        the checkpoint on the CPU. With a ``model`` the tensors of optimizers are left out, for
        :func:`load_optimizer_state`, and :data:`FOLDER_KEY` says where they are.
    """
    checkpoint, places = _load_rest(folder, weights_only)

    def target(path: Path_, size: torch.Size, dtype: torch.dtype) -> Any:
        table = (tables or {}).get(path[-1])
        like = (model or {}).get(path[-1])
        if table is not None and size and size[0] == table.num_positions:
            return SpreadRows(torch.empty(table.weight.size(0), *size[1:], dtype=dtype), table)
        if isinstance(like, DTensor) and like.shape == size:
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(size, dtype=dtype)

    if model is not None:
        left = {key: path for key, path in places.items() if path[0] == "optimizer_states"}
        places = {key: path for key, path in places.items() if key not in left}
        checkpoint[FOLDER_KEY] = (str(folder), left)
    _read(folder, checkpoint, places, target)
    return checkpoint


def load_optimizer_state(
    where: tuple[str, dict[str, Path_]],
    number: int,
    state: dict[str, Any],
    optimizer: Optimizer,
    tables: TablesByWeight,
) -> dict[str, Any]:
    """``checkpoint["optimizer_states"][number]`` of :func:`load_folder` with its tensors, of which this rank reads its
    own parts."""
    parameters = parameters_by_index(optimizer, state)
    folder, left = where
    places = {key: path for key, path in left.items() if path[1] == number}

    def target(path: Path_, size: torch.Size, dtype: torch.dtype) -> Any:
        parameter = parameters.get(path[3])
        table = tables.get(parameter) if parameter is not None else None
        if table is not None and size and size[0] == table.num_positions:
            return SpreadRows(torch.empty(table.weight.size(0), *size[1:], dtype=dtype), table)
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    whole = {"optimizer_states": {number: state}}
    _read(Path(folder), whole, places, target)
    return state


def load_meta(folder: Path, weights_only: bool | None) -> dict[str, Any]:
    """All of the checkpoint in ``folder`` but its tensors; raises ``ValueError`` if none lies there."""
    if not is_folder(folder):
        raise ValueError(
            f"{folder} is no distributed checkpoint: {_METADATA_FILENAME} is missing. Give the path of a folder that was"
            " saved with LSSStrategy(save_distributed_checkpoint=True), or of a file."
        )
    rest: dict[str, Any] = _load(folder / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only)
    return rest


def _load_rest(folder: Path, weights_only: bool | None) -> tuple[dict[str, Any], dict[str, Path_]]:
    rest = load_meta(folder, weights_only)
    if PLACES not in rest:
        raise ValueError(
            f"{folder} was written by another strategy: make one file of it with"
            f" lightning_lss.checkpoint.consolidate({str(folder)!r}, file), and load that."
        )
    return rest, rest.pop(PLACES)


def _read(
    folder: Path,
    checkpoint: dict[str, Any],
    places: Mapping[str, Path_],
    target: Callable[[Path_, torch.Size, torch.dtype], Any],
) -> None:
    """Fill the ``places`` of a checkpoint."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    targets = {}
    for key, path in places.items():
        kind = stored[key]
        assert isinstance(kind, TensorStorageMetadata)
        targets[key] = target(path, kind.size, kind.properties.dtype)
    dcp.load(targets, checkpoint_id=folder, planner=_LoadPlanner(), no_dist=True)  # ranks read different parts
    for key, path in places.items():
        holder: Any = checkpoint
        for step in path[:-1]:
            holder = holder[step]
        value = targets[key]
        holder[path[-1]] = value.rows if isinstance(value, SpreadRows) else value
