"""The proof leaves no trace: training is the same to the last bit with and without it."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_lss import InexactError, SegmentPositionalEmbedding
from lightning_lss.testing.compare import assert_equal
from tests.proof.faulty import LENGTH, WIDTH, OwnPositions, Right, make_batch
from tests.training import Run, make_trainer


class Stateful(Right):
    """Everything that a step can change beside gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SegmentPositionalEmbedding(LENGTH, WIDTH)
        self.dropout, self.metric = nn.Dropout(0.1), MeanMetric()
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.student = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.losses: list[Tensor] = []
        self.seen: Counter[str] = Counter()
        self.steps, self.generator, self.numbers = 0, torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.hooked: list[int] = []
        self.out.register_forward_hook(lambda *_: self.hooked.append(1))

    def mix(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
            self.mean += 0.01
        noise = torch.rand((), generator=self.generator) + self.numbers.random() + random.random() + torch.rand(())
        return self.dropout(x + self.table(x.size(1)) + self.student(x) + self.teacher(x) + self.mean) + 0.01 * noise

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        self.metric.update(loss.detach())
        self.seen["batches"] += 1
        self.steps += 1
        self.log("loss", loss.detach())
        return loss


def state_after(rank: int, run: Run, verify: bool) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    random.seed(0)
    model = Stateful()
    run.strategy["verify"] = verify
    trainer = make_trainer(rank, run)
    trainer.fit(model, DataLoader([make_batch()] * run.steps, batch_size=None, shuffle=False))
    assert (trainer.strategy.verification is not None and trainer.strategy.verification.exact) == verify
    tensors = {name: getattr(x, "_local_tensor", x).detach().clone() for name, x in model.state_dict().items()}
    tensors |= {"metric": model.metric.compute(), "losses": torch.stack(model.losses), "random": torch.rand(3)}
    tensors["generator"] = torch.rand(3, generator=model.generator)
    tensors["logged"] = trainer.callback_metrics["loss"]
    return tensors, (model.steps, model.seen, len(model.hooked), model.numbers.random(), random.random())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": {"sharding": "fsdp"}},
        {"trainer": {"accumulate_grad_batches": 2}},
        {"trainer": {"precision": "16-mixed"}},
    ],
    ids=str,
)
def test_training_is_the_same_to_the_last_bit(world, options) -> None:
    with_proof, without = (
        world.run(2, state_after, Run(**{"size": 2, "steps": 2, **options}), verify) for verify in (True, False)
    )
    for (proved, counted), (expected, also_counted) in zip(with_proof, without):
        assert_equal(proved, expected, 0)
        assert counted == also_counted


class Manual(Right):
    """Two optimizers, and two backward passes a step, of which the first is compared."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(x.parameters(), lr=0.1) for x in (self.embed, self.out)]


class ManuallyWrong(Manual, OwnPositions):
    pass


def train_manually(rank: int, run: Run) -> Any:
    torch.manual_seed(0)
    model = run.module()
    trainer = make_trainer(rank, run)
    try:
        trainer.fit(model, DataLoader([make_batch()] * 2, batch_size=None, shuffle=False))
    except InexactError as error:
        return str(error)
    report = trainer.strategy.verification
    frozen = [name for name, x in model.named_parameters() if not x.requires_grad]
    tensors = {name: getattr(x, "_local_tensor", x).detach().clone() for name, x in model.named_parameters()}
    return report.exact if report else None, frozen, trainer.global_step, tensors


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_manual_optimization(world, sharding) -> None:
    proved, plain = (
        world.run(
            2, train_manually, Run(size=2, steps=4, module=Manual, strategy={"sharding": sharding, "verify": verify})
        )
        for verify in (True, False)
    )
    for (exact, *rest, tensors), (_, *expected, others) in zip(proved, plain):
        assert exact
        assert rest == expected
        assert_equal(tensors, others, 0)
    wrong = world.run(2, train_manually, Run(size=2, steps=4, module=ManuallyWrong, strategy={"sharding": sharding}))
    assert all("Positions are counted from 0" in x for x in wrong)
