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
    trainer = make_trainer(rank, run, max_epochs=2)
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
    """Two losses, two optimizers and a schedule."""

    automatic_optimization = False

    def mix(self, x: Tensor) -> Tensor:
        return x

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for number, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            self.is_second = number == 1
            optimizer.zero_grad()
            self.take_gradients(super().training_step(batch, batch_idx))
            optimizer.step()
            self.lr_schedulers()[number].step()  # type: ignore[index]

    def take_gradients(self, loss: Tensor) -> None:
        self.manual_backward(loss)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (self.embed, self.out)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(x, 1) for x in optimizers]


class ByItself(Manual):
    """Without Lightning's ``manual_backward``."""

    def take_gradients(self, loss: Tensor) -> None:
        loss.backward()


class WithOwnOptimizer(Manual):
    """Whose step Lightning does not see."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
            self.is_second = False
            optimizer.zero_grad()
            self.manual_backward(Right.training_step(self, batch, batch_idx))
            optimizer.step()


class SecondLossIsWrong(Manual, OwnPositions):
    def mix(self, x: Tensor) -> Tensor:
        return OwnPositions.mix(self, x) if self.is_second else x


def train_manually(rank: int, run: Run) -> Any:
    torch.manual_seed(0)
    model = run.module()
    trainer = make_trainer(rank, run, max_epochs=2)
    try:
        trainer.fit(model, DataLoader([make_batch()] * 2, batch_size=None, shuffle=False))
    except InexactError as error:
        return str(error)
    report = trainer.strategy.verification
    rates = [x.scheduler.get_last_lr() for x in trainer.lr_scheduler_configs]
    frozen = [name for name, x in model.named_parameters() if not x.requires_grad]
    tensors = {name: getattr(x, "_local_tensor", x).detach().clone() for name, x in model.named_parameters()}
    return report.exact if report else None, frozen, rates, trainer.global_step, tensors


@pytest.mark.parametrize("sharding", [None, "fsdp"])
@pytest.mark.parametrize("module", [Manual, WithOwnOptimizer])
def test_manual_optimization(world, module, sharding) -> None:
    proved, plain = (
        world.run(
            2, train_manually, Run(size=2, steps=4, module=module, strategy={"sharding": sharding, "verify": verify})
        )
        for verify in (True, False)
    )
    for (exact, *rest, tensors), (_, *expected, others) in zip(proved, plain):
        assert exact
        assert rest == expected
        assert_equal(tensors, others, 0)


def test_backward_passes_without_lightning_leave_no_trace(world) -> None:
    for exact, _, rates, steps, _ in world.run(2, train_manually, Run(size=2, steps=4, module=ByItself)):
        assert exact
        assert steps == 4
        assert rates == [[pytest.approx(1e-3)], [pytest.approx(1e-3)]]


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_every_loss_of_manual_optimization_is_compared(world, sharding) -> None:
    wrong = world.run(
        2, train_manually, Run(size=2, steps=4, module=SecondLossIsWrong, strategy={"sharding": sharding})
    )
    assert all("Positions are counted from 0" in x for x in wrong)


class UnevenLater(Right):
    """Proved again in the midst of an accumulation."""


def train_unevenly(rank: int, run: Run) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, batches = UnevenLater(), [make_batch() for _ in range(4)]
    batches[0]["targets"] = batches[0]["inputs"].roll(-1, 1)
    trainer = make_trainer(rank, run, accumulate_grad_batches=2)
    trainer.fit(model, DataLoader(batches, batch_size=None, shuffle=False))
    return {name: getattr(x, "_local_tensor", x).detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("sharding", [None, "fsdp", "hybrid"])
def test_an_accumulation_goes_on_after_a_proof(world, sharding) -> None:
    proved, plain = (
        world.run(4, train_unevenly, Run(size=2, steps=2, strategy={"sharding": sharding, "verify": verify}))
        for verify in (True, False)
    )
    for tensors, others in zip(proved, plain):
        assert_equal(tensors, others, 0)
