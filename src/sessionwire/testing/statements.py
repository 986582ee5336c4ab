"""`count_statements`: what a block sends to the database, so that a query per row is a failing test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from dependency_injector import containers
from sqlalchemy import Connection, Engine, event

from sessionwire._database.runtime import database_of
from sessionwire.manager import DatabaseSessionManager

from ._call_sites import where
from .managers import managers_of

TRANSACTION_CONTROL = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")
WIDTH = 200  # of a statement in a message


@dataclass(frozen=True)
class SentStatement:
    """A statement without its parameters, and the line that sent it, as in `app.py:12 in Accounts.names`."""

    sql: str
    where: str


@contextmanager
def count_statements(
    database: DatabaseSessionManager | containers.Container, *, at_most: int | None = None
) -> Generator[list[SentStatement]]:
    """Record the statements that are sent while the block is open, by whatever task: `len(sent)` is their number.

    `database` is a manager, or a container for all databases in it. BEGIN, COMMIT and savepoints don't count.

    Raises `AssertionError` at the end of a block that ends well where there were more than `at_most`, with each
    statement, how often it was sent, and the line that sent it.
    """
    databases = [database_of(manager) for manager in managers_of(database)]
    sent: list[SentStatement] = []

    def note(connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
        if not sql.startswith(TRANSACTION_CONTROL) and any(each.uses_engine(connection.engine) for each in databases):
            sent.append(SentStatement(sql, where()))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    if at_most is not None and len(sent) > at_most:
        raise AssertionError(_too_many(sent, at_most))


def _too_many(sent: list[SentStatement], at_most: int) -> str:
    lines = [f"at most {at_most} statements were to be sent, and {len(sent)} were:"]
    for statement, count in Counter(sent).most_common():
        lines.append(f"{count:>5} × {shorten(statement.sql, WIDTH, placeholder=' …')} — {statement.where}")  # noqa: RUF001
    return "\n".join(lines)
