"""Whole parameters on every rank, whose gradients DistributedDataParallel averages over the world."""

from __future__ import annotations

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
from lightning_lss.sequence.grid import SequenceGrid


class Replicated:
    """How :class:`~lightning_lss.LSSStrategy` treats parameters that are whole on every rank.

    :class:`~lightning_lss.parallel.fsdp.FullyShard` has the same methods; the strategy chooses one of the two once.
    """

    def init_device(self, device: torch.device) -> torch.device:
        """Where modules are built: on the rank's device."""
        return device

    def prepare_run(self, trainer: pl.Trainer) -> None:
        """Nothing to prepare."""

    def layer_sync(self, module: nn.Module, layer_sync: LayerSync | None) -> LayerSync | None:
        """The Trainer's exchange of layers, such as ``sync_batchnorm``, that is to be applied to ``module``."""
        return layer_sync

    def place(
        self, module: pl.LightningModule, grid: SequenceGrid, device: torch.device, local: SegmentLocal
    ) -> nn.Module:
        """What the steps of ``module`` run through, before :meth:`wrap`."""
        ignore_in_ddp(module, local.names)
        return module

    def wrap(self, wrap_in_ddp: Callable[[], None]) -> None:
        """Have gradients averaged from now on."""
        wrap_in_ddp()

    def average_others(self, should_sync: Callable[[], bool]) -> list[RemovableHandle]:
        """Average what :meth:`wrap` leaves out, beside segment-local parameters: nothing."""
        return []

    def clipping_group(self, local: SegmentLocal) -> dist.ProcessGroup | None:
        """The ranks that must clip and skip steps together although their gradients differ; None where they are equal."""
        return local.group

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters as optimizers know them."""
        return module.parameters()

    def accumulate(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients are not averaged."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def before_backward(self, loss: Tensor) -> None:
        """Nothing to do."""

    def after_backward(self) -> None:
        """Nothing to do."""

    def before_step(self) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""

    def reshard(self) -> None:
        """Parameters stay whole."""

    def keep_gathered(self, tensor: Tensor) -> Any:
        """What becomes of a tensor that was gathered for a checkpoint: every rank keeps it."""
        return tensor

    def hand_over(self, module: nn.Module) -> None:
        """Let the process that spawned this one take over whole parameters: they are."""

    def tear_down(self, strategy: ParallelStrategy, tear_down: Callable[[], None]) -> None:
        """End a run with ``tear_down``, the strategy's own way."""
        tear_down()


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel leave the named parameters and buffers of ``module`` alone.

    DDP compares ``module_name + "." + name`` in one place, which for the root module is ``.name``, and the plain name
    in others.
    """
    names = list(names)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*ignored, *names, *(f".{name}" for name in names)]  # type: ignore[assignment]


def compress_hook(dtype: torch.dtype) -> Callable[..., Any]:
    """A communication hook for DistributedDataParallel that averages gradients in bfloat16 or float16.

    These are torch's own hooks under another name. DDP refuses them by name where it believes that only NCCL can run them,
    but gloo can.
    """
    hook = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}[dtype]
    return lambda state, bucket: hook(state, bucket)
