"""`mode=plan`: predict the needs of a run instead of training."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_lss.planner import Hardware


def check_plan(cfg: DictConfig) -> None:
    """Refuse what cannot be planned, and paths that cannot be written; raises ``ValueError``."""
    if not isinstance(cfg.devices, int):
        raise ValueError(f"mode=plan needs a number of devices, not devices={cfg.devices}: add devices=8, for example.")
    if cfg.trainer.accelerator not in ("cpu", "auto") and cfg.hardware.kernel == "cpu_flash":
        kinds = "v100, a100, h100 or h200"
        raise ValueError(
            f"hardware={cfg.hardware.name} does not match trainer.accelerator={cfg.trainer.accelerator}: add hardware={kinds}."
        )
    for name in ("csv", "png"):
        path = cfg.plan[name]
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"plan.{name}={path} cannot be written: the folder {Path(path).parent} does not exist.")


def run_plan(cfg: DictConfig) -> None:
    """Predict memory, traffic and time of the training that ``cfg`` describes, for every (D, S); nothing is trained."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from lightning_lss.megatron import MegatronScheme
    from lightning_lss.planner import plan
    from lightning_lss.planner.hardware import bytes_of
    from lightning_lss.planner.report import draw_plan, print_plan, write_csv

    hardware: Hardware = hydra.utils.instantiate(cfg.hardware, _convert_="all")
    if cfg.plan.memory is not None:
        hardware = replace(hardware, memory=bytes_of(cfg.plan.memory), usable=1.0)
    console = Console(soft_wrap=True)
    text = TextColumn("traced {task.completed} steps, now {task.description}")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        planned = plan(
            lambda: hydra.utils.instantiate(cfg.model, _convert_="all", **_of_data(cfg)),
            _example_batch(cfg),
            cfg.devices * cfg.trainer.num_nodes,
            hardware,
            global_batch=cfg.plan.global_batch,
            baselines=[MegatronScheme()],
            on_trace=lambda description: progress.update(task, description=description, advance=1),
            **_options(cfg, hardware.precision),
        )
    print_plan(planned, console)
    if cfg.plan.csv is not None:
        write_csv(planned, cfg.plan.csv)
    if cfg.plan.png is not None:
        draw_plan(planned).savefig(cfg.plan.png, dpi=120)


def _example_batch(cfg: DictConfig) -> Any:
    """Return a batch like the run's data, without reading any."""
    data = hydra.utils.get_class(cfg.data._target_)
    example = getattr(data, "example_batch", None)
    if example is None:
        raise ValueError(
            f"{data.__name__} has no example_batch: add a class method example_batch(seq_len, batch_size) that returns what"
            " training_step receives, of tensors on the meta device, so that mode=plan knows it without data."
        )
    return example(cfg.seq_len, cfg.data.get("batch_size", 1))


def _of_data(cfg: DictConfig) -> dict[str, Any]:
    """Return the model's arguments that come from the data: from its configuration, else from its class."""
    data = hydra.utils.get_class(cfg.data._target_)
    names = [name for name in ("vocab_size", "bytes_per_token") if name in cfg.model and cfg.model[name] is None]
    return {name: OmegaConf.select(cfg.data, name) or getattr(data, name) for name in names}


def _options(cfg: DictConfig, usual_precision: str) -> dict[str, Any]:
    """Return the planner's options that the trainer and the strategy set."""
    from lightning_lss.planner import Options

    names = {field.name for field in fields(Options)} - {"precision", "accumulate_grad_batches"}
    given = OmegaConf.to_container(cfg.strategy, resolve=True)
    assert isinstance(given, dict)
    chosen = {name: value for name, value in given.items() if name in names and value not in (None, "auto")}
    precision = planned_precision(cfg, usual_precision)
    return {**chosen, "precision": precision, "accumulate_grad_batches": cfg.trainer.accumulate_grad_batches}


def planned_precision(cfg: DictConfig, usual: str) -> str:
    """Return ``plan.precision``, else the trainer's. Where the CPU trainer has its default, return ``usual``, the usual
    precision of the planned hardware."""
    if cfg.plan.precision is not None:
        return cfg.plan.precision
    left_alone = cfg.trainer.accelerator == "cpu" and cfg.trainer.precision == "32-true"
    return usual if left_alone else str(cfg.trainer.precision)
