"""Report a run: a table on the screen, and `result.json`."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from lightning_lss.callbacks import LSSThroughputMonitor

RESULT = "result.json"


def report(trainer: pl.Trainer, folder: Path) -> None:
    """Print the metrics and paths of a run, and write the metrics to ``result.json`` in ``folder``."""
    result = {name: value.item() for name, value in trainer.callback_metrics.items()}
    table = Table.grid(padding=(0, 2))
    for stage in ("val", "test"):
        if f"{stage}/bits_per_byte" in result:
            table.add_row(f"{stage} bits per byte", f"{result[f'{stage}/bits_per_byte']:.3f}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LSSThroughputMonitor) and callback.tokens_per_second is not None:
            result["train/tokens_per_sec"] = callback.tokens_per_second
            table.add_row("tokens per second", f"{callback.tokens_per_second:,.0f}")
    written = trainer.state.fn == TrainerFn.FITTING  # other modes restore the path of the run that they evaluate
    if written and (checkpoint := getattr(trainer.checkpoint_callback, "best_model_path", "")):
        table.add_row("checkpoint", shown(checkpoint))
    if (folder / "hf").is_dir():
        table.add_row("for from_pretrained", shown(folder / "hf"))
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
    """Write a path as the user would type it from here."""
    return os.path.relpath(path) if Path(path).absolute().is_relative_to(Path.cwd()) else str(path)
