"""Time training steps of one rank of S with the Trainer, for :mod:`benchmarks.gpu`."""

import statistics
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.data import DataLoader

from benchmarks.clock import StepClock
from benchmarks.one_rank import OneOfMany, copy_bucket
from lightning_lss import LSSStrategy, LSSTransformer

# Dense bfloat16. Lightning knows the chip under another name and with sparsity: NVIDIA's H200 data sheet has 1,979 with
# sparsity, half of that without.
_PEAK_FLOPS = {"NVIDIA H200": 989.5e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the maker's figure of the device: floating-point operations a second in bfloat16; None if unknown."""
    if device.type != "cuda":
        return None
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(device)) or get_available_flops(device, torch.bfloat16)


class _Clock(StepClock):
    """Note the bytes on the device at the peak of the steps after the first, too."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def on_train_start(self, trainer: Any, module: Any) -> None:
        trainer.strategy.model.register_comm_hook(None, copy_bucket)  # Lightning's argument for it is for CUDA only

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # the first has made the optimizer's state
        super().on_train_batch_start(trainer, module, batch, index)

    @property
    def peak(self) -> int:
        """Peak in bytes."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def time_steps(
    size: int,
    length: int,
    checkpointing: str,
    model: dict[str, Any],
    steps: int,
    device: torch.device,
    peak: float | None,
) -> list[dict[str, Any]]:
    """Measure one row: ``steps`` training steps on one sequence of ``length``, after two that are not counted.

    Args:
        size: S; the caller is within :func:`lightning_lss.testing.fake_world.one_rank_of`.
        length: L.
        checkpointing: mode of activation checkpointing.
        model: further arguments of :class:`~lightning_lss.LSSTransformer`.
        steps: number of timed steps.
        device: the GPU, or the CPU.
        peak: floating-point operations a second to divide by; None for the maker's figure.
    """
    torch.manual_seed(0)
    module = LSSTransformer(seq_len=length, activation_checkpointing=checkpointing, **model)
    config = module.model.config
    clock = _Clock(device)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        num_nodes=size,
        strategy=LSSStrategy(
            size,
            cluster_environment=OneOfMany(size),
            process_group_backend="fake",
            verify=False,  # ranks that do not exist have no right gradients
        ),
        precision="bf16-mixed",
        callbacks=[clock],
        max_steps=steps + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    tokens = torch.randint(config.vocab_size, (length + 1,))
    batches = [{"inputs": tokens[:-1], "targets": tokens[1:]}] * trainer.max_steps
    trainer.fit(module, DataLoader(batches, batch_size=1))
    seconds = statistics.median(clock.seconds[2:])
    flops = config.training_flops(1, length) / size
    peak = peak or peak_flops(device)
    row = {
        "contestant": "lss",
        "ranks": size,
        "length": length,
        "layout": "zigzag",
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "head_width": config.head_dim,
        "layers": config.num_layers,
        "dtype": "bfloat16",
        "kernel": "auto",
        "head_chunks": "auto",
        "checkpointing": checkpointing,
        "collectives": "copies",
        "seconds": seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "utilization": flops / seconds / peak if peak else "",
        "peak_mib": clock.peak / 2**20,
        "rounds": len(clock.seconds) - 2,
    }
    return [row]
