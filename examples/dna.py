"""Find motifs in DNA with convolutions and attention, written for one device, on sequences that are split over two.

Run: python examples/dna.py
"""

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_lss  # noqa: F401  # registers strategy="lss"

PROMOTER, ENHANCER = "TATAAAGC", "GGCATTCC"


class DNAModel(L.LightningModule):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(4, width)
        self.before, self.after = (nn.Conv1d(width, width, 9, padding="same") for _ in range(2))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 1)

    def forward(self, bases):
        x = self.embed(bases)  # [B, L, E]
        x = x + F.gelu(self.before(x.transpose(1, 2))).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.gelu(self.after(x.transpose(1, 2))).transpose(1, 2)
        return self.out(x).squeeze(-1)  # [B, L]

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch["bases"]), batch["active"])

    def predict_step(self, batch, batch_idx):
        return self(batch["bases"]).sigmoid()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_sequences(count, seed, length=192):
    """Plant two promoters in each sequence; they are active where it has enhancers too, however far away."""
    generator = torch.Generator().manual_seed(seed)
    promoter, enhancer = (torch.tensor(["ACGT".index(base) for base in motif]) for motif in (PROMOTER, ENHANCER))
    samples = []
    for number in range(count):
        bases, active = torch.randint(4, (length,), generator=generator), torch.zeros(length)
        places = 16 * torch.randperm(length // 16, generator=generator)[:6]
        for place in places[2:] if number % 2 else ():
            bases[place : place + 8] = enhancer
        for place in places[:2]:
            bases[place : place + 8] = promoter
            active[place : place + 8] = number % 2
        samples.append({"bases": bases, "active": active, "places": places[:2]})
    return samples


if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_epochs=6, **quiet)
    model, unseen = DNAModel(), make_sequences(128, seed=2)
    trainer.fit(model, DataLoader(make_sequences(512, seed=1), batch_size=16, shuffle=True))
    predicted = torch.cat(trainer.predict(model, DataLoader(unseen, batch_size=32)))
    if trainer.is_global_zero:
        promoters = torch.zeros_like(predicted, dtype=torch.bool)
        for row, sample in zip(promoters, unseen):
            row[(sample["places"][:, None] + torch.arange(8)).flatten()] = True
        enhanced = (torch.arange(len(unseen)) % 2 == 1)[:, None]
        table = Table("position", "should be", "is", title="Mean probability of an active promoter")
        table.add_row("promoter, with enhancers", "1", f"{predicted[promoters & enhanced].mean():.2f}")
        table.add_row("promoter, without", "0", f"{predicted[promoters & ~enhanced].mean():.2f}")
        table.add_row("elsewhere", "0", f"{predicted[~promoters].mean():.2f}")
        Console().print(table)
