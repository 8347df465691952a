"""What LSS refuses or warns of, in one place: each with the values and the remedy, before any process communicates."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_lss.layout import chunks_per_rank
from lightning_lss.positions import SegmentPositionalEmbedding

_OTHER_LIGHTNING = (
    "`pytorch_lightning` has been imported. lightning_lss works with `lightning` (`import lightning.pytorch as pl`): the"
    " Trainer, LightningModules and callbacks of the two packages do not mix."
)


def check_module(module: pl.LightningModule, size: int, layout: str) -> None:
    """Refuse a module that cannot run on segments.

    Raises:
        MisconfigurationException: if a step takes ``dataloader_iter``, or a positional table cannot be shared out over
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
                f"SegmentPositionalEmbedding(num_positions={table.num_positions}) cannot be shared out over"
                f" sequence_parallel_size={size} with layout={layout!r}: it needs a multiple of {divisor}. Change one of"
                " them, or use RotaryEmbedding, which takes any length."
            )


def check_optimizers(optimizers: Iterable[Optimizer], averages_models: bool, count: int) -> None:
    """Refuse what would mix up the rows of different ranks, where ``count`` parameters stand for one segment.

    Raises:
        MisconfigurationException: for ``ZeroRedundancyOptimizer`` and for post-local SGD.
    """
    shards = any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in optimizers)
    if count and (shards or averages_models):
        what = "ZeroRedundancyOptimizer" if shards else "post-local SGD (model_averaging_period)"
        raise MisconfigurationException(
            f"{what} copies parameters between ranks, but {count} parameters of this model stand for one segment each"
            " (SegmentPositionalEmbedding). Use an ordinary optimizer, or RotaryEmbedding."
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
