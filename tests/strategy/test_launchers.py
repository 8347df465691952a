"""Real launches: Lightning's own subprocesses, spawn, fork, torchrun."""

import pytest
import torch

from lightning_lss.testing.compare import assert_equal
from tests.processes import ROOT, TORCHRUN, python


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
@pytest.mark.parametrize("name", ["as_it_is", "own_module"])
def test_the_readmes_examples_run_and_are_those_in_examples(tmp_path, name) -> None:
    example = ROOT / f"examples/{name}.py"
    assert example.read_text() in (ROOT / "README.md").read_text()
    python(example, cwd=tmp_path)


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
