"""Modules of users, small enough to be traced in a moment."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import LSSAttention, LSSTransformer, SegmentDropout, SegmentPositionalEmbedding, token_mean
from lightning_lss.planner import Hardware, Link

DEVICE = Hardware(
    "device",
    8e9,
    1e12,
    {"float32": 1e13, "bfloat16": 1e14},
    Link(1e11, 1e-6),
    Link(1e10, 1e-5),
    4,
    matmul=0.5,
    attention=0.25,
)


def transformer(**options: Any) -> LSSTransformer:
    sizes = {"vocab_size": 64, "width": 64, "num_layers": 2, "num_heads": 4, "positions": "rotary", **options}
    return LSSTransformer(**sizes)


def batch_of(length: int = 64, size: int = 1) -> dict[str, Tensor]:
    return {key: torch.zeros(size, length, dtype=torch.int64) for key in ("inputs", "targets")}


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.attention, self.dropout = LSSAttention(), SegmentDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.dropout(self.attention(q, k, v).transpose(1, 2).flatten(2))


class OwnModule(pl.LightningModule):
    """A table of positions, dropout, a log, a schedule that asks the trainer, and a batch that is a pair."""

    def __init__(self, num_positions: int = 64, width: int = 32, layers: int = 5) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(64, width), SegmentPositionalEmbedding(num_positions, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 64)
        self.head.weight = self.embedding.weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        tokens, targets = batch
        x = self.embedding(tokens) + self.positions(tokens.size(1))
        for layer in self.layers:
            x = layer(x)
        loss = F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), reduction="sum")
        self.log("loss", loss, sync_dist=True)
        return {"loss": token_mean(loss, targets.numel())}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        ]


def pair_of(length: int = 64, size: int = 1) -> tuple[Tensor, Tensor]:
    return tuple(batch_of(length, size).values())  # type: ignore[return-value]
