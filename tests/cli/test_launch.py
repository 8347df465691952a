"""Real launches: Lightning's own subprocesses, spawn, fork, torchrun, and Hydra's train.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lss.testing.compare import assert_equal

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def python(*arguments: object, timeout: float = 240, code: int = 0, cwd: Path = ROOT) -> str:
    """Run Python on ``arguments``; return what it printed."""
    left_out = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
    )
    output = process.stdout + process.stderr
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("reference") / "one.ckpt"
    python(ROOT / "tests/launch_script.py", "auto", path)
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [([], "lss"), ([], "lss_spawn"), ([], "lss_fork"), (TORCHRUN, "lss")],
    ids=lambda x: str(x)[:9],
)
def test_launchers_train_what_one_process_trains(reference, tmp_path, launcher, strategy) -> None:
    path = tmp_path / "saved.ckpt"
    python(*launcher, ROOT / "tests/launch_script.py", strategy, path)
    state = torch.load(path, weights_only=False)["state_dict"]
    assert_equal(state, reference, 1e-5)


@pytest.mark.slow
def test_the_readmes_example_runs_and_is_the_one_in_examples(tmp_path) -> None:
    example = ROOT / "examples/own_module.py"
    assert example.read_text() in (ROOT / "README.md").read_text()
    python(example, cwd=tmp_path)


def test_links_in_documents_lead_somewhere() -> None:
    for document in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        ROOT / "benchmarks/README.md",
    ]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.slow
def test_a_failing_rank_shows_its_error_and_ends_the_run(tmp_path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import sys; sys.argv[1:] = ['lss', 'unused']\n"
        "from tests.training import SGDTransformer, Run\n"
        "def fail(self, batch, batch_idx):\n"
        "    raise RuntimeError('the error that the user must see')\n"
        "SGDTransformer.training_step = fail\n"
        "from tests.launch_script import main\n"
        "main('lss', 'unused')\n"
    )
    output = python(script, code=1, timeout=90)
    assert "RuntimeError: the error that the user must see" in output
    assert "abort" not in output.lower()


def train(folder: Path, *overrides: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
    return python(*launcher, ROOT / "train.py", "experiment=debug", f"hydra.run.dir={folder}", *overrides, code=code)


@pytest.mark.slow
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


@pytest.mark.slow
def test_train_py_under_torchrun(tmp_path) -> None:
    output = train(tmp_path / "run", launcher=tuple(TORCHRUN))
    assert "val bits per byte" in output
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_multirun_gives_each_run_a_folder(tmp_path) -> None:
    sweep = f"hydra.sweep.dir={tmp_path}"
    python(ROOT / "train.py", "-m", "experiment=debug", "seq_len=64,128", sweep, "data.batch_size=1", timeout=280)
    for index, length in enumerate((64, 128)):
        assert f"seq_len: {length}" in (tmp_path / str(index) / ".hydra/config.yaml").read_text()
        assert (tmp_path / str(index) / "checkpoints/last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seq_lenn=4"], "seq_lenn"),
        (["seq_len=4098"], "train.py: A sequence of length 4098 cannot be split over 2 ranks"),
        (["devices=3", "sequence_parallel_size=2"], "sequence_parallel_size=2 does not divide the world size 3"),
        (["strategy.layout=spiral"], "layout='spiral' is unknown"),
        (["strategy=ddp", "sequence_parallel_size=2"], "use strategy=lss"),
        (["strategy=single", "devices=2"], "strategy=single has one process, not devices=2"),
        (["mode=test"], "mode=test needs a trained model"),
        (["mode=train"], "mode=train is unknown"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist"),
        (["strategy=single", "devices=1", "ckpt_path=."], "is a folder, which this strategy cannot read"),
        (["mode=plan", "devices=auto"], "add devices=8"),
        (["mode=plan", "trainer=gpu"], "add hardware="),
        (["mode=plan", "plan.csv=nowhere/plan.csv"], "there is no folder nowhere"),
        (["data=text"], "data.path is not set"),
        (["data=text", "data.path=/nowhere"], "/nowhere"),
        (["model.num_heads=3"], "width=32 must be a multiple of num_heads=3"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, overrides, words) -> None:
    output = train(tmp_path, *overrides, code=1)
    assert words in output
    assert "Traceback" not in output
