"""Gather the state of all ranks for a checkpoint, and cut a checkpoint's state to one rank's part."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import own_part


def tables_by_name(root: nn.Module) -> dict[str, SegmentPositionalEmbedding]:
    """The positional tables below ``root`` that are spread over ranks, by the name of their weight."""
    return {
        f"{prefix}.weight" if prefix else "weight": module
        for prefix, module in root.named_modules()
        if isinstance(module, SegmentPositionalEmbedding) and module.shard.size > 1
    }


Destination = Callable[[Tensor], Any]
"""Applied to a gathered tensor, such as :meth:`lightning_lss.parallel.replicated.Replicated.keep_for_checkpoint`."""


def gather_state(state: Any, tables: Mapping[str, SegmentPositionalEmbedding], keep: Destination) -> Any:
    """Copy a (nested) state and gather the tensors that are spread over ranks, one after another.

    These are the rows of positional tables, in position order, and sharded parameters (DTensors). Tables are found by
    the name of their weight at any depth, so copies of the model that callbacks store beside it (weight averaging) are
    gathered too. Every rank must call it, with the same structure.

    Args:
        state: the state.
        tables: the tables that are spread over ranks, by the name of their weight.
        keep: applied to each gathered tensor; its result goes into the copy.
    """
    if isinstance(state, DTensor):
        return keep(state.full_tensor().detach())
    if type(state) is list:
        return [gather_state(value, tables, keep) for value in state]
    if not isinstance(state, dict):
        return state
    gathered = copy.copy(state)
    for key, value in state.items():
        table = tables.get(key)
        if table is not None and isinstance(value, Tensor) and value.size(0) != table.num_positions:
            rows = value.detach().to(table.weight.device)  # weight averaging may keep its copy elsewhere
            gathered[key] = keep(table.shard.gather(rows, dim=0).to(value.device))
        else:
            gathered[key] = gather_state(value, tables, keep)
    return gathered


def gather_optimizer_state(
    state: dict[str, Any],
    optimizer: Optimizer,
    tables: Mapping[nn.Parameter, SegmentPositionalEmbedding],
    keep: Destination,
) -> dict[str, Any]:
    """Copy an optimizer's state dict and gather the moments of positional tables and of sharded parameters.

    Every rank must call it. For the arguments see :func:`gather_state`; here ``tables`` are found by their weight.
    """

    def gather(parameter: Tensor, moment: Tensor) -> Any:
        table = tables.get(parameter)  # type: ignore[call-overload]
        if table is not None and moment.size(0) == table.weight.size(0):
            return keep(table.shard.gather(moment, dim=0))
        return keep(moment.full_tensor()) if isinstance(moment, DTensor) else moment

    return _map_moments(state, optimizer, gather)


def own_optimizer_state(
    state: dict[str, Any], optimizer: Optimizer, tables: Mapping[nn.Parameter, SegmentPositionalEmbedding]
) -> dict[str, Any]:
    """Invert :func:`gather_optimizer_state`: cut whole moments to this rank's rows or part, without communication."""

    def cut(parameter: Tensor, moment: Tensor) -> Any:
        table = tables.get(parameter)  # type: ignore[call-overload]
        if table is not None and moment.size(0) == table.num_positions:
            return table.own_rows(moment)
        return own_part(moment, parameter)

    return _map_moments(state, optimizer, cut)


def tables_by_weight(root: nn.Module) -> dict[nn.Parameter, SegmentPositionalEmbedding]:
    """The tables of :func:`tables_by_name` by their weight."""
    return {table.weight: table for table in tables_by_name(root).values()}


def parameters_by_index(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[Any, nn.Parameter]:
    """An optimizer's parameters by their indices in its state dict ``state``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip([index for group in state["param_groups"] for index in group["params"]], parameters))


def _map_moments(
    state: dict[str, Any], optimizer: Optimizer, convert: Callable[[Tensor, Tensor], Any]
) -> dict[str, Any]:
    """Copy ``state`` with ``convert(parameter, tensor)`` applied to the tensors that have an entry for each element of
    a parameter."""
    if not state:  # ZeroRedundancyOptimizer has one on rank 0 only
        return state
    parameters = parameters_by_index(optimizer, state)
    converted = dict(state["state"])
    for index in sorted(converted, key=str):  # all ranks gather in the same order
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
