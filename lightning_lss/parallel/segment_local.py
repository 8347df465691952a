"""Segment-local parameters: double gradient averaging, and what else must know which parameters stand for one segment only.

Gradients of shared parameters are averaged over the world by DistributedDataParallel or FSDP. A segment-local parameter
(LSS Transformer, arXiv 2311.02382, on double gradient averaging) is left to this module. The backward pass of attention's
gathers has already added up what the losses of all S ranks say about it, so its gradient is S times that of their mean: it
is divided by S and averaged over the data group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lss.parallel.broadcast import broadcast_from_first
from lightning_lss.sequence.grid import SequenceGrid
from lightning_lss.sequence.segment import segment_local_names


class SegmentLocal:
    """The parameters and buffers of a module that stand for one segment only, on one rank of a grid.

    There are none where a sequence has one rank.

    Args:
        module: the whole model, with its segments assigned.
        grid: the grid of ranks.
    """

    def __init__(self, module: nn.Module, grid: SequenceGrid) -> None:
        self.names = segment_local_names(module) if grid.size > 1 else []
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        self.parameters = [parameters[name] for name in self.names if name in parameters]
        self.buffers = [buffers[name] for name in self.names if name in buffers]
        self.group = grid.sequence_group if self.parameters else None
        """The ranks whose gradients differ; None where no parameter is segment-local."""
        self._grid = grid

    def start_equally(self) -> None:
        """Start from the values of the first rank that holds the segment."""
        if self._grid.data_group is not None:
            broadcast_from_first([*self.parameters, *self.buffers], self._grid.data_group)

    def average_gradients(self, should_sync: Callable[[], bool]) -> list[RemovableHandle]:
        """From now on, scale the gradients in every backward pass and average them over the data group.

        The scaling acts on what a backward pass adds, the averaging on the accumulated gradient. Both are right however
        many passes accumulate before a step, as with DDP.

        Args:
            should_sync: whether the backward pass under way ends an accumulation.

        Returns:
            handles that undo it.
        """
        handles = []
        for parameter in self.parameters:
            handles.append(parameter.register_hook(lambda grad: grad / self._grid.size))
            if self._grid.data_group is not None:
                handles.append(average_over(parameter, self._grid.data_group, should_sync))
        return handles


def average_over(parameter: nn.Parameter, group: dist.ProcessGroup, should_sync: Callable[[], bool]) -> RemovableHandle:
    """From now on, average the accumulated gradient of ``parameter`` over ``group`` in every backward pass that ends an
    accumulation."""

    def average(parameter: Tensor) -> None:
        if should_sync() and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()

    return parameter.register_post_accumulate_grad_hook(average)


def total_norm(
    parameters: Iterable[Tensor], segment_local: Collection[Tensor], group: dist.ProcessGroup | None
) -> Tensor:
    """2-norm of all gradients, those of the segment-local parameters of every rank of the sequence group included, and
    all parts of sharded ones.

    total^2 = |shared|^2 + sum over ranks of |segment-local|^2; every rank of ``group`` must call it, and with sharded
    parameters every rank of the world. ``group`` is None where no parameter is segment-local.
    """
    parameters = list(parameters)
    grads = [(x.grad, x in segment_local) for x in parameters if x.grad is not None]
    device = parameters[0].device if parameters else torch.device("cpu")
    local = _squared_norm([grad for grad, is_local in grads if is_local]).to(device)
    shared = _squared_norm([grad for grad, is_local in grads if not is_local and not isinstance(grad, DTensor)])
    sharded = _squared_norm([grad for grad, is_local in grads if isinstance(grad, DTensor)])
    if group is not None:
        dist.all_reduce(local, group=group)
    return (local + shared.to(device) + sharded.to(device)).sqrt()


def _squared_norm(grads: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.to(torch.promote_types(norm.dtype, torch.float32)) ** 2  # in float16 it would overflow from 256


def clip_grad_norm(
    parameters: Iterable[Tensor], max_norm: float, segment_local: Collection[Tensor], group: dist.ProcessGroup | None
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the norm of the whole model, so that all ranks clip by one factor."""
    parameters = list(parameters)
    norm = total_norm(parameters, segment_local, group)
    nn.utils.clip_grads_with_norm_(local_views(parameters), max_norm, norm)
    return norm


def patch_precision_plugin(
    plugin: Precision,
    segment_local: Collection[Tensor],
    group: dist.ProcessGroup | None,
    scaler_group: dist.ProcessGroup | None,
) -> None:
    """Have clipping and the gradient scaler look at all ranks.

    Lightning clips in the precision plugin, of which there are many kinds, so the methods are replaced on the object.

    Args:
        plugin: the plugin, changed in place; :func:`restore_precision_plugin` undoes it.
        segment_local: the segment-local parameters.
        group: the sequence group, None where no parameter is segment-local.
        scaler_group: the ranks whose gradients differ, which must skip a step together.
    """

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm(plugin.main_params(optimizer), clip_val, segment_local, group)

    def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
        nn.utils.clip_grad_value_(local_views(plugin.main_params(optimizer)), clip_val)

    plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
    plugin.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None and scaler_group is not None:
        plugin.scaler = SegmentGradScaler.like(plugin.scaler, scaler_group)


def restore_precision_plugin(plugin: Precision) -> None:
    """Clip as Lightning does again."""
    for name in ("clip_grad_by_norm", "clip_grad_by_value"):
        vars(plugin).pop(name, None)


class SegmentGradScaler(torch.amp.GradScaler):
    """A gradient scaler that skips a step on all ranks of a group if any of them found an inf or NaN.

    Shared gradients are equal on all ranks, but one rank's segment-local gradient, or its part of a sharded one, may
    overflow alone; the others would step, and the weights drift apart. (torch's ``ShardedGradScaler`` does the same for
    the first FSDP.)
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

    def _unscale_grads_(self, optimizer: Optimizer, *args: Any) -> dict[torch.device, Tensor]:
        # torch's function over many tensors takes DTensors or others, but not both; it asks for nothing but gradients
        views = local_views(x for group in optimizer.param_groups for x in group["params"])
        return super()._unscale_grads_(SimpleNamespace(param_groups=[{"params": views}]), *args)  # type: ignore[arg-type]

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:  # used for fused optimizers
        super()._check_inf_per_device(optimizer)
        return self._share_found_inf(optimizer)

    def _share_found_inf(self, optimizer: Optimizer) -> dict[str, Any]:
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for found_inf in found.values():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self._group)
        return found


def count_parameters(module: nn.Module, size: int = 1) -> int:
    """Number of parameters of the whole model; segment-local ones lie on ``size`` ranks in equal parts."""
    local = set(segment_local_names(module))
    whole = {name: x for name, x in module.named_parameters() if name not in local or isinstance(x, DTensor)}
    parts = [x for name, x in module.named_parameters() if name not in whole]
    return sum(x.numel() for x in whole.values()) + size * sum(x.numel() for x in parts)


def local_views(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Parameters and gradients as plain tensors that share this rank's memory.

    Some of torch's functions over many tensors refuse DTensors beside others, and segment-local parameters are not
    DTensors.
    """
    views = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            view = parameter.to_local().detach()
            view.grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None
            views.append(view)
        else:
            views.append(parameter)
    return views
