"""`mode=plan`: predict what a run would need instead of training."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


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
