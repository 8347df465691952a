"""Run a configuration: instantiate what it names, and call the Trainer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from lightning_lss.cli.progress import StepsProgressBar
from lightning_lss.cli.report import RESULT, report


def run(cfg: DictConfig) -> None:
    """Instantiate everything that ``cfg`` names, and call the Trainer's method for its mode."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = make_data(cfg)
    model = make_model(cfg, lambda name: getattr(datamodule, name))
    logger = hydra.utils.instantiate(cfg.logger) if cfg.get("logger") else False
    callbacks = [hydra.utils.instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    # LearningRateMonitor refuses to work without a logger.
    callbacks = [callback for callback in callbacks if logger or not isinstance(callback, LearningRateMonitor)]
    if cfg.trainer.get("enable_progress_bar", True) and not any(isinstance(x, ProgressBar) for x in callbacks):
        callbacks.append(StepsProgressBar())
    strategy = hydra.utils.instantiate(cfg.strategy, _convert_="all")
    given = {"strategy": strategy, "logger": logger, "callbacks": callbacks, "default_root_dir": cfg.output_dir}
    trainer: pl.Trainer = hydra.utils.instantiate(cfg.trainer, **given)
    options = {"return_predictions": False} if cfg.mode == "predict" else {}
    getattr(trainer, cfg.mode)(model, datamodule=datamodule, ckpt_path=cfg.ckpt_path, **options)
    if trainer.is_global_zero:
        report(trainer, Path(cfg.output_dir))


def make_data(cfg: DictConfig) -> pl.LightningDataModule:
    """Instantiate the data; a text for a model with a tokenizer of its own is tokenized by that."""
    return hydra.utils.instantiate(tokenized(cfg))


def tokenized(cfg: DictConfig) -> DictConfig:
    """Return ``cfg.data``, or ``data=tokens`` in place of the bytes of ``data=text`` where the model's folder has a tokenizer."""
    data, folder = cfg.data, cfg.model.get("path")
    of_bytes = data._target_ == "lightning_lss.data.TextDataModule" and data.dtype == "uint8"
    if not (of_bytes and folder and (Path(folder).expanduser() / "tokenizer.json").is_file()):
        return data
    kept = {name: value for name, value in data.items() if name not in ("dtype", "vocab_size", "bytes_per_token")}
    given = {**kept, "_target_": "lightning_lss.data.TokensDataModule", "tokenizer": folder}
    return OmegaConf.create(given)


def make_model(cfg: DictConfig, of_data: Callable[[str], Any]) -> pl.LightningModule:
    """Instantiate the model; ``of_data`` gives by name what the configuration leaves to the data."""
    left_open = [name for name in ("vocab_size", "bytes_per_token") if cfg.model.get(name, "") is None]
    return hydra.utils.instantiate(cfg.model, _convert_="all", **{name: of_data(name) for name in left_open})


def run_in_new_process() -> float | None:
    """Run one job of a sweep in a new interpreter, since ranks and their process group outlive a run.

    Returns the validation bits per byte, for sweepers that search, or None if nothing was validated. Raises
    ``ValueError`` under torchrun, and ``subprocess.CalledProcessError`` if the run failed and printed its error.
    """
    if "RANK" in os.environ:
        raise ValueError("-m starts a process for each run and does not work under torchrun: give one run at a time.")
    chosen = HydraConfig.get()
    folder = Path(chosen.runtime.output_dir)
    flags = {"main": "--config-path", "command-line": "--config-dir"}
    words = [f"{flags[x.provider]}={x.path}" for x in chosen.runtime.config_sources if x.provider in flags]
    words += [f"--config-name={chosen.job.config_name}", *chosen.overrides.task, f'hydra.run.dir="{folder}"']
    subprocess.run([*program(), *words], check=True, cwd=hydra.utils.get_original_cwd())
    return json.loads((folder / RESULT).read_text()).get("val/bits_per_byte")


def program() -> list[str]:
    """Return the command that started this process, without arguments; Lightning starts the other ranks by it."""
    if sys.modules["__main__"].__spec__ is not None:
        return [sys.executable, "-m", "lightning_lss.cli"]
    return [sys.executable, hydra.utils.to_absolute_path(sys.argv[0])]
