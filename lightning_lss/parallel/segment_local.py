"""Segment-local parameters: double gradient averaging, gradient norms and gradient scaling.

DistributedDataParallel or FSDP average the gradients of shared parameters over the world. This module averages those of
segment-local parameters (LSS Transformer, arXiv 2311.02382, "double gradient averaging"). The backward pass of
attention's gathers sums the contributions of the losses of all S ranks to such a gradient, so it is S times that of
their mean: it is divided by S and averaged over the data group.
"""

from collections.abc import Callable, Iterable
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
    """The segment-local parameters and buffers of a module whose segments are assigned; with S = 1 there are none."""

    def __init__(self, module: nn.Module, grid: SequenceGrid) -> None:
        self.names = segment_local_names(module) if grid.size > 1 else []
        parameters = dict(module.named_parameters())
        self.parameters = [parameters[name] for name in self.names if name in parameters]
        self._module = module
        self.group = grid.sequence_group if self.parameters else None
        """The ranks whose gradients differ; None if no parameter is segment-local."""
        self.grid = grid

    @property
    def buffers(self) -> list[Tensor]:
        """The segment-local buffers; moving a module to a device or a dtype replaces them."""
        return [x for name, x in self._module.named_buffers() if name in self.names]

    def start_equally(self) -> None:
        """Copy the values of the first rank that holds the segment; every rank must call it."""
        if self.grid.data_group is not None:
            broadcast_from_first([*self.parameters, *self.buffers], self.grid.data_group)

    def average_gradients(self, should_sync: Callable[[], bool]) -> list[RemovableHandle]:
        """Scale the gradients of every backward pass, and average the accumulated ones over the data group after the last
        pass, of which ``should_sync`` is true; return the hooks' handles.

        Both are correct for any number of passes before a step, as with DDP. Frozen parameters take no hooks.
        """
        handles = []
        for parameter in (x for x in self.parameters if x.requires_grad):
            handles.append(parameter.register_hook(lambda grad: grad / self.grid.size))
            if self.grid.data_group is not None:
                handles.append(average_over(parameter, self.grid.data_group, should_sync))
        return handles

    def total_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """Return the 2-norm of the gradients of the whole model, in float32 or wider: total^2 = |shared|^2 + sum over
        ranks of |segment-local|^2.

        Every rank of the sequence group must call it with all its parameters; with sharded ones, every rank of the world.
        """
        parameters, own = list(parameters), set(self.parameters)
        grads = [(x.grad, x in own) for x in parameters if x.grad is not None]
        device = parameters[0].device if parameters else torch.device("cpu")
        local = _squared_norm([grad for grad, is_local in grads if is_local]).to(device)
        shared = _squared_norm([grad for grad, is_local in grads if not is_local and not isinstance(grad, DTensor)])
        sharded = _squared_norm([grad for grad, is_local in grads if isinstance(grad, DTensor)])
        if self.group is not None:
            dist.all_reduce(local, group=self.group)
        return (local + shared.to(device) + sharded.to(device)).sqrt()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip like ``torch.nn.utils.clip_grad_norm_``, but by :meth:`total_norm`, equal on all ranks; return the norm."""
        parameters = list(parameters)
        norm = self.total_norm(parameters)
        nn.utils.clip_grads_with_norm_(local_views(parameters), max_norm, norm)
        return norm

    def patch_precision_plugin(self, plugin: Precision, scaler_group: dist.ProcessGroup) -> None:
        """Make gradient clipping and the gradient scaler take the gradients of all ranks into account; the ranks of
        ``scaler_group`` skip steps together.

        Lightning clips in the precision plugin. There are many kinds, so the methods are replaced on the object.
        """

        def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
            self.clip_grad_norm(plugin.main_params(optimizer), clip_val)

        def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
            nn.utils.clip_grad_value_(local_views(plugin.main_params(optimizer)), clip_val)

        plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
        plugin.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            plugin.scaler = SegmentGradScaler(plugin.scaler, scaler_group)


def restore_precision_plugin(plugin: Precision) -> None:
    """Restore Lightning's own clipping."""
    for name in ("clip_grad_by_norm", "clip_grad_by_value"):
        vars(plugin).pop(name, None)


def average_over(parameter: nn.Parameter, group: dist.ProcessGroup, should_sync: Callable[[], bool]) -> RemovableHandle:
    """Average the accumulated gradient of ``parameter`` over ``group`` in the last backward pass of every accumulation
    from now on."""

    def average(parameter: Tensor) -> None:
        if should_sync() and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()

    return parameter.register_post_accumulate_grad_hook(average)


def _squared_norm(grads: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.to(torch.promote_types(norm.dtype, torch.float32)) ** 2  # in float16 it would overflow from 256


class SegmentGradScaler(torch.amp.GradScaler):
    """A gradient scaler that skips a step on all ranks of a group if any of them found an inf or NaN.

    Shared gradients are equal on all ranks, but one rank's segment-local gradient, or its part of a sharded one, may
    overflow alone. The other ranks would then step, and the weights would diverge. (torch's ``ShardedGradScaler`` does
    the same for FSDP1, but does not take fused optimizers, or DTensors beside other tensors.)

    It has the options and state of ``scaler``.
    """

    def __init__(self, scaler: torch.amp.GradScaler, group: dist.ProcessGroup) -> None:
        super().__init__(scaler._device, enabled=scaler.is_enabled())
        self.load_state_dict(scaler.state_dict())
        self._group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SegmentGradScaler":
        return SegmentGradScaler(self, self._group)  # process groups cannot be copied

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and record on all ranks whether any rank has an inf or NaN."""
        super().unscale_(optimizer)
        self._share_found_inf(optimizer)

    def _unscale_grads_(self, optimizer: Optimizer, *args: Any) -> dict[torch.device, Tensor]:
        # torch's multi-tensor function does not take DTensors beside other tensors; it reads only gradients
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
    """Count the parameters of the whole model, with segment-local ones in equal parts on ``size`` ranks."""
    local = set(segment_local_names(module))
    whole = {name: x for name, x in module.named_parameters() if name not in local or isinstance(x, DTensor)}
    parts = [x for name, x in module.named_parameters() if name not in whole]
    return sum(x.numel() for x in whole.values()) + size * sum(x.numel() for x in parts)


def local_views(parameters: Iterable[Tensor]) -> list[Tensor]:
    """View parameters and gradients as plain tensors in this rank's memory: some of torch's multi-tensor functions refuse
    DTensors beside other tensors, such as segment-local ones."""
    views = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            view = parameter.to_local().detach()
            view.grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None
            views.append(view)
        else:
            views.append(parameter)
    return views


def not_zero(values: Tensor, seed: int = 0) -> Tensor:
    """Return ``values``, or small random ones in place of zeros alone."""
    if values.any():
        return values
    generator = torch.Generator(values.device).manual_seed(seed)
    return torch.empty_like(values).normal_(std=0.02, generator=generator)
