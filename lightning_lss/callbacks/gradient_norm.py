"""The norm of the whole model's gradients."""

from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override


class GradientNormMonitor(pl.Callback):
    """Logs ``train/gradient_norm``, the 2-norm of the whole model's gradients before clipping."""

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (trainer.global_step + 1) % every:  # Lightning counts steps from 0, and logs the n-th
            return
        norm_of = getattr(trainer.strategy, "gradient_norm", None)
        grads = [x.grad for x in pl_module.parameters() if x.grad is not None]
        norm = norm_of() if norm_of is not None else nn.utils.get_total_norm(grads)
        for logger in trainer.loggers:
            logger.log_metrics({"train/gradient_norm": norm.item()}, step=trainer.global_step)
