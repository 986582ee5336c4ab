"""Cancel a coroutine at its n-th suspension, for each n, so that no await is missed."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import pytest

# values of `again_after`: how many suspensions later a second cancellation strikes
ONCE = pytest.param(None, id="once")
TWICE = pytest.param(1, id="twice", marks=pytest.mark.long)
TWICE_LATER = pytest.param(2, id="twice, later", marks=pytest.mark.long)


class Steps:
    """Run a coroutine in a task, and cancel it at these suspensions, counted from 1."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], *cancel_at: int) -> None:
        self.coroutine = coroutine
        self.cancel_at = cancel_at
        self.count = 0

    async def run(self) -> bool:
        """Return whether it ended without a cancellation."""

        async def drive() -> None:
            await self._drive()

        task = asyncio.create_task(drive())
        try:
            await asyncio.wait([task])
            await task
        except asyncio.CancelledError:
            return False
        return True

    @types.coroutine
    def _drive(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        step, argument = self.coroutine.send, None
        while True:
            try:
                future = step(argument)
            except StopIteration as end:
                return end.value
            self.count += 1
            if self.count in self.cancel_at:
                task.get_loop().call_soon(task.cancel)
            try:
                argument = yield future
                step = self.coroutine.send
            except BaseException as error:
                step, argument = self.coroutine.throw, error


async def each_cancellation(
    work: Callable[[], Coroutine[Any, Any, Any]], *, again_after: int | None = None, stride: int = 1
) -> AsyncIterator[Steps]:
    """Repeat the work, cancelled at its 1st, 2nd, … suspension, until it completes.

    `again_after` cancels a second time, that many suspensions later. A `stride` of n
    cancels only at every n-th suspension.
    """
    for n in range(1, 500, stride):
        steps = Steps(work(), n, *([n + again_after] if again_after else []))
        done = await steps.run()
        yield steps
        if done and steps.count < n:
            return
    raise AssertionError("it never ends")
