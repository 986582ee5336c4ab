"""Blocks that end with the error of a task that nobody awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from types import TracebackType
from typing import Any

from sessionwire.errors import SandboxError

from ._cpython import has_unretrieved_error, is_waiting_for

RETRIEVAL_GRACE = 0.5  # seconds in which somebody may still retrieve a task's error

_open: list[Interruptible] = []


class Interruptible:
    """A block that can be ended from outside, like that of `asyncio.timeout()`."""

    def __enter__(self) -> None:
        self.task = asyncio.current_task()
        self.reason: SandboxError | None = None
        self._cancelling = self.task.cancelling() if self.task else 0
        _open.append(self)

    def interrupt(self, reason: SandboxError) -> None:
        """End the block with this error, unless it has ended or was interrupted."""
        if self in _open and self.task is not None and self.reason is None:
            self.reason = reason
            self.task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _open.remove(self)
        if self.reason is None or self.task is None:
            return
        is_ours = self.task.uncancel() <= self._cancelling
        if error is None or (is_ours and isinstance(error, asyncio.CancelledError)):
            raise SandboxError(f"in a task that nobody awaits: {self.reason}") from self.reason
        error.add_note(f"a task that nobody awaits has raised: {self.reason}")


def interruptible(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make the body of an async function an `Interruptible` block."""

    @wraps(function)
    async def call(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        with Interruptible():
            return await function(*args, **options)

    return call


def interrupt_if_unretrieved(error: SandboxError) -> None:
    """Interrupt the innermost block if nobody retrieves an error that will be raised.

    The block might otherwise wait forever for the task that ended with the error.
    """
    if (block := _innermost()) is None:
        return
    task = asyncio.current_task()
    for each in asyncio.all_tasks():
        # the error also ends the tasks that await the current one
        if each is task or is_waiting_for(each, task):
            each.add_done_callback(partial(_check_retrieved, block, error))


def _check_retrieved(block: Interruptible, error: SandboxError, task: asyncio.Task[Any]) -> None:
    def check() -> None:
        if has_unretrieved_error(task):
            block.interrupt(error)
            task.exception()  # the block reports the error, so asyncio need not log it

    if has_unretrieved_error(task):
        task.get_loop().call_later(RETRIEVAL_GRACE, check)


def _innermost() -> Interruptible | None:
    """Return the block entered last in this event loop whose task still runs."""
    loop = asyncio.get_running_loop()
    tasks = ((block, block.task) for block in reversed(_open))
    return next(
        (block for block, task in tasks if task and not task.done() and task.get_loop() is loop),
        None,
    )
