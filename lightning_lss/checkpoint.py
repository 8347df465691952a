"""Checkpoints that do not know S: segment-local state in position order, and files that are never half written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.positions import SegmentPositionalEmbedding


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
        if target.is_dir():
            raise IsADirectoryError(f"The checkpoint path {target} is a folder: give the path of a file.")
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with open(part, "xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
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


def gather_model_state(state: Any, tables: Mapping[str, SegmentPositionalEmbedding]) -> Any:
    """A copy of a (nested) state with the rows of every table that is spread over ranks put together in position order.

    Finds entries by the name of the table's weight at any depth, so that copies of the model which callbacks store
    beside it (weight averaging) are put together too. Every rank of the sequence group must call it, with the same
    structure.
    """
    if not tables or not isinstance(state, dict):
        return state
    gathered = state.copy()
    for key, value in state.items():
        table = tables.get(key)
        if table is not None and isinstance(value, Tensor) and value.size(0) != table.num_positions:
            rows = value.detach().to(table.weight.device)  # weight averaging may keep its copy elsewhere
            gathered[key] = table.shard.gather(rows, dim=0).to(value.device)
        else:
            gathered[key] = gather_model_state(value, tables)
    return gathered


def gather_optimizer_state(
    state: dict[str, Any], optimizer: Optimizer, tables: Mapping[nn.Parameter, SegmentPositionalEmbedding]
) -> dict[str, Any]:
    """An optimizer's state dict with the moments of spread tables put together; every rank of the group must call
    it."""
    return _map_moments(
        state,
        optimizer,
        tables,
        lambda table, moment: table.shard.gather(moment, dim=0) if moment.size(0) == table.weight.size(0) else moment,
    )


def own_optimizer_state(
    state: dict[str, Any], optimizer: Optimizer, tables: Mapping[nn.Parameter, SegmentPositionalEmbedding]
) -> dict[str, Any]:
    """The inverse of :func:`gather_optimizer_state`: whole moments cut to this rank's rows. No communication."""
    return _map_moments(
        state,
        optimizer,
        tables,
        lambda table, moment: table.own_rows(moment) if moment.size(0) == table.num_positions else moment,
    )


def _map_moments(
    state: dict[str, Any], optimizer: Optimizer, tables: Mapping[nn.Parameter, Any], convert: Any
) -> dict[str, Any]:
    """``state`` with ``convert(table, tensor)`` applied to what the optimizer keeps for each row of a table."""
    if not tables:  # also where the state is empty: ZeroRedundancyOptimizer's is collected on rank 0 alone
        return state
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    converted = dict(state["state"])
    for index, parameter in zip(indices, parameters):
        table = tables.get(parameter)
        if table is not None and index in converted:
            converted[index] = {
                key: convert(table, value) if isinstance(value, Tensor) and value.dim() == parameter.dim() else value
                for key, value in converted[index].items()
            }
    return {**state, "state": converted}
