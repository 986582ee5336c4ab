"""The table of the comparison."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .trial import Findings

WIDTH = 88
COLUMNS = ("documented recipe", "by hand, with care", "sessionwire")
ROWS: dict[str, Callable[[Findings], int]] = {
    "answered 2xx, row missing": lambda findings: findings.lost,
    "answered an error, row written": lambda findings: findings.kept,
    "failed, nothing was wrong": lambda findings: findings.failed,
    "connections not given back": lambda findings: findings.held,
    "lines of code": lambda findings: findings.lines,
}


@contextmanager
def progress(total: int) -> Generator[Callable[[], None]]:
    columns = TextColumn(" "), BarColumn(40), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def show(findings: Sequence[Findings]) -> None:
    """Print the findings of each service, in the order of the columns."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for label, count in ROWS.items():
        table.add_row(label, *(f"{count(of_one)}" for of_one in findings))
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a terminal that is narrower wraps it, and shows all
    console.print(table)
