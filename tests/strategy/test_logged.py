"""What is logged of a step, and what callbacks and schedulers see of it, is the loss of the whole sequence."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_lss.testing.collectives import CollectiveCounter
from lightning_lss.testing.compare import assert_equal
from lightning_lss.testing.world import WorkerError, World
from tests.modules import OwnModule
from tests.training import Run, epochs, make_loader, make_module, make_samples, make_trainer, whole_state

FLOAT64 = {"precision": "64-true"}


class Logs(OwnModule):
    """Logs as users do, with a schedule that follows what is logged."""

    lr = 0.5

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"half": loss.item() / 2, "single": loss[None].float()})
        self.log("tokens", (batch["targets"] >= 0).sum().double(), reduce_fx="sum", on_step=True, on_epoch=True)
        return {"loss": loss, "extra": "kept"}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", super().training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.01)
        options = {"scheduler": schedule, "interval": "step", "monitor": "train_loss_step"}
        return {"optimizer": optimizer, "lr_scheduler": options}


class Seen(EarlyStopping):
    """Writes down what callbacks see, in order."""

    def __init__(self) -> None:
        super().__init__("val_loss", patience=100)
        self.seen: list[float] = []

    def see(self, trainer: pl.Trainer, *values: Any) -> None:
        metrics = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.seen += [float(x) for x in (*values, *rates, *(metrics[name] for name in sorted(metrics)))]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        assert outputs.get("extra", "kept") == "kept"
        self.see(trainer, outputs["loss"])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.see(trainer, outputs)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.see(trainer, self.best_score)


def fit_and_see(rank: int, run: Run, evaluate: bool) -> tuple[Tensor, dict[str, Tensor]]:
    seen = Seen()
    if not evaluate:
        run.trainer["limit_val_batches"] = 0
        seen._run_early_stopping_check = lambda trainer: setattr(seen, "best_score", torch.tensor(0.0))  # type: ignore[method-assign]
    module, trainer = make_module(run), make_trainer(rank, run, callbacks=[seen])
    loader = make_loader(trainer, make_samples(run.samples), 4 * run.size // trainer.world_size)
    trainer.fit(module, loader, loader)
    if evaluate:
        seen.seen.append(trainer.test(module, loader, verbose=False)[0]["test_loss"])
    return torch.tensor(seen.seen, dtype=torch.float64), whole_state(module)


@pytest.mark.parametrize("sharding", [None, "fsdp"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (2, 2), (4, 1)])
def test_callbacks_and_schedulers_see_the_loss_of_the_whole(world: World, ranks, accumulate, sharding) -> None:
    run = epochs(3, module=Logs)
    run.trainer |= {**FLOAT64, "accumulate_grad_batches": accumulate}
    evaluate = ranks == 2  # data replicas have validation losses of their own
    ((expected, weights),) = world.run(1, fit_and_see, run, evaluate)
    run.size, run.strategy = 2, {"sharding": sharding, "check_batches": 0}
    for seen, state in world.run(ranks, fit_and_see, run, evaluate):
        assert_equal([seen], [expected], 1e-7)  # one value is logged in float32
        assert_equal(state, weights, 1e-10)
    rates = {x.item() for x in expected} & {0.5 / 2**i for i in range(1, 8)}
    assert rates  # the schedule has lowered them


def find_rate(rank: int, run: Run, folder: str) -> tuple[float, Tensor]:
    module, trainer = make_module(run), make_trainer(rank, run, default_root_dir=folder)
    samples = make_samples(run.samples)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)
    found = Tuner(trainer).lr_find(module, make_loader(trainer, samples, 4), min_lr=1e-3, max_lr=10.0, num_training=16)
    return found.suggestion(skip_begin=2), torch.tensor(found.results["loss"], dtype=torch.float64)


def test_the_learning_rate_finder_sees_the_loss_of_the_whole(world: World, tmp_path) -> None:
    run = Run(module=Logs, trainer=FLOAT64)
    ((suggestion, losses),) = world.run(1, find_rate, run, str(tmp_path))
    run.size = 2
    for own_suggestion, own_losses in world.run(2, find_rate, run, str(tmp_path)):
        assert own_suggestion == suggestion
        assert_equal([own_losses], [losses], 1e-10)


def scale_batch_size(rank: int, run: Run) -> int:
    module, trainer = make_module(run), make_trainer(rank, run)
    with CollectiveCounter() as counter, pytest.raises(ValueError, match="not supported with distributed strategies"):
        Tuner(trainer).scale_batch_size(module, make_loader(trainer, make_samples(8), 2))
    return counter.tally.total() + trainer.global_step


def test_batch_sizes_are_not_tuned(world: World) -> None:
    assert world.run(2, scale_batch_size, Run(size=2, module=Logs)) == [0, 0]


class LogsByRank(Logs):
    """One rank logs more than others, and logs more than one collective takes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        if self.global_rank == 0:
            self.log("mine", 1.0)
        self.log("after", 5.0 + self.global_rank)
        for index in range(40):
            self.log(f"more/{index}", 0.0)
        return output


class ByHand(Logs):
    """Manual optimization, whose step returns nothing; a hook in the midst of it logs under its own name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("after", 5.0 + self.global_rank)


def logged(rank: int, run: Run) -> tuple[dict[str, float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, trainer = make_module(run), make_trainer(rank, run)
        trainer.fit(module, make_loader(trainer, make_samples(run.samples), 4))
    assert "log" not in vars(module)
    return {name: float(x) for name, x in trainer.callback_metrics.items()}, [str(x.message) for x in caught]


@pytest.mark.parametrize("module", [LogsByRank, ByHand])
def test_ranks_may_log_different_things_and_steps_return_nothing(world: World, module) -> None:
    run = Run(module=module, trainer=FLOAT64)
    ((expected, _),) = world.run(1, logged, run)
    run.size = 2
    for rank, (metrics, messages) in enumerate(world.run(2, logged, run)):
        for name in ("train_loss_step", "half", "tokens_step"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-10)
        assert metrics["after"] == 5.0 + rank
        if module is LogsByRank and rank == 0:
            assert any("Ranks logged different values" in message for message in messages)
            assert any("logs more than 41 values" in message for message in messages)


class LogsTwoElements(Logs):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.log("two", torch.ones(2))


def test_lightning_checks_what_is_logged(world: World) -> None:
    with pytest.raises(WorkerError, match="the tensor must have a single element"):
        world.run(2, logged, Run(size=2, module=LogsTwoElements, strategy={"verify": False}))
