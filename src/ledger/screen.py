"""What the demo shows: what it found, how far it is, what was answered, and the verdict."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from sqlite3 import sqlite_version_info

from sqlalchemy.ext.asyncio import AsyncEngine

from .proof import Check
from .repositories import Audit
from .traffic import Answer, Kind

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError("the ledger's demo draws with rich, which is not installed: pip install rich") from error

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.good, self.bad = ("ok", "WRONG") if self.console.options.ascii_only else ("✔", "✘")

    def began(self, engine: AsyncEngine) -> None:
        self._line()
        self._line(("ledger demo", "bold"), " on ", (_describe(engine), "cyan"))
        self._line()

    def found(self, books: Audit) -> None:
        if not books.accounts:
            self._line("The books are empty.")
            return
        verdict = ("the books are right.", "green") if books.agree else ("the books are WRONG.", "bold red")
        left = f"{_many(books.accounts, 'account')} and {_many(books.transfers, 'transfer')}"
        self._line(f"Earlier runs left {left}: ", verdict)

    def opened(self, accounts: int, each: Decimal, calls: int, workers: int) -> None:
        self._line(f"Opened {_many(accounts, 'account')} with {each:,} each.")
        self._line(f"Sending {_many(calls, 'transfer')}, {workers:,} at a time.")
        self._line()

    @contextmanager
    def progress(self, total: int) -> Generator[Callable[[], None]]:
        columns = TextColumn(" "), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("transfers", total=total)
            yield lambda: progress.advance(task)

    def answered(self, answers: Sequence[Answer]) -> None:
        table = _table("what was sent", header=True)
        for column in ("calls", "acknowledged", "refused"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("as")
        for kind in Kind:
            errors = [answer.error for answer in answers if answer.order.kind is kind]
            refused = Counter(type(error).__name__ for error in errors if error is not None)
            counts = len(errors), len(errors) - refused.total(), refused.total()
            if errors:
                table.add_row(kind.value, *(f"{count:,}" for count in counts), ", ".join(refused))
        self.console.print(table)
        if any(answer.transfer is not None and answer.order.kind is Kind.OTHER for answer in answers):
            self._line(("Of two transfers with one key, the one that arrives first is booked.", "dim"))
        self._line()

    def proved(self, checks: Sequence[Check]) -> None:
        table = _table("check")
        for check in checks:
            mark = (self.good, "green") if check.holds else (self.bad, "bold red")
            finding = Text(check.finding, "" if check.holds else "red")
            table.add_row(Text.assemble(mark, " ", check.claim), finding)
        self.console.print(table)
        self._line()

    def verdict(self, right: bool, calls: int, seconds: float, retries: int) -> None:
        said = ("Nothing lost.", "bold green") if right else (f"Something is wrong: see {self.bad} above.", "bold red")
        took = f"{_many(calls, 'transfer')} in {seconds:.1f} s, {calls / seconds:,.0f} a second"
        self._line(said, f" {took}; retries: {retries:,}.")

    def _line(self, *parts: str | tuple[str, str]) -> None:
        self.console.print(Text.assemble("  " if parts else "", *parts), soft_wrap=True)


def _table(first: str, *, header: bool = False) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=header, header_style="dim")
    table.add_column(first, no_wrap=True)
    return table


def _describe(engine: AsyncEngine) -> str:
    dialect = engine.dialect
    version = sqlite_version_info if dialect.name == "sqlite" else getattr(dialect, "server_version_info", ())
    name = DATABASES.get(dialect.name, dialect.name)
    return f"{name} {'.'.join(map(str, version))}, {engine.url.database}"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
