"""Interpret errors of drivers: SQLSTATE, lost connections, whether to try again."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from sessionwire.errors import CommitOutcomeUnknownError, TransactionTimeoutError

from .options import ConnectionOptions, options_of

CANNOT_CONNECT = "08001"
CANNOT_CONNECT_NOW = "57P03"
CONNECTION_LOST_SQLSTATES = ("08", "57P01", "57P02", CANNOT_CONNECT_NOW)  # "08" is a class
IN_FAILED_TRANSACTION = "25P02"
INVALID_CATALOG_NAME = "3D000"  # There is no such database.
INVALID_PASSWORD = "28P01"
INTERNAL_ERROR = "XX000"
READ_ONLY_TRANSACTION = "25006"
TOO_MANY_CONNECTIONS = "53300"
# statement_completion_unknown and transaction_resolution_unknown
OUTCOME_UNKNOWN_SQLSTATES = ("40003", "08007")
# idle_in_transaction_session_timeout: the server had not read the COMMIT.
ENDED_WHILE_IDLE = "25P03"
# The attribute of a driver's error that says that no connection was made.
NOT_CONNECTED = "sessionwire_not_connected"
# The beginnings of the codes of errors that a retry may mend, and the reasons.
RETRYABLE_CODES = {
    "40001": "serialization_failure",
    "40P01": "deadlock",
    "SQLITE_BUSY": "busy",
    CANNOT_CONNECT_NOW: "server_unavailable",  # It starts, or stops.
    TOO_MANY_CONNECTIONS: "too_many_connections",
}
# The errors of asyncpg after a migration. After the first SQLAlchemy prepares its plans
# anew; after the second it would keep them, so the connection has to go.
OUTDATED_PLAN, OUTDATED_TYPE = "InvalidCachedStatementError", "OutdatedSchemaCacheError"


def sqlstate(error: BaseException | None) -> str:
    """Return the SQLSTATE (PostgreSQL) or error name (SQLite) of an error, or "".

    For an error of SQLAlchemy it is that of the driver's error inside.
    """
    raised = getattr(error, "orig", None) or error
    return getattr(raised, "sqlstate", None) or getattr(raised, "sqlite_errorname", None) or ""


def is_outcome_unknown(error: BaseException | None) -> bool:
    """Tell whether the server itself says that it does not know the outcome of a commit."""
    return not _states(error).isdisjoint(OUTCOME_UNKNOWN_SQLSTATES)


def is_answer_lost(error: BaseException | None) -> bool:
    """Tell whether the driver's error leaves open if a commit was carried out.

    An answer of severity ERROR is a refusal. One of severity FATAL may follow a commit
    that was carried out (see "Message Formats" in PostgreSQL's documentation, field V).
    """
    return (
        hasattr(error, "sqlstate")
        and _severity(error) != "ERROR"
        and ENDED_WHILE_IDLE not in _states(error)
    )


def _states(error: BaseException | None) -> set[str]:
    """Return the SQLSTATEs of an error and of the server's last message before it."""
    return {sqlstate(error), sqlstate(error and error.__cause__)}


def _severity(error: BaseException | None) -> str | None:
    """Return "ERROR" or "FATAL" for an answer of PostgreSQL, in English if it tells that."""
    sources = getattr(error, "diag", None), error  # psycopg's, and the others
    names = "severity_nonlocalized", "severity_en", "severity"
    found = (getattr(source, name, None) for source in sources for name in names)
    return next((str(severity) for severity in found if severity), None)


def is_outdated_plan(error: BaseException | None) -> bool:
    """Tell whether a driver's prepared statement is older than a migration."""
    routine = getattr(getattr(error, "diag", None), "source_function", None)
    return (
        type(error and error.__cause__).__name__ == OUTDATED_PLAN
        or routine == "RevalidateCachedQuery"  # the server's, as psycopg tells it
    )


def is_retryable(error: BaseException | None) -> bool:
    """Tell whether it is certain that nothing was committed, and a retry may succeed.

    True for a serialization failure, a deadlock, SQLite's busy, a connection that was
    lost before the COMMIT, a server that could not be reached, a plan or type that a
    migration has changed, and a write that met a standby. The error may be wrapped by
    `raise … from` or be in an `ExceptionGroup`. False if the outcome of a commit is
    unknown, and after a deadline.

    Args:
        error: An error that left a block of this library, or an error of the database.
    """
    return retry_reason(error) is not None


def retry_reason(
    error: BaseException | None, is_wanted: Callable[[Sequence[Exception]], bool] | None = None
) -> str | None:
    """Return why to try again, in a word, or None.

    Args:
        error: The error of the last attempt.
        is_wanted: Tells of an error that is not retryable, followed by its causes,
            whether to try again all the same.
    """
    errors = list(_with_causes(error, set()))
    final = CommitOutcomeUnknownError, TransactionTimeoutError
    if any(isinstance(each, final) for each in errors):
        return None
    reason = next(filter(None, map(_reason_to_retry, errors)), None)
    if reason is None and errors and is_wanted is not None and is_wanted(errors):
        return "retry_on"
    return reason


def _with_causes(error: BaseException | None, seen: set[int]) -> Iterator[Exception]:
    """Yield the error, its causes and members of groups, up to a cancellation."""
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, ExceptionGroup):
            for member in cast("ExceptionGroup[Exception]", error).exceptions:
                yield from _with_causes(member, seen)
        error = error.__cause__


def _reason_to_retry(error: Exception) -> str | None:
    code = sqlstate(error)
    for beginning, reason in RETRYABLE_CODES.items():
        if code.startswith(beginning):
            return reason
    if not isinstance(error, DBAPIError):
        return None
    if is_outdated_plan(error.orig) or (
        # The server has no SQLSTATE for a type that is gone. It does not translate
        # internal errors, so their text can be compared.
        code == INTERNAL_ERROR and "cache lookup failed for type" in str(error.orig)
    ):
        return "outdated_plan"
    if not error.connection_invalidated:
        return None
    if code == READ_ONLY_TRANSACTION:
        return "read_only"
    return "server_unavailable" if hasattr(error.orig, NOT_CONNECTED) else "connection_lost"


def root_cause(error: BaseException | None, first: BaseException | None) -> BaseException | None:
    """Return `first` if `error` only says that the transaction has failed already."""
    is_refusal = isinstance(error, DBAPIError) and sqlstate(error) == IN_FAILED_TRANSACTION
    only_refers = is_refusal or isinstance(error, PendingRollbackError)
    return first if only_refers and first is not None else error


def install_disconnect_listener(engine: Engine) -> None:
    """Tell SQLAlchemy about connections that are lost or useless.

    By itself it would notice at the next statement, or never.

    A primary that has become a standby is lost for a transaction that may write. A
    connection that knows an outdated type would keep its statements of that type.
    """

    @event.listens_for(engine, "handle_error")
    def check_connection(context: ExceptionContext) -> None:
        state = sqlstate(context.original_exception)
        is_standby = state == READ_ONLY_TRANSACTION and _may_write(context.connection)
        cause = context.original_exception.__cause__
        is_outdated = type(cause).__name__ == OUTDATED_TYPE
        is_unreachable = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        is_lost = state.startswith((*CONNECTION_LOST_SQLSTATES, TOO_MANY_CONNECTIONS))
        if is_standby or is_outdated or is_unreachable or is_lost:
            context.is_disconnect = True


def _may_write(connection: Connection | None) -> bool:
    if connection is None:
        return False
    ours = options_of(connection) or ConnectionOptions()
    return not (connection.get_execution_options().get("postgresql_readonly") or ours.read_only)
