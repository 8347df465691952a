"""Checkpoints that do not know S, and files that are complete or not there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_lss import LSSTransformer
from lightning_lss.checkpoint import consolidate
from lightning_lss.checkpoint.file import AtomicCheckpointIO
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import World
from tests.training import (
    LENGTH,
    TABLE,
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
)


@pytest.mark.parametrize("module", [SGDTransformer, AdamTransformer])
def test_a_checkpoint_of_one_grid_resumes_on_any_other(world: World, tmp_path: Path, module) -> None:
    saved = str(tmp_path / "saved.ckpt")
    reference = world.run(1, fit, epochs(2, module=module))[0]
    world.run(4, fit, epochs(1, size=2, module=module, save=saved))  # (D, S) = (2, 2)
    for world_size, size, layout in [(1, 1, "zigzag"), (4, 4, "zigzag"), (4, 4, "contiguous"), (4, 1, "zigzag")]:
        run = epochs(2, size=size, layout=layout, module=module, resume=saved)
        assert_equal_on_ranks(world.run(world_size, fit, run), reference, 1e-5)


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
        assert_equal(file["state_dict"], reference["state_dict"], 1e-5)
        assert_equal(moments(file), moments(reference), 1e-4)


def test_load_from_checkpoint_without_a_strategy(world: World, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    state = world.run(2, fit, Run(size=2, save=str(path)))[0]
    module = LSSTransformer.load_from_checkpoint(path)
    assert_equal(module.state_dict(), state, 0)
    assert module(make_samples(1)[0]["inputs"][None]).shape == (1, LENGTH, 11)


def fit_with_ema(rank: int, run: Run, folder: str) -> dict[str, Tensor]:
    """Train with averaged weights, and save when an epoch ends: after training the average is all that there is."""
    callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
    trainer = make_trainer(rank, run, callbacks=callbacks, enable_checkpointing=True)
    per_rank = run.global_batch * run.size // trainer.world_size
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), per_rank), ckpt_path=run.resume)
    return trainer.strategy.lightning_module_state_dict()


@pytest.mark.parametrize("distributed", [False, True])
def test_averaged_weights_are_saved_whole_and_resumed_elsewhere(world: World, tmp_path: Path, distributed) -> None:
    unbroken = world.run(1, fit_with_ema, epochs(2), str(tmp_path / "unbroken"))[0]
    half = epochs(1, size=2, strategy={"save_distributed_checkpoint": distributed})
    world.run(4, fit_with_ema, half, str(tmp_path / "half"))
    saved = whole = str(tmp_path / "half/epoch=0.ckpt")
    if distributed:
        whole = str(tmp_path / "whole.ckpt")
        consolidate(saved, whole)
    file = torch.load(whole, weights_only=False)
    assert file["state_dict"][TABLE].shape == file["current_model_state"][TABLE].shape == (LENGTH, 16)
    for size in (1, 4):
        run = epochs(2, size=size, resume=saved, strategy={"sharding": None})
        assert_equal_on_ranks(world.run(size, fit_with_ema, run, str(tmp_path / str(size))), unbroken, 1e-5)


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
