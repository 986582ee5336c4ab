"""`count_statements`: the statements that a block sends to the database.

With it, one query per row is a failing test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from dependency_injector import containers
from sqlalchemy import Connection, Engine, event

from sessionwire._database.call_sites import running_line
from sessionwire._database.runtime import database_of
from sessionwire._managers import managers_of
from sessionwire.manager import DatabaseSessionManager

UNCOUNTED = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")
MAX_WIDTH = 200  # characters of a statement in a message


@dataclass(frozen=True)
class SentStatement:
    """A statement that was sent to the database.

    Attributes:
        sql: The SQL text, without parameters.
        where: The line that sent the statement, such as `app.py:12 in Accounts.names`.
    """

    sql: str
    where: str


@contextmanager
def count_statements(
    database: DatabaseSessionManager | containers.Container, *, at_most: int | None = None
) -> Generator[list[SentStatement]]:
    """Record the statements sent during the block: `len(sent)` is their number.

    The statements of all tasks count, except for BEGIN, COMMIT, ROLLBACK and
    savepoints.

    Args:
        database: A manager, or a container for all databases in it.
        at_most: The number of statements that the block may send; None: any number.

    Raises:
        AssertionError: The block ended without an error, and sent more than `at_most`.
            The message lists each statement, how often it was sent, and the line that
            sent it.
        ConfigurationError: The container has no database.
    """
    databases = [database_of(manager) for manager in managers_of(database)]
    sent: list[SentStatement] = []

    def record(connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
        engine = connection.engine
        if not sql.startswith(UNCOUNTED) and any(
            database.is_initialized and database.engines.includes(engine) for database in databases
        ):
            sent.append(SentStatement(sql, running_line()))

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", record)
    if at_most is not None and len(sent) > at_most:
        raise AssertionError(_too_many(sent, at_most))


def _too_many(sent: list[SentStatement], at_most: int) -> str:
    lines = [f"at most {at_most} statements were expected, and {len(sent)} were sent:"]
    for statement, count in Counter(sent).most_common():
        sql = shorten(statement.sql, MAX_WIDTH, placeholder=" …")
        lines.append(f"{count:>5} × {sql} — {statement.where}")  # noqa: RUF001
    return "\n".join(lines)
