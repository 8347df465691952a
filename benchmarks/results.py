"""Keep the rows of figures: one CSV a figure, with the environment and the commit in every row."""

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results"


@cache
def environment() -> dict[str, Any]:
    """Describe the machine and the versions of a measurement; ``load`` is the load average of the minute before."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Name the commit that is measured, with a plus if tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        # results do not change what is measured
        changes = [*git, "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results"]
        dirty = subprocess.run(changes, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "unknown"
    return (name or "unknown") + ("+" if dirty else "")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append(figure: str, rows: Sequence[dict[str, Any]], folder: Path = FOLDER) -> Path:
    """Add rows, all with the same columns, to the figure's CSV, and the environment to each.

    The file may have a last column ``note`` that somebody wrote by hand; new rows leave it empty.

    Raises:
        ValueError: if the file exists with other columns.
    """
    path = folder / f"{figure}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    columns = header = [*rows[0], *environment()]
    fresh = not path.exists()
    if not fresh:
        with open(path, newline="") as file:
            header = next(csv.reader(file), columns)
        if header not in (columns, [*columns, "note"]):
            raise ValueError(
                f"{path} has other columns: move it away first. It has {header}; the new rows have {columns}."
            )
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **environment()} for row in rows)
    return path


def read(figure: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """Read all rows of a figure, oldest first; none if there is no file."""
    path = folder / f"{figure}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the columns that differ, below the values that all rows share; a single row is printed whole."""
    if len(rows) == 1:
        rows = [{"": key.replace("_", " "), "value": value} for key, value in rows[0].items() if value != ""]
    common = {key: value for key, value in rows[0].items() if len(rows) > 1 and all(r[key] == value for r in rows)}
    table = Table()
    columns = [column for column in rows[0] if column not in common]
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(", ".join(f"{key} {_text(value)}" for key, value in common.items() if value != ""))
    console.print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
