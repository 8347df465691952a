"""Show what a proof found as tables."""

from rich.console import Console
from rich.table import Table

from lightning_lss.proof.report import Report

_ROWS = 20  # of parameters and modules; the others are summed up in a line


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the gradients of parameters, the outputs of modules, and what one token reaches."""
    console = console or Console(soft_wrap=True)
    if report.gradients:
        table = _table("gradient of", "relative error", "norm")
        for x in report.gradients[:_ROWS]:
            table.add_row(x.name, _marked(x.error, report.tolerance), f"{x.norm:.3g}")
        _print(console, table, len(report.gradients) - _ROWS, "parameters, with smaller errors")
    if report.modules:
        table = _table("output of", "relative error")
        for name, error in list(report.modules.items())[:_ROWS]:
            table.add_row(name, _marked(error, report.tolerance))
        _print(console, table, len(report.modules) - _ROWS, "modules")
    if report.leaks:
        table = _table("changed", "output of", "moves on one rank", f"moves on {report.size}")
        for leak in report.leaks:
            where = f"{leak.entry}, position {leak.position}"
            table.add_row(where, leak.module, _ranges(leak.on_one), _ranges(leak.on_all))
        console.print(table, "")
    if report.exact:
        worst = report.gradients[0]
        console.print(
            f"Exact: the gradients of {len(report.gradients)} parameters over {report.size} ranks are those of one device"
            f" (largest relative error {worst.error:.1e}; rounding explains {report.tolerance:.0e}), on {report.length} of"
            f" {report.of_length} positions."
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(
            column, justify="right" if number and "moves" not in column and "output" not in column else "left"
        )
    return table


def _print(console: Console, table: Table, more: int, what: str) -> None:
    console.print(table)
    console.print(f"... and {more} more {what}\n" if more > 0 else "")


def _marked(error: float, tolerance: float) -> str:
    return f"{error:.1e}" if error <= tolerance else f"[bold red]{error:.1e}[/bold red]"


def _ranges(positions: list[int]) -> str:
    """Write positions as runs, such as ``8-15``."""
    runs: list[list[int]] = []
    for x in positions:
        if runs and x == runs[-1][-1] + 1:
            runs[-1][-1] = x
        else:
            runs.append([x, x])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) or "nothing"
