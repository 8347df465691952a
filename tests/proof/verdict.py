"""What the proof of a run says of a module."""

import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_lss import InexactError
from tests.proof.faulty import make_batch
from tests.training import Run, make_trainer


def verdict(rank: int, module: type[pl.LightningModule], run: Run, length: int = 16) -> str:
    """Train; return what refused the run, and check that nothing was trained."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, trainer = module(), make_trainer(rank, run)
    before = [x.detach().clone() for x in model.parameters()]
    try:
        trainer.fit(model, DataLoader([make_batch(length)] * run.steps, batch_size=None, shuffle=False))
    except InexactError as error:
        assert trainer.global_step == 0
        same = (torch.equal(x, y) for x, y in zip(before, model.parameters()))
        assert run.strategy.get("sharding") or all(same)
        return str(error)
    report = trainer.strategy.verification
    return "" if report is not None and report.exact else f"not proved: {report}"
