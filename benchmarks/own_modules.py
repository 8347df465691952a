"""Two LightningModules as users write them; the planner knows neither."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import LSSAttention, RotaryEmbedding, SegmentPositionalEmbedding, sequence_shard, token_mean

Batch = dict[str, Tensor]


class ByteModel(pl.LightningModule):
    """The model of ``examples/own_module.py``, with several layers."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.out = nn.Embedding(256, width), nn.Linear(width, 256)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.rotary = RotaryEmbedding(width // heads)
        self.attention = LSSAttention(causal=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy over the tokens of all ranks."""
        x = self.embed(batch["inputs"])  # [B, l, E]
        for layer in self.qkv:
            q, k, v = layer(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.attention(self.rotary(q), self.rotary(k), v).transpose(1, 2).flatten(2)
        logits, targets = self.out(x).flatten(0, 1), batch["targets"].flatten()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return token_mean(loss, targets.numel())

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class GPTBlock(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = LSSAttention(causal=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, l, E] to [B, l, E]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        x = x + self.dropout(self.c_proj(self.attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(pl.LightningModule):
    """GPT-2 in the manner of nanoGPT: a learned table of positions, tied embeddings, a log and a schedule. Its batch is
    a pair of tokens and targets."""

    def __init__(self, num_positions: int, width: int = 256, heads: int = 4, layers: int = 6) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(512, width), SegmentPositionalEmbedding(num_positions, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, 0.1) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 512, bias=False)
        self.lm_head.weight = self.wte.weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy over the tokens of all ranks."""
        tokens, targets = batch
        x = self.wte(tokens) + self.wpe(tokens.size(1))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        self.log("segment", float(sequence_shard(self).rank))
        mean = token_mean(loss, targets.numel())
        self.log("loss", mean, prog_bar=True, sync_dist=True)
        return mean

    def configure_optimizers(self) -> Any:
        """Return AdamW with a cosine over the steps of the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]
