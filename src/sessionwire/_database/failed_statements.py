"""Track failed statements, so that no block commits silently after an error was caught.

PostgreSQL aborts the transaction of a failed statement and answers its COMMIT with
ROLLBACK, which SQLAlchemy and asyncpg report as success; SQLite goes on without the one
statement. This library treats both alike: only rolling back to a savepoint clears a
failure.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError


class _FailureLog:
    """The failures in the current transaction of one connection."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.savepoints: list[int] = []  # the number of errors before each open savepoint


def _log_of(connection: Connection) -> _FailureLog:
    # A mapping, even with weak keys, would keep the connection alive through the
    # tracebacks of its errors. An attribute does not.
    log: _FailureLog = vars(connection).setdefault("_sessionwire_failures", _FailureLog())
    return log


def failed_statements(connection: Connection | None) -> list[BaseException]:
    """Return the failures in a connection's transaction, except those rolled back."""
    return [] if connection is None else _log_of(connection).errors


def record_failure(connection: Connection, error: BaseException, *, whole: bool = False) -> None:
    """Record a failure of the innermost savepoint, or of the `whole` transaction."""
    log = _log_of(connection)
    if whole:
        log.errors.insert(0, error)
        log.savepoints = [before + 1 for before in log.savepoints]
    else:
        log.errors.append(error)


def install_failure_listeners(engine: Engine) -> None:
    """Record the failed statements in all transactions of an engine."""

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        if context.connection is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
            record_failure(context.connection, context.sqlalchemy_exception)

    @event.listens_for(engine, "savepoint")
    def on_savepoint(connection: Connection, _name: Any) -> None:
        log = _log_of(connection)
        log.savepoints.append(len(log.errors))

    @event.listens_for(engine, "release_savepoint")
    def on_release(connection: Connection, _name: Any, _context: Any) -> None:
        _log_of(connection).savepoints.pop()

    @event.listens_for(engine, "rollback_savepoint")
    def on_rollback_to(connection: Connection, _name: Any, _context: Any) -> None:
        log = _log_of(connection)
        del log.errors[log.savepoints.pop() :]

    @event.listens_for(engine, "rollback")
    def on_rollback(connection: Connection) -> None:
        vars(connection).pop("_sessionwire_failures", None)
