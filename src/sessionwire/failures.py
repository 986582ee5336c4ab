"""Statements that failed in a transaction: no block may end as if nothing had happened, whoever caught the error.

PostgreSQL aborts such a transaction, and answers its COMMIT with ROLLBACK, which SQLAlchemy and asyncpg take for
success; SQLite goes on without the one statement. Here they mean the same: only a savepoint undoes a failure.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from .errors import CommitOutcomeUnknownError, TransactionTimeoutError, UnexpectedRollbackError
from .terms import TERMS, Terms

CONNECTION_LOST = ("08", "57P01", "57P02", "57P03")  # SQLSTATEs, or their classes
IN_FAILED_TRANSACTION = "25P02"
READ_ONLY_TRANSACTION = "25006"
TOO_MANY_CONNECTIONS = "53300"
# serialization failure, deadlock, no lock in time; the server starts, stops or is full
RETRYABLE = ("40001", "40P01", "SQLITE_BUSY", "57P03", TOO_MANY_CONNECTIONS)
# asyncpg's names for what a migration has changed: SQLAlchemy forgets the plans of the first, not those of the second
OUTDATED_PLAN, OUTDATED_TYPE = "InvalidCachedStatementError", "OutdatedSchemaCacheError"


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
    """Tell whether it is certain that nothing was committed, and another attempt may succeed.

    True for a serialization failure, a deadlock, SQLite's busy, a connection that was lost before the COMMIT, a server
    that could not be connected to, a plan or type that a migration has changed, and a write that met a standby. The
    error may be wrapped by `raise … from`, or be in an `ExceptionGroup`. False if the outcome of a commit is unknown,
    and after a deadline.

    Args:
        error: an error that left a block of this library, or an error of the database.
    """
    errors = list(_with_causes(error, set()))
    if any(isinstance(each, (CommitOutcomeUnknownError, TransactionTimeoutError)) for each in errors):
        return False
    return any(_passes(each) for each in errors)


def _with_causes(error: BaseException | None, seen: set[int]) -> Iterator[Exception]:
    """The error, what it was raised from, and the members of groups; nothing beyond a cancellation."""
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, ExceptionGroup):
            for member in cast("ExceptionGroup[Exception]", error).exceptions:
                yield from _with_causes(member, seen)
        error = error.__cause__


def _passes(error: Exception) -> bool:
    if sqlstate(error).startswith(RETRYABLE):
        return True
    if not isinstance(error, DBAPIError):
        return False
    is_outdated = type(error.orig and error.orig.__cause__).__name__ == OUTDATED_PLAN or (
        # the server has no SQLSTATE of its own for a type that is gone, and does not translate internal errors
        sqlstate(error) == "XX000" and "cache lookup failed for type" in str(error.orig)
    )
    return error.connection_invalidated or is_outdated


def origin(error: BaseException | None, first: BaseException | None) -> BaseException | None:
    """Of an error that says no more than that an earlier one has ended the transaction: that one."""
    is_refusal = isinstance(error, DBAPIError) and sqlstate(error) == IN_FAILED_TRANSACTION
    return first if (is_refusal or isinstance(error, PendingRollbackError)) and first is not None else error


def name_cause(error: BaseException, failed: Sequence[BaseException]) -> None:
    """Give a `PendingRollbackError` the failure as its cause that made the transaction end; SQLAlchemy gives none."""
    if isinstance(error, PendingRollbackError) and error.__cause__ is None and failed:
        error.__cause__ = failed[0]


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
        str(reason)  # which has a remedy of its own
        if isinstance(reason, UnexpectedRollbackError)
        else "what was done was rolled back, although this block ended well, because of a failure that was caught in "
        f"it: {in_short(reason)}; what may fail and be caught belongs into transaction(Propagation.NESTED)"
    )
    error.__cause__ = reason
    return error


def cut_off() -> UnexpectedRollbackError:
    return UnexpectedRollbackError("the manager was closed before this block ended: all was rolled back")


def watch_disconnects(engine: Engine, *, read_only: bool = False) -> None:
    """Let SQLAlchemy know at once of a connection that was lost or can't be had, which it would learn only later.

    A primary that has become a standby is lost for a transaction that was meant to write. All connections of a
    `read_only` engine refuse to write. One that knows an outdated type would keep the closed statements of that type.
    """

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        state = sqlstate(context.original_exception)
        is_standby = state == READ_ONLY_TRANSACTION and not read_only and _may_write(context.connection)
        cause = context.original_exception.__cause__
        is_outdated = type(cause).__name__ == OUTDATED_TYPE
        is_unreachable = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        if is_standby or is_outdated or is_unreachable or state.startswith((*CONNECTION_LOST, TOO_MANY_CONNECTIONS)):
            context.is_disconnect = True


def _may_write(connection: Connection | None) -> bool:
    if connection is None:
        return False
    options = connection.get_execution_options()
    return not (options.get("postgresql_readonly") or options.get(TERMS, Terms()).read_only)


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
