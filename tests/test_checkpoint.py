"""Checkpoints that do not know S, and files that are complete or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_lss import LSSTransformer
from lightning_lss.checkpoint.file import AtomicCheckpointIO
from tests.training import (
    LENGTH,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    worst_difference,
)
from tests.world import World

TABLE = "model.positions.weight"


class AdamTransformer(SGDTransformer):
    """Adam has two moments for each parameter; a large eps keeps tiny gradients from being blown up to a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, eps=1e-2)


def epochs(count: int, size: int = 1, **more: Any) -> Run:
    """Epochs of five steps each; Lightning resumes at the start of an epoch."""
    return Run(size=size, trainer={"max_epochs": count}, steps=-1, samples=20, **more)


@pytest.mark.parametrize("module", [SGDTransformer, AdamTransformer])
def test_a_checkpoint_of_one_grid_resumes_on_any_other(world: World, tmp_path: Path, module) -> None:
    saved = str(tmp_path / "saved.ckpt")
    reference = world.run(1, fit, epochs(2, module=module))[0]
    world.run(4, fit, epochs(1, size=2, module=module, save=saved))  # (D, S) = (2, 2)
    for world_size, size, layout in [(1, 1, "zigzag"), (4, 4, "zigzag"), (4, 4, "contiguous"), (4, 1, "zigzag")]:
        run = epochs(2, size=size, layout=layout, module=module, resume=saved)
        for state in world.run(world_size, fit, run):
            difference, name = worst_difference(state, reference)
            assert difference <= 1e-5, (world_size, size, layout, name)


def test_files_of_all_grids_hold_the_same(world: World, tmp_path: Path) -> None:
    files = {}
    for world_size, size, layout in [(1, 1, "zigzag"), (2, 2, "zigzag"), (4, 2, "contiguous"), (4, 4, "zigzag")]:
        path = tmp_path / f"{world_size}-{size}.ckpt"
        world.run(world_size, fit, epochs(1, size=size, layout=layout, module=AdamTransformer, save=str(path)))
        files[path.stem] = torch.load(path, weights_only=False)
    reference = files["1-1"]
    names = list(reference["state_dict"])
    for file in files.values():
        assert list(file["state_dict"]) == names
        assert file["state_dict"][TABLE].shape == (LENGTH, 16)
        assert worst_difference(file["state_dict"], reference["state_dict"])[0] < 1e-5
        moments, expected = (x["optimizer_states"][0]["state"] for x in (file, reference))
        assert moments.keys() == expected.keys()
        for index, state in expected.items():
            for key, value in state.items():
                torch.testing.assert_close(moments[index][key], value, rtol=1e-4, atol=1e-7)


def test_load_from_checkpoint_without_a_strategy(world: World, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    state = world.run(2, fit, Run(size=2, save=str(path)))[0]
    module = LSSTransformer.load_from_checkpoint(path)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module(make_samples(1)[0]["inputs"][None]).shape == (1, LENGTH, 11)


def fit_with_ema(rank: int, run: Run) -> dict[str, Tensor]:
    trainer = make_trainer(rank, run, callbacks=[EMAWeightAveraging(decay=0.5)])
    per_rank = run.global_batch * run.size // trainer.world_size
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), per_rank), ckpt_path=run.resume)
    state = trainer.strategy.lightning_module_state_dict()
    if run.save:  # while training, as a ModelCheckpoint would
        trainer.state.stage = None
        trainer.save_checkpoint(run.save)
    return state


def test_averaged_weights_are_saved_whole_and_resumed_elsewhere(world: World, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved.ckpt")
    reference = world.run(1, fit_with_ema, epochs(2))[0]
    world.run(2, fit_with_ema, epochs(1, size=2, save=saved))
    file = torch.load(saved, weights_only=False)
    assert file["state_dict"][TABLE].shape == file["current_model_state"][TABLE].shape == (LENGTH, 16)
    whole = world.run(1, fit_with_ema, epochs(2, resume=saved))[0]
    for state in world.run(4, fit_with_ema, epochs(2, size=4, resume=saved)):
        assert worst_difference(state, whole)[0] < 1e-5
    assert reference.keys() == whole.keys()


def write_and_fail(checkpoint_io: AtomicCheckpointIO, path: Path) -> None:
    class Unpicklable:
        def __reduce__(self) -> Any:
            raise RuntimeError("half-way")

    checkpoint_io.save_checkpoint({"weights": torch.zeros(1000), "bad": Unpicklable()}, path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path, checkpoint_io = tmp_path / "folder" / "a.ckpt", AtomicCheckpointIO()
    checkpoint_io.save_checkpoint({"x": 1}, path)
    with pytest.raises(RuntimeError, match="half-way"):
        write_and_fail(checkpoint_io, path)
    assert checkpoint_io.load_checkpoint(path) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_files_have_ordinary_permissions_and_odd_paths_work(tmp_path: Path) -> None:
    checkpoint_io = AtomicCheckpointIO()
    path = tmp_path / "a b=c,d.ckpt"
    umask = os.umask(0o022)
    try:
        checkpoint_io.save_checkpoint({"x": 1}, str(path))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(IsADirectoryError, match="is a folder"):
        checkpoint_io.save_checkpoint({}, tmp_path)


def test_remote_paths_are_left_to_lightning() -> None:
    checkpoint_io = AtomicCheckpointIO()
    checkpoint_io.save_checkpoint({"x": 1}, "memory://folder/a.ckpt")
    assert checkpoint_io.load_checkpoint("memory://folder/a.ckpt") == {"x": 1}
