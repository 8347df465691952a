"""Double gradient averaging, and what else must know which parameters stand for one segment only.

DistributedDataParallel averages the gradients of shared parameters over the world. A segment-local parameter (LSS
Transformer, arXiv 2311.02382, on double gradient averaging) is left to this module: the backward of the attention's
gathers has already added up what the losses of all S ranks say about it, so its gradient is S times that of their mean;
it is divided by S and averaged over the data group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lss.mesh import SequenceMesh
from lightning_lss.positions import SegmentPositionalEmbedding


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel leave the named parameters and buffers of ``module`` alone.

    DDP compares ``module_name + "." + name`` in one place, which for the root module is ``.name``, and the plain name
    in others.
    """
    names = list(names)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*ignored, *names, *(f".{name}" for name in names)]  # type: ignore[assignment]


def broadcast_over_data_group(module: nn.Module, names: Iterable[str], mesh: SequenceMesh) -> None:
    """Start the named segment-local parameters and buffers from those of the first rank that holds the segment, as DDP
    does."""
    if mesh.data_group is None:
        return
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    for name in names:
        dist.broadcast(tensors[name].detach(), group=mesh.data_group, group_src=0)


_ROWS_AT_A_TIME = 4096


def broadcast_rows(table: SegmentPositionalEmbedding, whole: Tensor | None, device: torch.device) -> None:
    """Give every rank of the world its rows of global rank 0's table ``whole`` [num_positions, dim], a few rows at a
    time."""
    for start in range(0, table.num_positions, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, table.num_positions - start)
        rows = torch.empty(count, table.dim, dtype=table.weight.dtype, device=device)
        if whole is not None and dist.get_rank() == 0:
            rows.copy_(whole[start : start + count])
        dist.broadcast(rows, src=0)
        table.take_rows(start, rows)


def average_segment_local_gradients(
    parameters: Iterable[nn.Parameter], mesh: SequenceMesh, should_sync: Callable[[], bool]
) -> list[RemovableHandle]:
    """From now on, scale the gradients of segment-local parameters in every backward pass and average them over the
    data group.

    The scaling acts on what a backward pass adds and the averaging on the accumulated gradient, so that both are right
    however many passes accumulate before a step, as it is with DDP.

    Args:
        parameters: the segment-local parameters.
        mesh: the grid of ranks.
        should_sync: whether the backward pass under way is one that ends an accumulation.

    Returns:
        handles that undo it.
    """
    handles = []
    for parameter in parameters:
        handles.append(parameter.register_hook(lambda grad: grad / mesh.size))
        if mesh.data_group is not None:
            handles.append(parameter.register_post_accumulate_grad_hook(_average_over(mesh, should_sync)))
    return handles


def _average_over(mesh: SequenceMesh, should_sync: Callable[[], bool]) -> Callable[[Tensor], None]:
    def average(parameter: Tensor) -> None:
        if should_sync() and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=mesh.data_group)
            parameter.grad /= mesh.data_size

    return average


def total_norm(parameters: Iterable[Tensor], segment_local: Collection[Tensor], group: dist.ProcessGroup) -> Tensor:
    """2-norm of all gradients, those of the segment-local parameters of every rank of the sequence group included.

    total^2 = |shared|^2 + sum over ranks of |segment-local|^2; every rank of ``group`` must call it.
    """
    parameters = list(parameters)
    local = _squared_norm([x.grad for x in parameters if x.grad is not None and x in segment_local])
    shared = _squared_norm([x.grad for x in parameters if x.grad is not None and x not in segment_local])
    if parameters:
        local = local.to(parameters[0].device)
    dist.all_reduce(local, group=group)
    return (local + shared.to(local.device)).sqrt()


def _squared_norm(grads: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(grads)
    return norm.to(torch.promote_types(norm.dtype, torch.float32)) ** 2  # in float16 it would overflow from 256


def clip_grad_norm(
    parameters: Iterable[Tensor], max_norm: float, segment_local: Collection[Tensor], group: dist.ProcessGroup
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the norm of the whole model, so that all ranks clip by one factor."""
    parameters = list(parameters)
    norm = total_norm(parameters, segment_local, group)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class SegmentGradScaler(torch.amp.GradScaler):
    """A gradient scaler that skips a step on all ranks of the sequence group if any of them found an inf or NaN.

    Shared gradients are equal on all ranks, but one rank's segment-local gradient may overflow alone; the others would
    step, and the shared weights drift apart. (torch's ``ShardedGradScaler`` does the same for FSDP.)
    """

    _group: dist.ProcessGroup

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, group: dist.ProcessGroup) -> SegmentGradScaler:
        """A scaler with the options and state of ``scaler``."""
        new = cls(scaler._device, enabled=scaler.is_enabled())
        if scaler.is_enabled():
            new._init_scale = scaler.get_scale()
            new.load_state_dict(scaler.state_dict())
        new._group = group
        return new

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and note on all ranks whether any is not finite on any rank."""
        super().unscale_(optimizer)
        self._share_found_inf(optimizer)

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:  # used for fused optimizers
        super()._check_inf_per_device(optimizer)
        return self._share_found_inf(optimizer)

    def _share_found_inf(self, optimizer: Optimizer) -> dict[str, Any]:
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for found_inf in found.values():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self._group)
        return found
