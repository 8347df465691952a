"""What a run shows beside its loss: throughput, gradient norm, memory, and how the sequence is split."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import BasePredictionWriter, ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from lightning_lss.attention.module import LSSAttention
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles
from lightning_lss.models.transformer import count_parameters
from lightning_lss.sequence.segment import SequenceShard, sequence_shard

_GIB = 2**30


def _first_sequence(batch: Any) -> Tensor:
    """The first tensor of a batch with two or more dimensions, [B, l, ...]."""
    return next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1)


class _SequenceThroughput(Throughput):
    """Rates in which a sequence that S ranks share counts once."""

    def __init__(self, shares: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shares = shares

    @override
    def compute(self) -> dict[str, int | float]:
        metrics = super().compute()
        for name in metrics:
            if name.endswith(("batches_per_sec", "samples_per_sec")):
                metrics[name] /= self.shares
        tokens_per_device = metrics.get(f"device{self.separator}items_per_sec")
        if tokens_per_device is not None:
            metrics["tokens_per_sec"] = tokens_per_device * self.world_size
        return metrics


class LSSThroughputMonitor(ThroughputMonitor):
    """Lightning's ``ThroughputMonitor`` for sequences that several ranks share.

    Logs ``train/tokens_per_sec`` of the whole world, ``train/device/flops_per_sec`` and, where the peak of the device
    is known, ``train/device/mfu`` (model FLOP/s utilization), if the module has ``flops_per_batch``, the operations of
    this rank in a batch.

    Args:
        window_size: number of batches to average over.
        batch_size_fn: sequences in a batch; by default the first dimension of the first tensor that has two.
        length_fn: local tokens in a batch; by default the product of that tensor's first two dimensions.
    """

    def __init__(
        self,
        window_size: int = 20,
        batch_size_fn: Callable[[Any], int] = lambda batch: _first_sequence(batch).size(0),
        length_fn: Callable[[Any], int] = lambda batch: _first_sequence(batch).shape[:2].numel(),
    ) -> None:
        super().__init__(batch_size_fn, length_fn, window_size=window_size, separator="/")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        shares = sequence_shard(pl_module).size
        self._throughputs = {
            stage: _SequenceThroughput(
                shares, available_flops=self.available_flops, world_size=trainer.world_size, **self.kwargs
            )
            for stage in self._throughputs
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Mean training rate of the whole world in the window, tokens per second; None before the window is full."""
        throughput = self._throughputs.get(RunningStage.TRAINING)
        rate = throughput.compute().get("tokens_per_sec") if throughput is not None and throughput._time else None
        return None if rate is None else float(rate)


class GradientNormMonitor(pl.Callback):
    """Logs ``train/gradient_norm``, the 2-norm of the whole model's gradients before clipping."""

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        norm_of = getattr(trainer.strategy, "gradient_norm", None)
        grads = [x.grad for x in pl_module.parameters() if x.grad is not None]
        norm = norm_of() if norm_of is not None else nn.utils.get_total_norm(grads)
        for logger in trainer.loggers:
            logger.log_metrics({"train/gradient_norm": norm.item()}, step=trainer.global_step)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU's memory, or on CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemoryMonitor(pl.Callback):
    """Logs the peak memory of every rank in GiB, ``memory/rank_0`` and so on, and the highest, ``memory/peak``.

    Args:
        most_ranks: with more ranks than this only the highest is logged.
    """

    def __init__(self, most_ranks: int = 64) -> None:
        self.most_ranks = most_ranks
        self._last_step = -1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._last_step = step  # which several batches share when gradients accumulate
        own = torch.tensor(peak_memory(trainer.strategy.root_device) / _GIB, device=trainer.strategy.root_device)
        peaks = trainer.strategy.all_gather(own).flatten().tolist()
        metrics = {"memory/peak": max(peaks)}
        if 1 < len(peaks) <= self.most_ranks:
            metrics |= {f"memory/rank_{rank}": peak for rank, peak in enumerate(peaks)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class RunLayout(pl.Callback):
    """Writes to TensorBoard, once, how a run is laid out: attention tiles by rank, a table of sizes,
    hyperparameters."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._seen: list[tuple[LSSAttention, torch.Size, torch.Size, torch.dtype]] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for writer in _tensorboard_writers(trainer):
            # Lightning writes them only together with a value; here the metric's own curve is named instead.
            watched = getattr(trainer.checkpoint_callback, "monitor", None)
            values = {key: x if isinstance(x, (bool, int, float)) else str(x) for key, x in pl_module.hparams.items()}
            for summary in hparams(values, {watched: 0.0} if watched else {}):
                writer._get_file_writer().add_summary(summary)
        self._seen = []
        modules = [module for module in pl_module.modules() if isinstance(module, LSSAttention)]
        self._handles = [module.register_forward_pre_hook(self._see, with_kwargs=True) for module in modules]

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Note the shapes of the queries and keys of an attention call, and the dtype in which keys travel."""
        queries = kwargs["q"] if "q" in kwargs else args[0]
        keys = kwargs["k"] if "k" in kwargs else args[1]
        autocast = torch.is_autocast_enabled(keys.device.type)
        dtype = torch.get_autocast_dtype(keys.device.type) if autocast else keys.dtype
        assert isinstance(module, LSSAttention)
        self._seen.append((module, queries.shape, keys.shape, dtype))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._write(trainer, pl_module, sequence_shard(pl_module))

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, shard: SequenceShard) -> None:
        if not self._seen:
            return
        attention, queries, keys, dtype = self._seen[0]
        batch_size, heads, key_length, head_dim = keys
        length = key_length * attention.shard.size
        shares_heads = attention.shard.size != shard.size  # tensor parallelism: whole sequence, a part of the heads
        # it receives two gathers and two sums of [B, l, E], which is as large as its queries, from every other rank
        tensors = 4 * queries.numel() if shares_heads else 2 * keys.numel()
        rows = {
            "processes W = D x S": f"{trainer.world_size} = {trainer.world_size // shard.size} x {shard.size}",
            "sequence length L": f"{length:,}",
            "segment length l = L / S": f"{length // shard.size:,}",
            "layout": shard.layout if shard.size > 1 else "whole sequence on each rank",
            "batch per sequence group": f"{batch_size}",
            "attention": f"{'causal' if attention.causal else 'bidirectional'}, {heads} key/value heads of {head_dim}"
            + (" on each rank" if shares_heads else ""),
            "parameters": f"{count_parameters(pl_module, shard.size):,}",
            "bytes received per layer and rank, forward": f"{tensors * dtype.itemsize * (shard.size - 1):,}",
            "precision": str(trainer.precision),
        }
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
        for writer in _tensorboard_writers(trainer):
            writer.add_text("run layout", table)
            if not shares_heads:
                picture = draw_attention_tiles(length, shard.size, shard.layout, attention.causal)
                writer.add_figure("attention tiles", picture)


def _tensorboard_writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The writers behind the Trainer's TensorBoard loggers, on rank 0; none elsewhere."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned to ``predictions-<data rank>.pt``, once for each sequence group.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # ranks may have composed other names

    @override
    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        if sequence_shard(pl_module).rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            rank = getattr(trainer.strategy, "data_rank", trainer.global_rank)
            torch.save({"predictions": predictions, "indices": batch_indices}, self.folder / f"predictions-{rank}.pt")
