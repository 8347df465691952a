"""A Trainer can be copied after a run, though process groups and sharded modules cannot."""

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision

from lightning_lss.testing.compare import assert_equal
from tests.training import (
    AdamTransformer,
    Run,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    sharded,
    whole_state,
)


def copy_after_a_run(rank: int, run: Run) -> list[float]:
    """Fit, copy the Trainer, and validate with the original, its copy, and the original again."""
    module = make_module(run)
    trainer = make_trainer(rank, run, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    loader = make_loader(trainer, make_samples(8), 2)
    trainer.fit(module, loader)
    twin = copy.deepcopy(trainer)
    shared = twin.lightning_module is trainer.lightning_module
    assert shared == ("sharding" in run.strategy)
    assert twin.precision_plugin.scaler.get_scale() == trainer.precision_plugin.scaler.get_scale()
    models = [module, twin.lightning_module, module]
    return [
        one.validate(model, loader, verbose=False)[0]["val/loss"]
        for one, model in zip((trainer, twin, trainer), models)
    ]


@pytest.mark.parametrize("strategy", [{}, sharded("fsdp")], ids=["lss", "lss_fsdp"])
def test_a_trainer_and_its_copy_go_on(world, strategy) -> None:
    for first, copied, again in world.run(
        2, copy_after_a_run, Run(2, module=AdamTransformer, steps=2, strategy=strategy)
    ):
        assert first == copied == again


def copy_module(rank: int, run: Run) -> Any:
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, make_samples(8), 2))
    try:
        assert_equal(whole_state(copy.deepcopy(module)), whole_state(module), 0)
    except MisconfigurationException as error:
        return str(error)
    return None


def test_a_module_is_copied_or_says_why_not(world) -> None:
    assert world.run(2, copy_module, Run(2, steps=1)) == [None, None]
    for message in world.run(2, copy_module, Run(2, steps=1, strategy=sharded("fsdp"))):
        assert "Save a checkpoint" in message
