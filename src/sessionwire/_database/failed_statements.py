"""Statements that failed in a transaction: no block may end as if nothing had happened, whoever caught the error.

PostgreSQL aborts such a transaction, and answers its COMMIT with ROLLBACK, which SQLAlchemy and asyncpg take for
success; SQLite goes on without the one statement. Here they mean the same: only a savepoint undoes a failure.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError


class _Failures:
    """Of one connection's transaction."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.savepoints: list[int] = []  # how many errors there were before each


def _failures_of(connection: Connection) -> _Failures:
    # An attribute, not a mapping: a mapping would keep the connection alive through the tracebacks of its errors.
    found: _Failures = vars(connection).setdefault("_sessionwire_failures", _Failures())
    return found


def failures(connection: Connection | None) -> list[BaseException]:
    """What failed in the transaction of this connection, and was not undone."""
    return [] if connection is None else _failures_of(connection).errors


def note_failure(connection: Connection, error: BaseException, *, whole: bool = False) -> None:
    """Count it as a failure of the innermost savepoint, or of the `whole` transaction."""
    found = _failures_of(connection)
    if whole:
        found.errors.insert(0, error)
        found.savepoints = [before + 1 for before in found.savepoints]
    else:
        found.errors.append(error)


def watch_failures(engine: Engine) -> None:
    """Take note of them in all transactions of this engine."""

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        if context.connection is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
            _failures_of(context.connection).errors.append(context.sqlalchemy_exception)

    @event.listens_for(engine, "savepoint")
    def begun(connection: Connection, _name: Any) -> None:
        found = _failures_of(connection)
        found.savepoints.append(len(found.errors))

    @event.listens_for(engine, "release_savepoint")
    def released(connection: Connection, _name: Any, _context: Any) -> None:
        _failures_of(connection).savepoints.pop()

    @event.listens_for(engine, "rollback_savepoint")
    def undone(connection: Connection, _name: Any, _context: Any) -> None:
        found = _failures_of(connection)
        del found.errors[found.savepoints.pop() :]

    @event.listens_for(engine, "rollback")
    def ended(connection: Connection) -> None:
        vars(connection).pop("_sessionwire_failures", None)
