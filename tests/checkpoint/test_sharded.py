"""Checkpoints of sharded models, as files and as folders, on other grids than they were saved on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lss import LSSTransformer
from lightning_lss.checkpoint import consolidate
from lightning_lss.checkpoint.folder import is_folder
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import World
from tests.training import (
    KINDS,
    AdamTransformer,
    Run,
    SGDTransformer,
    epochs,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    moments,
    sharded,
    whole_state,
)

GRIDS: list[tuple[int, int, str, str | None]] = [
    (1, 1, "zigzag", None),
    (4, 1, "zigzag", "fsdp"),
    (4, 2, "contiguous", "hybrid"),
    (4, 4, "zigzag", None),
]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("module", [SGDTransformer, AdamTransformer])
def test_a_checkpoint_resumes_on_any_other_grid(world: World, tmp_path: Path, module, distributed) -> None:
    saved = str(tmp_path / "saved.ckpt")
    reference = world.run(1, fit, epochs(2, module=module))[0]
    options = sharded(save_distributed_checkpoint=distributed)
    world.run(4, fit, epochs(1, size=2, module=module, save=saved, strategy=options))  # (D, S) = (2, 2), zigzag
    assert is_folder(saved) == distributed
    for world_size, size, layout, kind in GRIDS:
        run = epochs(2, size=size, layout=layout, module=module, resume=saved, strategy=sharded(kind))
        assert_equal_on_ranks(world.run(world_size, fit, run), reference, 1e-5)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_without_sharding_resumes_with_it(world: World, tmp_path: Path, distributed) -> None:
    saved = str(tmp_path / "saved.ckpt")
    reference = world.run(1, fit, epochs(2, module=AdamTransformer))[0]
    options = {"save_distributed_checkpoint": distributed}
    world.run(4, fit, epochs(1, size=4, module=AdamTransformer, save=saved, strategy=options))
    for kind in KINDS:
        run = epochs(2, size=2, layout="contiguous", module=AdamTransformer, resume=saved, strategy=sharded(kind))
        assert_equal_on_ranks(world.run(4, fit, run), reference, 1e-5)


class WithAPath(AdamTransformer):
    """With a hyperparameter that torch loads only if it is told that the file can be trusted."""

    def __init__(self, where: Path = Path("data"), **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters()


def resume_trusting(rank: int, run: Run) -> bool:
    module, trainer = make_module(run), make_trainer(rank, run)
    loader = make_loader(trainer, make_samples(run.samples), 4)
    trainer.fit(module, loader, ckpt_path=run.resume, weights_only=False)
    return bool(trainer.optimizers[0].state)


def test_a_folder_with_any_hyperparameter_is_resumed_by_those_who_trust_it(world: World, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved.ckpt")
    options = sharded(save_distributed_checkpoint=True)
    world.run(2, fit, epochs(1, size=2, module=WithAPath, save=saved, strategy=options))
    run = epochs(2, size=2, module=WithAPath, resume=saved, strategy=options)
    assert world.run(2, resume_trusting, run) == [True, True]


def test_files_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    world.run(1, fit, epochs(1, module=AdamTransformer, save=str(tmp_path / "one.ckpt")))
    for distributed in (False, True):
        options = sharded(save_distributed_checkpoint=distributed)
        saved = str(tmp_path / f"sharded-{distributed}.ckpt")
        world.run(4, fit, epochs(1, size=2, module=AdamTransformer, save=saved, strategy=options))
    consolidate(tmp_path / "sharded-True.ckpt", tmp_path / "consolidated.ckpt")
    expected = torch.load(tmp_path / "one.ckpt", weights_only=False)
    for name in ("sharded-False.ckpt", "consolidated.ckpt"):
        file = torch.load(tmp_path / name, weights_only=False)
        assert file.keys() == expected.keys()
        assert list(file["state_dict"]) == list(expected["state_dict"])
        assert_equal(file["state_dict"], expected["state_dict"], 1e-4)
        assert_equal(moments(file), moments(expected), 1e-4)
        assert type(file["state_dict"]["model.head.weight"]) is Tensor
        module = LSSTransformer.load_from_checkpoint(tmp_path / name)
        assert module(make_samples(1)[0]["inputs"][None]).isfinite().all()


def fit_and_test_best(rank: int, run: Run, folder: str, distributed: bool) -> list[str]:
    """ModelCheckpoint while training, its best one loaded into the module that is sharded already."""
    checkpoint = ModelCheckpoint(
        folder, "{step}", monitor="train/loss", save_top_k=1, every_n_train_steps=1, save_last=True
    )
    trainer = make_trainer(rank, run, callbacks=[checkpoint], enable_checkpointing=True, log_every_n_steps=1)
    module = make_module(run)
    data = make_loader(trainer, make_samples(16), 4)
    trainer.fit(module, data)
    trained = whole_state(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    trainer.test(module, data, ckpt_path=str(Path(folder) / "last.ckpt"), verbose=False)
    assert_equal(whole_state(module), trained, 0)
    assert is_folder(checkpoint.best_model_path) == distributed
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("distributed", [False, True])
def test_model_checkpoint(world: World, tmp_path: Path, distributed) -> None:
    run = Run(size=2, steps=3, strategy=sharded(save_distributed_checkpoint=distributed))
    files = world.run(4, fit_and_test_best, run, str(tmp_path), distributed)[0]
    assert len(files) == 2  # the best and the last, replaced with every step
    assert files[0] == "last.ckpt"


def test_what_lies_at_the_path_is_replaced(world: World, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved.ckpt")
    for distributed in (False, True, True, False):
        options = sharded(save_distributed_checkpoint=distributed)
        world.run(2, fit, epochs(1, size=2, save=saved, strategy=options))
        assert is_folder(saved) == distributed
        assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]


SPAWN = """
import lightning.pytorch as pl, torch, warnings
from lightning_lss import LSSStrategy
from tests.training import Run, make_module, make_samples
from torch.utils.data import DataLoader
if __name__ == "__main__":
    module = make_module(Run())
    before = module.model.head.weight.detach().clone()
    strategy = LSSStrategy(sharding="fsdp", start_method="fork")
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(make_samples(8), 4))
    assert not torch.equal(before, module.model.head.weight)
    assert module(make_samples(1)[0]["inputs"][None]).isfinite().all()
    print("fine")
"""


@pytest.mark.slow
def test_a_process_that_forks_others_gets_the_whole_model_back(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    root = str(Path(__file__).parents[2])
    process = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert "fine" in process.stdout, process.stderr
