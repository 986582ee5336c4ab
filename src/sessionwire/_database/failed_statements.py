"""Track failed statements, so that no block commits silently after an error was caught.

PostgreSQL aborts the transaction of a failed statement and answers its COMMIT with
ROLLBACK, which SQLAlchemy and asyncpg report as success; SQLite goes on without the one
statement. This library treats both alike: only rolling back to a savepoint clears a
failure.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def clear(self, *_: object) -> None:
        """Forget all, because the transaction was rolled back."""
        self.errors.clear()
        self.savepoints.clear()


def failure_log(connection: Connection) -> FailureLog:
    """Return the log of a connection."""
    # A mapping, even with weak keys, would keep the connection alive through the
    # tracebacks of its errors. An attribute does not.
    log: FailureLog | None = connection.__dict__.get("_sessionwire_failures")
    if log is None:
        log = connection.__dict__["_sessionwire_failures"] = FailureLog()
    return log


def failures_of(connection: Connection) -> Sequence[BaseException]:
    """Return the failures in the current transaction of a connection."""
    log: FailureLog | None = connection.__dict__.get("_sessionwire_failures")
    return () if log is None else log.errors


def install_failure_listener(engine: Engine) -> None:
    """Record the failed statements in all transactions of an engine."""

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        if context.connection is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
            failure_log(context.connection).record(context.sqlalchemy_exception)


def record_savepoints(dialect: Any) -> None:
    """Record the savepoints in all transactions of a dialect.

    The events of an engine would do too, but SQLAlchemy makes an object for each event
    of each connection once an engine has one listener.
    """
    set_savepoint, release = dialect.do_savepoint, dialect.do_release_savepoint
    roll_back_to = dialect.do_rollback_to_savepoint

    def do_savepoint(connection: Connection, name: str) -> None:
        log = failure_log(connection)
        log.savepoints.append(len(log.errors))
        set_savepoint(connection, name)

    def do_release_savepoint(connection: Connection, name: str) -> None:
        failure_log(connection).savepoints.pop()
        release(connection, name)

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        log = failure_log(connection)
        del log.errors[log.savepoints.pop() :]
        roll_back_to(connection, name)

    dialect.do_savepoint = do_savepoint
    dialect.do_release_savepoint = do_release_savepoint
    dialect.do_rollback_to_savepoint = do_rollback_to_savepoint
