"""Checkpoints as folders: every rank writes and reads its own part with ``torch.distributed.checkpoint``.

A folder holds the standard Lightning checkpoint in two pieces. torch stores the tensors of models and optimizers, by
name and by position in the whole tensor. ``meta.pt`` holds everything else, with None in place of the tensors. Neither
depends on the number of ranks that wrote it, their layout, or whether parameters were sharded.
"""

import copy
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
"""Entry of a loaded checkpoint: its folder, and the paths of optimizers' tensors by their key in the folder."""

PATHS = "lightning_lss_tensors"  # entry of meta.pt: the path in the checkpoint of each stored tensor, by its key

KeyPath = tuple[Any, ...]
"""Keys and indices that lead through the nested checkpoint to a value."""
Tables = Mapping[str, SegmentPositionalEmbedding]
TablesByWeight = Mapping[nn.Parameter, SegmentPositionalEmbedding]


@dataclass(frozen=True)
class SpreadRows:
    """This rank's rows of a positional table, or of one of its moments, as a part of the whole [num_positions, ...].

    It implements the protocol of ``torch.distributed.checkpoint`` for sharded tensors. (A DTensor cannot represent rows
    in two separate places, as in the zigzag layout.)
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
        parts = [(chunk, TensorWriteData(chunk, properties, size)) for chunk, _ in self._chunks()]
        return [WriteItem(MetadataIndex(fqn, x.offsets), WriteItemType.SHARD, tensor_data=data) for x, data in parts]

    def __create_chunk_list__(self) -> list[Any]:
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return next(rows for chunk, rows in self._chunks() if chunk.offsets == index.offset)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a distributed checkpoint."""
    return (Path(path) / _METADATA_FILENAME).is_file()


class FolderCheckpoints:
    """How :class:`~lightning_lss.LSSStrategy` writes checkpoints as folders: every rank writes its own part.

    :class:`~lightning_lss.checkpoint.file.FileCheckpoints` has the same methods.
    """

    def collect_model(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part, ``state`` itself."""
        return state

    def collect_optimizer(self, module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part, ``state`` itself."""
        return state

    def needs_all_ranks(self, module: nn.Module) -> bool:
        """True: torch writes a folder with collectives."""
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
        save_folder(checkpoint, folder.expanduser().absolute(), tables_by_name(module), optimizers)


# -- writing -----------------------------------------------------------------------------------------------------------


class _SavePlanner(dcp.DefaultSavePlanner):
    """Write a flat dict as it is; the default planner does not recognize :class:`SpreadRows` as a tensor."""

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, SpreadRows) else super().lookup_object(index)


def save_folder(checkpoint: dict[str, Any], folder: Path, tables: Tables, optimizers: Iterable[Optimizer]) -> None:
    """Write a checkpoint completely or not at all; every rank of the world must call it with the same ``folder``.

    Args:
        checkpoint: the checkpoint that Lightning collected, with this rank's parts of tensors.
        folder: where to write; an existing checkpoint is replaced.
        tables: positional tables that are spread over ranks, by the name of their weight.
        optimizers: the optimizers of ``checkpoint["optimizer_states"]``.
    """
    weights = {table.weight: table for table in tables.values()}
    rows: dict[KeyPath, SegmentPositionalEmbedding] = {}
    for number, (optimizer, state) in enumerate(zip(optimizers, checkpoint.get("optimizer_states", []))):
        for index, parameter in (parameters_by_index(optimizer, state) if state else {}).items():
            if parameter in weights:
                rows["optimizer_states", number, "state", index] = weights[parameter]
    stored: dict[str, Any] = {}
    paths: dict[str, KeyPath] = {}

    def take_out(value: Any, path: KeyPath) -> Any:
        if isinstance(value, Tensor):
            table = rows.get(path[:-1]) or tables.get(path[-1])
            if table is not None and value.dim() and value.size(0) == table.weight.size(0):
                part: Any = SpreadRows(value.detach(), table)
            elif isinstance(value, DTensor):
                part = value.detach()
            elif path[0] in ("state_dict", "optimizer_states"):
                part = value.detach() if dist.get_rank() == 0 else None  # equal on all ranks, or rank 0's counts
            else:
                return value
            key = ".".join(map(str, path))
            paths[key] = path
            if part is not None:
                stored[key] = part
            return None
        if isinstance(value, dict):
            taken = copy.copy(value)  # a Counter or a defaultdict stays one
            for key, x in value.items():
                taken[key] = take_out(x, (*path, key))
            return taken
        if type(value) is list:
            return [take_out(x, (*path, number)) for number, x in enumerate(value)]
        return value

    rest = take_out(checkpoint, ())
    part = folder.with_name(f".{folder.name}.{_same_on_all_ranks(uuid.uuid4().hex)}.part")
    try:
        dcp.save(stored, checkpoint_id=part, planner=_SavePlanner(flatten_state_dict=False))
        if dist.get_rank() == 0:
            with open(part / _METADATA_FILENAME, "xb") as file:
                torch.save({**rest, PATHS: paths}, file)
                file.flush()
                os.fsync(file.fileno())
            _replace_folder(folder, part)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


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


