"""The LightningModule: its loss, metrics, optimizer and schedule."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_lss import AttentionMask, LSSTransformer
from tests.training import LENGTH, VOCAB, make_samples

SIZES = {"vocab_size": VOCAB, "seq_len": LENGTH, "width": 16, "num_layers": 1, "num_heads": 2}


def trainer_for(steps: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def test_loss_is_the_mean_cross_entropy_of_the_tokens_that_count() -> None:
    module = LSSTransformer(**SIZES)
    batch = default_collate(make_samples(4))
    loss_sum, count = module._loss(batch)
    expected = F.cross_entropy(module(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())
    torch.testing.assert_close(loss_sum / count, expected)


class Colder(LSSTransformer):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(tokens) * 2
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_a_subclass_may_make_its_own_logits() -> None:
    module, batch = Colder(**SIZES), default_collate(make_samples(4))
    expected = F.cross_entropy(module(batch["inputs"]).flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(module._loss(batch)[0], expected)


def test_validation_metrics_are_exact_over_uneven_batches() -> None:
    module = LSSTransformer(**SIZES, bytes_per_token=2.0)
    samples = make_samples(5)
    metrics = trainer_for(1).validate(module, DataLoader(samples, batch_size=2), verbose=False)[0]
    with torch.no_grad():
        loss_sum, count = module._loss(default_collate(samples))
    assert metrics["val/loss"] == pytest.approx((loss_sum / count).item(), rel=1e-6)
    assert metrics["val/bits_per_byte"] == pytest.approx((loss_sum / count / 2 / math.log(2)).item(), rel=1e-6)


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    class Spy(pl.Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    spy, trainer = Spy(), trainer_for(20)
    trainer.callbacks.append(spy)  # type: ignore[attr-defined]
    trainer.fit(LSSTransformer(**SIZES, lr=1.0, min_lr=0.1, warmup_steps=4), DataLoader(make_samples(20)))
    assert spy.rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert spy.rates[12] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way between step 4 and step 20
    assert spy.rates[-1] < 0.12
    assert spy.rates[4:] == sorted(spy.rates[4:], reverse=True)


def test_hyperparameters_are_plain_values() -> None:
    module = LSSTransformer(**SIZES, betas=(0.8, 0.9))
    assert module.hparams["betas"] == (0.8, 0.9)
    assert LSSTransformer(**module.hparams).model.config == module.model.config


def test_flops_of_a_batch_are_shared_out() -> None:
    module = LSSTransformer(**SIZES)
    module.training_step(default_collate(make_samples(2)), 0)
    assert module.flops_per_batch == module.model.config.training_flops(2, LENGTH)


def test_flops_are_those_of_the_pairs_that_rows_and_heads_see() -> None:
    ids = torch.stack([torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH)])
    module = LSSTransformer(**SIZES)
    documents, function = AttentionMask.documents(ids), AttentionMask.from_function(lambda b, h, q, k: b == 0)
    for mask, pairs in ((documents, (LENGTH**2 + LENGTH) / 2), (function, LENGTH**2 / 2)):
        module.training_step({**default_collate(make_samples(2)), "mask": mask}, 0)
        assert module.flops_per_batch == pytest.approx(module.model.config.training_flops(2, LENGTH, pairs))
    of_heads = AttentionMask.from_function(lambda b, h, q, k: (h > 0) | (k == q))  # a pair is computed for all heads
    module.training_step({**default_collate(make_samples(2)), "mask": of_heads}, 0)
    assert module.flops_per_batch == module.model.config.training_flops(2, LENGTH, LENGTH**2)


class WithOwnArgument(LSSTransformer):
    def __init__(self, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature


def test_arguments_of_a_subclass_are_hyperparameters() -> None:
    module = WithOwnArgument(temperature=2.0, **SIZES)
    assert module.hparams["temperature"] == 2.0
    assert WithOwnArgument(**module.hparams).temperature == 2.0
    assert {"config", "optimizer", "execution"}.isdisjoint(module.hparams)
