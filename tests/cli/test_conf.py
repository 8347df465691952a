"""Every choice of every configuration group composes, and what it names can be made."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_lss.parallel.segment_local import count_parameters

CONF = Path(__file__).parents[2] / "conf"
CHOICES = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("*/*.yaml"))]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "output_dir=unused"])


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_compose(choice) -> None:
    cfg = composed(choice, *(["data.path=unused"] if choice == "data=text" else []))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


# parameters without positional tables, by hand from the sizes: 12 E^2 a layer with GELU, and the embeddings
@pytest.mark.parametrize(
    ("model", "millions"),
    [("tiny", 0.46), ("enwik8-small", 19.0), ("gpt2-small", 85.1), ("1b", 0.98e3), ("8b", 6.98e3)],
)
def test_models_have_the_sizes_they_claim(model, millions) -> None:
    cfg = composed(f"model={model}", "model.positions=rotary")
    with torch.device("meta"):
        module = hydra.utils.instantiate(cfg.model, vocab_size=256, bytes_per_token=1.0, _convert_="all")
    assert count_parameters(module) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith(("strategy=", "callbacks="))])
def test_strategies_and_callbacks_can_be_made(choice) -> None:
    cfg = composed(choice)
    assert hydra.utils.instantiate(cfg.strategy) is not None
    assert all(hydra.utils.instantiate(callback) for callback in cfg.callbacks.values())


def test_what_people_change_reaches_what_it_is_for() -> None:
    cfg = composed("seq_len=512", "devices=4", "sequence_parallel_size=2", "seed=5")
    assert cfg.model.seq_len == cfg.data.seq_len == 512
    assert cfg.trainer.devices == 4
    assert cfg.strategy.sequence_parallel_size == 2
    assert composed("strategy=single").trainer.devices == 1
