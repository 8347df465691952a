"""Train a LightningModule as it is: nothing in it knows of a split sequence.

Run: python examples/as_it_is.py
"""

from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_lss  # noqa: F401  # registers strategy="lss"


class ByteModel(L.LightningModule):
    def __init__(self, width=64, heads=4, longest=1024):
        super().__init__()
        self.embed, self.positions = nn.Embedding(256, width), nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.out = nn.Linear(width, 256)

    def training_step(self, tokens, batch_idx):  # [batch, length]: the whole sequence, of which a rank holds a segment
        length = tokens.size(1)
        x = self.embed(tokens) + self.positions(torch.arange(length, device=self.device))
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=self.device)
        logits = self.out(self.encoder(x, mask=causal, is_causal=True))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    text = torch.tensor(list(Path(__file__).read_bytes()))
    samples = [text[i : i + 512] for i in range(0, 1024, 16)]
    quiet = dict(logger=False, enable_checkpointing=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_epochs=1, **quiet)
    trainer.fit(ByteModel(), DataLoader(samples, batch_size=4))
