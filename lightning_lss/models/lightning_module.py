"""``LSSTransformer``: the LightningModule of the LSS Transformer, with its loss, metrics, optimizer and schedule."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from lightning_lss.attention.spec import HeadChunks
from lightning_lss.megatron.parallelize import own_copy, parallelize
from lightning_lss.megatron.strategy import MegatronStrategy
from lightning_lss.models.transformer import MLP, Positions, Transformer, TransformerConfig
from lightning_lss.nn.loss import IGNORED, cross_entropy_sum, linear_cross_entropy, token_mean
from lightning_lss.nn.metrics import BitsPerByte
from lightning_lss.nn.recompute import ActivationCheckpointing
from lightning_lss.sequence.segment import sequence_shard

Batch = dict[str, Tensor]


class LSSTransformer(pl.LightningModule):
    """The LSS Transformer (arXiv 2311.02382): a decoder by default, an encoder with ``causal=False``.

    A batch is a dict of ``inputs`` and ``targets``, int64 [B, L], with the targets shifted already (targets[i] =
    inputs[i + 1]): shifting after the split would lose a target at every border between segments. Targets of -100 do
    not count.

    It runs under any strategy, and without one. Under :class:`~lightning_lss.LSSStrategy` each rank works on its
    segment.

    Args:
        vocab_size, seq_len, width, num_layers, num_heads, num_kv_heads, positions, mlp, mlp_width, causal,
        tie_embeddings, dropout, head_chunks, keep_gathered, activation_checkpointing, mlp_tiles:
            see :class:`~lightning_lss.models.transformer.TransformerConfig`.
        compile_blocks: compile each block with ``torch.compile``, without graph breaks unless there is dropout.
        lr: highest learning rate of AdamW.
        min_lr: learning rate at the end of the cosine.
        weight_decay: on the matrices of linear layers.
        betas: of AdamW.
        warmup_steps: steps of linear warm-up.
        bytes_per_token: mean number of bytes of text in a token, for bits per byte; 1 for bytes.

    Raises:
        ValueError: if sizes do not fit together.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        seq_len: int = 4096,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        positions: Positions = "learned",
        mlp: MLP = "gelu",
        mlp_width: int | None = None,
        causal: bool = True,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        head_chunks: HeadChunks = "auto",
        keep_gathered: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        mlp_tiles: int = 1,
        compile_blocks: bool = False,
        lr: float = 3e-4,
        min_lr: float = 3e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 100,
        bytes_per_token: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Transformer(
            TransformerConfig(
                vocab_size=vocab_size,
                seq_len=seq_len,
                width=width,
                num_layers=num_layers,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                positions=positions,
                mlp=mlp,
                mlp_width=mlp_width,
                causal=causal,
                tie_embeddings=tie_embeddings,
                dropout=dropout,
                head_chunks=head_chunks,
                keep_gathered=keep_gathered,
                activation_checkpointing=activation_checkpointing,
                mlp_tiles=mlp_tiles,
            )
        )
        self.compile_blocks = compile_blocks
        self.lr = lr
        self.min_lr = min_lr
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])  # Hydra gives a list
        self.warmup_steps = warmup_steps
        self.bytes_per_token = bytes_per_token
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_bits_per_byte, self.test_bits_per_byte = BitsPerByte(), BitsPerByte()
        self._flops = 0.0

    @property
    def flops_per_batch(self) -> float | None:
        """Floating-point operations of this rank in the last training batch, for throughput monitors; None in
        evaluation."""
        return self._flops if self.training else None

    def configure_model(self) -> None:
        """Share out the model over the ranks of a tensor-parallel group, under
        :class:`~lightning_lss.megatron.strategy.MegatronStrategy` only."""
        if self.device_mesh is None or isinstance(self.model.head.weight, DTensor):  # Lightning may call it again
            return
        if not isinstance(self.trainer.strategy, MegatronStrategy):
            raise MisconfigurationException(
                f"{type(self.trainer.strategy).__name__} would neither split batches along the sequence nor finish the"
                " gradients. Use lightning_lss.megatron.strategy.MegatronStrategy, which is a ModelParallelStrategy that does."
            )
        parallelize(self.model, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Compile the blocks, where that is asked for."""
        if self.compile_blocks:
            self.model.compile_blocks()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, l, V] of tokens, int64 [B, l]: of the segment within a run under LSS, else of whole sequences."""
        return self.model(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy over all tokens of all ranks, in nats."""
        loss_sum, num_tokens = self._loss(batch)
        loss = token_mean(loss_sum, num_tokens)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train/bits_per_byte", loss.detach() / (math.log(2) * self.bytes_per_token), sync_dist=True)
        batch_size, local_length = batch["inputs"].shape
        self._flops = self._training_flops(batch_size, local_length)
        return loss

    @torch.compiler.disable  # Lightning's log cannot be traced: a module compiled as a whole would fail in it
    def log(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`lightning.pytorch.LightningModule.log`."""
        super().log(*args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count towards ``val/loss`` (nats per token) and ``val/bits_per_byte``."""
        self._evaluate(batch, "val", self.val_loss, self.val_bits_per_byte)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count towards ``test/loss`` and ``test/bits_per_byte``."""
        self._evaluate(batch, "test", self.test_loss, self.test_bits_per_byte)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The most probable token at every position of the whole sequence, int64 [B, L], on every rank."""
        return sequence_shard(self).gather(self(batch["inputs"]).argmax(-1))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up and a cosine down to ``min_lr`` over the steps that the Trainer will take."""
        optimizer = torch.optim.AdamW(self.model.parameter_groups(self.weight_decay), lr=self.lr, betas=self.betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = self.trainer.estimated_stepping_batches
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))  # 0 where the end is open
        least = self.min_lr / self.lr
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropies of the local tokens that count, and their number."""
        targets = batch["targets"].flatten()
        if type(self).forward is LSSTransformer.forward:
            features = self.model.features(batch["inputs"]).flatten(0, 1)
            loss_sum = linear_cross_entropy(features, own_copy(self.model.head.weight), targets)
        else:  # a subclass makes its logits in its own way
            loss_sum = cross_entropy_sum(self(batch["inputs"]).flatten(0, 1), targets)
        return loss_sum, (targets != IGNORED).sum()

    def _evaluate(self, batch: Batch, stage: str, loss: MeanMetric, bits_per_byte: BitsPerByte) -> None:
        loss_sum, num_tokens = self._loss(batch)
        loss.update(loss_sum / num_tokens.clamp(min=1), weight=num_tokens)
        bits_per_byte.update(loss_sum, num_tokens * self.bytes_per_token)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/bits_per_byte", bits_per_byte, prog_bar=True)

    def _training_flops(self, batch_size: int, local_length: int) -> float:
        shares = sequence_shard(self).size
        whole = self.model.config.training_flops(batch_size, local_length * shares)
        return whole / shares
