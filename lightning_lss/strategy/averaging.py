"""Which gradients are averaged, from the start of a run and after parameters were frozen, unfrozen, added or removed."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lss.parallel.broadcast import assign_segments
from lightning_lss.parallel.fsdp import FullyShard
from lightning_lss.parallel.members import Members
from lightning_lss.parallel.replicated import Replicated, check_averaged, compress_hook, has_work_for_ddp
from lightning_lss.parallel.segment_local import SegmentLocal, restore_precision_plugin
from lightning_lss.sequence.grid import SequenceGrid
from lightning_lss.sequence.replicas import meet
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.strategy import validation


class GradientAveraging(DDPStrategy):
    """The part of :class:`~lightning_lss.LSSStrategy` that wraps the module and arranges for its gradients.

    Members of the module are compared at the start of every batch; where they have changed, everything is arranged
    anew.
    """

    _parameters: Replicated | FullyShard
    _communication_dtype: torch.dtype | None
    _segment_local: SegmentLocal | None
    _grid: SequenceGrid | None
    _shard: SequenceShard
    _shows_whole: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._members: Members | None = None
        self._averaging = ExitStack()

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    def model_to_device(self) -> None:
        local = self._segment_local
        assert local is not None
        self.model = self._parameters.place(self._module, local, self.root_device)
        super().model_to_device()

    @override
    def configure_ddp(self) -> None:
        if self.model is not self._module:
            return  # the root that it was sharded under averages its gradients
        self._pl_static_graph_delay_done = False
        if has_work_for_ddp(self._module):
            super().configure_ddp()
        else:
            _sync_module_states(self._module)  # as DistributedDataParallel does at its start

    @override
    def _register_ddp_hooks(self) -> None:
        super()._register_ddp_hooks()
        if self._communication_dtype is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, compress_hook(self._communication_dtype))

    def _average_gradients(self, local: SegmentLocal) -> None:
        """Arrange for the gradients of what is trained now, beside those that DistributedDataParallel or FSDP reduce."""
        self._parameters.check_optimizers(self.optimizers)
        validation.check_optimizers(self.optimizers, self._model_averaging_period is not None, local.parameters)
        self._averaging.close()  # of what was trained before
        handles = local.average_gradients(self._is_last_backward)
        for handle in (*handles, *self._parameters.register_hooks(self._is_last_backward)):
            self._averaging.callback(handle.remove)
        group = self._parameters.clipping_group(local)
        if group is not None:
            self._averaging.callback(restore_precision_plugin, self.precision_plugin)
            local.patch_precision_plugin(self.precision_plugin, group)
        self._members = self._parameters.members(self._module)

    def _stop_averaging(self) -> None:
        self._averaging.close()
        self._members = None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # not in training_step, which runs within no_sync of the DistributedDataParallel of before while gradients accumulate
        super().on_train_batch_start(batch, batch_idx)
        old, new = self._members, self._parameters.members(self._module)
        if old is not None and not new.follows(old, self._parameters.keeps_frozen):
            self._follow_members(old, new)

    def _follow_members(self, old: Members, new: Members) -> None:
        """Train what is trainable from now on, as if the run had begun with it."""
        self._parameters.check_members(old, new)
        validation.check_renewal(self._ddp_kwargs, self._ddp_comm_state)
        new.check_ranks(self._timeout)
        assert self._segment_local is not None
        assert self._grid is not None
        new.average_accumulated(old, self._segment_local)
        assign_segments([x for x in new.modules if x not in old.modules], self._shard, self.root_device)
        self._segment_local = local = SegmentLocal(self._module, self._grid)
        if isinstance(self.model, DistributedDataParallel):
            self.model._remove_autograd_hooks()
        self.model = self._parameters.place(self._module, local, self.root_device)
        self.configure_ddp()
        local.start_equally()
        self._average_gradients(local)

    # -- backward passes -----------------------------------------------------------------------------------------------

    def _is_last_backward(self) -> bool:
        return bool(getattr(self.model, "require_backward_grad_sync", True))

    def _meet_replicas(self) -> None:
        if self._shows_whole:
            meet(self._shard, self.root_device)

    @override
    def reduce(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.lightning_module
        if module is not None and module._current_fx_name == "training_step":  # ``self.log(..., sync_dist=True)``
            self._meet_replicas()
        return super().reduce(*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        output = super().training_step(*args, **kwargs)
        self._meet_replicas()
        return output

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        if not self._module.automatic_optimization:
            self._meet_replicas()
        super().pre_backward(closure_loss)
        self._parameters.before_backward(closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if isinstance(self.model, DistributedDataParallel) and self._is_last_backward():
            check_averaged(self.model)
        if self._members is not None:
            self._members.check_gradients(self._parameters.members(self._module), self.optimizers)

    @override
    def on_validation_end(self) -> None:
        self._parameters.reshard()

    on_test_end = on_predict_end = on_validation_end

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradients of the whole model; every rank must call it, during a run."""
        assert self._segment_local is not None
        return self._segment_local.total_norm(self._parameters.parameters(self._module))
