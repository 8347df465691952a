"""Modules of users, and what they show of a run."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import (
    AttentionMask,
    LSSAttention,
    RotaryEmbedding,
    SegmentDropout,
    sequence_shard,
    token_mean,
)
from tests.training import LENGTH, Run, SGDTransformer, make_loader, make_module, make_samples, make_trainer


class OwnModule(pl.LightningModule):
    """A module as a user would write it, with nothing of ours but attention, positions and loss."""

    def __init__(self, vocab_size: int, width: int, num_heads: int, **_: Any) -> None:
        super().__init__()
        self.heads = num_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.scale = nn.Parameter(torch.ones(width))  # directly on the LightningModule
        self.qkv = nn.Linear(width, 3 * width)
        self.rotary = RotaryEmbedding(width // num_heads)
        self.attention = LSSAttention(causal=True)
        self.out = nn.Linear(width, vocab_size)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.embedding(batch["inputs"]) * self.scale
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.attention(self.rotary(q), self.rotary(k), v).transpose(1, 2).flatten(2)
        targets = batch["targets"].flatten()
        loss = F.cross_entropy(self.out(x + y).flatten(0, 1), targets, reduction="sum")
        assert sequence_shard(self).size * batch["inputs"].size(1) == 16
        return token_mean(loss, (targets >= 0).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class MaskedModule(pl.LightningModule):
    """Packed documents with padding in one layer; a window, sinks and soft-capping in the next; dropout in both."""

    def __init__(self, vocab_size: int, width: int, num_heads: int, dropout: float = 0.0, **_: Any) -> None:
        super().__init__()
        self.heads = num_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.rotary = RotaryEmbedding(width // num_heads)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.packed = LSSAttention(dropout=dropout)
        window = AttentionMask.sliding_window(3, 1)
        self.windowed = LSSAttention(mask=window, softcap=0.5, dropout=dropout, head_chunks=2)
        self.sinks = nn.Parameter(torch.randn(num_heads))
        self.dropout = SegmentDropout(dropout)
        self.out = nn.Linear(width, vocab_size)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        tokens = batch["inputs"]
        ids = (tokens == 0).cumsum(1)
        valid = torch.arange(tokens.size(1)) < tokens.size(1) - tokens[:, :1] % 4
        return {**batch, "mask": AttentionMask.documents(ids) & AttentionMask.causal() & AttentionMask.padding(valid)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x = self.dropout(self.embedding(batch["inputs"]))
        x = x + self.attend(x, 0, mask=batch["mask"])
        x = x + self.attend(x, 1, sinks=self.sinks)
        targets = batch["targets"].flatten()
        loss = F.cross_entropy(self.out(self.dropout(x)).flatten(0, 1), targets, reduction="sum")
        return token_mean(loss, (targets >= 0).sum())

    def attend(self, x: Tensor, layer: int, **options: Any) -> Tensor:
        q, k, v = self.qkv[layer](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (self.packed, self.windowed)[layer]
        return attention(self.rotary(q), self.rotary(k), v, **options).transpose(1, 2).flatten(2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Recorder(SGDTransformer):
    """Checks in every stage that batches are split, and collects metrics."""

    def check(self, batch: dict[str, Tensor]) -> None:
        assert batch["inputs"].size(1) * sequence_shard(self).size == LENGTH

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.check(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.check(batch)
        return super().validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.check(batch)
        return super().predict_step(batch, batch_idx)


class TransformerBuiltLate(SGDTransformer):
    """Makes its layers in ``configure_model`` or in ``setup``, when the strategy has handed out shards already."""

    late_hook = "configure_model"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kwargs = kwargs
        self.model = None  # type: ignore[assignment]

    def build(self) -> None:
        if self.model is None:
            torch.manual_seed(7)
            self.model = SGDTransformer(**self.kwargs).model

    def configure_model(self) -> None:
        self.build()


def gradient_norms(rank: int, run: Run) -> list[float]:
    norms = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = getattr(trainer.strategy, "gradient_norm", lambda: torch.nn.utils.get_total_norm(grads))()
            norms.append(norm.item())

    trainer = make_trainer(rank, run, callbacks=[Spy()])
    trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    return norms
