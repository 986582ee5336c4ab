"""The report of the demo, printed on the console. It fits in 80 columns."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from sqlite3 import sqlite_version_info

from sqlalchemy.ext.asyncio import AsyncEngine

from ledger.repositories import Audit

from .reconciliation import Check
from .workload import Answer, OrderKind

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError(
        "the ledger's demo draws with rich, which is not installed: pip install rich"
    ) from error

DATABASE_NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
INDENT = "  "


class ConsoleReport:
    """Print each step of the demo and its result."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.passed_mark, self.failed_mark = (
            ("ok", "WRONG") if self.console.options.ascii_only else ("✔", "✘")
        )

    def show_header(self, engine: AsyncEngine) -> None:
        self._line()
        self._line(("ledger demo", "bold"), " on ", (_describe(engine), "cyan"))
        self._line()

    def show_earlier_runs(self, audit: Audit) -> None:
        if not audit.accounts:
            self._line("The books are empty.")
            return
        is_right = (
            ("the books are right.", "green")
            if audit.is_balanced
            else ("the books are WRONG.", "bold red")
        )
        left = f"{_count(audit.accounts, 'account')} and {_count(audit.transfers, 'transfer')}"
        self._line(f"Earlier runs left {left}: ", is_right)

    def show_workload(self, accounts: int, opening: Decimal, calls: int, workers: int) -> None:
        self._line(f"Opened {_count(accounts, 'account')} with {opening:,} each.")
        self._line(f"Sending {_count(calls, 'transfer')}, {workers:,} at a time.")
        self._line()

    @contextmanager
    def show_progress(self, total: int) -> Generator[Callable[[], None]]:
        """Show a progress bar. Call the yielded function after each answer."""
        columns = TextColumn(" "), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("transfers", total=total)
            yield lambda: progress.advance(task)

    def show_answers(self, answers: Sequence[Answer]) -> None:
        table = _table("what was sent", header=True)
        for column in ("calls", "acknowledged", "refused"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("error")
        for kind in OrderKind:
            errors = [answer.error for answer in answers if answer.order.kind is kind]
            refused = Counter(type(error).__name__ for error in errors if error is not None)
            counts = len(errors), len(errors) - refused.total(), refused.total()
            if errors:
                table.add_row(kind.value, *(f"{count:,}" for count in counts), "\n".join(refused))
        self.console.print(table)
        if any(
            answer.transfer is not None and answer.order.kind is OrderKind.CONFLICTING
            for answer in answers
        ):
            self._line(("Of two transfers with one key, the first to arrive is booked.", "dim"))
        self._line()

    def show_checks(self, checks: Sequence[Check]) -> None:
        table = _table("check")
        for check in checks:
            mark = (self.passed_mark, "green") if check.passed else (self.failed_mark, "bold red")
            details = Text(check.details, "" if check.passed else "red")
            table.add_row(Text.assemble(mark, " ", check.name), details)
        self.console.print(table)
        self._line()

    def show_result(self, all_passed: bool, calls: int, seconds: float, retries: int) -> None:
        passed = ("Nothing lost.", "bold green")
        failed = (f"Something is wrong: see {self.failed_mark} above.", "bold red")
        took = f"{_count(calls, 'transfer')} in {seconds:.1f} s, {calls / seconds:,.0f} a second"
        self._line(passed if all_passed else failed, f" {took}; retries: {retries:,}.")
        if retries:
            self._line(
                (
                    "Concurrent transfers at one account can conflict; one of them is tried again.",
                    "dim",
                )
            )

    def _line(self, *parts: str | tuple[str, str]) -> None:
        # Wrapped here, because Rich would not indent the second line of a long one.
        width = self.console.width - len(INDENT)
        for line in Text.assemble(*parts).wrap(self.console, width) or [Text()]:
            line.rstrip()
            self.console.print(Text.assemble(INDENT if line else "", line), soft_wrap=True)


def _table(first: str, *, header: bool = False) -> Table:
    table = Table(box=None, padding=(0, 0, 0, len(INDENT)), show_header=header, header_style="dim")
    table.add_column(first, no_wrap=True)
    return table


def _describe(engine: AsyncEngine) -> str:
    dialect = engine.dialect
    version = (
        sqlite_version_info
        if dialect.name == "sqlite"
        else getattr(dialect, "server_version_info", ())
    )
    name = DATABASE_NAMES.get(dialect.name, dialect.name)
    return f"{name} {'.'.join(map(str, version))}, {engine.url.database}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
