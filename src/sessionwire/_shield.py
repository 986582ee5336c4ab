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
# The tasks that finish work for another task: a search for leftover tasks skips them.
shielding_tasks: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()


async def run_shielded(work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Run `work` to completion even if the task is cancelled, then re-raise that.

    If the task was cancelled, an error of `work` is the cause of the `CancelledError`.

    Args:
        work: The coroutine to run.
        timeout: Seconds after which `work` is cancelled.

    Raises:
        TimeoutError: `work` took longer.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    cancellation: asyncio.CancelledError | None = None
    try:
        awaited = work.send(None)
        # Mostly nothing disturbs it, and a task of its own would cost more.
        while awaited is not None:
            cancellation = await _wait_for(awaited, deadline)
            if cancellation is not None or not awaited.done():
                break
            awaited = work.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    except asyncio.CancelledError as error:  # from the work
        raise _timeout_error(timeout) from error
    remaining = deadline - loop.time()
    while True:
        rest = _resume(work, awaited)
        task = asyncio.ensure_future(rest)  # Cancelling the current task does not reach it.
        shielding_tasks.add(task)
        timer = loop.call_later(remaining, task.cancel)
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancellation = error
        timer.cancel()
        # `rest` has not begun if a wrapper of the task was cancelled before it ran.
        rest.close()
        if not task.cancelled() or inspect.getcoroutinestate(work) != inspect.CORO_SUSPENDED:
            break
        if awaited is not None:
            awaited.cancel()  # This tells the work, which is then resumed and can finish.
        remaining = timeout
    failure = _timeout_error(timeout) if task.cancelled() else task.exception()
    if cancellation is not None:
        raise cancellation from failure
    if failure is not None:
        raise failure
    return task.result()


def _timeout_error(timeout: float) -> TimeoutError:
    return TimeoutError(f"no answer within {timeout:g} s")


async def _wait_for(future: asyncio.Future[Any], deadline: float) -> asyncio.CancelledError | None:
    """Wait until a future is done, or the deadline, or the current task is cancelled.

    Returns:
        The cancellation, which does not reach the future.
    """
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake(*_: object) -> None:
        if not woken.done():
            woken.set_result(None)

    future.add_done_callback(wake)
    timer = loop.call_at(deadline, wake)
    try:
        await woken
    except asyncio.CancelledError as cancellation:
        return cancellation
    finally:
        timer.cancel()
        future.remove_done_callback(wake)
    return None


async def _resume(work: Coroutine[Any, Any, T], awaited: asyncio.Future[Any] | None) -> T:
    """Continue work that has begun.

    Tools that instrument tasks wrap what they are given, so this must be a real
    coroutine.
    """
    return await _continue(work, awaited)


@types.coroutine
def _continue(
    work: Coroutine[Any, Any, T], awaited: asyncio.Future[Any] | None
) -> Generator[asyncio.Future[Any] | None, None, T]:
    """Yield the future that `work` is waiting for, then drive `work` to its end."""
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
