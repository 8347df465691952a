"""What callbacks log, and the picture of the tiles."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.callbacks import GradientNormMonitor, LSSThroughputMonitor, PeakMemoryMonitor, RunLayout
from lightning_lss.callbacks.memory import peak_memory
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles
from tests.training import LENGTH, VOCAB, Run, make_loader, make_module, make_samples, make_trainer


class Logged(CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.seen: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.seen.setdefault(name, []).append(float(value))


def fit_and_log(rank: int, run: Run, folder: str) -> dict[str, list[float]]:
    logger = Logged(folder)
    callbacks: list[pl.Callback] = [GradientNormMonitor(), PeakMemoryMonitor(), RunLayout(), LSSThroughputMonitor(2)]
    trainer = make_trainer(rank, run, logger=logger, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    return logger.seen


@pytest.mark.parametrize("strategy", [{}, {"megatron": True}], ids=["lss", "megatron"])
def test_a_run_over_two_ranks_logs_what_one_process_logs(world, tmp_path, strategy) -> None:
    reference = world.run(1, fit_and_log, Run(), str(tmp_path))[0]
    ours = world.run(2, fit_and_log, Run(size=2, strategy=strategy), str(tmp_path))[0]
    for name in ("train/loss", "train/bits_per_byte", "train/gradient_norm"):
        assert len(ours[name]) == 3
        assert ours[name] == pytest.approx(reference[name], rel=1e-4), name
    assert min(ours["memory/rank_0"] + ours["memory/rank_1"]) > 0.05  # GiB
    assert ours["memory/peak"][-1] == max(ours["memory/rank_0"][-1], ours["memory/rank_1"][-1])
    assert "memory/rank_0" not in reference
    assert {"train/tokens_per_sec", "train/device/flops_per_sec"} <= ours.keys() & reference.keys()


class Steps(CSVLogger):
    """Keeps at which steps each metric is logged."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.seen: dict[str, list[int | None]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name in metrics:
            self.seen.setdefault(name, []).append(step)


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 3]), (0, [])])
def test_what_callbacks_log_stands_beside_what_lightning_logs(world, tmp_path, every, steps) -> None:
    """At the same steps, so that curves can be read together; with 0 nothing is logged."""
    seen = world.run(1, log_steps, str(tmp_path), every)[0]
    for name in ("train/loss", "train/gradient_norm", "memory/peak"):
        assert seen.get(name, []) == steps, name


def log_steps(rank: int, folder: str, every: int) -> dict[str, list[int | None]]:
    run, logger = Run(steps=5), Steps(folder)
    callbacks: list[pl.Callback] = [GradientNormMonitor(), PeakMemoryMonitor()]
    trainer = make_trainer(rank, run, logger=logger, callbacks=callbacks, log_every_n_steps=every)
    trainer.fit(make_module(run), make_loader(trainer, make_samples(20), 4))
    return logger.seen


class ForOneDevice(pl.LightningModule):
    flops_per_batch = None

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 4)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.embed(batch["inputs"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens_and_samples(rank: int, size: int, folder: str) -> list[float]:
    logger, run = Logged(folder), Run(size)
    trainer = make_trainer(rank, run, logger=logger, callbacks=[LSSThroughputMonitor(2)], log_every_n_steps=1)
    trainer.fit(ForOneDevice(), make_loader(trainer, make_samples(16), 4))
    tokens, samples = (logger.seen.get(f"train/{name}_per_sec", []) for name in ("tokens", "samples"))
    return [a / b for a, b in zip(tokens, samples)]  # of rank 0, which logs


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_are_counted_once_where_each_rank_is_shown_all(world, tmp_path, size) -> None:
    found = world.run(2, tokens_and_samples, size, str(tmp_path))[0]
    assert found == pytest.approx([LENGTH] * len(found))
    assert found


def test_peak_memory_never_falls() -> None:
    before = peak_memory(torch.device("cpu"))
    torch.ones(2**24).sum()
    assert peak_memory(torch.device("cpu")) >= before > 2**20


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_picture_covers_the_visible_pairs_once(size, layout, causal) -> None:
    length = 24
    axes = Figure().subplots()
    mask = AttentionMask.causal() if causal else AttentionMask.full()
    draw_attention_tiles(axes, mask, length, SequenceShard(0, size, layout), "")
    areas = [_area(patch.get_xy()[:-1]) for patch in axes.patches]
    assert sum(areas) == pytest.approx(length**2 / 2 if causal else length**2)
    shares = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(shares) == size
    if layout == "zigzag" or not causal:
        assert {share.split(": ")[1] for share in shares} == {f"{100 / size:.1f} %"}


def _area(corners: Any) -> float:
    """Of a polygon, by the shoelace formula."""
    x, y = torch.tensor(corners, dtype=torch.float64).T
    return (0.5 * (x * y.roll(-1) - x.roll(-1) * y).sum().abs()).item()
