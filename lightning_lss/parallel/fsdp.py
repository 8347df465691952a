"""Parameters, gradients and optimizer state in equal parts over the ranks, with torch's ``fully_shard`` (FSDP2).

Every repeated block of a model is a *unit*, whose parameters are whole for its forward and its backward only; what
belongs to no unit (embeddings, a head, weights that several modules share) stays with the root and is whole during a
step. Sharded tensors are torch's DTensors. Segment-local parameters are not sharded: a rank has only its own already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_lss.sequence.grid import SequenceMesh

Sharding = Literal["fsdp", "hybrid"]


def sharding_mesh(mesh: SequenceMesh, sharding: Sharding, device_type: str) -> DeviceMesh:
    """The ranks to shard over: all of them, or for ``"hybrid"`` the sequence group, with a copy for each of the D
    batches."""
    if sharding == "hybrid" and mesh.data_group is not None:
        return mesh.device_mesh(device_type)  # [data, sequence]: fully_shard replicates over the first dimension
    everyone = dist.group.WORLD
    assert everyone is not None
    return DeviceMesh.from_group(everyone, device_type, mesh_dim_names=("world",))


def units_of(module: nn.Module, types: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """The modules whose parameters are put together by themselves.

    Args:
        module: the whole model.
        types: classes of units; None takes the outermost children of an ``nn.ModuleList`` or ``nn.Sequential`` that
            have children of their own and a class that occurs there more than once.

    Returns:
        units in the order of the model. One that shares a parameter with a module outside of it (tied weights) is left
        out, so that the parameter stays with the root.
    """
    holders: Counter[int] = Counter()  # modules that hold a parameter, by the parameter's id
    for owner in module.modules():
        holders.update(id(x) for _, x in owner.named_parameters(recurse=False, remove_duplicate=False))
    units: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        kinds = Counter(type(child) for child in parent.children())
        is_stack = isinstance(parent, (nn.ModuleList, nn.Sequential))
        for child in parent.children():
            repeated = is_stack and kinds[type(child)] > 1 and any(True for _ in child.children())
            wanted = repeated if types is None else isinstance(child, tuple(types))
            if wanted and child not in units and _is_closed(child, holders):
                units.append(child)
            elif child not in units:
                visit(child)

    visit(module)
    return units


def _is_closed(unit: nn.Module, holders: Counter[int]) -> bool:
    """Whether no module outside of ``unit`` holds one of its parameters, and it has any."""
    inside: Counter[int] = Counter()
    for owner in unit.modules():
        inside.update(id(x) for _, x in owner.named_parameters(recurse=False, remove_duplicate=False))
    return bool(inside) and all(holders[key] == count for key, count in inside.items())


class ShardedRoot(nn.Module):
    """What the steps of a sharded LightningModule run through, as they run through DistributedDataParallel without
    sharding.

    Its forward finds the parameters that belong to no unit whole; calls of the LightningModule from within a step are
    ordinary calls. (Were the LightningModule itself given to ``fully_shard``, they would start the step anew.) All
    ranks start from the values of rank 0. No device holds more than its parts and one whole unit, or the whole root.

    Args:
        module: the LightningModule, which is sharded in place and stays so.
        mesh: the ranks to shard over, see :func:`sharding_mesh`.
        device: where a rank's parts go.
        segment_local: names of segment-local parameters and buffers, which are neither sharded nor made equal.
        unit_types: see :func:`units_of`.
        broadcast_buffers: whether buffers become those of rank 0 before each training step, as with DDP.
        reduce_dtype: the dtype in which gradients travel and are summed; None for their own.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        mesh: DeviceMesh,
        device: torch.device,
        segment_local: Collection[str] = (),
        unit_types: Collection[type[nn.Module]] | None = None,
        broadcast_buffers: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        local = [x for name, x in [*parameters.items(), *buffers.items()] if name in segment_local]
        self.scalars = [x for x in parameters.values() if x.dim() == 0]  # fully_shard refuses them
        ignored = {x for x in (*local, *self.scalars) if isinstance(x, nn.Parameter)}
        self.shared_buffers = [x for name, x in buffers.items() if name not in segment_local]
        units = units_of(module, unit_types)
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for tensor in local:
            tensor.data = tensor.data.to(device)
        _start_equally([*self.scalars, *self.shared_buffers], device)
        for unit in units:
            _start_equally([x for x in unit.parameters() if x not in ignored], device)
            fully_shard(unit, mesh=mesh, ignored_params=ignored, mp_policy=policy)
        rest = [x for x in module.parameters() if x not in ignored and not isinstance(x, DTensor)]
        _start_equally(rest, device)
        self.module = module
        fully_shard(self, mesh=mesh, ignored_params=ignored, mp_policy=policy)

        self.mesh = mesh
        self.broadcast_buffers = broadcast_buffers
        self.require_backward_grad_sync = True
        self.own_parameters = list(module.parameters())  # as optimizers know them, also while modules hold whole ones
        in_units = {x for unit in units for x in unit.modules()}
        self._held_by_root = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if owner not in in_units
        ]
        if not module.automatic_optimization:
            for method in ("toggle_optimizer", "untoggle_optimizer"):
                setattr(module, method, self._followed_by_whole_parameters(getattr(module, method)))
        vars(module)["_sharded_root"] = self  # past nn.Module, for which it would be a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule, or the step that Lightning has put in the place of its forward."""
        if self.broadcast_buffers and self.module.training:  # Lightning switches that back after a validation
            for buffer in self.shared_buffers:
                dist.broadcast(buffer, src=0)
        return self.module(*args, **kwargs)

    @contextmanager
    def accumulate(self) -> Generator[None, None, None]:
        """Within it, gradients are not averaged to the end.

        They are reduced to each rank's part nevertheless (FSDP could keep them whole instead, and save the traffic for
        the memory that sharding is there for); what waits is the sum over the copies of ``"hybrid"``.
        """
        self._set_last(False)
        try:
            yield
        finally:
            self._set_last(True)

    def _set_last(self, last: bool) -> None:
        assert isinstance(self, FSDPModule)
        self.require_backward_grad_sync = last
        self.set_requires_all_reduce(last)

    # With manual optimization a step may hold several passes; between a backward, which puts the root's parameters
    # away, and the forward after it nobody would put them together again.

    def before_manual_backward(self, loss: Tensor) -> None:
        """Have the backward from ``loss`` end with the root's gradients reduced."""
        for owner, name, parameter in self._held_by_root:
            parameter.requires_grad_(getattr(owner, name).requires_grad)  # users freeze what they find in modules
        fully_shard.state(self)._register_pre_backward_hook(loss)  # type: ignore[attr-defined]

    def put_together(self) -> None:
        """Make the root's parameters whole, as they are in a step."""
        assert isinstance(self, FSDPModule)
        self.unshard()

    def put_away(self) -> None:
        """Leave each rank with its part of the root's parameters."""
        assert isinstance(self, FSDPModule)
        self.reshard()

    def _followed_by_whole_parameters(self, toggle: Callable[..., None]) -> Callable[..., None]:
        """Lightning freezes what optimizers know."""

        @wraps(toggle)
        def toggle_both(*args: Any, **kwargs: Any) -> None:
            toggle(*args, **kwargs)
            for owner, name, parameter in self._held_by_root:
                getattr(owner, name).requires_grad_(parameter.requires_grad)

        return toggle_both


def _start_equally(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
        dist.broadcast(tensor.detach(), src=0)


def sharded_root(module: nn.Module) -> ShardedRoot | None:
    """The root that ``module`` was sharded under, None if it was not."""
    root = vars(module).get("_sharded_root")
    return root if isinstance(root, ShardedRoot) else None


# -- tensors of a state ------------------------------------------------------------------------------------------------


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


def own_part(whole: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor, sharded as ``like`` is; anything else as it is. No communication."""
    fits = isinstance(whole, Tensor) and isinstance(like, DTensor) and not isinstance(whole, DTensor)
    if not fits or whole.shape != like.shape:
        return whole
    assert isinstance(like, DTensor)
    whole = whole.detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def own_model_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A model's state dict with whole tensors cut to the parts that this rank's ``module`` holds."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {key: own_part(x, parameters[key]) if key in parameters else x for key, x in state.items()}
