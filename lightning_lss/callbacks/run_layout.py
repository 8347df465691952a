"""How a run is laid out, in TensorBoard."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lss.attention.module import LSSAttention
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.segment import sequence_shard


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

    def _note_call(self, module: LSSAttention, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tensors = dict(zip("qkv", args)) | kwargs
        dtype = module.shard.communication_dtype or in_autocast_dtype(tensors["k"].new_empty(0))[0].dtype
        self._calls.append(_AttentionCall(module, tensors["q"].shape, tensors["k"].shape, dtype))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._calls and trainer.is_global_zero:
            _write_layout(trainer, pl_module, self._calls[0])
        self._handles, self._calls = [], []

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        monitored = getattr(trainer.checkpoint_callback, "monitor", None)
        if self._hyperparameters_written or not fitting or monitored not in trainer.callback_metrics:
            return
        self._hyperparameters_written = True
        metrics = {monitored: trainer.callback_metrics[monitored].item()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # The step is the one of Lightning's own point, so the second one lies on it.
                logger.log_hyperparams(logger.hparams, metrics, step=trainer.global_step - 1)


def _write_layout(trainer: pl.Trainer, pl_module: pl.LightningModule, call: _AttentionCall) -> None:
    shard, attention = sequence_shard(pl_module), call.attention
    rows = _table_rows(trainer, pl_module, call)
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("run layout", table)
            if attention.shard.size == shard.size:  # otherwise ranks share out heads, and each has the whole matrix
                tiles = draw_attention_tiles(call.keys[2] * shard.size, shard.size, shard.layout, attention.causal)
                logger.experiment.add_figure("attention tiles", tiles)


def _table_rows(trainer: pl.Trainer, pl_module: pl.LightningModule, call: _AttentionCall) -> dict[str, str]:
    shard = sequence_shard(pl_module)
    batch_size, heads, rows, head_dim = call.keys
    length = rows * call.attention.shard.size
    if call.attention.shard.size == shard.size:  # LSS: a rank receives the other ranks' keys and values
        elements, where = 2 * call.keys.numel(), ""
    else:  # tensor parallelism: a layer gathers and sums [B, l, E] twice each, as many elements as a rank's queries
        elements, where = 4 * call.queries.numel(), " on each rank"
    direction = "causal" if call.attention.causal else "bidirectional"
    return {
        "processes W = D x S": f"{trainer.world_size} = {trainer.world_size // shard.size} x {shard.size}",
        "sequence length L": f"{length:,}",
        "segment length l = L / S": f"{length // shard.size:,}",
        "layout": shard.layout if shard.size > 1 else "whole sequence on each rank",
        "batch per sequence group": f"{batch_size}",
        "attention": f"{direction}, {heads} key/value heads of width {head_dim}{where}",
        "parameters": f"{count_parameters(pl_module, shard.size):,}",
        "bytes received per layer and rank, forward": f"{elements * call.dtype.itemsize * (shard.size - 1):,}",
        "precision": str(trainer.precision),
    }
