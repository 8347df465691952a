"""``LanguageModule``: what modules that predict the next token share: loss, metrics, optimizer and schedule."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_lss.nn.loss import token_mean
from lightning_lss.nn.metrics import BitsPerByte

Batch = dict[str, Any]  # tensors, and perhaps a mask


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule: a linear warm-up, then a cosine over the remaining steps of the run.

    Args:
        lr: highest learning rate.
        min_lr: learning rate at the end of the cosine.
        weight_decay: weight decay of the matrices of linear layers; other parameters have none.
        betas: AdamW's coefficients of the running averages.
        warmup_steps: number of steps of the warm-up.
    """

    lr: float = 3e-4
    min_lr: float = 3e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers.")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list in configuration files


class LanguageModule(pl.LightningModule, ABC):
    """Trains ``model`` to predict the next token, on batches with ``inputs`` and ``targets``, int64 [B, L].

    It logs ``loss`` (nats per token) and ``bits_per_byte`` of each stage, over all tokens that count. A subclass says what
    the loss of a batch is, and which parameters decay.

    Args:
        model: what is trained.
        optimizer: options of the optimizer and its schedule.
        bytes_per_token: mean number of bytes of text per token, for bits per byte; 1 where tokens are bytes.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, bytes_per_token: float) -> None:
        super().__init__()
        self.model, self.optimizer_config, self.bytes_per_token = model, optimizer, bytes_per_token
        self.lr = optimizer.lr  # Lightning's Tuner replaces it
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_bits_per_byte, self.test_bits_per_byte = BitsPerByte(), BitsPerByte()

    @abstractmethod
    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum the cross entropies of the tokens that count; also return their number."""

    @abstractmethod
    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group parameters for an optimizer."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's loss; its average over the ranks is the mean cross entropy over all tokens, in nats."""
        loss_sum, num_tokens = self._loss(batch)
        loss = token_mean(loss_sum, num_tokens)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/bits_per_byte", loss.detach() / (math.log(2) * self.bytes_per_token), sync_dist=True)
        return loss

    @torch.compiler.disable  # Lightning's log cannot be traced and would fail in a module compiled as a whole
    def log(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`lightning.pytorch.LightningModule.log`."""
        super().log(*args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update ``val/loss`` (nats per token) and ``val/bits_per_byte``."""
        self._evaluate(batch, "val", self.val_loss, self.val_bits_per_byte)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update ``test/loss`` (nats per token) and ``test/bits_per_byte``."""
        self._evaluate(batch, "test", self.test_loss, self.test_bits_per_byte)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Configure AdamW and the schedule of :class:`OptimizerConfig`."""
        chosen = replace(self.optimizer_config, lr=self.lr)
        optimizer = torch.optim.AdamW(self.parameter_groups(chosen.weight_decay), chosen.lr, chosen.betas)

        def lr_factor(step: int) -> float:
            if step < chosen.warmup_steps:
                return (step + 1) / chosen.warmup_steps
            steps = self.trainer.estimated_stepping_batches - chosen.warmup_steps
            progress = min(1.0, (step - chosen.warmup_steps) / max(1, steps))  # 0 if the run is endless
            least = chosen.min_lr / chosen.lr
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def _evaluate(self, batch: Batch, stage: str, loss: MeanMetric, bits_per_byte: BitsPerByte) -> None:
        loss_sum, num_tokens = self._loss(batch)
        loss.update(loss_sum / num_tokens.clamp(min=1), weight=num_tokens)
        bits_per_byte.update(loss_sum, num_tokens * self.bytes_per_token)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/bits_per_byte", bits_per_byte, prog_bar=True)


def with_options(config: Any, options: dict[str, Any]) -> Any:
    """Move the options that are fields of ``config`` from ``options`` to a copy of ``config``."""
    return replace(config, **{field.name: options.pop(field.name) for field in fields(config) if field.name in options})
