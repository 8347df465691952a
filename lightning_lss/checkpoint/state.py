"""Checkpoints that do not know S, nor sharding: whole tensors, tables in position order, files never half written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.folder import is_folder, parameters_by_index
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import own_part


class AtomicCheckpointIO(TorchCheckpointIO):
    """``TorchCheckpointIO`` whose local files are complete or not there at all.

    The file is written beside its target, flushed to the disk and renamed; Lightning's own writer goes through a
    temporary folder that may lie on another file system, where the move is a copy that can be interrupted. Remote paths
    are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        if storage_options is not None or "file" not in _protocols(path):
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


def _protocols(path: _PATH) -> tuple[str, ...]:
    protocol = get_filesystem(path).protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def tables_by_name(root: nn.Module) -> dict[str, SegmentPositionalEmbedding]:
    """The positional tables below ``root`` that are spread over ranks, by the name of their weight."""
    return {
        f"{prefix}.weight" if prefix else "weight": module
        for prefix, module in root.named_modules()
        if isinstance(module, SegmentPositionalEmbedding) and module.shard.size > 1
    }


Place = Callable[[Tensor], Any]
"""Where a gathered tensor goes."""


def on_rank_zero_only(tensor: Tensor) -> Tensor | None:
    """To the CPU on global rank 0, nowhere on others."""
    return tensor.cpu() if dist.get_rank() == 0 else None


def gather_model_state(
    state: Any, tables: Mapping[str, SegmentPositionalEmbedding], place: Place = lambda tensor: tensor
) -> Any:
    """A copy of a (nested) state in which tensors are whole that are spread over ranks, one gathered after another.

    That is the rows of positional tables, put together in position order, and sharded parameters (DTensors). Finds
    tables by the name of their weight at any depth, so that copies of the model which callbacks store beside it (weight
    averaging) are put together too. Every rank must call it, with the same structure.

    Args:
        state: what to copy.
        tables: the spread tables by the name of their weight.
        place: where each gathered tensor goes.
    """
    if isinstance(state, DTensor):
        return place(state.full_tensor().detach())
    if type(state) is list:
        return [gather_model_state(value, tables, place) for value in state]
    if not isinstance(state, dict):
        return state
    gathered = state.copy()
    for key, value in state.items():
        table = tables.get(key)
        if table is not None and isinstance(value, Tensor) and value.size(0) != table.num_positions:
            rows = value.detach().to(table.weight.device)  # weight averaging may keep its copy elsewhere
            gathered[key] = place(table.shard.gather(rows, dim=0).to(value.device))
        else:
            gathered[key] = gather_model_state(value, tables, place)
    return gathered


def gather_optimizer_state(
    state: dict[str, Any],
    optimizer: Optimizer,
    tables: Mapping[nn.Parameter, SegmentPositionalEmbedding],
    place: Place = lambda tensor: tensor,
) -> dict[str, Any]:
    """An optimizer's state dict with the moments of spread tables and of sharded parameters put together; every rank
    must call it."""

    def gather(parameter: Tensor, moment: Tensor) -> Any:
        table = tables.get(parameter)  # type: ignore[call-overload]
        if table is not None and moment.size(0) == table.weight.size(0):
            return place(table.shard.gather(moment, dim=0))
        return place(moment.full_tensor()) if isinstance(moment, DTensor) else moment

    return _map_moments(state, optimizer, gather)


def own_optimizer_state(
    state: dict[str, Any], optimizer: Optimizer, tables: Mapping[nn.Parameter, SegmentPositionalEmbedding]
) -> dict[str, Any]:
    """The inverse of :func:`gather_optimizer_state`: whole moments cut to this rank's rows or part. No
    communication."""

    def cut(parameter: Tensor, moment: Tensor) -> Any:
        table = tables.get(parameter)  # type: ignore[call-overload]
        if table is not None and moment.size(0) == table.num_positions:
            return table.own_rows(moment)
        return own_part(moment, parameter)

    return _map_moments(state, optimizer, cut)


def _map_moments(
    state: dict[str, Any], optimizer: Optimizer, convert: Callable[[Tensor, Tensor], Any]
) -> dict[str, Any]:
    """``state`` with ``convert(parameter, tensor)`` applied to what the optimizer keeps for the elements of a
    parameter."""
    parameters = parameters_by_index(optimizer, state)
    converted = dict(state["state"])
    for index in sorted(converted, key=str):  # gathers come in one order on all ranks
        if index not in parameters:
            continue
        parameter = parameters[index]
        converted[index] = {
            key: convert(parameter, value)
            if isinstance(value, Tensor) and value.dim() == parameter.dim() > 0
            else value
            for key, value in converted[index].items()
        }
    return {**state, "state": converted}
