"""What an error of a driver means: its SQLSTATE, whether its connection is lost, and whether to try again."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from sessionwire.errors import CommitOutcomeUnknownError, TransactionTimeoutError

from .options import TERMS, Terms

CONNECTION_LOST = ("08", "57P01", "57P02", "57P03")  # SQLSTATEs, or their classes
IN_FAILED_TRANSACTION = "25P02"
READ_ONLY_TRANSACTION = "25006"
TOO_MANY_CONNECTIONS = "53300"
# serialization failure, deadlock, no lock in time; the server starts, stops or is full
RETRYABLE = ("40001", "40P01", "SQLITE_BUSY", "57P03", TOO_MANY_CONNECTIONS)
# asyncpg's names for what a migration has changed: SQLAlchemy forgets the plans of the first, not those of the second
OUTDATED_PLAN, OUTDATED_TYPE = "InvalidCachedStatementError", "OutdatedSchemaCacheError"


def sqlstate(error: BaseException | None) -> str:
    """The driver's SQLSTATE, or SQLite's name for the error, or nothing; of SQLAlchemy's error, that of its cause."""
    raised = getattr(error, "orig", None) or error
    return getattr(raised, "sqlstate", None) or getattr(raised, "sqlite_errorname", None) or ""


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
