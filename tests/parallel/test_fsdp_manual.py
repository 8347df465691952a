"""Sharded parameters (FSDP) with manual optimization: every pass of a step computes with the weights of the step before."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_lss.testing.compare import assert_equal_on_ranks
from lightning_lss.testing.world import World
from tests.training import KINDS, Run, fit, sharded


class TwoPlayers(pl.LightningModule):
    """Manual optimization with two optimizers in turn, clipping, and a parameter that only one of them may touch."""

    def __init__(self, vocab_size: int, width: int, **_: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, width))
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.bias = nn.Parameter(torch.zeros(width))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(first)
        self.manual_backward(-self.score(batch))
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        for _ in range(2):
            self.manual_backward(self.score(batch) + self.bias.square().sum())
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def score(self, batch: dict[str, Tensor]) -> Tensor:
        return self.second(self.first(batch["inputs"]) + self.bias).square().mean()

    def configure_optimizers(self) -> Any:
        players = ([*self.first.parameters(), self.bias], self.second.parameters())
        return [torch.optim.SGD(player, lr=0.5, momentum=0.9) for player in players]


@pytest.mark.parametrize("units", [None, [nn.Linear]])
@pytest.mark.parametrize("kind", KINDS)
def test_manual_optimization(world: World, kind, units) -> None:
    trainer = {"precision": "64-true"}
    reference = world.run(1, fit, Run(module=TwoPlayers, trainer=trainer, steps=6))[0]
    run = Run(size=2, module=TwoPlayers, trainer=trainer, steps=6, strategy=sharded(kind, sharding_units=units))
    assert_equal_on_ranks(world.run(4, fit, run), reference, 1e-10)


class Decayed(torch.optim.SGD):
    """Changes parameters after the step of the optimizer that it is derived from."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return loss


class StepsOfAllKinds(TwoPlayers):
    """Takes several steps for each batch, and replaces its optimizers between two of them."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.score(batch)
            self.manual_backward(loss)
            return loss

        optimizer: Any = self.optimizers()
        closure()
        optimizer.step()
        closure()
        self.optimizers(use_pl_optimizer=False).step()  # type: ignore[union-attr,call-arg]
        optimizer.step(closure=closure)
        closure()
        optimizer.step()

    def configure_optimizers(self) -> Any:
        torch.optim.SGD(
            [nn.Parameter(torch.zeros(1))]
        )  # from now on torch runs hooks in its step, Decayed's inner one too
        return Decayed(self.parameters(), lr=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_manual_steps_of_all_kinds(world: World, kind) -> None:
    trainer = {"precision": "64-true"}
    reference = world.run(1, fit, Run(module=StepsOfAllKinds, trainer=trainer, steps=12))[0]
    run = Run(size=2, module=StepsOfAllKinds, trainer=trainer, steps=12, strategy=sharded(kind))
    assert_equal_on_ranks(world.run(4, fit, run), reference, 1e-10)
