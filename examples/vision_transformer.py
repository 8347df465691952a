"""Train a vision transformer, written for one device, whose patches are split over two.

Run: python examples/vision_transformer.py
"""

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_lss  # noqa: F401  # registers strategy="lss"

SHAPES = ("square", "cross", "circle", "bar")


class VisionTransformer(L.LightningModule):
    def __init__(self, size=32, patch=4, width=48, layers=2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SHAPES)))

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, patches, E]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["images"]), batch["shapes"])

    def predict_step(self, batch, batch_idx):
        return self(batch["images"]).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def draw(count, seed, size=32, extent=13):
    """Draw one shape at a random place of each noisy image."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, extent)], indexing="ij")
    pictures = torch.stack(
        [
            torch.maximum(x.abs(), y.abs()) > 0.7,  # square
            torch.minimum(x.abs(), y.abs()) < 0.2,  # cross
            ((x**2 + y**2).sqrt() - 0.7).abs() < 0.2,  # circle
            y.abs() < 0.3,  # bar
        ]
    ).float()
    samples = []
    for shape in torch.randint(len(SHAPES), (count,), generator=generator):
        image = 0.1 * torch.randn(1, size, size, generator=generator)
        top, left = torch.randint(size - extent, (2,), generator=generator).tolist()
        image[0, top : top + extent, left : left + extent] += pictures[shape]
        samples.append({"images": image, "shapes": shape})
    return samples


if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_epochs=7, **quiet)
    model, unseen = VisionTransformer(), draw(256, seed=2)
    trainer.fit(model, DataLoader(draw(768, seed=1), batch_size=32, shuffle=True))
    predicted = torch.cat(trainer.predict(model, DataLoader(unseen, batch_size=64)))
    if trainer.is_global_zero:
        actual = torch.stack([sample["shapes"] for sample in unseen])
        table = Table("shape", "images", "accuracy", title="Unseen images")
        for index, shape in enumerate(SHAPES):
            right = (predicted == actual)[actual == index]
            table.add_row(shape, str(len(right)), f"{right.float().mean():.0%}")
        Console().print(table)
