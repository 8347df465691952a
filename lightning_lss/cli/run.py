"""Run a configuration: instantiate what it names, and call the Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig

from lightning_lss.cli.report import RESULT, report


def run(cfg: DictConfig) -> None:
    """Instantiate everything that ``cfg`` names, and call the Trainer's method for its mode."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = hydra.utils.instantiate(cfg.data)
    unset = [name for name in ("vocab_size", "bytes_per_token") if cfg.model[name] is None]
    from_data = {name: getattr(datamodule, name) for name in unset}
    model = hydra.utils.instantiate(cfg.model, _convert_="all", **from_data)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.get("logger") else False
    callbacks = [hydra.utils.instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    # LearningRateMonitor refuses to work without a logger.
    callbacks = [callback for callback in callbacks if logger or not isinstance(callback, LearningRateMonitor)]
    strategy = hydra.utils.instantiate(cfg.strategy)
    given = {"strategy": strategy, "logger": logger, "callbacks": callbacks, "default_root_dir": cfg.output_dir}
    trainer: pl.Trainer = hydra.utils.instantiate(cfg.trainer, **given)
    options = {"return_predictions": False} if cfg.mode == "predict" else {}
    getattr(trainer, cfg.mode)(model, datamodule=datamodule, ckpt_path=cfg.ckpt_path, **options)
    if trainer.is_global_zero:
        report(trainer, Path(cfg.output_dir))


def run_in_new_process() -> float | None:
    """Run one job of a sweep in a new interpreter, since ranks and their process group outlive a run.

    Returns the validation bits per byte, for sweepers that search, or None if nothing was validated. Raises
    ``ValueError`` under torchrun, and ``subprocess.CalledProcessError`` if the run failed and printed its error.
    """
    if "RANK" in os.environ:
        raise ValueError("-m starts a process for each run and does not work under torchrun: give one run at a time.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = [*HydraConfig.get().overrides.task, f'hydra.run.dir="{folder}"', *config_choice(sys.argv[1:])]
    subprocess.run([*program(), *overrides], check=True, cwd=hydra.utils.get_original_cwd())
    return json.loads((folder / RESULT).read_text()).get("val/bits_per_byte")


def program() -> list[str]:
    """Return the command that started this process, without arguments; Lightning starts the other ranks by it."""
    if sys.modules["__main__"].__spec__ is not None:
        return [sys.executable, "-m", "lightning_lss.cli"]
    return [sys.executable, hydra.utils.to_absolute_path(sys.argv[0])]


def config_choice(given: list[str]) -> list[str]:
    """Select ``--config-name``, ``--config-dir`` and their values from the arguments."""
    flags = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")
    pairs = [given[i : i + 2] for i, word in enumerate(given) if word in flags]
    return [word for pair in pairs for word in pair] + [w for w in given if w.startswith(tuple(f"{f}=" for f in flags))]
