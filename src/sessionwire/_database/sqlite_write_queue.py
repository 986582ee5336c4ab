"""`WriteQueue`: transactions that write on SQLite begin in turn, first come, first served."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .driver_errors import sqlstate

if TYPE_CHECKING:
    from .sqlite_driver import Connection

# Seconds between two looks at the writer ahead, whose end may have gone unnoticed.
LOOK_INTERVAL = 0.02


class WriteQueue:
    """The transactions of one pool that wait for SQLite's write lock.

    They wait in the event loop, because SQLite's own wait sleeps for up to 0.1 seconds
    after the lock is free, and serves the waiters in no order. The queue holds no lock
    of its own: SQLite says whether a transaction has begun, and whether it goes on.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # held by the first in the queue
        self._writer: Connection | None = None  # whose transaction was the last to begin

    async def begin(self, driver: Connection, script: str, deadline: float) -> None:
        """Begin a transaction after those that came before.

        Args:
            driver: The connection of the transaction.
            script: The script that begins it, and waits for other processes briefly.
            deadline: When to stop waiting, by the monotonic clock. SQLite's error then
                says that the database is locked.
        """
        try:
            async with asyncio.timeout(max(deadline - monotonic(), 0)):
                await self._turn.acquire()
        except TimeoutError:
            await self._try_to_begin(driver, script)
            return
        try:
            await self._begin_as_first(driver, script, deadline)
        finally:
            self._turn.release()

    async def _begin_as_first(self, driver: Connection, script: str, deadline: float) -> None:
        while True:
            await self._wait_for_writer(deadline)
            try:
                return await self._try_to_begin(driver, script)
            except sqlite3.OperationalError as error:
                # Another process writes, or code that does not wait in this queue.
                if not sqlstate(error).startswith("SQLITE_BUSY") or monotonic() > deadline:
                    raise

    async def _try_to_begin(self, driver: Connection, script: str) -> None:
        await driver.executescript(script)
        driver.writer_ended = asyncio.Event()
        self._writer = driver

    async def _wait_for_writer(self, deadline: float) -> None:
        while (ended := self._end_of_writer()) and (left := deadline - monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_INTERVAL)):
                    await ended.wait()

    def _end_of_writer(self) -> asyncio.Event | None:
        """Return what is set when the writer ends, or None if nobody writes."""
        if self._writer is not None:
            ended = self._writer.writer_ended
            with suppress(ValueError, sqlite3.ProgrammingError):  # It is closed.
                if ended is not None and not ended.is_set() and self._writer.in_transaction:
                    return ended
            self._writer = None
        return None
