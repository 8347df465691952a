"""Stand-ins without contents: for a module, a batch, a Trainer and host memory."""

import copy
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lss.nn import recompute
from lightning_lss.nn.positions import DeferredTable
from lightning_lss.sequence.batch import SequenceDims, map_tensors, sequence_dim, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard


def without_contents(module: pl.LightningModule, mode: FakeTensorMode, dtype: torch.dtype | None) -> pl.LightningModule:
    """Copy the module, with parameters and buffers that have no contents; tied ones stay tied."""
    fakes: dict[int, Any] = {}
    with mode:
        for x in [*module.parameters(), *module.buffers()]:
            deferred = isinstance(x, DeferredTable)  # asking for its shape would build the table
            chosen = dtype if dtype is not None and x.dtype.is_floating_point else x.dtype
            fake = torch.empty((0,) if deferred else x.shape, dtype=chosen)
            fakes[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    fakes[id(module._trainer)] = None
    try:
        return copy.deepcopy(module, fakes)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({error}): give `plan` a function that builds it."
        ) from error


def resized(batch: Any, length: int, batch_size: int, sequence_dims: SequenceDims | None) -> Any:
    """Return a batch like ``batch`` without contents, of ``batch_size`` sequences of ``length``."""
    before = batch_size_of(batch)

    def resize(path: Any, x: Tensor) -> Tensor:
        shape = list(x.shape)
        dim = sequence_dim(path, x, sequence_dims or {})
        if dim is not None:
            shape[dim] = length
        if shape and shape[0] == before and dim != 0:
            shape[0] = batch_size
        return torch.empty(shape, dtype=x.dtype)

    return map_tensors(batch, resize)


def batch_size_of(batch: Any) -> int:
    """Return the first dimension of the first tensor with two or more; raise ``ValueError`` if there is none."""
    sizes = [x.size(0) for _, x in tensors_by_path(batch) if x.dim() > 1]
    if not sizes:
        raise ValueError("batch has no tensor [B, L, ...]: give an example of what training_step receives.")
    return sizes[0]


def length_of(batch: Any, sequence_dims: SequenceDims | None) -> int:
    """Return the length of a batch's sequences; raise ``ValueError`` if its tensors disagree."""
    dims = [(x, sequence_dim(path, x, sequence_dims or {})) for path, x in tensors_by_path(batch)]
    lengths = {x.size(dim) for x, dim in dims if dim is not None}
    if len(lengths) != 1:
        raise ValueError(
            f"The sequences of batch have lengths {sorted(lengths)}: say which dimensions are sequences with"
            " sequence_dims={key: dimension or None}."
        )
    return lengths.pop()


class MissingError(AttributeError):
    """Report that a module asked for an attribute that the stand-in for a Trainer lacks."""


class StandInTrainer:
    """Answer what modules ask of a Trainer in ``training_step`` and ``configure_optimizers``."""

    estimated_stepping_batches = max_steps = 1000
    max_epochs = 1
    current_epoch = global_step = global_rank = local_rank = 0
    num_nodes = num_devices = accumulate_grad_batches = 1
    training, sanity_checking, validating, testing, predicting = True, False, False, False, False
    is_global_zero = True
    logger = datamodule = None
    barebones = False

    def __init__(self, shard: SequenceShard) -> None:
        self.strategy = SimpleNamespace(sequence_shard=shard, shard_of_run=shard)
        self.world_size = shard.size
        self.loggers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        raise MissingError(
            f"The planner's stand-in for a Trainer has no {name!r}: training_step and configure_optimizers must do without."
        )


class _OnHost(torch.autograd.graph.saved_tensors_hooks):
    """Offload what autograd keeps: on the device it is freed."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(lambda x: (x.shape, x.dtype), lambda like: torch.empty(like[0], dtype=like[1]))


def host_memory(kernel: str) -> AbstractContextManager[Any]:
    """Free offloaded tensors in a trace for a GPU; it runs on CPU tensors, and torch's offloading would keep those."""
    return nullcontext() if kernel == "cpu_flash" else patch.object(recompute, "save_on_cpu", _OnHost)
