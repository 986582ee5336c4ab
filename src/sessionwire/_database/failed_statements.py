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


class FailureLog:
    """The failures in the current transaction of one connection, except those that were
    rolled back with a savepoint.
    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.savepoints: list[int] = []  # the number of errors before each open savepoint

    def record(self, error: BaseException, *, whole: bool = False) -> None:
        """Record a failure of the innermost savepoint, or of the `whole` transaction."""
        if whole:
            self.errors.insert(0, error)
            self.savepoints = [before + 1 for before in self.savepoints]
        else:
            self.errors.append(error)


def failure_log(connection: Connection) -> FailureLog:
    """Return the log of a connection."""
    # A mapping, even with weak keys, would keep the connection alive through the
    # tracebacks of its errors. An attribute does not.
    log: FailureLog = vars(connection).setdefault("_sessionwire_failures", FailureLog())
    return log


def install_failure_listeners(engine: Engine) -> None:
    """Record the failed statements in all transactions of an engine."""

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        if context.connection is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
            failure_log(context.connection).record(context.sqlalchemy_exception)

    @event.listens_for(engine, "savepoint")
    def on_savepoint(connection: Connection, _name: Any) -> None:
        log = failure_log(connection)
        log.savepoints.append(len(log.errors))

    @event.listens_for(engine, "release_savepoint")
    def on_release(connection: Connection, _name: Any, _context: Any) -> None:
        failure_log(connection).savepoints.pop()

    @event.listens_for(engine, "rollback_savepoint")
    def on_rollback_to(connection: Connection, _name: Any, _context: Any) -> None:
        log = failure_log(connection)
        del log.errors[log.savepoints.pop() :]

    @event.listens_for(engine, "rollback")
    def on_rollback(connection: Connection) -> None:
        log = failure_log(connection)
        log.errors.clear()
        log.savepoints.clear()
