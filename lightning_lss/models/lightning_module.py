"""``LSSTransformer``: the LightningModule of the LSS Transformer, with its loss, metrics, optimizer and schedule."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.models.transformer import Block, ExecutionConfig, Transformer, TransformerConfig
from lightning_lss.nn.loss import IGNORED, token_mean
from lightning_lss.nn.metrics import BitsPerByte
from lightning_lss.sequence.segment import sequence_shard

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


class LSSTransformer(pl.LightningModule):
    """The LSS Transformer (arXiv 2311.02382): a decoder by default, an encoder with ``causal=False``.

    A batch is a dict of ``inputs`` and ``targets``, int64 [B, L]. Targets must be shifted already (targets[i] =
    inputs[i + 1]), since a shift after the split would lose a target at every border between chunks. Targets of -100 do
    not count. A further entry ``mask``, an :class:`~lightning_lss.AttentionMask`, says what each token sees, for example
    only its own document.

    It runs under any strategy. Under :class:`~lightning_lss.LSSStrategy` each rank works on its segment.

    Args:
        config: sizes of the model.
        optimizer: options of the optimizer and its schedule.
        execution: how a step is computed.
        bytes_per_token: mean number of bytes of text per token, for bits per byte; 1 where tokens are bytes.
        **options: fields of the three configurations by name, such as ``width=512, lr=1e-3, keep_gathered=True``. They
            override the fields of ``config``, ``optimizer`` and ``execution``.

    Raises:
        ValueError: if an option is out of range, or options are incompatible.
        TypeError: if an option is not a field of a configuration.
    """

    def __init__(
        self,
        config: TransformerConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        execution: ExecutionConfig | None = None,
        *,
        bytes_per_token: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        # what a subclass takes too; LightningCLI would have its own way to build the module from nested values
        self.save_hyperparameters(ignore=["config", "optimizer", "execution", "_instantiator"])
        given = (config or TransformerConfig(), optimizer or OptimizerConfig(), execution or ExecutionConfig())
        config, self.optimizer_config, self.execution = (_with_options(part, options) for part in given)
        # flat, so that a checkpoint holds plain values and loads as LSSTransformer(**hparams)
        flat = {**asdict(config), **asdict(self.optimizer_config), **asdict(self.execution)}
        if options:
            raise TypeError(f"LSSTransformer does not take {', '.join(options)}. It takes {', '.join(flat)}.")
        self.save_hyperparameters({**flat, "bytes_per_token": bytes_per_token})
        self.model = Transformer(config, self.execution)
        self.lr = self.optimizer_config.lr  # Lightning's Tuner replaces it
        self.bytes_per_token = bytes_per_token
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_bits_per_byte, self.test_bits_per_byte = BitsPerByte(), BitsPerByte()
        self._flops = 0.0

    @property
    def flops_per_batch(self) -> float | None:
        """Floating-point operations of this rank in the last training batch, for throughput monitors; None during
        evaluation."""
        return self._flops if self.training else None

    def setup(self, stage: str) -> None:
        """Compile the blocks with ``compile_blocks``, without graph breaks unless there is dropout."""
        for block in self.model.blocks if self.execution.compile_blocks else ():
            assert isinstance(block, Block)
            block.compile_forward(fullgraph=self.model.config.dropout == 0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, mask: AttentionMask | None = None) -> Tensor:
        """Compute logits [B, l, V] of tokens, int64 [B, l]; with targets, int64 [B, l], the sum of their cross
        entropies instead. During a run under LSS tokens are this rank's segment, else whole sequences."""
        return self.model(tokens, targets, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's loss; its average over the ranks is the mean cross entropy over all tokens, in nats."""
        loss_sum, num_tokens = self._loss(batch)
        loss = token_mean(loss_sum, num_tokens)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/bits_per_byte", loss.detach() / (math.log(2) * self.bytes_per_token), sync_dist=True)
        self._count_flops(batch)
        return loss

    @torch.compiler.disable  # a mask counts its pairs outside of any graph
    def _count_flops(self, batch: Batch) -> None:
        shard, (batch_size, local_length) = sequence_shard(self), batch["inputs"].shape
        length = local_length * shard.size
        sizes = {"batch": batch_size, "heads": self.model.config.num_heads}
        pairs = [mask.visible_pairs(length, shard.num_chunks, **sizes) for mask in _mask_of(batch).values()]
        self._flops = self.model.config.training_flops(batch_size, length, *pairs) / shard.size

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

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict the most probable token at every position of the whole sequence, int64 [B, L], on every rank."""
        return sequence_shard(self).gather(self(batch["inputs"], **_mask_of(batch)).argmax(-1))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Configure AdamW and the schedule of :class:`OptimizerConfig`."""
        chosen = replace(self.optimizer_config, lr=self.lr)
        optimizer = torch.optim.AdamW(self.model.parameter_groups(chosen.weight_decay), chosen.lr, chosen.betas)

        def lr_factor(step: int) -> float:
            if step < chosen.warmup_steps:
                return (step + 1) / chosen.warmup_steps
            steps = self.trainer.estimated_stepping_batches - chosen.warmup_steps
            progress = min(1.0, (step - chosen.warmup_steps) / max(1, steps))  # 0 if the run is endless
            least = chosen.min_lr / chosen.lr
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum the cross entropies of the local tokens that count; also return their number."""
        return self(batch["inputs"], batch["targets"], **_mask_of(batch)), (batch["targets"] != IGNORED).sum()

    def _evaluate(self, batch: Batch, stage: str, loss: MeanMetric, bits_per_byte: BitsPerByte) -> None:
        loss_sum, num_tokens = self._loss(batch)
        loss.update(loss_sum / num_tokens.clamp(min=1), weight=num_tokens)
        bits_per_byte.update(loss_sum, num_tokens * self.bytes_per_token)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/bits_per_byte", bits_per_byte, prog_bar=True)


def _mask_of(batch: Batch) -> dict[str, AttentionMask]:
    """The mask as an argument of ``forward``; nothing where there is none, since a subclass may not take any."""
    return {"mask": batch["mask"]} if isinstance(batch.get("mask"), AttentionMask) else {}


def _with_options(config: Any, options: dict[str, Any]) -> Any:
    """Move the options that are fields of ``config`` from ``options`` to a copy of ``config``."""
    return replace(config, **{field.name: options.pop(field.name) for field in fields(config) if field.name in options})
