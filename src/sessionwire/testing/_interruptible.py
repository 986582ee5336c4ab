"""A test, or a sandbox, that ends with an error of a task which nobody awaits, instead of waiting for that task."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from sessionwire.errors import SandboxError

_open: list[Interruptible] = []


class Interruptible:
    """A block of one task, which can be ended from outside, as `asyncio.timeout()` ends one."""

    def __enter__(self) -> None:
        self.task = asyncio.current_task()
        self.reason: SandboxError | None = None
        self._cancelling = self.task.cancelling() if self.task else 0
        _open.append(self)

    def interrupt(self, reason: SandboxError) -> None:
        """End it with this error, once, and unless it has ended."""
        if self in _open and self.task is not None and self.reason is None:
            self.reason = reason
            self.task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _open.remove(self)
        if self.reason is None or self.task is None:
            return
        is_ours = self.task.uncancel() <= self._cancelling
        if error is None or (is_ours and isinstance(error, asyncio.CancelledError)):
            raise SandboxError(f"in a task that nobody awaits: {self.reason}") from self.reason
        error.add_note(f"a task that nobody awaits has raised: {self.reason}")


def innermost() -> Interruptible | None:
    """The block that was entered last in this loop, of those whose tasks are running."""
    loop = asyncio.get_running_loop()
    tasks = ((block, block.task) for block in reversed(_open))
    return next((block for block, task in tasks if task and not task.done() and task.get_loop() is loop), None)


def is_unheard(task: asyncio.Task[Any]) -> bool:
    """Whether it has raised an error that nobody has asked for; asyncio says so itself once the task is freed."""
    return bool(getattr(task, "_log_traceback", False))
