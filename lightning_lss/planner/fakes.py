"""Stand-ins without contents: for a module, a batch, a Trainer, and a device's kernels and host memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lss.attention.kernels import KERNELS, Kernel, Packed, Scores, Segments
from lightning_lss.nn import recompute
from lightning_lss.nn.positions import DeferredTable
from lightning_lss.planner.tracker import Tracker
from lightning_lss.sequence.batch import SequenceDims, map_tensors, masks_by_path, sequence_dim, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard

# -- a module and its batch --------------------------------------------------------------------------------------------


def without_contents(module: pl.LightningModule, mode: FakeTensorMode, precision: Precision) -> pl.LightningModule:
    """Copy the module, with parameters and buffers of ``precision`` that have no contents; tied ones stay tied."""
    fakes: dict[int, Any] = {id(module._trainer): None}
    with mode:
        for x in [*module.parameters(), *module.buffers()]:
            shape = (0,) if isinstance(x, DeferredTable) else x.shape  # asking for its shape would build the table
            fake = precision.convert_input(torch.empty(shape, dtype=x.dtype))
            fakes[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    try:
        return copy.deepcopy(module, fakes)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({error}): give `plan` a function that builds it."
        ) from error


def resized(batch: Any, length: int, batch_size: int, sequence_dims: SequenceDims | None) -> Any:
    """Return a batch like ``batch`` without contents, of ``batch_size`` sequences of ``length``.

    Raises ``ValueError`` if it has a mask that is for sequences of a certain length or for certain rows.
    """
    before = batch_size_of(batch)
    for path, mask in masks_by_path(batch):
        if mask.rows > 1 or (mask.num_queries, mask.num_keys) != (None, None):
            raise ValueError(
                f"The mask {'.'.join(map(str, path))} of the batch is for sequences of one length, and the planner cannot know it for"
                " others. Plan with one that is for any, such as AttentionMask.causal(): other masks hide more."
            )

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


# -- the Trainer -------------------------------------------------------------------------------------------------------


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
        self.strategy = SimpleNamespace(sequence_shard=shard, shard_of_run=shard, shard_of_module=shard)
        self.world_size = shard.size
        self.loggers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        raise MissingError(
            f"The planner's stand-in for a Trainer has no {name!r}: training_step and configure_optimizers must do without."
        )


# -- a device ----------------------------------------------------------------------------------------------------------

_TRACED = "cpu_flash"  # steps are traced on CPU tensors, and attention chooses this kernel there


@contextmanager
def stand_in(name: str, length: int, tracker: Tracker) -> Iterator[None]:
    """Let a step on CPU tensors allocate what it would allocate on the device of the attention kernel ``name``.

    Attention allocates what that kernel would, and ``tracker`` counts its operations. A kernel that takes a few keys at
    a time is called twice a tile instead, whatever the tile's length. More calls would not hold more: the result of one
    call and the sum of the calls before. They would take thousands of operators. ``length`` is the global sequence
    length L. Offloaded tensors are freed on a GPU; torch's offloading would keep CPU tensors.
    """
    kernel = _stand_in(KERNELS[name], length, tracker)
    offloading = nullcontext() if name == _TRACED else patch.object(recompute, "save_on_cpu", _OnHost)
    with patch.dict(KERNELS, {name: kernel, _TRACED: kernel}), offloading:
        yield


def _stand_in(kernel: Kernel, length: int, tracker: Tracker) -> Kernel:
    def packed_forward(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        tracker.add_attention(q, k, v, scores, False, segments)
        tracker.relabel(k, "kv_buffers")
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_empty(*q.shape[:3], v.size(-1)), lse

    def packed_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments | None,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tracker.add_attention(q, k, v, scores, True, segments)
        return q.new_empty(q.shape), _empty_keys(k, kernel.backward_keys), _empty_keys(v, kernel.backward_keys)

    def fewer(limit: int | None) -> int | None:
        return None if limit is None else max(limit, -(-length // 2))

    def forward_keys(rows: int) -> int | None:
        return fewer(kernel.forward_keys(rows))

    def forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        return packed_forward(q, k, v, None, scores)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        return packed_backward(grad, q, k, v, out, lse, None, scores)

    return kernel._replace(
        forward=forward,
        backward=backward,
        backward_keys=fewer(kernel.backward_keys),
        forward_keys=forward_keys,
        packed=None if kernel.packed is None else Packed(packed_forward, packed_backward),
    )


def _empty_keys(k: Tensor, most: int | None) -> Tensor:
    """Return a tensor like ``k`` [B, G, n, D] that occupies the memory of at most ``most`` keys."""
    batch, heads, keys, width = k.shape
    if most is None or keys <= most:
        return k.new_empty(k.shape)
    return k.new_empty(batch, heads, most, width).as_strided(k.shape, (heads * most * width, most * width, 0, 1))


class _OnHost(torch.autograd.graph.saved_tensors_hooks):
    """Offload what autograd keeps: on the device it is freed."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(lambda x: (x.shape, x.dtype), lambda like: torch.empty(like[0], dtype=like[1]))
