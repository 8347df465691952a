"""Compose a configuration with Hydra, check it, and do what its mode says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_lss.cli.check import check
from lightning_lss.cli.help import help_text, program_name
from lightning_lss.cli.plan import run_plan
from lightning_lss.cli.run import run, run_in_new_process
from lightning_lss.data.download import DownloadError

PACKAGE = Path(__file__).parent.parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # in a wheel; in a clone

# Errors about what was asked for, rather than faults of the program.
USER_ERRORS = (ValueError, FileNotFoundError, OmegaConfBaseException, MisconfigurationException, DownloadError)


def main() -> None:
    """What the command line starts."""
    keep_to_own_folder()
    OmegaConf.register_new_resolver("help_text", help_text, replace=True)
    composed()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def composed(cfg: DictConfig) -> float | None:
    """One run, or one of a multirun: check ``cfg`` and do what its mode says; returns what a run of a sweep came to."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data here is cheap to load
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # last.ckpt, a folder with strategy=megatron
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")  # its own use of torch
    try:
        check(cfg)
        if cfg.mode == "plan":
            run_plan(cfg)
        elif HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_in_new_process()
        else:
            run(cfg)
        return None
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the run has said why
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not isinstance(cause, USER_ERRORS):
            raise
        print(f"{program_name()}: {cause}\n(HYDRA_FULL_ERROR=1 shows where this was found.)", file=sys.stderr)
        sys.exit(1)  # a sentence instead of a stack of frames


def keep_to_own_folder() -> None:
    """Under torchrun or SLURM every rank composes its own configuration: only the first may make the run's folder.

    Clocks differ, so the ranks' ``${now:...}`` would too; Lightning's checkpoints and logs follow rank 0 anyway.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if rank > 0:
        folder = tempfile.mkdtemp(prefix=f"lightning_lss_rank_{rank}_")
        sys.argv += ["hydra.output_subdir=null", f"hydra.run.dir={folder}"]
