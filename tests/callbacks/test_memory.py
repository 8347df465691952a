"""Which memory is logged, of whom and how often."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lss.callbacks import PeakMemoryMonitor
from lightning_lss.callbacks.memory import peak_memory
from tests.training import Run, make_loader, make_module, make_samples, make_trainer


class Logged(CSVLogger):
    """Keeps what is logged about memory, with its step."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.seen: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        memory = {name: value for name, value in metrics.items() if name.startswith("memory/")}
        self.seen += [(step, memory)] if memory else []


def fit_with_known_peaks(rank: int, run: Run, folder: str, most_ranks: int) -> list[tuple[int | None, dict[str, Any]]]:
    """Train while rank r seems to hold r + 1 GiB; return what it logged."""
    logger = Logged(folder)
    trainer = make_trainer(rank, run, logger=logger, callbacks=[PeakMemoryMonitor(most_ranks)], log_every_n_steps=1)
    with mock.patch("lightning_lss.callbacks.memory.peak_memory", return_value=(rank + 1) * 2**30):
        trainer.fit(make_module(run), make_loader(trainer, make_samples(24), 4))
    return logger.seen


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_rank_is_logged_once_a_step(world, tmp_path, accumulated) -> None:
    run = Run(size=2, trainer={"accumulate_grad_batches": accumulated})
    expected = {"memory/peak": 2.0, "memory/rank_0": 1.0, "memory/rank_1": 2.0}
    logged = world.run(2, fit_with_known_peaks, run, str(tmp_path), 64)[0]
    assert logged == [(step, expected) for step in (0, 1, 2)]


def test_of_too_many_ranks_only_the_highest_is_logged(world, tmp_path) -> None:
    logged = world.run(2, fit_with_known_peaks, Run(size=2, steps=1), str(tmp_path), 1)[0]
    assert logged == [(0, {"memory/peak": 2.0})]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_memory_is_what_the_kernel_counts() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmHWM"].split()[0]) * 1024  # the kernel says kB and means KiB
    assert peak_memory(torch.device("cpu")) == pytest.approx(resident, rel=0.05)
