"""What callbacks write, as values: when memory is logged, what the run's layout says, who writes predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_lss.callbacks import PeakMemoryMonitor, PredictionWriter, RunLayout
from lightning_lss.testing.collectives import CollectiveCounter
from tests.training import Run, make_loader, make_module, make_samples, make_trainer


class Steps(CSVLogger):
    """Keeps the steps at which memory was logged."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "memory/peak" in metrics:
            self.seen = [*getattr(self, "seen", []), step]


def steps_with_memory(rank: int, run: Run, folder: str, every: int) -> list[int | None]:
    logger = Steps(folder)
    trainer = make_trainer(rank, run, logger=logger, callbacks=[PeakMemoryMonitor()], log_every_n_steps=every)
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), 2))
    return logger.seen


def test_memory_is_logged_once_a_step_while_gradients_accumulate(world, tmp_path) -> None:
    run = Run(size=2, steps=4, trainer={"accumulate_grad_batches": 3})
    for every, steps in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])):
        (seen, _) = world.run(2, steps_with_memory, run, str(tmp_path), every)
        assert seen[-len(steps) + 1 :] == steps[1:]
        assert len(seen) == len(set(seen))


def layout_and_bytes(rank: int, run: Run, folder: str) -> int:
    """Bytes that this rank received while it computed the first loss."""
    trainer = make_trainer(rank, run, logger=TensorBoardLogger(folder, "", ""), callbacks=[RunLayout()])
    module = make_module(run)
    counter = CollectiveCounter()
    step = module.training_step

    def counted(*args: Any) -> Tensor:
        with counter:
            return step(*args)

    module.training_step = counted
    trainer.fit(
        module, make_loader(trainer, make_samples(run.samples), run.global_batch * run.size // trainer.world_size)
    )
    return sum(x.received * number for x, number in counter.tally.items() if x.received > 64)


@pytest.mark.parametrize(
    ("ranks", "run"),
    [
        (2, Run(size=2, steps=1, model={"keep_gathered": True})),
        (4, Run(size=4, steps=1, model={"num_kv_heads": 1})),
        (4, Run(size=2, steps=1, model={"keep_gathered": True})),
        (2, Run(size=2, steps=1, strategy={"megatron": True}, model={"num_kv_heads": 2})),
    ],
)
def test_the_runs_layout_says_what_is_sent(world, tmp_path, ranks, run) -> None:
    received = world.run(ranks, layout_and_bytes, run, str(tmp_path))[0]
    rows = table_of(tmp_path)
    assert rows["processes W = D x S"] == f"{ranks} = {ranks // run.size} x {run.size}"
    assert rows["sequence length L"] == "16"
    assert rows["segment length l = L / S"] == str(16 // run.size)
    assert rows["batch per sequence group"] == str(run.global_batch * run.size // ranks)
    assert rows["bytes received per layer and rank, forward"] == f"{received // 2:,}"  # of two layers


def table_of(folder: Path) -> dict[str, str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    text = events.Tensors("run layout/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return dict(rows)


def predict(rank: int, run: Run, folder: str) -> None:
    trainer = make_trainer(rank, run, callbacks=[PredictionWriter(folder)])
    trainer.predict(make_module(run), make_loader(trainer, make_samples(8), 2), return_predictions=False)


def test_every_sequence_group_writes_its_own_predictions(world, tmp_path) -> None:
    for ranks, size in ((1, 1), (4, 2)):
        world.run(ranks, predict, Run(size=size, model={"positions": "rotary"}), str(tmp_path / str(ranks)))
    (whole,) = (torch.load(file) for file in (tmp_path / "1").iterdir())
    expected = torch.cat(whole["predictions"])
    files = sorted((tmp_path / "4").iterdir())
    assert [file.name for file in files] == ["predictions-0.pt", "predictions-1.pt"]
    for replica, file in enumerate(files):  # samples 0, 2, 4, 6 and 1, 3, 5, 7
        assert torch.equal(torch.cat(torch.load(file)["predictions"]), expected[replica::2])
