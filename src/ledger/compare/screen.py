"""The table of the comparison."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .trial import Findings

WIDTH = 65
ROWS: dict[str, Callable[[Findings], int]] = {
    "answered 2xx, row missing": lambda findings: findings.lost,
    "answered an error, row written": lambda findings: findings.kept,
    "failed, nothing was wrong": lambda findings: findings.failed,
    "connections not given back": lambda findings: findings.held,
}


@contextmanager
def progress(total: int) -> Generator[Callable[[], None]]:
    columns = TextColumn(" "), BarColumn(40), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def show(usual: Findings, ours: Findings) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("usual recipe", "sessionwire"):
        table.add_column(column, justify="right", no_wrap=True, min_width=15)
    for label, count in ROWS.items():
        table.add_row(label, f"{count(usual)}", f"{count(ours)}")
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a terminal that is narrower wraps it, and shows all
    console.print(table)
