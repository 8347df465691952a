"""All checks that refuse a run, and warnings: each names the values and the remedy before any process communicates."""

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.sequence.batch import SequenceDims, how_to_name, tensors_by_path
from lightning_lss.sequence.layout import chunks_per_rank
from lightning_lss.sequence.segment import ShardedModule, segment_local_names
from lightning_lss.strategy.balancing import BatchLayouts

_OTHER_LIGHTNING = (
    "`pytorch_lightning` has been imported. lightning_lss works with `lightning` (`import lightning.pytorch as pl`): the"
    " Trainers, LightningModules and callbacks of the two packages do not mix."
)


def check_module(module: pl.LightningModule, size: int, layouts: BatchLayouts) -> None:
    """Refuse a module that cannot run on segments.

    Raises:
        MisconfigurationException: if a step takes ``dataloader_iter``, a positional table cannot be divided evenly
            among ``size`` ranks, the layout changes with each batch and parameters stand for one segment, or batches are to
            be filled up that the module cuts itself.
    """
    layout = layouts.base
    if layouts.pad_values and hasattr(module, "shard_batch"):
        raise MisconfigurationException(
            f"{type(module).__name__}.shard_batch cuts batches itself, so pad_values of LSSStrategy has no effect. Leave one of them out;"
            " sequence_dims says which dimensions are cut."
        )
    check_segment_local(module, size, layout)
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


def check_view(module: nn.Module, view: str) -> None:
    """Refuse to show whole sequences to parts that are written for segments.

    Raises:
        MisconfigurationException: naming the first that there is.
    """
    name = next((name for name, x in module.named_modules() if isinstance(x, ShardedModule)), None)
    if view == "whole" and name is not None:
        raise MisconfigurationException(
            f"view='whole' shows the module whole sequences, but {name} ({type(module.get_submodule(name)).__name__}) is written for"
            " segments. Use view='segment', or functions of whole sequences: torch's attention, lss_attention(q, k, v), nn.Embedding."
        )


def check_segment_local(module: nn.Module, size: int, layout: str) -> None:
    """Refuse segment-local parameters and buffers under a layout that changes with each batch.

    Raises:
        MisconfigurationException: naming the first that there is.
    """
    if layout == "balanced" and size > 1 and (names := segment_local_names(module)):
        raise MisconfigurationException(
            f"layout='balanced' gives every rank other positions in each batch, but {names[0]} stands for the same ones in all. Use"
            " RotaryEmbedding instead of SegmentPositionalEmbedding, or layout='zigzag'."
        )


_OF_DDP_STRATEGY = {
    *("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"),
    *("process_group_backend", "timeout", "start_method", "broadcast_buffers"),
}


VIEWS = ("segment", "whole", "auto")


def check_arguments(
    sharding: object,
    view: object,
    save_distributed_checkpoint: bool,
    communication_dtype: object,
    ddp_kwargs: Mapping[str, Any],
) -> None:
    """Refuse arguments of :class:`~lightning_lss.LSSStrategy` that are incompatible.

    Raises:
        ValueError: if ``sharding`` or the view is unknown, one of ``ddp_kwargs`` has no effect with it, two arguments set the dtype
            of sent gradients, or distributed checkpoints do not support the start method.
    """
    if sharding not in (None, "fsdp", "hybrid"):
        raise ValueError(
            f"sharding={sharding!r} is unknown: use 'fsdp' (over all ranks), 'hybrid' (over the sequence group) or None."
        )
    if view not in VIEWS:
        raise ValueError(f"view={view!r} is unknown: choose one of {', '.join(map(repr, VIEWS))}.")
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


_MIXES_ROWS = tuple(x for name in ("Adafactor", "Muon") if (x := getattr(torch.optim, name, None)) is not None)


