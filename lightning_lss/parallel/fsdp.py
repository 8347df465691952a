"""Shard parameters, gradients and optimizer state evenly over the ranks with torch's ``fully_shard`` (FSDP2).

Every repeated block of a model is a *unit*. Its parameters are whole only during its forward and backward. Parameters
outside of units (embeddings, a head, weights that several modules share) belong to the root and are whole during a
step. Sharded tensors are torch's DTensors. Segment-local parameters are not sharded: a rank has only its own already.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_lss.nn.recompute import outermost, repeated_blocks
from lightning_lss.parallel.broadcast import broadcast_from_first
from lightning_lss.parallel.segment_local import SegmentLocal, average_over
from lightning_lss.sequence.grid import SequenceGrid

Sharding = Literal["fsdp", "hybrid"]


def sharding_mesh(grid: SequenceGrid, sharding: Sharding, device_type: str) -> DeviceMesh:
    """Mesh of the ranks to shard over: all ranks, or for ``"hybrid"`` each sequence group, with D copies of the
    parameters."""
    if sharding == "hybrid" and grid.data_group is not None:
        return grid.device_mesh(device_type)  # [data, sequence]: fully_shard replicates over the first dimension
    everyone = dist.group.WORLD
    assert everyone is not None
    return DeviceMesh.from_group(everyone, device_type, mesh_dim_names=("world",))


def units_of(module: nn.Module, types: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """Find the units, in the order of the model: modules of ``types``, or the repeated blocks, whose parameters are gathered
    together.

    A module that shares a parameter with one outside of it (tied weights) is not a unit; its parameters belong to the
    root.
    """
    holders = _holders(module)
    if types is None:
        return repeated_blocks(module, lambda block: _is_closed(block, holders))
    return outermost(module, lambda _, child: isinstance(child, tuple(types)) and _is_closed(child, holders))


def _holders(module: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by the parameter's id."""
    holders: Counter[int] = Counter()
    for owner in module.modules():
        holders.update(id(x) for _, x in owner.named_parameters(recurse=False, remove_duplicate=False))
    return holders


def _is_closed(unit: nn.Module, holders: Counter[int]) -> bool:
    """Whether ``unit`` has parameters and no module outside of it holds any of them."""
    inside = _holders(unit)
    return bool(inside) and all(holders[key] == count for key, count in inside.items())


