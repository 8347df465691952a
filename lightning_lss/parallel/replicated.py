"""Whole parameters on every rank; DistributedDataParallel averages their gradients over the world."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_lss.parallel.fsdp import check_sharding
from lightning_lss.parallel.members import Members, some
from lightning_lss.parallel.segment_local import SegmentLocal, not_zero


class Replicated:
    """How :class:`~lightning_lss.LSSStrategy` treats parameters that are whole on every rank.

    :class:`~lightning_lss.parallel.fsdp.FullyShard` has the same methods; the strategy chooses between the two once.
    """

    stay_on_device = False  # after a run

    def __init__(self, keeps_frozen: bool = False) -> None:
        self.keeps_frozen = keeps_frozen
        """Whether DistributedDataParallel needs no renewal where parameters are frozen: it takes them for unused ones."""
        self._restore: Callable[[], None] = self._do_nothing

    def _do_nothing(self, *args: Any) -> None:
        """Whole parameters need nothing at these moments."""

    check_optimizers = check_members = before_backward = reshard = hand_over = _do_nothing

    def check(self, module: nn.Module, size: int, world_size: int) -> None:
        """Raise ``MisconfigurationException`` if an earlier run has sharded the parameters."""
        check_sharding(module, None)

    def init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which modules are built: the strategy's own, on the rank's device."""
        return nullcontext()

    def layer_sync(self, module: nn.Module, layer_sync: LayerSync | None) -> LayerSync | None:
        """The Trainer's replacement of layers (``sync_batchnorm``) to apply to ``module``: all of it."""
        return layer_sync

    def place(self, module: pl.LightningModule, local: SegmentLocal, device: torch.device) -> nn.Module:
        """Return the module that runs the steps of ``module``: itself, which DistributedDataParallel wraps."""
        self._restore()
        self._restore = ignore_in_ddp(module, local.names)
        return module

    def register_hooks(self, should_sync: Callable[[], bool]) -> Iterable[RemovableHandle]:
        """Register the hooks that the training needs beside DistributedDataParallel: none."""
        return []

    def clipping_group(self, local: SegmentLocal) -> dist.ProcessGroup | None:
        """The ranks that clip and skip steps together and hold different gradients; None if all gradients are equal."""
        return local.group

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters as optimizers hold them."""
        return module.parameters()

    def members(self, module: nn.Module) -> Members:
        """The parameters by name, and those whose gradients are averaged if gradients are arranged for now."""
        named = dict(module.named_parameters())
        return Members(module, named, [x for x in named.values() if x.requires_grad])

    def release(self) -> None:
        """Forget the module at the end of a run."""
        self._restore()
        self._restore = self._do_nothing

    def keep_for_checkpoint(self, tensor: Tensor) -> Any:
        """Return a tensor that was gathered for a checkpoint, on every rank."""
        return tensor

    @contextmanager
    def rehearse(self, module: nn.Module) -> Generator[dict[str, nn.Parameter], None, None]:
        """Give ``module`` stand-ins for the parameters that are trained, in the same memory but without hooks, so that a
        step leaves gradients on these alone; yield them by name.

        Those that are zero get other values: what lies before a head that starts at zero would have no gradient.
        """
        stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        with ExitStack() as stack:
            for (
                parameter
            ) in module.parameters():  # a step may reach one in another way, or drop the gradient of a frozen one
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
            for owner in module.modules():
                for name, parameter in list(owner.named_parameters(recurse=False)):
                    if parameter.requires_grad:
                        stand_in = stand_ins.setdefault(parameter, nn.Parameter(not_zero(parameter.detach())))
                        stack.callback(setattr, owner, name, parameter)
                        setattr(owner, name, stand_in)
            yield {name: x for name, x in module.named_parameters() if x.requires_grad}

    def rehearsing_group(self, sequence_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """The ranks that rehearse a step together: a sequence group, for itself."""
        return sequence_group

    def average(self, gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Average over ``group`` what a rehearsed step has left on a stand-in."""
        dist.all_reduce(gradient, group=group)
        return gradient.div_(group.size())


_IGNORED = "_ddp_params_and_buffers_to_ignore"  # torch's name


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> Callable[[], None]:
    """Have DistributedDataParallel ignore the named parameters and buffers of ``module`` too; return what undoes it.

    DDP compares plain names, except in one place: there ``module_name + "." + name``, for the root module ``.name``.
    """
    names, before = list(names), getattr(module, _IGNORED, [])
    setattr(module, _IGNORED, [*before, *names, *(f".{name}" for name in names)])
    return lambda: setattr(module, _IGNORED, before)


def has_work_for_ddp(module: nn.Module) -> bool:
    """Whether any parameter is trained that DistributedDataParallel does not ignore; it refuses a module without."""
    ignored = getattr(module, _IGNORED, [])
    return any(x.requires_grad for name, x in module.named_parameters() if name not in ignored)


def check_averaged(model: DistributedDataParallel) -> None:
    """Refuse to go on after a backward pass whose gradients were not averaged.

    DistributedDataParallel averages a bucket once every parameter in it has its gradient. It says so at the next step, when an
    optimizer has stepped by the gradients of one rank, and not at all if there is no next step.

    Raises:
        MisconfigurationException: naming the parameters without a gradient.
    """
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        ignored = model.parameters_to_ignore
        trained = [(n, x) for n, x in model.module.named_parameters() if x.requires_grad and n not in ignored]
        names = [name for name, x in trained if x.grad is None] or ["Some parameters"]
        raise MisconfigurationException(
            f"{some(names)}: trained, but without a gradient in this step. DistributedDataParallel waits for the gradient of every"
            " parameter, so gradients were not averaged over the ranks. Use LSSStrategy(find_unused_parameters=True), which is"
            " strategy='lss_find_unused_parameters_true', or freeze what a step does not use (requires_grad_(False))."
        ) from error


def compress_hook(dtype: torch.dtype) -> Callable[..., Any]:
    """Return a communication hook for DistributedDataParallel that averages gradients in bfloat16 or float16.

    The hooks are torch's own in a function of another name: DDP refuses theirs for backends other than NCCL, but gloo
    can run them.
    """
    hook = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}[dtype]
    return lambda state, bucket: hook(state, bucket)
