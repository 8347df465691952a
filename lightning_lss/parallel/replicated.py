"""Whole parameters on every rank; DistributedDataParallel averages their gradients over the world."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_lss.parallel.segment_local import SegmentLocal


class Replicated:
    """How :class:`~lightning_lss.LSSStrategy` treats parameters that are whole on every rank.

    :class:`~lightning_lss.parallel.fsdp.FullyShard` has the same methods; the strategy chooses between the two once.
    """

    def _do_nothing(self, *args: Any) -> None:
        """Whole parameters need nothing at these moments."""

    prepare_run = before_backward = after_backward = before_step = after_step = reshard = hand_over = _do_nothing

    def init_device(self, device: torch.device) -> torch.device:
        """The device on which modules are built: the rank's."""
        return device

    def layer_sync(self, module: nn.Module, layer_sync: LayerSync | None) -> LayerSync | None:
        """The Trainer's replacement of layers (``sync_batchnorm``) to apply to ``module``: all of it."""
        return layer_sync

    def place(self, module: pl.LightningModule, local: SegmentLocal, device: torch.device) -> nn.Module:
        """Return the module that runs the steps of ``module``, before :meth:`wrap`: itself."""
        ignore_in_ddp(module, local.names)
        return module

    def wrap(self, wrap_in_ddp: Callable[[], None]) -> None:
        """Wrap the module so that its gradients are averaged."""
        wrap_in_ddp()

    def average_others(self, should_sync: Callable[[], bool]) -> list[RemovableHandle]:
        """Average the shared gradients that :meth:`wrap` leaves out: none."""
        return []

    def clipping_group(self, local: SegmentLocal) -> dist.ProcessGroup | None:
        """The ranks that clip and skip steps together and hold different gradients; None if all gradients are equal."""
        return local.group

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters as optimizers hold them."""
        return module.parameters()

    def accumulate(self, model: nn.Module | None) -> AbstractContextManager[Any]:
        """Return a context in which gradients accumulate and are not averaged."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def keep_for_checkpoint(self, tensor: Tensor) -> Any:
        """Return a tensor that was gathered for a checkpoint, on every rank."""
        return tensor

    def tear_down(self, strategy: ParallelStrategy, tear_down: Callable[[], None]) -> None:
        """End a run with ``tear_down``, the strategy's own method."""
        tear_down()


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel ignore the named parameters and buffers of ``module``.

    DDP compares plain names, except in one place: there ``module_name + "." + name``, for the root module ``.name``.
    """
    names = list(names)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*ignored, *names, *(f".{name}" for name in names)]  # type: ignore[assignment]


def compress_hook(dtype: torch.dtype) -> Callable[..., Any]:
    """Return a communication hook for DistributedDataParallel that averages gradients in bfloat16 or float16.

    The hooks are torch's own in a function of another name: DDP refuses theirs for backends other than NCCL, but gloo
    can run them.
    """
    hook = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}[dtype]
    return lambda state, bucket: hook(state, bucket)
