"""All checks that refuse a run, and warnings: each names the values and the remedy before any process communicates."""

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
    " Trainers, LightningModules and callbacks of the two packages do not mix."
)


def check_module(module: pl.LightningModule, size: int, layout: str) -> None:
    """Refuse a module that cannot run on segments.

    Raises:
        MisconfigurationException: if a step takes ``dataloader_iter``, or a positional table cannot be divided evenly
            among ``size`` ranks.
    """
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{type(module).__name__}.{step} takes `dataloader_iter`, which bypasses the hook where LSSStrategy splits"
                " batches along the sequence. Take `batch` instead."
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
        ValueError: if ``sharding`` is unknown, one of ``ddp_kwargs`` has no effect with it, two arguments set the dtype
            of sent gradients, or distributed checkpoints do not support the start method.
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
    of_ddp = [name for name, value in ddp_kwargs.items() if name not in _OF_DDP_STRATEGY and value is not None]
    if sharding is not None and of_ddp:
        raise ValueError(
            f"{', '.join(of_ddp)}: with sharding={sharding!r} FSDP reduces the gradients, so arguments of DistributedDataParallel"
            " have no effect. Leave them out, or use sharding=None."
        )
    if communication_dtype is not None and ddp_kwargs.get("ddp_comm_hook") is not None:
        raise ValueError(
            f"communication_dtype={communication_dtype!r} and ddp_comm_hook both say how gradients are sent: give one of them."
        )


def check_parameters(module: pl.LightningModule, sharding: str | None, size: int, world_size: int) -> None:
    """Refuse a run whose parameters cannot be distributed as ``sharding`` requires.

    Raises:
        MisconfigurationException: if an earlier run has sharded the parameters in another way, a callback averages
            sharded weights, ``"hybrid"`` has only one rank to shard over, or parameters have no values.
    """
    if not _is_compatible(module, sharding, size, world_size):
        raise MisconfigurationException(
            "The parameters of this module are sharded in another way already. Make a new module, and load a checkpoint."
        )
    if sharding is None:
        return
    callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    averaging = [x for x in callbacks if isinstance(x, (WeightAveraging, StochasticWeightAveraging))]
    if averaging:
        raise MisconfigurationException(
            f"{type(averaging[0]).__name__} keeps a copy of the whole model, but sharded parameters cannot be copied"
            f" (sharding={sharding!r}). Leave the callback out, or use sharding=None."
        )
    if sharding == "hybrid" and size == 1 < world_size:
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


def _is_compatible(module: nn.Module, sharding: str | None, size: int, world_size: int) -> bool:
    """Whether an earlier run has left the parameters unsharded, or sharded in the way that this run requires."""
    root = sharded_root(module)
    if root is None:
        return sharding is None or not any(isinstance(x, DTensor) for x in module.parameters())
    copies = sharding == "hybrid" and size < world_size  # sharded over one dimension, copied along another
    return sharding is not None and root.mesh.size() == world_size and root.mesh.ndim == 1 + copies


def check_communication_dtype(dtype: torch.dtype | None, precision_plugin: Precision) -> None:
    """Refuse to send unscaled gradients in float16: those of a mean over many tokens would become 0.

    Raises:
        MisconfigurationException: if ``dtype`` is float16 and the plugin has no gradient scaler.
    """
    scaler = getattr(precision_plugin, "scaler", None)
    if dtype == torch.float16 and (scaler is None or not scaler.is_enabled()):
        raise MisconfigurationException(
            f"communication_dtype={dtype} rounds gradients of a mean over many tokens to 0 unless they are scaled. Use"
            " 'bfloat16', or Trainer(precision='16-mixed') with its gradient scaler."
        )


def check_optimizers(optimizers: Iterable[Optimizer], sharding: str | None, averages_models: bool, count: int) -> None:
    """Refuse optimizers that do not work with the run's parameters; ``count`` of them are segment-local.

    Raises:
        MisconfigurationException: for ``ZeroRedundancyOptimizer`` or post-local SGD with segment-local parameters,
            ``ZeroRedundancyOptimizer`` with sharding, and ``foreach`` or ``fused`` with sharded and other parameters in
            one group.
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


def warn_of_batch_norm(module: nn.Module) -> None:
    """Warn about statistics that are computed over one segment only."""
    batch_norms = [(name, x) for name, x in module.named_modules() if isinstance(x, _BatchNorm)]
    names = [name for name, x in batch_norms if not isinstance(x, nn.SyncBatchNorm)]
    if names:
        rank_zero_warn(
            f"Batch normalization ({', '.join(names)}) computes its statistics over one segment of the sequence, so training"
            " differs from that on one device. Use Trainer(sync_batchnorm=True) or LayerNorm."
        )


def warn_of_unsaved_state(names: Collection[str]) -> None:
    """Warn about segment-local state that checkpoints save from rank 0 only."""
    if names:
        rank_zero_warn(
            f"Checkpoints will contain only rank 0's values of {', '.join(sorted(names))}: only positional tables"
            " (SegmentPositionalEmbedding) are gathered from all ranks. Save the others in on_save_checkpoint."
        )


def warn_of_other_lightning() -> None:
    """Warn if ``pytorch_lightning`` is imported, since its objects are easily passed to the wrong Trainer."""
    if "pytorch_lightning" in sys.modules:
        rank_zero_warn(_OTHER_LIGHTNING)


def refuse_other_lightning() -> None:
    """Make an already imported ``pytorch_lightning`` explain why it does not know ``"lss"``."""
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is None:
        return

    def refuse(**_: Any) -> None:
        raise MisconfigurationException(_OTHER_LIGHTNING)

    for name in StrategyRegistry:
        if name.startswith("lss"):
            other.StrategyRegistry.register(name, refuse, description="only in `lightning`", override=True)
