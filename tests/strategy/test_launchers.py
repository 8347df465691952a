"""Real launches: Lightning's own subprocesses, spawn, fork, torchrun; and the environment that SLURM starts processes in."""

import os
import warnings

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import Tensor

from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from tests.processes import ROOT, TORCHRUN, python
from tests.training import Run, fit, make_loader, make_module, make_samples, make_trainer, whole_state


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


def fit_under_slurm(rank: int, run: Run) -> tuple[dict[str, Tensor], list[str]]:
    """Train where the variables of `srun` say which rank this is; return the weights and what was warned of SLURM."""
    numbers = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "PROCID": rank, "LOCALID": rank, "NODEID": 0, "JOB_ID": 7}
    variables = {"SLURM_JOB_NAME": "train", **{f"SLURM_{name}": str(x) for name, x in numbers.items()}}
    os.environ.update(variables)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(rank, run)
            assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
            module = make_module(run)
            trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    finally:
        for name in variables:
            del os.environ[name]
    return whole_state(module), [str(x.message) for x in caught if "auto-requeue" in str(x.message)]


@pytest.mark.parametrize(
    ("environment", "model", "sharding", "warns"),
    [
        (None, {"positions": "learned"}, None, True),
        (None, {"positions": "rotary"}, None, False),
        (None, {"positions": "rotary"}, "fsdp", True),
        (SLURMEnvironment(auto_requeue=False), {"positions": "learned"}, None, False),
    ],
)
def test_slurm_says_who_a_rank_is_and_must_not_requeue_what_all_ranks_save(
    world, environment, model, sharding, warns
) -> None:
    run = Run(2, model=model, strategy={"cluster_environment": environment, "sharding": sharding})
    states, messages = zip(*world.run(2, fit_under_slurm, run))
    assert_equal_on_ranks(states, world.run(1, fit, Run(model=model, samples=16))[0], 1e-5)
    assert [len(x) for x in messages] == [int(warns), 0]
    assert not warns or "Use plugins=SLURMEnvironment(auto_requeue=False)" in messages[0][0]
