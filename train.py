"""Train the LSS Transformer from the command line: compose a configuration with Hydra, instantiate it, run it.

python train.py                                      # the main job: two CPU ranks share sequences of 4,096 bytes
python train.py seq_len=8192 devices=4 sequence_parallel_size=2
python train.py mode=plan model=1b seq_len=1048576 devices=64 hardware=h100
python train.py --help                               # all groups and keys
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    import lightning.pytorch as pl

MODES = ("fit", "validate", "test", "predict", "plan")
RESULT = "result.json"


def load_layout() -> ModuleType:
    """The package's ``layout`` module by itself: pure integer arithmetic, while the package takes seconds to import
    torch."""
    package = importlib.util.find_spec("lightning_lss")
    if package is None or not package.submodule_search_locations:
        fail("the package lightning_lss is not installed: run `pip install -e .` in the folder of train.py.")
    path = Path(package.submodule_search_locations[0]) / "sequence" / "layout.py"
    spec = importlib.util.spec_from_file_location("layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fail(message: str) -> NoReturn:
    """End with a sentence instead of a stack of frames."""
    print(f"train.py: {message}\n(HYDRA_FULL_ERROR=1 shows where this was found.)", file=sys.stderr)
    sys.exit(1)


def check(cfg: DictConfig) -> None:
    """Refuse combinations that cannot work, before anything slow happens.

    Raises:
        ValueError: naming the values and the remedy.
    """
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode} is unknown: choose one of {', '.join(MODES)}.")
    if cfg.mode == "plan":
        check_plan(cfg)
        return
    if cfg.mode != "fit" and cfg.ckpt_path is None:
        raise ValueError(
            f"mode={cfg.mode} needs a trained model: add ckpt_path=<folder of the run>/checkpoints/last.ckpt."
        )
    if cfg.ckpt_path is not None and not (Path(cfg.ckpt_path).exists() or "://" in cfg.ckpt_path):
        raise ValueError(f"ckpt_path={cfg.ckpt_path} does not exist.")
    check_folder(cfg)
    for key in ("data.path", "seq_len", "devices"):
        if OmegaConf.is_missing(*_parent(cfg, key)):
            raise ValueError(f"{key} is not set: add {key}=...")
    if isinstance(cfg.devices, int) and cfg.devices > 0:
        check_split(cfg, cfg.devices * cfg.trainer.num_nodes)


def splits_sequence(cfg: DictConfig) -> bool:
    """Whether the strategy is one of this package's."""
    return cfg.strategy.get("_target_", "").endswith(("LSSStrategy", "MegatronStrategy"))


def check_folder(cfg: DictConfig) -> None:
    """Refuse a checkpoint that is a folder where the strategy reads files only; raises ``ValueError``."""
    if cfg.ckpt_path is not None and Path(cfg.ckpt_path).is_dir() and not splits_sequence(cfg):
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} is a folder, which this strategy cannot read: make a file of it with"
            " lightning_lss.checkpoint.consolidate(folder, file), or use strategy=lss."
        )


def check_plan(cfg: DictConfig) -> None:
    """Refuse what cannot be planned, and files that could not be written; raises ``ValueError``."""
    if not isinstance(cfg.devices, int):
        raise ValueError(f"mode=plan needs a number of devices, not devices={cfg.devices}: add devices=8, for example.")
    if cfg.trainer.accelerator not in ("cpu", "auto") and cfg.hardware.kernel == "cpu_flash":
        kinds = "v100, a100, h100 or h200"
        raise ValueError(
            f"hardware={cfg.hardware.name} is not what trainer.accelerator={cfg.trainer.accelerator} runs on: add hardware={kinds}."
        )
    for name in ("csv", "png", "weak_scaling"):
        path = cfg.plan[name]
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"plan.{name}={path} cannot be written: there is no folder {Path(path).parent}.")


def _parent(cfg: DictConfig, key: str) -> tuple[Any, str]:
    group, _, name = key.rpartition(".")
    return (OmegaConf.select(cfg, group) if group else cfg), name


