"""How a run is laid out, in TensorBoard."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.module import LSSAttention
from lightning_lss.attention.plan import Plan
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles, plan_ranks
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.segment import SequenceShard, place_of


class RunLayout(pl.Callback):
    """Writes to TensorBoard, once a run, the attention tiles by rank, a table of sizes, and the hyperparameters.

    The hyperparameters are written after the first validation, with the metric that the Trainer's ``ModelCheckpoint``
    monitors: TensorBoard shows hyperparameters only beside a metric.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._hyperparameters_written = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calls, self._hyperparameters_written = [], False
        modules = [module for module in pl_module.modules() if isinstance(module, LSSAttention)]
        self._handles = [module.register_forward_pre_hook(self._note_call, with_kwargs=True) for module in modules]

    def _note_call(self, module: LSSAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("q", "k", "v", "mask"), args)) | kwargs
        q, k, v, mask = given["q"], given["k"], given["v"], given.get("mask")
        dtype = module.shard.communication_dtype or in_autocast_dtype(k.new_empty(0))[0].dtype
        shown = module.default_mask if mask is None else mask
        self._calls.append(_Call(module, shown, q.shape, k.shape, v.size(-1), dtype))

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


class _Call(NamedTuple):
    """A call of attention."""

    module: LSSAttention
    mask: AttentionMask
    queries: torch.Size  # [B, H, l, D]
    keys: torch.Size  # [B, G, m, D]
    value_width: int
    dtype: torch.dtype  # that of keys and values when they are sent


def _write_layout(trainer: pl.Trainer, pl_module: pl.LightningModule, call: _Call) -> None:
    shard, attention = place_of(pl_module), call.module
    batch_size, heads, local_length, head_dim = call.keys
    length, padding = call.queries[2] * attention.shard.size, attention.shard.padding
    splits_heads = attention.shard.size != shard.size  # tensor parallelism: each rank has the whole matrix
    to_itself = call.queries[2] == local_length and not attention.whole_memory
    plans = plan_ranks(call.mask, length - padding, attention.shard) if to_itself else []
    where = " on each rank" if splits_heads else ""
    rows = {
        "processes W = D x S": f"{trainer.world_size} = {trainer.world_size // shard.size} x {shard.size}",
        "sequence length L": f"{length - padding:,}" + (f", filled up to {length:,}" if padding else ""),
        "segment length l = L / S": f"{length // shard.size:,}",
        "layout": shard.layout if shard.size > 1 else "whole sequence on each rank",
        "batch per sequence group": f"{batch_size}",
        "attention": f"{_describe(attention, call.mask)}, {heads} key/value heads of width {head_dim}{where}",
        "parameters": f"{count_parameters(pl_module, shard.size):,}",
        "precision": str(trainer.precision),
    }
    if plans:
        pairs = [plan.pairs for plan in plans]
        rows["visible pairs per row of the batch"] = f"{sum(pairs) // call.mask.rows:,} of {length**2:,}"
        if len(pairs) > 1:
            rows["busiest rank / mean of the ranks"] = f"{max(pairs) * len(pairs) / max(1, sum(pairs)):.3f}"
    rows["bytes received per layer and rank, forward"] = f"{_received(call, shard, plans, splits_heads):,.0f}"
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("run layout", table)
            if plans and not splits_heads:
                figure = Figure(figsize=(6.4, 5.6), layout="constrained")
                title = f"{shard.layout}, S = {shard.size}, L = {length - padding:,}, {_describe(attention, call.mask)}"
                draw_attention_tiles(figure.subplots(), call.mask, length - padding, attention.shard, title)
                logger.experiment.add_figure("attention tiles", figure)


def _describe(attention: LSSAttention, mask: AttentionMask) -> str:
    if mask in (AttentionMask.causal(), AttentionMask.full()):
        return "causal" if mask == AttentionMask.causal() else "bidirectional"
    return "own mask"


def _received(call: _Call, shard: SequenceShard, plans: list[Plan], splits_heads: bool) -> float:
    """Bytes that a rank receives in the forward pass of a layer."""
    if splits_heads:  # [B, l, E], as many as a rank's queries, of each other rank, for two gathers and two sums
        return 4 * call.queries.numel() * call.dtype.itemsize * (shard.size - 1)
    if call.module.whole_memory:
        return 0
    batch, heads, local_length, width = call.keys
    of_a_key = batch * heads * (width + call.value_width) * call.dtype.itemsize
    if plans and not call.module.keep_gathered:
        return of_a_key * sum(plans[0].received) / shard.size
    return of_a_key * local_length * (shard.size - 1)
