"""The examples: that of packed documents, and those of modules that are written for one device."""

import contextlib
import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lss.testing.compare import assert_equal
from tests.processes import ROOT, python
from tests.training import VOCAB, Run, make_module, make_trainer, whole_state

EXAMPLES = ROOT / "examples"
PACKED = EXAMPLES / "packed_documents.py"


def load(name: str = "packed_documents") -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_packed_documents_lose_no_token_and_do_not_predict_each_other() -> None:
    documents = [torch.tensor(x) for x in ([1, 2, 3], [4], [5, 6, 7, 8, 9])]
    samples = load()["pack"](documents, 4)
    assert [x["inputs"].tolist() for x in samples] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [x["targets"].tolist() for x in samples] == [[2, 3, -100, -100], [6, 7, 8, 9]]
    batch = load()["collate"](samples)
    assert batch.keys() == {"inputs", "targets", "mask"}
    assert batch["mask"].dense(4)[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def fit_packed(rank: int, size: int) -> tuple[dict[str, Tensor], str]:
    """Train on packed documents; return the weights and what is printed."""
    example, generator = load(), torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 40, (40,), generator=generator).tolist()
    samples = example["pack"]([torch.randint(VOCAB, (n,), generator=generator) for n in lengths], 64)
    run = Run(size, "auto", {"positions": "rotary", "seq_len": 64}, {"precision": "64-true"}, steps=4)
    module, trainer = make_module(run), make_trainer(rank, run, callbacks=[example["PrintEvenness"]()])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.fit(module, DataLoader(samples, 2, collate_fn=example["collate"]))
    return whole_state(module), printed.getvalue()


def test_training_on_packed_documents_is_that_of_one_rank(world) -> None:
    (one, printed_by_one), *_ = world.run(1, fit_packed, 1)
    (two, printed_by_two), (other, printed_by_other) = world.run(2, fit_packed, 2)
    assert_equal(two, one, 1e-10)
    assert_equal(other, one, 1e-10)
    losses = re.compile(r"loss ([\d.]+)")
    assert len(losses.findall(printed_by_one)) == 4
    assert losses.findall(printed_by_two) == losses.findall(printed_by_one)
    assert "balanced" in printed_by_two
    assert not printed_by_other


@pytest.mark.slow
def test_it_runs_and_the_readme_shows_it(tmp_path) -> None:
    assert PACKED.read_text() in (ROOT / "README.md").read_text()
    steps = re.findall(r"step \d+: loss ([\d.]+); busiest rank / mean: ([\d.]+)", python(PACKED, cwd=tmp_path))
    assert len(steps) == 20
    assert float(steps[-1][0]) < float(steps[0][0]) - 1
    assert all(float(uneven) <= 1.1 for _, uneven in steps)


# -- modules that are written for one device ---------------------------------------------------------------------------

# by example: its module, and the function that makes its samples
FOR_ONE_DEVICE = {
    "vision_transformer": ("VisionTransformer", "draw"),
    "time_series": ("Forecaster", "make_series"),
    "dna": ("DNAModel", "make_sequences"),
    "finetune_huggingface": ("FineTune", "make_samples"),
}


def fit(rank: int, size: int, name: str, folder: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Train an example's module in float64 with SGD; return the weights and its predictions."""
    example, (module_name, data) = load(name), FOR_ONE_DEVICE[name]
    torch.manual_seed(3)
    if name == "finetune_huggingface":
        samples, module = example[data](folder, [EXAMPLES / "dna.py"], 50)[:8], example[module_name](folder)
    else:
        samples, module = example[data](8, seed=1), example[module_name]()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    run = Run(size, "auto", trainer={"precision": "64-true"}, steps=3)
    trainer, loader = make_trainer(rank, run), DataLoader(samples, 2)
    trainer.fit(module, loader)
    if size > 1:
        assert trainer.strategy.verification.exact  # type: ignore[attr-defined]
    return whole_state(module), trainer.predict(module, loader)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FOR_ONE_DEVICE)
def test_training_is_that_of_one_device(world, tmp_path, name) -> None:
    if name == "finetune_huggingface":
        load(name)["make_checkpoint"](tmp_path, [EXAMPLES / "dna.py"])
    (one,) = world.run(1, fit, 1, name, tmp_path)
    for rank in world.run(2, fit, 2, name, tmp_path):
        assert_equal(rank[0], one[0], 1e-10)
        assert_equal(dict(enumerate(rank[1])), dict(enumerate(one[1])), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vision_transformer", r"circle .* (\d\d|100)%"),
        ("time_series", r"saved: forecast.png"),
        ("dna", r"elsewhere .* 0\.0\d "),
        ("finetune_huggingface", "The logits of finetuned are those of the training"),
    ],
)
def test_an_example_runs(tmp_path, name, found) -> None:
    output = python(EXAMPLES / f"{name}.py", cwd=tmp_path)
    assert len(re.findall(found, output)) == 1, output  # by one of the two processes
    if name == "time_series":
        assert (tmp_path / "forecast.png").exists()
