"""The report of the comparison, printed on the console."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .experiment import Result

MIN_WIDTH = 88
COLUMNS = ("documented recipe", "by hand, with care", "sessionwire")
ROWS: dict[str, Callable[[Result], int]] = {
    "answered 2xx, row missing": lambda result: result.missing_rows,
    "answered an error, row written": lambda result: result.unexpected_rows,
    "failed, nothing was wrong": lambda result: result.spurious_failures,
    "connections not given back": lambda result: result.leaked_connections,
    "lines of code": lambda result: result.lines_of_code,
}


@contextmanager
def show_progress(total: int) -> Generator[Callable[[], None]]:
    """Show a progress bar. Call the yielded function after each answer."""
    columns = TextColumn(" "), BarColumn(40), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def show_results(results: Sequence[Result]) -> None:
    """Print the results of the services, in the order of the columns."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for label, count in ROWS.items():
        table.add_row(label, *(f"{count(result)}" for result in results))
    console = Console(highlight=False)
    # A narrower terminal wraps the lines; Rich would cut the columns.
    console.width = max(console.width, MIN_WIDTH)
    console.print(table)