# -- reading -----------------------------------------------------------------------------------------------------------


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Read into a flat dict as it is; the default planner does not recognize :class:`SpreadRows` as a tensor."""

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
    """Load the checkpoint in a folder.

    Args:
        folder: the folder.
        model: the state dict of the model that will load the checkpoint. Only this rank's part of its sharded tensors
            and spread tables is read. None reads all tensors whole, those of optimizers too, in a single process.
        tables: the positional tables that are spread over ranks, by the name of their weight.
        weights_only: as for ``torch.load``.

    Returns:
        the checkpoint on the CPU. With a ``model`` it lacks the tensors of optimizers; :func:`load_optimizer_state`
        reads them with the entry :data:`FOLDER_KEY`.

    Raises:
        ValueError: if ``folder`` is not a distributed checkpoint of LSSStrategy.
    """
    checkpoint = load_meta(folder, weights_only)
    if PATHS not in checkpoint:
        raise ValueError(
            f"{folder} was written by another strategy: convert it to one file with"
            f" lightning_lss.checkpoint.consolidate({str(folder)!r}, file), and load that."
        )
    paths = checkpoint.pop(PATHS)
    if model is not None:
        left = {key: path for key, path in paths.items() if path[0] == "optimizer_states"}
        paths = {key: path for key, path in paths.items() if key not in left}
        checkpoint[FOLDER_KEY] = (str(folder), left)
    _read(folder, checkpoint, paths, lambda path: ((tables or {}).get(path[-1]), (model or {}).get(path[-1])))
    return checkpoint


def load_optimizer_state(
    source: tuple[str, dict[str, KeyPath]],
    number: int,
    state: dict[str, Any],
    optimizer: Optimizer,
    tables: TablesByWeight,
) -> dict[str, Any]:
    """Read this rank's parts of the tensors of an optimizer.

    Args:
        source: ``checkpoint[FOLDER_KEY]`` of :func:`load_folder`.
        number: the index of the optimizer.
        state: ``checkpoint["optimizer_states"][number]``, filled in.
        optimizer: the optimizer that will load the state.
        tables: the positional tables that are spread over ranks, by their weight.

    Returns:
        ``state``.
    """
    parameters = parameters_by_index(optimizer, state)
    folder, left = source
    paths = {key: path for key, path in left.items() if path[1] == number}

    def owner(path: KeyPath) -> tuple[Any, Any]:
        parameter = parameters.get(path[3])
        return None if parameter is None else tables.get(parameter), parameter

    _read(Path(folder), {"optimizer_states": {number: state}}, paths, owner)
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


def _read(
    folder: Path, checkpoint: dict[str, Any], paths: Mapping[str, KeyPath], owner: Callable[[KeyPath], tuple[Any, Any]]
) -> None:
    """Read this rank's parts of the tensors of ``paths`` into a checkpoint; ``owner`` returns a tensor's positional
    table or None, and its parameter or None."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    targets = {}
    for key, path in paths.items():
        kind = stored[key]
        assert isinstance(kind, TensorStorageMetadata)
        targets[key] = _allocate(*owner(path), kind.size, kind.properties.dtype)
    dcp.load(targets, checkpoint_id=folder, planner=_LoadPlanner(), no_dist=True)  # ranks read different parts
    for key, path in paths.items():
        holder: Any = checkpoint
        for step in path[:-1]:
            holder = holder[step]
        value = targets[key]
        holder[path[-1]] = value.rows if isinstance(value, SpreadRows) else value


def _allocate(
    table: SegmentPositionalEmbedding | None, parameter: Tensor | None, size: torch.Size, dtype: torch.dtype
) -> Any:
    """Allocate this rank's part of a tensor of the whole ``size``."""
    if table is not None and size and size[0] == table.num_positions:
        return SpreadRows(torch.empty(table.weight.size(0), *size[1:], dtype=dtype), table)
    if isinstance(parameter, DTensor) and parameter.shape == size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)
