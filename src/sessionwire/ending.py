"""Ends that a cancellation cannot cut short: how a commit or a rollback is waited for, and what its answer means."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sqlite3
import types
import weakref
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, TypeVar, cast

from sqlalchemy.exc import DBAPIError, InterfaceError

from .errors import CommitOutcomeUnknownError
from .failures import in_short, sqlstate

OUTCOME_UNKNOWN = ("40003", "08007")  # SQLSTATEs statement_completion_unknown and transaction_resolution_unknown
ENDED_WHILE_IDLE = "25P03"  # idle_in_transaction_session_timeout: the server had read nothing of the commit
T = TypeVar("T")
logger = logging.getLogger("sessionwire")


# the tasks that finish work for another task, for those who look for tasks that are left
shielding_tasks: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()


async def to_the_end(work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Run `work` to completion even if the current task is cancelled, then re-raise the cancellation.

    Work that takes longer than `timeout` seconds is cancelled. Raises `TimeoutError`, and what the work raises; as the
    cause of a `CancelledError` if the current task was cancelled.
    """
    try:
        awaited = work.send(None)
    except StopIteration as done:  # nothing had to be waited for
        return cast(T, done.value)
    cancellation: asyncio.CancelledError | None = None
    while True:
        rest = _resume(work, awaited)
        task = asyncio.ensure_future(rest)  # a cancellation of the current task does not reach it
        shielding_tasks.add(task)
        overdue = asyncio.get_running_loop().call_later(timeout, task.cancel)
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancellation = error
        overdue.cancel()
        rest.close()  # which has not begun if a wrapper of the task was cancelled before its first step
        if not task.cancelled() or inspect.getcoroutinestate(work) != inspect.CORO_SUSPENDED:
            break
        if awaited is not None:
            awaited.cancel()  # let the work know, and finish it
    failure = TimeoutError(f"no answer within {timeout:g} s") if task.cancelled() else task.exception()
    if cancellation is not None:
        raise cancellation from failure
    if failure is not None:
        raise failure
    return task.result()


async def _resume(work: Coroutine[Any, Any, T], awaited: asyncio.Future[Any] | None) -> T:
    """Continue work that has begun. A coroutine like any other, because whoever makes the task may wrap it."""
    return await _continue(work, awaited)


@types.coroutine
def _continue(
    work: Coroutine[Any, Any, T], awaited: asyncio.Future[Any] | None
) -> Generator[asyncio.Future[Any] | None, None, T]:
    """Await first what the work is waiting for already."""
    while True:
        try:
            yield awaited
        except BaseException as error:
            resume = partial(work.throw, error)
        else:
            resume = partial(work.send, None)
        try:
            awaited = resume()
        except StopIteration as done:
            return cast(T, done.value)


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
