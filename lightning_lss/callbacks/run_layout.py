"""How a run is laid out, in TensorBoard."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lss.attention.module import LSSAttention
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.segment import SequenceShard, sequence_shard


class _AttentionCall(NamedTuple):
    """What a rank's attention was given."""

    attention: LSSAttention
    queries: torch.Size  # [B, H, l, D]
    keys: torch.Size  # [B, G, l, D]
    dtype: torch.dtype  # that of keys and values when they are sent


class RunLayout(pl.Callback):
    """Writes to TensorBoard, once a run, the attention tiles by rank, a table of sizes, and the hyperparameters.

    The hyperparameters are written after the first validation, with the metric that the Trainer's ``ModelCheckpoint``
    monitors: TensorBoard shows hyperparameters only beside a metric.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._calls: list[_AttentionCall] = []
        self._hyperparameters_written = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calls, self._hyperparameters_written = [], False
        modules = [module for module in pl_module.modules() if isinstance(module, LSSAttention)]
        self._handles = [module.register_forward_pre_hook(self._note_call, with_kwargs=True) for module in modules]

    def _note_call(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        assert isinstance(module, LSSAttention)
        queries = kwargs["q"] if "q" in kwargs else args[0]
        keys = kwargs["k"] if "k" in kwargs else args[1]
        dtype = module.shard.communication_dtype or in_autocast_dtype(keys.new_empty(0))[0].dtype
        self._calls.append(_AttentionCall(module, queries.shape, keys.shape, dtype))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._calls:
            _write_layout(trainer, pl_module, self._calls[0])

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        monitored = getattr(trainer.checkpoint_callback, "monitor", None)
        if self._hyperparameters_written or not fitting or monitored not in trainer.callback_metrics:
            return
        self._hyperparameters_written = True
        metrics = {monitored: trainer.callback_metrics[monitored].item()}
        for logger in _tensorboard_loggers(trainer):
            # The step is the one of Lightning's own point, so the second one lies on it.
            logger.log_hyperparams(logger.hparams, metrics, step=trainer.global_step - 1)


@rank_zero_only
def _write_layout(trainer: pl.Trainer, pl_module: pl.LightningModule, call: _AttentionCall) -> None:
    shard = sequence_shard(pl_module)
    rows = _table_rows(trainer, pl_module, shard, call)
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for logger in _tensorboard_loggers(trainer):
        logger.experiment.add_text("run layout", table)
        if not _splits_heads(call, shard):
            tiles = draw_attention_tiles(_length(call), shard.size, shard.layout, call.attention.causal)
            logger.experiment.add_figure("attention tiles", tiles)


def _table_rows(
    trainer: pl.Trainer, pl_module: pl.LightningModule, shard: SequenceShard, call: _AttentionCall
) -> dict[str, str]:
    batch_size, heads, _, head_dim = call.keys
    length, causal = _length(call), "causal" if call.attention.causal else "bidirectional"
    where = " on each rank" if _splits_heads(call, shard) else ""
    return {
        "processes W = D x S": f"{trainer.world_size} = {trainer.world_size // shard.size} x {shard.size}",
        "sequence length L": f"{length:,}",
        "segment length l = L / S": f"{length // shard.size:,}",
        "layout": shard.layout if shard.size > 1 else "whole sequence on each rank",
        "batch per sequence group": f"{batch_size}",
        "attention": f"{causal}, {heads} key/value heads of width {head_dim}{where}",
        "parameters": f"{count_parameters(pl_module, shard.size):,}",
        "bytes received per layer and rank, forward": f"{_bytes_received(call, shard):,}",
        "precision": str(trainer.precision),
    }


def _length(call: _AttentionCall) -> int:
    """Return the global sequence length L."""
    return call.keys[2] * call.attention.shard.size


def _splits_heads(call: _AttentionCall, shard: SequenceShard) -> bool:
    """Return whether ranks compute heads of whole sequences (tensor parallelism) instead of rows of all heads."""
    return call.attention.shard.size != shard.size


def _bytes_received(call: _AttentionCall, shard: SequenceShard) -> int:
    """Return what a rank receives in the forward pass of one layer.

    Under LSS these are the other ranks' keys and values. Under tensor parallelism the layer gathers and sums [B, l, E]
    twice each, which has as many elements as a rank's queries.
    """
    elements = 4 * call.queries.numel() if _splits_heads(call, shard) else 2 * call.keys.numel()
    return elements * call.dtype.itemsize * (shard.size - 1)


def _tensorboard_loggers(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
