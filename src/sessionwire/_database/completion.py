"""Finish commits and rollbacks even when cancelled, and interpret their results."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine
from typing import Any

from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._error_reports import summarize
from sessionwire._log_events import ROLLBACK_FAILED
from sessionwire._shield import run_shielded
from sessionwire.errors import CommitOutcomeUnknownError

from .driver_errors import is_answer_lost, is_outcome_unknown

NO_ANSWER = "no answer came in time"


async def finish_commit(
    work: Coroutine[Any, Any, None], timeout: float, *, read_only: bool = False
) -> None:
    """Finish a commit even if the current task is cancelled, then re-raise that.

    Args:
        work: The coroutine that commits.
        timeout: Seconds to wait for the server's answer.
        read_only: Nothing was written, so a lost answer makes no difference and is no
            error.

    Raises:
        CommitOutcomeUnknownError: The answer was lost or did not come in time. After a
            cancellation it is the cause of the `CancelledError`.
    """
    try:
        await run_shielded(work, timeout)
    except asyncio.CancelledError as cancellation:
        if unknown := _outcome_unknown_error(cancellation.__cause__):
            cancellation.__cause__ = None if read_only else unknown
        raise
    except Exception as error:
        unknown = _outcome_unknown_error(error)
        if unknown is None or unknown is error:
            raise
        if not read_only:
            raise unknown from unknown.__cause__


async def finish_rollback(
    work: Coroutine[Any, Any, None], timeout: float, error: BaseException | None
) -> Exception | None:
    """Finish a rollback even if the current task is cancelled, then re-raise that.

    Args:
        work: The coroutine that rolls back.
        timeout: Seconds that it may take.
        error: The error that led to the rollback, if there was one.

    Returns:
        The error of a rollback that failed. It is logged and noted on `error`, not
        raised, because the server rolls back when the connection is closed.
    """
    try:
        await run_shielded(work, timeout)
    except asyncio.CancelledError as cancellation:
        raise cancellation from error
    except Exception as rollback_error:
        ROLLBACK_FAILED.log(error=summarize(rollback_error))
        if error is not None:
            error.add_note(ROLLBACK_FAILED.message % {"error": summarize(rollback_error)})
        return rollback_error
    return None


async def close_or_invalidate(connection: AsyncConnection) -> None:
    """Close the connection, which rolls back; if that fails, discard it."""
    try:
        await connection.close()
    except BaseException:
        await connection.invalidate()
        raise


def _outcome_unknown_error(error: BaseException | None) -> CommitOutcomeUnknownError | None:
    """Return what to raise instead of an error that leaves the outcome of a commit unknown."""
    if isinstance(error, CommitOutcomeUnknownError):
        return error
    reason = NO_ANSWER if isinstance(error, TimeoutError) else _reason_for_doubt(error)
    if reason is None:
        return None
    unknown = CommitOutcomeUnknownError(
        f"the COMMIT was sent, but {reason}: look in the database whether it was carried out "
        "before you run the transaction again",
        reason=reason,
    )
    unknown.__cause__ = error
    return unknown


def _reason_for_doubt(error: BaseException | None) -> str | None:
    """Return why a commit may have been carried out despite an error, or None.

    On an `InterfaceError` the COMMIT was never sent.
    """
    if not isinstance(error, DBAPIError):
        return None
    # psycopg raises its errors itself; SQLAlchemy's adapter for asyncpg wraps them.
    raised = error.orig
    cause = (None if hasattr(raised, "diag") else raised and raised.__cause__) or raised
    if isinstance(error, InterfaceError) or isinstance(cause, sqlite3.Error):
        return None
    if is_outcome_unknown(cause):
        return "the server doesn't know its outcome"
    knows_server = hasattr(cause, "sqlstate")
    if is_answer_lost(cause) if knows_server else error.connection_invalidated:
        return "the connection was lost before its answer came"
    return None
