"""Lightning's own command line takes the model's and the optimizer's configuration key by key."""

import pytest
import torch
import yaml

from lightning_lss import LSSTransformer
from tests.processes import ROOT, python

EXAMPLE = ROOT / "examples/lightning_cli.py"


@pytest.mark.slow
def test_two_ranks_train_what_the_command_line_says(tmp_path) -> None:
    trainer = ["accelerator=cpu", "strategy=lss", "devices=2", "max_steps=2", "limit_val_batches=1"]
    model = ["config.width=64", "config.num_layers=1", "config.seq_len=64", "optimizer.lr=1e-3"]
    data = ["seq_len=64", "batch_size=2"]
    words = [
        f"--{name}.{word}"
        for name, group in zip(("trainer", "model", "data"), (trainer, model, data))
        for word in group
    ]
    python(EXAMPLE, "fit", *words, cwd=tmp_path)
    run = tmp_path / "lightning_logs/version_0"
    composed = yaml.safe_load((run / "config.yaml").read_text())
    assert composed["trainer"]["strategy"] == "lss"
    assert composed["model"]["config"]["width"] == 64
    saved = next((run / "checkpoints").glob("*.ckpt"))
    assert torch.load(saved, weights_only=False)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-3
    model = LSSTransformer.load_from_checkpoint(saved, map_location="cpu")
    assert model.model.config.width == 64
    assert model.model.config.seq_len == 64


def test_the_readme_shows_the_example() -> None:
    code = EXAMPLE.read_text().split('"""')[2].strip()
    assert code in (ROOT / "README.md").read_text()
