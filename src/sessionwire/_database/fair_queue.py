"""`FairQueue`: the idle connections of a pool, which serves those that wait in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import memoized_property
from sqlalchemy.util.queue import AsyncAdaptedQueue


class FairQueue(AsyncAdaptedQueue[ConnectionPoolEntry]):
    """Hand each connection to the task that has waited longest.

    asyncio's own queues only wake that task. Until it runs, another one may take the
    connection, and it waits again, behind all others.
    """

    @memoized_property
    def _queue(self) -> Any:
        return _HandingQueue(self.maxsize)


class _HandingQueue(asyncio.LifoQueue[ConnectionPoolEntry]):
    """A queue that has items only while no task waits for one."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._waiting: deque[asyncio.Future[ConnectionPoolEntry]] = deque()

    async def get(self) -> ConnectionPoolEntry:
        if not self.empty():
            return self.get_nowait()
        turn: asyncio.Future[ConnectionPoolEntry] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            # The cancellation may come between the turn and the task's next step.
            if turn.done() and not turn.cancelled():
                self.put_nowait(turn.result())
            raise

    def put_nowait(self, item: ConnectionPoolEntry) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(item)
                return
        super().put_nowait(item)
