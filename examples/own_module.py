"""Train your own LightningModule on long sequences. LSS needs only the numbered lines.

Run: python examples/own_module.py
"""

from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lss import LSSAttention, RotaryEmbedding, token_mean  # 1. the import registers strategy="lss"


class ByteModel(L.LightningModule):
    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.embed, self.qkv, self.out = nn.Embedding(256, width), nn.Linear(width, 3 * width), nn.Linear(width, 256)
        self.rotary = RotaryEmbedding(width // heads)  # 2. positions of the whole sequence, not of the segment
        self.attention = LSSAttention(causal=True)  # 3. attention that sees the whole sequence

    def training_step(self, batch, batch_idx):
        x = self.embed(batch["inputs"])  # [batch, length / ranks, width]: this rank's segment
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.attention(self.rotary(q), self.rotary(k), v).transpose(1, 2).flatten(2)
        logits, targets = self.out(x + y).flatten(0, 1), batch["targets"].flatten()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return token_mean(loss, targets.numel())  # 4. the mean over the tokens of all ranks

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    text = torch.tensor(list(Path(__file__).read_bytes()))
    samples = [{"inputs": text[i : i + 512], "targets": text[i + 1 : i + 513]} for i in range(0, 1024, 16)]
    quiet = dict(logger=False, enable_checkpointing=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_epochs=1, **quiet)
    trainer.fit(ByteModel(), DataLoader(samples, batch_size=4))