class FullyShard:
    """How :class:`~lightning_lss.LSSStrategy` treats parameters that are sharded over the ranks.

    :class:`~lightning_lss.parallel.replicated.Replicated` has the same methods. Gradients are sent and summed in
    ``reduce_dtype``, None for their own.
    """

    stay_on_device = True  # after a run, so that their process groups can gather them for a checkpoint

    def __init__(
        self,
        sharding: Sharding,
        unit_types: Collection[type[nn.Module]] | None = None,
        broadcast_buffers: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._sharding = sharding
        self._unit_types = unit_types
        self._broadcast_buffers = broadcast_buffers
        self._policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        self._root: ShardedRoot | None = None

    def check(self, module: pl.LightningModule, size: int, world_size: int) -> None:
        """Refuse a run whose parameters cannot be sharded over ``world_size`` ranks in sequence groups of ``size``.

        Raises:
            MisconfigurationException: if an earlier run has sharded them in another way, a callback averages weights,
                ``"hybrid"`` has only one rank to shard over, or parameters have no values.
        """
        copies = self._sharding == "hybrid" and size < world_size  # sharded over one dimension, copied along another
        check_sharding(module, (world_size, 1 + copies))
        callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        averaging = [x for x in callbacks if isinstance(x, (WeightAveraging, StochasticWeightAveraging))]
        if averaging:
            raise MisconfigurationException(
                f"{type(averaging[0]).__name__} keeps a copy of the whole model, but sharded parameters cannot be copied"
                f" (sharding={self._sharding!r}). Leave the callback out, or use sharding=None."
            )
        if self._sharding == "hybrid" and size == 1 < world_size:
            raise MisconfigurationException(
                "sharding='hybrid' shards over the sequence group, but that has one rank (sequence_parallel_size=1). Use"
                " sharding='fsdp', which shards over all ranks."
            )
        without_values = [name for name, x in module.named_parameters() if x.is_meta]
        if without_values:
            raise MisconfigurationException(
                f"Parameters on the meta device have no values to start from: {', '.join(without_values[:5])}. Build them in"
                " configure_model without `torch.device('meta')`; they stay on the CPU until they are sharded."
            )

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that do not work with sharded parameters.

        Raises:
            MisconfigurationException: for ``ZeroRedundancyOptimizer``, and ``foreach`` or ``fused`` with sharded and other
                parameters in one group.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                raise MisconfigurationException(
                    "ZeroRedundancyOptimizer shards the state of an optimizer, but it is sharded with its parameters already."
                    " Use the optimizer that it wraps."
                )
            for group in optimizer.param_groups:
                kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
                if len(kinds) > 1 and (group.get("foreach") or group.get("fused")):
                    raise MisconfigurationException(
                        f"{type(optimizer).__name__}(foreach=True) and fused=True do not take sharded parameters and others"
                        " (positional tables, scalars) in one group. Leave these options out, or give the others a group of"
                        " their own."
                    )

    def init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which modules are built: on the CPU, since the rank's device never holds a whole one."""
        return torch.device("cpu")

    def layer_sync(self, module: nn.Module, layer_sync: LayerSync | None) -> LayerSync | None:
        """Drop ``layer_sync`` for a module that is sharded already: its layers were replaced before, and FSDP does not
        support it later."""
        return None if sharded_root(module) is not None else layer_sync

    def place(self, module: pl.LightningModule, local: SegmentLocal, device: torch.device) -> nn.Module:
        """Shard ``module``, unless an earlier run has, and return the root that runs its steps."""
        trainer = module.trainer
        evaluation = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
        for loop in (trainer.fit_loop.epoch_loop.val_loop, *evaluation):
            # FSDP allocates the memory of whole parameters once and cannot train with tensors that were made in inference
            # mode. (Lightning uses ``torch.no_grad`` with its own FSDP strategy too.)
            loop.inference_mode = False
        root = sharded_root(module)
        if root is None:
            mesh, units = sharding_mesh(local.grid, self._sharding, device.type), units_of(module, self._unit_types)
            root = ShardedRoot(module, units, mesh, device, local, self._policy, self._broadcast_buffers)
        # Outside of fitting, Lightning broadcasts all parameters and buffers that are not ignored. None needs it: shared
        # ones are equal already, and the others must differ.
        root._ddp_params_and_buffers_to_ignore = [*dict(root.named_parameters()), *dict(root.named_buffers())]  # type: ignore[assignment]
        self._root = root
        return root

    def register_hooks(self, should_sync: Callable[[], bool]) -> Iterable[RemovableHandle]:
        """Average the gradients of scalars over the world, since FSDP does not take scalars, and keep the root whole
        between the optimizer steps of manual optimization; return the hooks' handles."""
        assert self._root is not None
        assert dist.group.WORLD is not None
        scalars = [average_over(scalar, dist.group.WORLD, should_sync) for scalar in self._root.scalars]
        return scalars + self._root.follow_manual_steps()

    def clipping_group(self, local: SegmentLocal) -> dist.ProcessGroup | None:
        """All ranks, since each holds different parts."""
        return dist.group.WORLD

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The sharded parameters, as optimizers hold them, also while modules hold whole ones."""
        assert self._root is not None
        return self._root.own_parameters

    def before_backward(self, loss: Tensor) -> None:
        """Have the root's gradients reduced at the end of a manual backward from ``loss``, which its forward did not
        return."""
        if self._root is not None and self._root.is_manual:
            fully_shard.state(self._root)._register_pre_backward_hook(loss)  # type: ignore[attr-defined]

    def reshard(self) -> None:
        """Reshard the root, whose parameters stay whole after a forward without backward."""
        if self._root is not None:
            self._root.reshard_own()

    def keep_for_checkpoint(self, tensor: Tensor) -> Any:
        """Return a tensor that was gathered for a checkpoint on the CPU of global rank 0, and None on other ranks:
        sharded models may not fit whole on every rank."""
        return tensor.cpu() if dist.get_rank() == 0 else None

    def hand_over(self, module: nn.Module) -> None:
        """Make the next ``module.state_dict()`` whole, for the process that spawned this one; every rank must call
        that."""
        module.register_state_dict_post_hook(_make_whole)

    @contextmanager
    def rehearse(self, module: nn.Module) -> Generator[dict[str, nn.Parameter], None, None]:
        """Set the gradients of the parameters aside and yield these by name; a step leaves gradients on them."""
        assert self._root is not None
        own = dict(zip((name for name, _ in module.named_parameters()), self._root.own_parameters))
        with ExitStack() as stack:
            for parameter in own.values():
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
            stack.callback(self._root.forget_pass)
            stack.callback(self._root.set_last, self._root.require_backward_grad_sync)
            self._root.set_last(True)  # the first step of an accumulation would not be summed
            yield {name: x for name, x in own.items() if x.requires_grad}

    def average(self, gradient: Tensor) -> Tensor:
        """Return the gradient that a rehearsed step has left, which FSDP has averaged."""
        return gradient

    def release(self) -> None:
        """Forget the module at the end of a run."""
        self.reshard()
        self._root = None


def _make_whole(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    state.update({name: x.full_tensor().cpu() for name, x in state.items() if isinstance(x, DTensor)})


def _as_fsdp(root: nn.Module) -> FSDPModule:
    assert isinstance(root, FSDPModule)
    return root


class ShardedRoot(nn.Module):
    """Shard a LightningModule in place for good, wrap it and run its steps, as DistributedDataParallel does without
    sharding.

    Its forward unshards the parameters that belong to no unit. Calls of the LightningModule from within a step are
    ordinary calls. (With ``fully_shard`` on the LightningModule itself they would start the step again.) All ranks
    start from the values of rank 0, but for segment-local ones, and with ``broadcast_buffers`` they copy rank 0's
    buffers before each training step, as with DDP. While it shards, a device holds at most its parts and one whole unit,
    or the whole root.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        units: list[nn.Module],
        mesh: DeviceMesh,
        device: torch.device,
        local: SegmentLocal,
        policy: MixedPrecisionPolicy,
        broadcast_buffers: bool,
    ) -> None:
        super().__init__()
        self.scalars = [x for x in module.parameters() if x.dim() == 0]  # fully_shard refuses them
        ignored = {*local.parameters, *self.scalars}
        self.shared_buffers = [x for name, x in module.named_buffers() if name not in local.names]
        for tensor in (*local.parameters, *local.buffers):
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
        self.own_parameters = list(module.parameters())  # as optimizers hold them, also while modules hold whole ones
        in_units = {x for unit in units for x in unit.modules()}
        self._held_by_root = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if owner not in in_units
        ]
        if self.is_manual:
            for method in ("toggle_optimizer", "untoggle_optimizer"):
                setattr(module, method, self._followed_by_whole_parameters(getattr(module, method)))
        # Both bypass nn.Module, which would make the root a submodule.
        vars(module).update(_sharded_root=self, __deepcopy__=self._share_module)

    @property
    def is_manual(self) -> bool:
        """Whether the LightningModule calls backward and optimizers itself."""
        return not self.module.automatic_optimization

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule, or the step that Lightning runs in place of its forward."""
        if self.broadcast_buffers and self.module.training:  # Lightning restores ``training`` after a validation
            broadcast_from_first(self.shared_buffers)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients without summing them over the copies of ``"hybrid"``; Lightning calls it as with DDP.

        They are still reduced to each rank's part in every backward. (FSDP could keep them whole instead: less traffic,
        but the memory that sharding saves.)
        """
        self.set_last(False)
        try:
            yield
        finally:
            self.set_last(True)

    def set_last(self, last: bool) -> None:
        """Say whether gradients are summed over the copies of ``"hybrid"`` in the next backward."""
        self.require_backward_grad_sync = last
        _as_fsdp(self).set_requires_all_reduce(last)

    def _share_module(self, memo: dict[int, Any]) -> pl.LightningModule:
        """Stand in for the module's ``__deepcopy__``, which FSDP does not support: copies of a Trainer share the module."""
        if not any(isinstance(x, pl.Trainer) for x in memo.values()):
            raise MisconfigurationException(
                "A sharded module cannot be copied. Save a checkpoint with trainer.save_checkpoint, and load it into a new module."
            )
        rank_zero_warn("The copy of the Trainer shares the sharded module, which cannot be copied.")
        memo.update({id(x): x for x in (self.module, self, self.mesh, *self.own_parameters)})
        return self.module

    def follow_manual_steps(self) -> list[RemovableHandle]:
        """Keep parameters whole for all passes of a manual step, since only the next step's forward would unshard them,
        and unshard them again after an optimizer step, which changes each rank's parts.

        The hook is that of all optimizers, since users may make new ones during the run.
        """
        _as_fsdp(self).set_reshard_after_backward(not self.is_manual, recurse=False)
        return [register_optimizer_step_post_hook(self._renew_own)] if self.is_manual else []

    def _renew_own(self, *_: Any) -> None:
        self.reshard_own()
        _as_fsdp(self).unshard()

    def reshard_own(self) -> None:
        """Reshard the parameters that belong to no unit."""
        for owner, name, parameter in self._held_by_root:
            parameter.requires_grad_(getattr(owner, name).requires_grad)  # users freeze those that modules hold
        _as_fsdp(self).reshard()

    def forget_pass(self) -> None:
        """Reshard all parameters, also after a pass that raised or had no backward."""
        for state in fully_shard.state(self)._state_ctx.all_states:  # type: ignore[attr-defined]
            state._training_state = TrainingState.IDLE
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:  # torch 2.13, 2.11
                group._training_state = TrainingState.IDLE
                group._post_forward_indices.clear()
                group._partial_reduce_output = None
                group.reshard()
            state._comm_ctx.post_forward_order.clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
        self.reshard_own()

    def _followed_by_whole_parameters(self, toggle: Callable[..., None]) -> Callable[..., None]:
        """Make ``toggle`` also freeze or unfreeze the whole parameters that modules hold; Lightning's acts on those of
        optimizers only."""

        @wraps(toggle)
        def toggle_both(*args: Any, **kwargs: Any) -> None:
            toggle(*args, **kwargs)
            for owner, name, parameter in self._held_by_root:
                getattr(owner, name).requires_grad_(parameter.requires_grad)

        return toggle_both


def _start_equally(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:  # one at a time, to keep the peak low
        tensor.data = tensor.data.to(device)
        broadcast_from_first([tensor])


def sharded_root(module: nn.Module) -> ShardedRoot | None:
    """Return the root that ``module`` was sharded under, or None."""
    root = vars(module).get("_sharded_root")
    return root if isinstance(root, ShardedRoot) else None


def check_sharding(module: nn.Module, wanted: tuple[int, int] | None) -> None:
    """Refuse parameters that an earlier run has sharded over another mesh than one of the ``wanted`` size and number of
    dimensions, if any; raise ``MisconfigurationException``."""
    root = sharded_root(module)
    by_others = root is None and any(isinstance(x, DTensor) for x in module.parameters())
    if by_others or (root is not None and (root.mesh.size(), root.mesh.ndim) != wanted):
        raise MisconfigurationException(
            "The parameters of this module are sharded in another way already. Make a new module, and load a checkpoint."
        )
