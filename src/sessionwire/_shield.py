"""Run work to completion, even if the current task is cancelled."""

from __future__ import annotations

import asyncio
import inspect
import types
import weakref
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, TypeVar, cast

T = TypeVar("T")
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
