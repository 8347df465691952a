"""The part of the strategy that puts :mod:`lightning_lss.parallel.fsdp` in the place of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.init import _EmptyInit
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lss.checkpoint.state import gather_model_state
from lightning_lss.parallel.fsdp import ShardedRoot, Sharding, sharded_root, sharding_mesh
from lightning_lss.sequence.grid import SequenceMesh
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, segment_local_names
from lightning_lss.strategy.saving import SavingStrategy
from lightning_lss.strategy.sequence import SequenceStrategy
from lightning_lss.strategy.validation import check_sharded_before, check_sharded_run


class ShardingStrategy(SequenceStrategy, SavingStrategy):
    """A DDPStrategy that can shard; with ``sharding=None`` it is DDPStrategy."""

    _sharding: Sharding | None = None
    _sharding_units: Collection[type[nn.Module]] | None = None
    _communication_dtype: torch.dtype | None = None
    _mesh: SequenceMesh | None = None
    _shard = WHOLE_SEQUENCE

    @property
    def _root(self) -> ShardedRoot | None:
        """What the steps of a sharded module run through."""
        return self.model if isinstance(self.model, ShardedRoot) else None

    @property
    def _manual_root(self) -> ShardedRoot | None:
        """The same where steps contain backward passes."""
        return None if self._module.automatic_optimization else self._root

    def _segment_local(self) -> list[str]:
        """Names of parameters and buffers that differ from segment to segment; none where there is one segment."""
        return segment_local_names(self._module) if self._shard.size > 1 else []

    def _check_sharded_run(self) -> None:
        size, world_size = self.sequence_parallel_size, self._processes
        check_sharded_before(self._module, self._sharding, size, world_size)
        if self._sharding is not None:
            check_sharded_run(self._module.trainer, self._module, self._sharding, size, world_size)
            _evaluate_without_inference_mode(self._module.trainer)

    # -- setting up and tearing down -----------------------------------------------------------------------------------

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """What is to be sharded is made on the CPU: a device never holds all of it."""
        if self._sharding is None:
            with super().tensor_init_context(empty_init):
                yield
        else:
            with _EmptyInit(enabled=bool(empty_init)), self.precision_plugin.tensor_init_context():
                yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        layer_sync = self._layer_sync
        if self._is_sharded:  # batch normalization was synchronized then; FSDP would not follow an exchange of layers
            self._layer_sync = None
        super().setup(trainer)
        self._layer_sync = layer_sync

    @override
    def model_to_device(self) -> None:
        """Move the model, or leave this rank its parts of it on the device."""
        if self._sharding is None:
            super().model_to_device()
            return
        self._check_sharded_run()  # once more, with what configure_model has made
        assert self._mesh is not None
        root = sharded_root(self._module)
        if root is None:
            mesh = sharding_mesh(self._mesh, self._sharding, self.root_device.type)
            broadcast_buffers = bool(self._ddp_kwargs.get("broadcast_buffers", True))
            root = ShardedRoot(
                self._module,
                mesh,
                self.root_device,
                self._segment_local(),
                self._sharding_units,
                broadcast_buffers,
                self._communication_dtype,
            )
        # What Lightning would make equal on all ranks where it does not train; it is, or must not be.
        root._ddp_params_and_buffers_to_ignore = [*dict(root.named_parameters()), *dict(root.named_buffers())]  # type: ignore[assignment]
        self.model = root
        super().model_to_device()  # metrics

    @override
    def configure_ddp(self) -> None:
        if self._sharding is None:
            super().configure_ddp()

    @override
    def teardown(self) -> None:
        if self._sharding is None:
            super().teardown()
            return
        # As every strategy's, but nothing is moved to the CPU: sharded tensors stay where their process groups can
        # gather them, for a checkpoint after the run.
        self._put_away()
        if self._start_method != "popen" and self._is_sharded:
            self._module.register_state_dict_post_hook(_make_whole)  # Lightning's next look at it
        self.model = self.lightning_module
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # -- steps ---------------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradients are accumulated, not averaged to the end."""
        with self._root.accumulate() if self._root is not None else super().block_backward_sync():
            yield

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._manual_root is not None:
            self._manual_root.before_manual_backward(closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._manual_root is not None:
            self._manual_root.put_together()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        if self._manual_root is None:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._manual_root.put_away()  # what is whole now will be out of date
        output = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._manual_root.put_together()
        return output

    # A forward without backward leaves the root's parameters whole.

    @override
    def on_validation_end(self) -> None:
        self._put_away()

    @override
    def on_test_end(self) -> None:
        self._put_away()

    @override
    def on_predict_end(self) -> None:
        self._put_away()

    def _put_away(self) -> None:
        if self._root is not None:
            self._root.put_away()


def _evaluate_without_inference_mode(trainer: pl.Trainer) -> None:
    """FSDP makes room for whole parameters once; tensors of inference mode could not be trained with afterwards.
    (Lightning knows that of its own FSDP strategy, and uses ``torch.no_grad`` there.)"""
    loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    for loop in loops:
        loop.inference_mode = False


def _make_whole(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """The process that has spawned this one takes its weights over; all ranks come here."""
    state.update(gather_model_state(state, {}, lambda tensor: tensor.cpu()))
