"""Statements that failed in a transaction: no block may end as if nothing had happened, whoever caught the error.

PostgreSQL aborts such a transaction, and answers its COMMIT with ROLLBACK, which SQLAlchemy and asyncpg take for
success; SQLite goes on without the one statement. Here they mean the same: only a savepoint undoes a failure.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from .errors import UnexpectedRollbackError

CONNECTION_LOST = ("08", "57P01", "57P02", "57P03")  # SQLSTATEs, or their classes
IN_FAILED_TRANSACTION = "25P02"
RETRYABLE = ("40001", "40P01", "SQLITE_BUSY")  # serialization failure, deadlock, no lock in time


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


def sqlstate(error: BaseException | None) -> str:
    """The driver's SQLSTATE, or SQLite's name for the error, or nothing; of SQLAlchemy's error, that of its cause."""
    raised = getattr(error, "orig", None) or error
    return getattr(raised, "sqlstate", None) or getattr(raised, "sqlite_errorname", None) or ""


def in_short(error: BaseException) -> str:
    """Its type and first line: the lines after it, of SQLAlchemy's errors, are SQL and its parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def is_retryable(error: BaseException | None) -> bool:
    """Whether nothing was done for certain, and another attempt may succeed. Not for an unknown outcome of a commit."""
    if isinstance(error, UnexpectedRollbackError):
        error = error.__cause__
    is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return is_lost or sqlstate(error).startswith(RETRYABLE)


def origin(error: BaseException | None, first: BaseException | None) -> BaseException | None:
    """Of an error that says no more than that an earlier one has ended the transaction: that one."""
    is_refusal = isinstance(error, DBAPIError) and sqlstate(error) == IN_FAILED_TRANSACTION
    return first if (is_refusal or isinstance(error, PendingRollbackError)) and first is not None else error


def after(first: BaseException | None, later: BaseException, what: str) -> BaseException:
    """What to raise: the first, and the later one is a note on it; but a cancellation or an exit goes on."""
    if first is None:
        return later
    if isinstance(later, Exception) or not isinstance(first, Exception):
        first.add_note(f"then {what} failed: {in_short(later)}")
        return first
    later.__cause__ = first
    return later


def lost_after(reason: BaseException) -> UnexpectedRollbackError:
    """What to raise where all seemed well, but a failure was caught on the way."""
    error = UnexpectedRollbackError(
        "what was done was rolled back, although this block ended well, because of a failure that was caught in it: "
        f"{in_short(reason)}; what may fail and be caught belongs into transaction(Propagation.NESTED)"
    )
    error.__cause__ = reason
    return error


def cut_off() -> UnexpectedRollbackError:
    return UnexpectedRollbackError("the manager was closed before this block ended: all was rolled back")


def watch_disconnects(engine: Engine) -> None:
    """Let SQLAlchemy know at once of a connection that was lost, which it would learn only from the next statement."""

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        if sqlstate(context.original_exception).startswith(CONNECTION_LOST):
            context.is_disconnect = True


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
