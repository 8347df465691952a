"""What LSS refuses or warns of, in one place: each with the values and the remedy, before any process communicates."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import sharded_root
from lightning_lss.sequence.layout import chunks_per_rank

_OTHER_LIGHTNING = (
    "`pytorch_lightning` has been imported. lightning_lss works with `lightning` (`import lightning.pytorch as pl`): the"
    " Trainer, LightningModules and callbacks of the two packages do not mix."
)


def check_module(module: pl.LightningModule, size: int, layout: str) -> None:
    """Refuse a module that cannot run on segments.

    Raises:
        MisconfigurationException: if a step takes ``dataloader_iter``, or a positional table cannot be divided evenly among
            ``size`` ranks.
    """
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{type(module).__name__}.{step} takes `dataloader_iter`, which bypasses the hook in which LSSStrategy"
                " splits batches along the sequence. Take `batch` instead."
            )
    divisor = size * chunks_per_rank(size, layout)
    for table in module.modules():
        if isinstance(table, SegmentPositionalEmbedding) and table.num_positions % divisor:
            raise MisconfigurationException(
                f"SegmentPositionalEmbedding(num_positions={table.num_positions}) cannot be divided evenly among"
                f" sequence_parallel_size={size} with layout={layout!r}: it needs a multiple of {divisor}. Change one of"
                " them, or use RotaryEmbedding, which takes any length."
            )


_OF_DDP_STRATEGY = {
    *("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"),
    *("process_group_backend", "timeout", "start_method", "broadcast_buffers"),
}


def check_arguments(
    sharding: object, save_distributed_checkpoint: bool, communication_dtype: object, ddp_kwargs: Mapping[str, Any]
) -> None:
    """Refuse arguments of :class:`~lightning_lss.LSSStrategy` that are incompatible.

    Raises:
        ValueError: if ``sharding`` is unknown, one of ``ddp_kwargs`` has no meaning with it, two arguments say in which dtype
            gradients are sent, or processes are started in a way that distributed checkpoints do not work with.
    """
    if sharding not in (None, "fsdp", "hybrid"):
        raise ValueError(
            f"sharding={sharding!r} is unknown: use 'fsdp' (over all ranks), 'hybrid' (over the sequence group) or None."
        )
    start_method = ddp_kwargs.get("start_method", "popen")
    if save_distributed_checkpoint and start_method != "popen":
        raise ValueError(
            f"save_distributed_checkpoint=True and start_method={start_method!r} are incompatible: the process that starts the"
            " others takes over whole weights from them. Use start_method='popen', or save one file."
        )
    without_meaning = [name for name, value in ddp_kwargs.items() if name not in _OF_DDP_STRATEGY and value is not None]
    if sharding is not None and without_meaning:
        raise ValueError(
            f"{', '.join(without_meaning)}: with sharding={sharding!r} gradients are reduced by FSDP, not by"
            " DistributedDataParallel, for which these arguments are. Leave them out, or use sharding=None."
        )
    if communication_dtype is not None and ddp_kwargs.get("ddp_comm_hook") is not None:
        raise ValueError(
            f"communication_dtype={communication_dtype!r} and ddp_comm_hook both say how gradients are sent: give one of them."
        )


def check_parameters(module: pl.LightningModule, sharding: str | None, size: int, world_size: int) -> None:
    """Refuse a run whose parameters cannot lie as ``sharding`` says.

    Raises:
        MisconfigurationException: if an earlier run has sharded the parameters in another way, for callbacks that average
            weights, for ``"hybrid"`` where there is nothing to shard over, and for parameters without values.
    """
    if not _lies_as_wanted(module, sharding, size, world_size):
        raise MisconfigurationException(
            "The parameters of this module are sharded in another way already. Make a new module, and load a checkpoint."
        )
    if sharding is None:
        return
    callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    averaging = [x for x in callbacks if isinstance(x, (WeightAveraging, StochasticWeightAveraging))]
    if averaging:
        raise MisconfigurationException(
            f"{type(averaging[0]).__name__} keeps a copy of the whole model, which cannot be made of sharded parameters"
            f" (sharding={sharding!r}). Leave the callback out, or use sharding=None."
        )
    if sharding == "hybrid" and size == 1 < world_size:
        raise MisconfigurationException(
            "sharding='hybrid' shards over the sequence group, which has one rank here (sequence_parallel_size=1). Use"
            " sharding='fsdp', which shards over all ranks."
        )
    without_values = [name for name, x in module.named_parameters() if x.is_meta]
    if without_values:
        raise MisconfigurationException(
            f"Parameters on the meta device have no values to start from: {', '.join(without_values[:5])}. Build them in"
            " configure_model without `torch.device('meta')`; they stay on the CPU until they are sharded."
        )


def _lies_as_wanted(module: nn.Module, sharding: str | None, size: int, world_size: int) -> bool:
    """Whether parameters that an earlier run has sharded, if any, lie as this run wants them."""
    root = sharded_root(module)
    if root is None:
        return sharding is None or not any(isinstance(x, DTensor) for x in module.parameters())
    copies = sharding == "hybrid" and size < world_size  # sharded over one dimension, copied along another
    return sharding is not None and root.mesh.size() == world_size and root.mesh.ndim == 1 + copies


def check_communication_dtype(dtype: torch.dtype | None, precision_plugin: Precision) -> None:
    """Refuse to send gradients in float16 where nothing scales them.

    Raises:
        MisconfigurationException: without a gradient scaler; gradients of a mean over many tokens would become 0.
    """
    scaler = getattr(precision_plugin, "scaler", None)
    if dtype == torch.float16 and (scaler is None or not scaler.is_enabled()):
        raise MisconfigurationException(
            f"communication_dtype={dtype} rounds gradients of a mean over many tokens to 0 unless they are scaled. Use"
            " 'bfloat16', or Trainer(precision='16-mixed'), which has a gradient scaler."
        )


def check_optimizers(optimizers: Iterable[Optimizer], sharding: str | None, averages_models: bool, count: int) -> None:
    """Refuse optimizers that would mix up what ranks hold, where ``count`` parameters stand for one segment.

    Raises:
        MisconfigurationException: for ``ZeroRedundancyOptimizer`` and post-local SGD with such parameters, for
            ``ZeroRedundancyOptimizer`` with sharding, and for ``foreach`` or ``fused`` over sharded and other parameters in
            one group, which torch cannot do.
    """
    optimizers = list(optimizers)
    if sharding is not None:
        _check_sharded_optimizers(optimizers)
    zero = any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in optimizers)
    if count and (zero or averages_models):
        what = "ZeroRedundancyOptimizer" if zero else "post-local SGD (model_averaging_period)"
        raise MisconfigurationException(
            f"{what} copies parameters between ranks, but {count} parameters of this model stand for one segment each"
            " (SegmentPositionalEmbedding). Use an ordinary optimizer, or RotaryEmbedding."
        )


def _check_sharded_optimizers(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise MisconfigurationException(
                "ZeroRedundancyOptimizer shards the state of an optimizer, which is sharded with its parameters here"
                " already. Use the optimizer that it wraps."
            )
        for group in optimizer.param_groups:
            kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
            if len(kinds) > 1 and (group.get("foreach") or group.get("fused")):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__}(foreach=True) and fused=True do not take sharded parameters and others"
                    " (positional tables, scalars) in one group. Leave these options out, or give the others a group of"
                    " their own."
                )


def warn_of_batch_norm(module: nn.Module) -> None:
    """Warn of statistics that are taken over a segment."""
    batch_norms = [(name, x) for name, x in module.named_modules() if isinstance(x, _BatchNorm)]
    names = [name for name, x in batch_norms if not isinstance(x, nn.SyncBatchNorm)]
    if names:
        rank_zero_warn(
            f"Batch normalization ({', '.join(names)}) takes its statistics over one segment of the sequence, which is not"
            " the training that one device would give. Use Trainer(sync_batchnorm=True) or LayerNorm."
        )


def warn_of_unsaved_state(names: Collection[str]) -> None:
    """Warn of segment-local state whose rows on other ranks no checkpoint will hold."""
    if names:
        rank_zero_warn(
            f"Checkpoints will hold only rank 0's values of {', '.join(sorted(names))}: only positional tables"
            " (SegmentPositionalEmbedding) are put together over ranks. Save the others in on_save_checkpoint."
        )


def warn_of_other_lightning() -> None:
    """Warn where ``pytorch_lightning`` is imported: its objects are easily handed to the wrong Trainer."""
    if "pytorch_lightning" in sys.modules:
        rank_zero_warn(_OTHER_LIGHTNING)


def refuse_other_lightning() -> None:
    """Have ``pytorch_lightning``, where it is imported already, say why it does not know ``"lss"``."""
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is None:
        return

    def refuse(**_: Any) -> None:
        raise MisconfigurationException(_OTHER_LIGHTNING)

    for name in StrategyRegistry:
        if name.startswith("lss"):
            other.StrategyRegistry.register(name, refuse, description="only in `lightning`", override=True)
