"""Finish commits and rollbacks even when cancelled, and interpret their results."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Coroutine
from typing import Any

from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._error_reports import in_short
from sessionwire._shield import to_the_end
from sessionwire.errors import CommitOutcomeUnknownError

from .driver_errors import sqlstate

OUTCOME_UNKNOWN = ("40003", "08007")  # SQLSTATEs statement_completion_unknown and transaction_resolution_unknown
ENDED_WHILE_IDLE = "25P03"  # idle_in_transaction_session_timeout: the server had read nothing of the commit
logger = logging.getLogger("sessionwire")


async def finish_commit(work: Coroutine[Any, Any, None], timeout: float, *, read_only: bool = False) -> None:
    """For a commit. Raises `CommitOutcomeUnknownError` where its answer was lost or does not come in time.

    The outcome of a `read_only` transaction makes no difference to anybody: there a lost answer is no error.
    """
    try:
        await to_the_end(_committing(work), timeout)
    except TimeoutError as error:
        if not read_only:
            raise _unknown("no answer came in time") from error
    except CommitOutcomeUnknownError:
        if not read_only:
            raise
    except asyncio.CancelledError as cancellation:
        if isinstance(cancellation.__cause__, TimeoutError):
            cancellation.__cause__ = _unknown("no answer came in time")
        if read_only and isinstance(cancellation.__cause__, CommitOutcomeUnknownError):
            cancellation.__cause__ = None
        raise


async def finish_rollback(
    work: Coroutine[Any, Any, None], timeout: float, error: BaseException | None
) -> Exception | None:
    """The same for a rollback after `error`. What fails is returned, and a note on that: the server undoes anyway."""
    try:
        await to_the_end(work, timeout)
    except asyncio.CancelledError as cancellation:
        raise cancellation from error
    except Exception as trouble:
        note = f"the rollback failed, and its connection was given up: {in_short(trouble)}"
        logger.warning(note)
        if error is not None:
            error.add_note(note)
        return trouble
    return None


async def close_or_invalidate(connection: AsyncConnection) -> None:
    """Close the connection, which rolls back what was not committed; if that fails, discard it."""
    try:
        await connection.close()
    except BaseException:
        await connection.invalidate()
        raise


async def _committing(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except DBAPIError as error:
        if reason := _doubt(error):
            raise _unknown(reason) from error
        raise


def _doubt(error: DBAPIError) -> str | None:
    """Why it is not certain, after this error, that the commit was not carried out; nothing where it is.

    An `InterfaceError` was not sent. An answer of severity ERROR is a refusal, but for two which say that the server
    doesn't know; one of severity FATAL may follow a commit that was carried out (PostgreSQL, "Message Formats", V).
    """
    cause = error.orig.__cause__ if error.orig is not None and error.orig.__cause__ is not None else error.orig
    if isinstance(error, InterfaceError) or isinstance(cause, sqlite3.Error):
        return None
    # the second is what the server said before a connection was lost
    states = {sqlstate(cause), sqlstate(cause.__cause__ if cause is not None else None)}
    if not states.isdisjoint(OUTCOME_UNKNOWN):
        return "the server doesn't know its outcome"
    severity = getattr(cause, "severity_en", None) or getattr(cause, "severity", None)
    is_lost = severity != "ERROR" if hasattr(cause, "sqlstate") else error.connection_invalidated
    return "the connection was lost before its answer came" if is_lost and ENDED_WHILE_IDLE not in states else None


def _unknown(reason: str) -> CommitOutcomeUnknownError:
    return CommitOutcomeUnknownError(
        f"the commit was sent, and {reason}: look in the database whether it was carried out, before trying again"
    )
