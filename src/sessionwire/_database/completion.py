"""Finish commits and rollbacks even when cancelled, and interpret their results."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Coroutine
from typing import Any

from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._error_reports import summarize
from sessionwire._shield import run_shielded
from sessionwire.errors import CommitOutcomeUnknownError

from .driver_errors import sqlstate

# SQLSTATEs statement_completion_unknown and transaction_resolution_unknown.
OUTCOME_UNKNOWN_SQLSTATES = ("40003", "08007")
# SQLSTATE idle_in_transaction_session_timeout: the server had not read the COMMIT.
ENDED_WHILE_IDLE = "25P03"
NO_ANSWER = "no answer came in time"
logger = logging.getLogger("sessionwire")


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
        note = f"the rollback failed, and its connection was closed: {summarize(rollback_error)}"
        logger.warning(note)
        if error is not None:
            error.add_note(note)
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
        "before you run the transaction again"
    )
    unknown.__cause__ = error
    return unknown


def _reason_for_doubt(error: BaseException | None) -> str | None:
    """Return why a commit may have been carried out despite an error, or None.

    On an `InterfaceError` the COMMIT was never sent. An answer of severity ERROR is a
    refusal, except for two SQLSTATEs which say that the server does not know. An answer
    of severity FATAL may follow a commit that was carried out (see "Message Formats" in
    PostgreSQL's documentation, field V).
    """
    if not isinstance(error, DBAPIError):
        return None
    cause = (error.orig and error.orig.__cause__) or error.orig
    if isinstance(error, InterfaceError) or isinstance(cause, sqlite3.Error):
        return None
    # The second one is the server's last message before the connection was lost.
    states = {sqlstate(cause), sqlstate(cause.__cause__ if cause is not None else None)}
    if not states.isdisjoint(OUTCOME_UNKNOWN_SQLSTATES):
        return "the server doesn't know its outcome"
    severity = getattr(cause, "severity_en", None) or getattr(cause, "severity", None)
    is_lost = severity != "ERROR" if hasattr(cause, "sqlstate") else error.connection_invalidated
    if is_lost and ENDED_WHILE_IDLE not in states:
        return "the connection was lost before its answer came"
    return None
