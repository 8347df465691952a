"""How a run is laid out, in TensorBoard."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lss.attention.module import LSSAttention
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.segment import sequence_shard


class RunLayout(pl.Callback):
    """Writes to TensorBoard, once a run, the attention tiles by rank, a table of sizes, and the hyperparameters.

    The hyperparameters are written after the first validation, with the metric that the Trainer's ``ModelCheckpoint``
    monitors: TensorBoard shows hyperparameters only beside a metric.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._calls: list[tuple[LSSAttention, torch.Size, torch.Size, torch.dtype]] = []
        self._hyperparameters_written = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calls, self._hyperparameters_written = [], False
        modules = [module for module in pl_module.modules() if isinstance(module, LSSAttention)]
        self._handles = [module.register_forward_pre_hook(self._note_call, with_kwargs=True) for module in modules]

    def _note_call(self, module: LSSAttention, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tensors = dict(zip("qkv", args)) | kwargs
        dtype = module.shard.communication_dtype or in_autocast_dtype(tensors["k"].new_empty(0))[0].dtype
        self._calls.append((module, tensors["q"].shape, tensors["k"].shape, dtype))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._calls and trainer.is_global_zero:
            _write_layout(trainer, pl_module, *self._calls[0])
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


def _write_layout(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    attention: LSSAttention,
    queries: torch.Size,  # [B, H, l, D]
    keys: torch.Size,  # [B, G, l, D]
    dtype: torch.dtype,  # that of keys and values when they are sent
) -> None:
    shard = sequence_shard(pl_module)
    batch_size, heads, local_length, head_dim = keys
    length = local_length * attention.shard.size
    splits_heads = attention.shard.size != shard.size  # tensor parallelism: each rank has the whole matrix
    # Elements of each other rank: keys and values, or under tensor parallelism [B, l, E], as many as a rank's queries,
    # for two gathers and two sums.
    elements = 4 * queries.numel() if splits_heads else 2 * keys.numel()
    direction, where = "causal" if attention.causal else "bidirectional", " on each rank" if splits_heads else ""
    rows = {
        "processes W = D x S": f"{trainer.world_size} = {trainer.world_size // shard.size} x {shard.size}",
        "sequence length L": f"{length:,}",
        "segment length l = L / S": f"{length // shard.size:,}",
        "layout": shard.layout if shard.size > 1 else "whole sequence on each rank",
        "batch per sequence group": f"{batch_size}",
        "attention": f"{direction}, {heads} key/value heads of width {head_dim}{where}",
        "parameters": f"{count_parameters(pl_module, shard.size):,}",
        "bytes received per layer and rank, forward": f"{elements * dtype.itemsize * (shard.size - 1):,}",
        "precision": str(trainer.precision),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("run layout", table)
            if not splits_heads:
                figure = Figure(figsize=(6.4, 5.6), layout="constrained")
                draw_attention_tiles(figure.subplots(), length, shard.size, shard.layout, attention.causal)
                logger.experiment.add_figure("attention tiles", figure)
