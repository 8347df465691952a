"""Predictions on disk: every sample's, from every data replica."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from lightning_lss.callbacks import PredictionWriter
from tests.training import Run, make_loader, make_module, make_samples, make_trainer


def predict(rank: int, run: Run, folder: str) -> int:
    """Predict; return how many files this rank wrote."""
    trainer = make_trainer(rank, run, callbacks=[PredictionWriter(Path(folder) / f"named-by-{rank}")])
    module, loader = make_module(run), make_loader(trainer, make_samples(8), 2)
    with mock.patch("torch.save", wraps=torch.save) as save:
        trainer.predict(module, loader, return_predictions=False)
    return sum(isinstance(call.args[1], Path) for call in save.call_args_list)  # others write to memory


def read(file: Path) -> dict[int, torch.Tensor]:
    """The predictions of a file by the place of their samples in the dataset."""
    saved = torch.load(file)
    batches = zip(saved["indices"][0], saved["predictions"])  # of the first loader
    return {index: row for indices, rows in batches for index, row in zip(indices, rows)}


@pytest.mark.parametrize("strategy", [{}, {"megatron": True}], ids=["lss", "megatron"])
def test_each_data_replica_writes_its_own_samples_whole(world, tmp_path, strategy) -> None:
    world.run(1, predict, Run(), str(tmp_path / "one"))
    whole = read(tmp_path / "one" / "named-by-0" / "predictions-0.pt")
    assert sorted(whole) == list(range(8))

    assert world.run(4, predict, Run(size=2, strategy=strategy), str(tmp_path / "four")) == [1, 0, 1, 0]
    folders = list((tmp_path / "four").iterdir())
    assert [folder.name for folder in folders] == ["named-by-0"]
    files = sorted(folders[0].iterdir())
    assert [file.name for file in files] == ["predictions-0.pt", "predictions-1.pt"]
    for replica, file in enumerate(files):
        own = read(file)
        assert sorted(own) == list(range(replica, 8, 2))
        for index, row in own.items():
            assert torch.equal(row, whole[index]), index
