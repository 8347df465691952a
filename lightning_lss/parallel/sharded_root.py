"""``ShardedRoot``: the module that shards a LightningModule with ``fully_shard`` and runs its steps."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_lss.parallel.broadcast import broadcast_from_first
from lightning_lss.parallel.segment_local import SegmentLocal


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
        self._trained_by_root = [x.requires_grad for _, _, x in self._held_by_root]
        self._trained_before: list[bool] | None = (
            None  # in a forward pass whose gradients are not summed over copies yet
        )
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
        self._check_accumulation()
        if self.broadcast_buffers and self.module.training:  # Lightning restores ``training`` after a validation
            broadcast_from_first(self.shared_buffers)
        output = self.module(*args, **kwargs)
        self.share_requires_grad()  # before FSDP takes whole parameters out of modules
        return output

    @contextmanager
    def no_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients without summing them over the copies of ``"hybrid"``; Lightning calls it as with DDP.

        They are still reduced to each rank's part in every backward. (FSDP could keep them whole instead: less traffic,
        but the memory that sharding saves.)
        """
        self._set_last(False)
        try:
            yield
        finally:
            self._set_last(True)

    def _set_last(self, last: bool) -> None:
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

    def _check_accumulation(self) -> None:
        """Refuse to freeze or unfreeze parameters between batches of one accumulation with ``"hybrid"``: FSDP adds the
        gradients that wait for the sum over copies as one row of numbers, without a look at whose they are."""
        if self.mesh.ndim == 1 or not self.module.training:
            return
        trained = [x.requires_grad for x in self.own_parameters]
        if self._trained_before not in (None, trained):
            raise MisconfigurationException(
                "sharding='hybrid' does not take parameters that are frozen or unfrozen while gradients accumulate. Do it before"
                " the first batch of an accumulation, or use sharding='fsdp'."
            )
        self._trained_before = None if self.require_backward_grad_sync else trained

    def parts_of_whole(self) -> dict[int, nn.Parameter]:
        """The sharded parameter of each whole one that FSDP puts into modules, by the id of the whole one."""
        return {
            id(x._unsharded_param): x.sharded_param
            for group in self._groups()
            for x in group.fsdp_params
            if hasattr(x, "_unsharded_param")  # after the first forward pass
        }

    def _groups(self) -> list[Any]:
        """FSDP's groups of parameters that are gathered together; a module without parameters of its own has none."""
        states = [fully_shard.state(x) for x in self.modules() if isinstance(x, FSDPModule)]  # type: ignore[attr-defined]
        return [x._fsdp_param_group for x in states if x._fsdp_param_group is not None]

    def share_requires_grad(self) -> None:
        """Give the root's parameters, and the whole ones that modules hold, the ``requires_grad`` of whichever was changed."""
        for index, (owner, name, parameter) in enumerate(self._held_by_root):
            held, before = getattr(owner, name), self._trained_by_root[index]
            trained = not before if before in (not held.requires_grad, not parameter.requires_grad) else before
            held.requires_grad_(trained)
            parameter.requires_grad_(trained)
            self._trained_by_root[index] = trained

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
        self.share_requires_grad()
        _as_fsdp(self).reshard()

    @contextmanager
    def passes_apart(self) -> Generator[None, None, None]:
        """Set gradients aside, and run passes that the training knows nothing of; they may raise, or have no backward.

        Their gradients are summed over all ranks at once, also where those that were set aside are not yet.
        """
        last, grads = self.require_backward_grad_sync, [x.grad for x in self.own_parameters]
        partial = [(group, group._partial_reduce_output) for group in self._groups()]
        self._set_aside(dict.fromkeys(self.own_parameters), [(group, None) for group, _ in partial])
        self._set_last(True)
        try:
            yield
        finally:
            self._set_last(last)
            self._end_pass()
            self._set_aside(dict(zip(self.own_parameters, grads)), partial)

    def _set_aside(self, grads: dict[nn.Parameter, Tensor | None], partial: list[tuple[Any, Tensor | None]]) -> None:
        for parameter, grad in grads.items():
            parameter.grad = grad
        for group, output in partial:
            group._partial_reduce_output = output

    def _end_pass(self) -> None:
        """Bring FSDP where it is between two steps, with all parameters resharded."""
        for state in fully_shard.state(self)._state_ctx.all_states:  # type: ignore[attr-defined]
            state._training_state = TrainingState.IDLE
            state._comm_ctx.post_forward_order.clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
        for group in self._groups():
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
            group.reshard()
        self.reshard_own()

    def _followed_by_whole_parameters(self, toggle: Callable[..., None]) -> Callable[..., None]:
        """Make ``toggle`` also freeze or unfreeze the whole parameters that modules hold; Lightning's acts on those of
        optimizers only."""

        @wraps(toggle)
        def toggle_both(*args: Any, **kwargs: Any) -> None:
            self.share_requires_grad()
            toggle(*args, **kwargs)
            self.share_requires_grad()

        return toggle_both


def _start_equally(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:  # one at a time, to keep the peak low
        tensor.data = tensor.data.to(device)
        broadcast_from_first([tensor])


def sharded_root(module: nn.Module) -> ShardedRoot | None:
    """Return the root that ``module`` was sharded under, or None."""
    root = vars(module).get("_sharded_root")
    return root if isinstance(root, ShardedRoot) else None