def check_optimizers(optimizers: Iterable[Optimizer], averages_models: bool, local: Collection[nn.Parameter]) -> None:
    """Refuse optimizers that copy parameters between ranks, or mix the rows of one, if there are segment-local ``local``.

    Raises:
        MisconfigurationException: for ``ZeroRedundancyOptimizer`` and post-local SGD; for ``torch.optim.Adafactor`` and
            ``torch.optim.Muon`` with one of ``local`` in a parameter group.
    """
    own = {id(x) for x in local}
    for optimizer in optimizers:
        zero = isinstance(optimizer, ZeroRedundancyOptimizer)
        if own and (zero or averages_models):
            what = "ZeroRedundancyOptimizer" if zero else "post-local SGD (model_averaging_period)"
            raise MisconfigurationException(
                f"{what} copies parameters between ranks, but {len(own)} parameters of this model stand for one segment each"
                " (SegmentPositionalEmbedding). Use an ordinary optimizer, or RotaryEmbedding."
            )
        held = {id(x) for group in optimizer.param_groups for x in group["params"]}
        if isinstance(optimizer, _MIXES_ROWS) and own & held:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} computes the step of a row from other rows of its parameter, but each rank has only its"
                f" own rows of {len(own & held)} parameters (SegmentPositionalEmbedding): that would not be the training of one"
                " device. Use RotaryEmbedding, or give these parameters a second optimizer such as AdamW (with manual"
                " optimization), or freeze them and leave them out."
            )


def keeps_frozen(ddp_kwargs: Mapping[str, Any]) -> bool:
    """Whether DistributedDataParallel with these arguments goes on where parameters are frozen, as with unused ones."""
    return bool(ddp_kwargs.get("find_unused_parameters")) and not ddp_kwargs.get("static_graph")


def check_renewal(ddp_kwargs: Mapping[str, Any], comm_state: object) -> None:
    """Refuse to wrap a module anew in DistributedDataParallel where something of the old one would stay.

    Raises:
        MisconfigurationException: for arguments that leave hooks on modules or parameters, or keep a state by bucket.
    """
    stay = ("mixed_precision", "delay_all_reduce_named_params")
    names = [name for name in stay if ddp_kwargs.get(name) is not None]
    names += ["ddp_comm_state"] if comm_state is not None else []
    if names:
        raise MisconfigurationException(
            f"Parameters were frozen, unfrozen, added or removed after the start, which DistributedDataParallel cannot follow with"
            f" {', '.join(names)}. Leave that out, or train the same parameters from start to end."
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


def warn_of_requeue(environment: ClusterEnvironment | None, needs_all_ranks: bool) -> None:
    """Warn that SLURM's auto-requeue cannot save what is collected from all ranks, which are not at the same place of a step."""
    if needs_all_ranks and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        rank_zero_warn(
            "SLURM's auto-requeue saves a checkpoint wherever in a step its signal finds a rank, but this run's checkpoints are"
            " collected from all ranks (positional tables, sharded parameters, folders), so it may wait forever. Use"
            " plugins=SLURMEnvironment(auto_requeue=False) and ModelCheckpoint(every_n_train_steps=...)."
        )


def warn_of_images(batch: Any, sequence_dims: SequenceDims | None) -> None:
    """Warn about tensors that look like images and were cut along dimension 1 because nobody said otherwise."""
    for path, tensor in tensors_by_path(batch):
        unnamed = (sequence_dims or {}).keys().isdisjoint(path)
        if unnamed and tensor.dim() >= 4 and tensor.is_floating_point():
            rank_zero_warn(
                f"Batch entry {'.'.join(map(str, path)) or 'batch'} {tuple(tensor.shape)} was cut along dimension 1, which was"
                f" taken for the sequence. For images, dimension 1 is the channels. To say otherwise, {how_to_name(path)}."
            )


def warn_of_equal_replicas(data_parallel_size: int) -> None:
    """Warn that all data replicas train on the same batch."""
    rank_zero_warn(
        f"All {data_parallel_size} data replicas were given the same batch, so each sample is trained on {data_parallel_size}"
        " times. An IterableDataset must split itself: take every n-th sample from the k-th on, where"
        " n = trainer.strategy.data_parallel_size and k = trainer.strategy.data_rank. With num_workers > 0 every worker has a copy"
        " of the dataset: with info = torch.utils.data.get_worker_info(), take n = data_parallel_size * info.num_workers and"
        " k = data_rank * info.num_workers + info.id. Other datasets are split by Lightning's sampler, unless"
        " Trainer(use_distributed_sampler=False)."
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
