"""Predictions on disk, once for each sequence group."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lightning_lss.sequence.segment import place_of


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned on the first rank of each sequence group to ``predictions-<data rank>.pt``.

    The file holds a dict of what Lightning passes on: ``"predictions"`` is a list of batches (of several loaders, a
    list of such lists), ``"indices"`` lists for each loader, batch by batch, the samples' places in the dataset. It is
    written to ``folder``, the first rank's if ranks name different ones.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # a name with the time in it differs by rank

    @override
    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        if place_of(pl_module).rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            rank = getattr(trainer.strategy, "data_rank", trainer.global_rank)
            torch.save({"predictions": predictions, "indices": batch_indices}, self.folder / f"predictions-{rank}.pt")
