"""`mode=plan`: predict the needs of a run instead of training."""

from dataclasses import fields, replace
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_lss.cli.run import make_model
from lightning_lss.megatron import MegatronScheme
from lightning_lss.planner import Hardware, Options, plan
from lightning_lss.planner.hardware import bytes_of
from lightning_lss.planner.report import draw_plan, print_plan, write_csv


def run_plan(cfg: DictConfig) -> None:
    """Predict memory, traffic and time of the training that ``cfg`` describes, for every (D, S); nothing is trained."""
    hardware: Hardware = hydra.utils.instantiate(cfg.hardware, _convert_="all")
    if cfg.plan.memory is not None:
        hardware = replace(hardware, memory=bytes_of(cfg.plan.memory), usable=1.0)
    data = hydra.utils.get_class(cfg.data._target_)
    if not hasattr(data, "example_batch"):
        raise ValueError(
            f"{data.__name__} has no example_batch: add a class method example_batch(seq_len, batch_size) that returns what"
            " training_step receives, of tensors on the meta device, so that mode=plan knows it without data."
        )
    console = Console(soft_wrap=True)
    text = TextColumn("traced {task.completed} steps, now {task.description}")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        planned = plan(
            lambda: make_model(cfg, lambda name: of_data(cfg, name)),
            data.example_batch(cfg.seq_len, cfg.data.get("batch_size", 1)),
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


def of_data(cfg: DictConfig, name: str) -> Any:
    """Return what a model takes from its data: the configuration's or the class's value, else that of the data themselves."""
    if name == "bytes_per_token":
        return 1.0  # it is for a metric; a text would have to be read for it
    value = OmegaConf.select(cfg.data, name) or getattr(hydra.utils.get_class(cfg.data._target_), name)
    return value or getattr(hydra.utils.instantiate(cfg.data), name)  # 0 where a tokenizer or an alphabet says it


def _options(cfg: DictConfig, usual_precision: str) -> dict[str, Any]:
    """Return the planner's options that the trainer and the strategy set.

    A CPU trainer with its default precision says nothing about other hardware, which then has its usual one.
    """
    names = {field.name for field in fields(Options)}
    given: Any = OmegaConf.to_container(cfg.strategy, resolve=True)
    chosen = {name: value for name, value in given.items() if name in names and value not in (None, "auto")}
    left_alone = cfg.trainer.accelerator == "cpu" and cfg.trainer.precision == "32-true"
    precision = cfg.plan.precision or (usual_precision if left_alone else str(cfg.trainer.precision))
    return {**chosen, "precision": precision, "accumulate_grad_batches": cfg.trainer.accumulate_grad_batches}
