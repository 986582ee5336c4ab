"""`FairQueue`: the idle connections of a pool, which serves those that wait in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from greenlet import getcurrent, greenlet
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only
from sqlalchemy.util.queue import Empty, Full, QueueCommon

from .totals import Totals

Turn = asyncio.Future[ConnectionPoolEntry]
# A turn, with the task and the greenlet that wait for it.
Place = tuple[Turn, asyncio.Task[Any] | None, greenlet]


class FairQueue(QueueCommon[ConnectionPoolEntry]):
    """Hand each connection to the task that has waited longest.

    asyncio's own queues only wake that task. Until it runs, another one may take the
    connection, and it waits again, behind all others. The connection that was used last
    is handed out first.
    """

    totals: Totals | None = None

    def __init__(self, maxsize: int = 0, use_lifo: bool = True) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self._idle: list[ConnectionPoolEntry] = []  # empty while a task waits
        self._waiting: deque[Place] = deque()

    def empty(self) -> bool:
        return not self._idle

    def full(self) -> bool:
        return 0 < self.maxsize <= len(self._idle)

    def qsize(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> Sequence[Place]:
        """Those that wait, the longest first."""
        return self._waiting

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        """Take a connection.

        Args:
            block: Wait for one if there is none, in SQLAlchemy's greenlet.
            timeout: Seconds to wait.

        Raises:
            Empty: There is none, or none came in time.
        """
        if self._idle:
            return self._idle.pop()
        if not block:
            raise Empty
        return await_only(self._wait(timeout, getcurrent()))

    def get_nowait(self) -> ConnectionPoolEntry:
        return self.get(block=False)

    def put(
        self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None
    ) -> None:
        """Give a connection back. Raises `Full`, without waiting."""
        while self._waiting:
            turn, *_ = self._waiting.popleft()
            if not turn.done():
                turn.set_result(item)
                return
        if self.full():
            raise Full
        self._idle.append(item)

    def put_nowait(self, item: ConnectionPoolEntry) -> None:
        self.put(item)

    async def _wait(self, timeout: float | None, waiting: greenlet) -> ConnectionPoolEntry:
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        place = turn, asyncio.current_task(), waiting
        self._waiting.append(place)
        timer = None if timeout is None else loop.call_later(timeout, _give_up, turn)
        since = monotonic()
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # A cancellation came between the turn and the task's next step.
                self.put(turn.result())
            else:
                with suppress(ValueError):
                    self._waiting.remove(place)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self.totals is not None:
                self.totals.waited_for += monotonic() - since


def _give_up(turn: Turn) -> None:
    if not turn.done():
        turn.set_exception(Empty())
