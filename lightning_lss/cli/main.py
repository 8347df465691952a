"""Compose a configuration with Hydra, check it, and run its mode."""

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
from lightning_lss.cli.verify import run_verify
from lightning_lss.data.download import DownloadError
from lightning_lss.data.optional import MissingPackageError

PACKAGE = Path(__file__).parent.parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # in a wheel; in a clone

# Errors in what the user asked for, rather than faults of the program.
USER_ERRORS = (
    *(ValueError, FileNotFoundError, OmegaConfBaseException, MisconfigurationException),
    *(DownloadError, MissingPackageError),
)


def main() -> None:
    """Start the command line."""
    keep_to_own_folder()
    OmegaConf.register_new_resolver("help_text", help_text, replace=True)
    composed()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def composed(cfg: DictConfig) -> float | None:
    """Check ``cfg`` and run its mode; return a run's validation bits per byte in a multirun, else None."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data here is cheap to load
    warnings.filterwarnings("ignore", "The dirpath has changed from")  # each run has a folder of its own
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # last.ckpt, a folder with strategy=megatron
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")  # its own use of torch
    try:
        check(cfg)
        if cfg.mode == "plan":
            run_plan(cfg)
        elif cfg.mode == "verify":
            run_verify(cfg)
        elif HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_in_new_process()
        else:
            run(cfg)
        return None
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the run has printed its error
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not isinstance(cause, USER_ERRORS):
            raise
        print(f"{program_name()}: {cause}\n(HYDRA_FULL_ERROR=1 shows where this was found.)", file=sys.stderr)
        sys.exit(1)  # a sentence instead of a stack of frames


def keep_to_own_folder() -> None:
    """Let only rank 0 create the run's folder under torchrun or SLURM, where every rank composes its own configuration.

    Clocks differ, so the ranks' ``${now:...}`` would differ too. Lightning's checkpoints and logs follow rank 0 anyway.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if rank > 0:
        folder = tempfile.mkdtemp(prefix=f"lightning_lss_rank_{rank}_")
        sys.argv += ["hydra.output_subdir=null", f"hydra.run.dir={folder}"]
