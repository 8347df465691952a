"""Forecast time series with torch's own encoder, written for one device, over series that are split over two.

Run: python examples/time_series.py
"""

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_lss  # noqa: F401  # registers strategy="lss"

LENGTH, HORIZON = 192, 48  # hours; the last two days are to be forecast


class Forecaster(L.LightningModule):
    def __init__(self, width=32, layers=1):
        super().__init__()
        self.embed, self.out = nn.Linear(2, width), nn.Linear(width, 1)
        self.positions = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, series):
        hours = torch.arange(series.size(1), device=series.device)
        known = (hours < len(hours) - HORIZON).expand_as(series)
        x = torch.stack([series * known, known.to(series.dtype)], dim=-1)  # [B, L, 2]
        x = self.embed(x) + self.positions(hours)
        return self.out(self.encoder(x)).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch["series"]), batch["series"])

    def predict_step(self, batch, batch_idx):
        return self(batch["series"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=6e-3)


def make_series(count, seed, length=LENGTH):
    """Add up a daily and a weekly wave of random heights and phases, and noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(length)
    height, phase = torch.rand(2, count, 2, 1, generator=generator)
    waves = (0.5 + height) * torch.sin(2 * torch.pi * (time / torch.tensor([[24.0], [168.0]]) + phase))
    noise = 0.1 * torch.randn(count, length, generator=generator)
    return [{"series": x} for x in waves.sum(1) + noise]


def draw(series, forecast, path):
    """Draw series [B, L] and their forecasts [B, L] to a file."""
    figure = Figure(figsize=(9, 2.2 * len(series)), layout="constrained")
    for axes, actual, predicted in zip(figure.subplots(len(series), sharex=True), series, forecast):
        start = len(actual) - HORIZON
        axes.plot(actual, color="0.6", label="series")
        axes.plot(range(start, len(actual)), predicted[start:], color="C1", label="forecast")
        axes.axvline(start, color="0.3", linestyle=":", label="start of the forecast")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel("hour")
    figure.supylabel("value")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_epochs=9, **quiet)
    model, unseen = Forecaster(), make_series(64, seed=2)
    trainer.fit(model, DataLoader(make_series(512, seed=1), batch_size=16, shuffle=True))
    forecast = torch.cat(trainer.predict(model, DataLoader(unseen, batch_size=16)))
    if trainer.is_global_zero:
        series = torch.stack([sample["series"] for sample in unseen])
        error = (forecast - series)[:, -HORIZON:].square().mean().sqrt()
        print(f"error of the forecasts (root mean square): {error:.2f}; the noise alone is 0.10")
        draw(series[:3], forecast[:3], "forecast.png")
        print("saved: forecast.png")