def check_split(cfg: DictConfig, world_size: int) -> None:
    """Refuse sizes that do not divide each other; raises ``ValueError``."""
    target = cfg.strategy.get("_target_", "")
    if target == "builtins.str" and world_size > 1:
        raise ValueError(
            f"strategy=single has one process, not devices={world_size}: use strategy=lss or strategy=ddp."
        )
    if not splits_sequence(cfg):
        if cfg.sequence_parallel_size not in ("auto", 1):
            raise ValueError(
                f"sequence_parallel_size={cfg.sequence_parallel_size} has no meaning for this strategy: use strategy=lss."
            )
        return
    layout = load_layout()
    size = layout.resolve_sequence_parallel_size(world_size, cfg.strategy.sequence_parallel_size)
    if target.endswith("MegatronStrategy"):
        layout.check_heads(cfg.model.num_heads, size)
        layout.check_length(cfg.seq_len, size, "contiguous")
        return
    name = "zigzag" if cfg.strategy.layout == "auto" else cfg.strategy.layout
    layout.check_layout(name)
    layout.check_length(cfg.seq_len, size, name)


def run_in_new_process() -> float | None:
    """One run of a sweep. Processes and their group outlive a run, so each run of a multirun gets an interpreter of its
    own."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = [*HydraConfig.get().overrides.task, f'hydra.run.dir="{folder}"', *_config_choice()]
    subprocess.run([sys.executable, __file__, *overrides], check=True, cwd=hydra.utils.get_original_cwd())
    result = json.loads((folder / RESULT).read_text())
    return result.get("val/bits_per_byte")


def _config_choice() -> list[str]:
    """``--config-name`` and ``--config-dir`` as they were given."""
    given = sys.argv[1:]
    flags = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")
    pairs = [given[i : i + 2] for i, word in enumerate(given) if word in flags]
    return [word for pair in pairs for word in pair] + [w for w in given if w.startswith(tuple(f"{f}=" for f in flags))]


def run(cfg: DictConfig) -> None:
    """Instantiate everything that ``cfg`` names and do what its mode says."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LearningRateMonitor

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = hydra.utils.instantiate(cfg.data)
    from_data = {
        name: getattr(datamodule, name) for name in ("vocab_size", "bytes_per_token") if cfg.model[name] is None
    }
    model = hydra.utils.instantiate(cfg.model, _convert_="all", **from_data)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.get("logger") else False
    callbacks = [hydra.utils.instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    if not logger:  # which this one refuses to be without
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer: pl.Trainer = hydra.utils.instantiate(
        cfg.trainer,
        strategy=hydra.utils.instantiate(cfg.strategy),
        logger=logger,
        callbacks=callbacks,
        default_root_dir=cfg.output_dir,
    )
    options = {"return_predictions": False} if cfg.mode == "predict" else {}
    getattr(trainer, cfg.mode)(model, datamodule=datamodule, ckpt_path=cfg.ckpt_path, **options)
    if trainer.is_global_zero:
        report(trainer, Path(cfg.output_dir))


def run_plan(cfg: DictConfig) -> None:
    """Predict memory, traffic and time of the training that ``cfg`` describes, for every (D, S); nothing is trained."""
    from dataclasses import fields, replace

    from rich.console import Console

    from lightning_lss.models.transformer import TransformerConfig
    from lightning_lss.planner import plan, usual_options
    from lightning_lss.planner.hardware import bytes_of
    from lightning_lss.planner.report import draw_plan, print_plan, write_csv
    from lightning_lss.planner.scaling import draw_weak_scaling, print_weak_scaling, weak_scaling

    hardware = hydra.utils.instantiate(cfg.hardware, _convert_="all")
    if cfg.plan.memory is not None:
        hardware = replace(hardware, memory=bytes_of(cfg.plan.memory), usable=1.0)
    vocab_size = cfg.model.vocab_size or OmegaConf.select(cfg, "data.vocab_size") or 256  # bytes, unless said otherwise
    names = {field.name for field in fields(TransformerConfig)}
    sizes = {name: value for name, value in cfg.model.items() if name in names}
    model = TransformerConfig(**{**sizes, "vocab_size": vocab_size})
    layout = cfg.strategy.get("layout", "auto")
    chosen = {
        "layout": "zigzag" if layout == "auto" else layout,
        "sharding": cfg.strategy.get("sharding"),
        "communication_dtype": cfg.strategy.get("communication_dtype"),
        "accumulate_grad_batches": cfg.trainer.accumulate_grad_batches,
        "precision": planned_precision(cfg, hardware.precision),
    }
    options = usual_options(hardware, **{**chosen, **cfg.plan.options})
    console = Console(soft_wrap=True)
    if cfg.plan.weak_scaling is not None:
        scaling = weak_scaling(model, hardware, options, cfg.data.batch_size)
        print_weak_scaling(scaling, console)
        draw_weak_scaling(scaling).savefig(cfg.plan.weak_scaling, dpi=120)
        return
    planned = plan(
        model,
        cfg.seq_len,
        cfg.devices * cfg.trainer.num_nodes,
        hardware,
        batch_size=cfg.data.batch_size,
        global_batch=cfg.plan.global_batch,
        options=options,
    )
    print_plan(planned, console)
    if cfg.plan.csv is not None:
        write_csv(planned, cfg.plan.csv)
    if cfg.plan.png is not None:
        draw_plan(planned).savefig(cfg.plan.png, dpi=120)


def planned_precision(cfg: DictConfig, usual: str) -> str:
    """What ``plan.precision`` says; else the trainer's, unless that is the CPU trainer's own while other hardware is
    planned for, of which ``usual`` is the usual one."""
    if cfg.plan.precision is not None:
        return cfg.plan.precision
    left_alone = cfg.trainer.accelerator == "cpu" and cfg.trainer.precision == "32-true"
    return usual if left_alone else str(cfg.trainer.precision)


def report(trainer: pl.Trainer, folder: Path) -> None:
    """Print what the run came to and where things lie; write the metrics to ``result.json``."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from rich.console import Console
    from rich.table import Table

    from lightning_lss.callbacks import LSSThroughputMonitor

    result = {name: value.item() for name, value in trainer.callback_metrics.items()}
    rates = [x.tokens_per_second for x in trainer.callbacks if isinstance(x, LSSThroughputMonitor)]  # type: ignore[attr-defined]
    table = Table.grid(padding=(0, 2))
    for stage in ("val", "test"):
        if f"{stage}/bits_per_byte" in result:
            table.add_row(f"{stage} bits per byte", f"{result[f'{stage}/bits_per_byte']:.3f}")
    if rates and rates[0] is not None:
        result["train/tokens_per_sec"] = rates[0]
        table.add_row("tokens per second", f"{rates[0]:,.0f}")
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        table.add_row("checkpoint", shown(checkpoint))
    if (folder / "predictions").is_dir():
        table.add_row("predictions", shown(folder / "predictions"))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            table.add_row("follow it with", f"tensorboard --logdir {shown(folder)}")
        elif logger.log_dir is not None:
            table.add_row("logged", shown(logger.log_dir))
    (folder / RESULT).write_text(json.dumps(result, indent=2))
    print()
    Console(soft_wrap=True).print(table)


def shown(path: str | Path) -> str:
    """A path as the user would type it from here."""
    near = Path(path).absolute().is_relative_to(Path.cwd())
    return os.path.relpath(path) if near else str(path)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One run, or one of a multirun."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data here is cheap to load
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # last.ckpt, a folder with strategy=megatron
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")  # its own use of torch
    try:
        check(cfg)
        if cfg.mode == "plan":
            run_plan(cfg)
            return None
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if "RANK" in os.environ:
                raise ValueError(
                    "-m starts a process for each run and does not work under torchrun: give one run at a time."
                )
            return run_in_new_process()
        run(cfg)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the run has said why
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not is_mistake_of_user(cause or error):
            raise
        fail(str(cause or error))
    return None


def is_mistake_of_user(error: BaseException) -> bool:
    """Whether an error is about what was asked for, rather than a fault of the program."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = (ValueError, FileNotFoundError, OmegaConfBaseException)
    return isinstance(error, told) or bool(names & {"MisconfigurationException", "DownloadError"})


def keep_to_own_folder() -> None:
    """Under torchrun or SLURM every rank composes its own configuration: only the first may make the run's folder.

    Clocks differ, so the ranks' ``${now:...}`` would too; Lightning's checkpoints and logs follow rank 0 anyway.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if rank > 0:
        folder = tempfile.mkdtemp(prefix=f"lightning_lss_rank_{rank}_")
        sys.argv += ["hydra.output_subdir=null", f"hydra.run.dir={folder}"]


if __name__ == "__main__":
    keep_to_own_folder()
    main()
