"""Real launches of the command line, away from the repository: ``train.py``, ``python -m lightning_lss.cli``, torchrun."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import ROOT, TORCHRUN, python

pytestmark = pytest.mark.slow

TRAIN_PY, MODULE = (ROOT / "train.py",), ("-m", "lightning_lss.cli")


def train(folder: Path, *overrides: str, launcher: tuple[object, ...] = TRAIN_PY) -> str:
    return python(*launcher, "experiment=debug", f"hydra.run.dir={folder}", *overrides, cwd=folder.parent)


def test_train_py_from_start_to_prediction(tmp_path) -> None:
    output = train(tmp_path / "fit")
    for words in ("val bits per byte", "tokens per second", "checkpoint", "tensorboard --logdir"):
        assert words in output
    checkpoint = tmp_path / "fit/checkpoints/last.ckpt"
    result = json.loads((tmp_path / "fit/result.json").read_text())
    assert 0 < result["val/bits_per_byte"] < 8.5
    assert (tmp_path / "fit/.hydra/config.yaml").exists()
    check_tensorboard(tmp_path / "fit/tensorboard")

    another_grid = ("trainer.max_steps=9", "sequence_parallel_size=1")
    output = train(tmp_path / "more", f"ckpt_path={checkpoint}", "~logger", *another_grid)
    assert "tensorboard" not in output
    assert torch.load(tmp_path / "more/checkpoints/last.ckpt", weights_only=False)["global_step"] == 9

    output = train(tmp_path / "validate", "mode=validate", f"ckpt_path={checkpoint}", "strategy=single", "logger=csv")
    assert "tensorboard" not in output
    assert "step-" not in output, "the path of another run's best checkpoint, as if this one had written it"
    assert (tmp_path / "validate/csv/metrics.csv").exists()
    again = json.loads((tmp_path / "validate/result.json").read_text())
    assert again["val/bits_per_byte"] == pytest.approx(result["val/bits_per_byte"], rel=1e-5)

    limits = ("trainer.limit_predict_batches=1", "data.batch_size=3")
    train(tmp_path / "predict", "mode=predict", f"ckpt_path={checkpoint}", *limits)
    saved = torch.load(tmp_path / "predict/predictions/predictions-0.pt", weights_only=False)
    assert saved["predictions"][0].shape == (3, 256)


def check_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    expected = {
        "train/loss",
        "train/bits_per_byte",
        "train/gradient_norm",
        "train/tokens_per_sec",
        "train/device/flops_per_sec",
        "val/loss",
        "val/bits_per_byte",
        "train/lr/decayed",
        "train/lr/others",
        "memory/peak",
        "memory/rank_0",
        "memory/rank_1",
    }
    assert expected <= set(tags["scalars"]), expected - set(tags["scalars"])
    assert tags["images"] == ["attention tiles"]
    assert "run layout/text_summary" in tags["tensors"]
    table = events.Tensors("run layout/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "2 = 1 x 2" in table
    assert "_hparams_/experiment" in events.summary_metadata


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [(MODULE, "lss_fsdp"), ((*TORCHRUN, *TRAIN_PY), "megatron")],
    ids=["-m lss_fsdp", "torchrun megatron"],
)
def test_two_ranks_start(tmp_path, launcher, strategy) -> None:
    output = train(tmp_path / "run", f"strategy={strategy}", launcher=launcher)
    assert "val bits per byte" in output
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_two_ranks_learn_dna_from_a_compressed_file(tmp_path) -> None:
    letters = "".join(random.Random(0).choices("ACGTacgtN", k=20_000))
    lines = "\n".join(letters[i : i + 60] for i in range(0, len(letters), 60))
    (tmp_path / "genome.fa.gz").write_bytes(gzip.compress(f">chr1 a header\n{lines}\n>chr2\nACGTACGT".encode()))
    data = ("data=fasta", f"data.path={tmp_path}/genome.fa.gz", f"data.cache_dir={tmp_path}/cache")
    train(tmp_path / "run", *data, "~logger", "trainer.limit_val_batches=1", "trainer.max_steps=3")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert 1.9 < result["val/bits_per_byte"] < 2.9  # of four letters in random order; text as bytes begins at 8
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=False)
    assert saved["hyper_parameters"]["vocab_size"] == 6


def test_multirun_gives_each_run_a_folder(tmp_path) -> None:
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("defaults:\n  - tiny\n\nmlp: swiglu\n")
    words = ["experiment=debug", "model=mine", "seq_len=64,128", "strategy=single", f"hydra.sweep.dir={tmp_path}"]
    python(*TRAIN_PY, "-m", "--config-dir", "own", *words, cwd=tmp_path, timeout=280)
    for index, length in enumerate((64, 128)):
        composed = (tmp_path / str(index) / ".hydra/config.yaml").read_text()
        assert f"seq_len: {length}\n" in composed
        assert "mlp: swiglu\n" in composed
        assert (tmp_path / str(index) / "checkpoints/last.ckpt").exists()
