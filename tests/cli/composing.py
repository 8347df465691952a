"""Configurations as the command line composes them."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_lss.cli.main import CONF

CHOICES = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("*/*.yaml"))]


def composed(*overrides: str) -> DictConfig:
    """The configuration of ``overrides``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "output_dir=unused"])
