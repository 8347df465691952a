"""Double gradient averaging, and what else must know which parameters stand for one segment only.

DistributedDataParallel averages the gradients of shared parameters over the world. A segment-local parameter (LSS
Transformer, arXiv 2311.02382, on double gradient averaging) is left to this module: the backward of the attention's
gathers has already added up what the losses of all S ranks say about it, so its gradient is S times that of their mean;
it is divided by S and averaged over the data group. With sharding FSDP averages the shared ones, to the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lss.parallel.fsdp import local_views
from lightning_lss.sequence.grid import SequenceMesh


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel leave the named parameters and buffers of ``module`` alone.

    DDP compares ``module_name + "." + name`` in one place, which for the root module is ``.name``, and the plain name
    in others.
    """
    names = list(names)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*ignored, *names, *(f".{name}" for name in names)]  # type: ignore[assignment]


def travel_in(dtype: torch.dtype) -> Callable[..., Any]:
    """A communication hook for DistributedDataParallel that averages gradients in bfloat16 or float16.

    torch's own hooks, which DDP would refuse by their names where it thinks that only NCCL can do it; gloo can.
    """
    hook = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}[dtype]
    return lambda state, bucket: hook(state, bucket)


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
            handles.append(_average_over(parameter, mesh.data_group, should_sync))
    return handles


def average_replicated_gradients(
    parameters: Iterable[nn.Parameter], should_sync: Callable[[], bool]
) -> list[RemovableHandle]:
    """The same for parameters that neither DistributedDataParallel nor FSDP looks after: averaged over the world."""
    everyone = dist.group.WORLD
    assert everyone is not None
    return [_average_over(parameter, everyone, should_sync) for parameter in parameters]


def _average_over(
    parameter: nn.Parameter, group: dist.ProcessGroup, should_sync: Callable[[], bool]
) -> RemovableHandle:
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


def watch_precision_plugin(
    plugin: Precision,
    segment_local: Collection[Tensor],
    group: dist.ProcessGroup | None,
    scaler_group: dist.ProcessGroup | None,
) -> None:
    """Have clipping and the gradient scaler look at all ranks.

    Lightning clips in the precision plugin, of which there are many kinds, so the methods are replaced on the object.

    Args:
        plugin: the plugin, changed in place; :func:`leave_precision_plugin` undoes it.
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


def leave_precision_plugin(plugin: Precision) -> None:
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
