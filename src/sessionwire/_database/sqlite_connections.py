"""Open, interrupt and close connections of aiosqlite, which runs SQLite in a thread."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import weakref
from collections.abc import Awaitable
from contextlib import suppress
from threading import Thread
from time import monotonic
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from .connection_pool import ConnectionPool
from .sqlite_write_queue import WriteQueue

# Seconds that a statement waits for a lock in the driver's thread, where a cancellation
# cannot reach it.
BUSY_TIMEOUT = 5.0
THREAD_STOP_TIMEOUT = 1.0  # seconds for the driver's thread to end
CONNECT_ARGS = {
    "isolation_level": None,  # Otherwise the driver begins late and does not know savepoints.
    "timeout": BUSY_TIMEOUT,
    "check_same_thread": False,
}


class _AutoClosingConnection(sqlite3.Connection):
    """A connection whose `close()` closes its file even if cursors are unfinished.

    SQLite keeps the file open as long as an unfinished cursor may read it, and the
    traceback of a cancelled task keeps such cursors.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        # Cursors are made in another thread than that in which this is closed.
        self._cursors_lock = threading.Lock()

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        cursor = super().cursor(*arguments, **options)
        with self._cursors_lock:
            self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        with self._cursors_lock:
            cursors = list(self._cursors)
        for cursor in cursors:
            with suppress(sqlite3.Error):
                cursor.close()
        super().close()


class ConnectionOpening:
    """Opens a connection in the driver's thread; closes it if aborted meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: _AutoClosingConnection | None = None
        self._is_aborted = False

    def __call__(self, *arguments: Any, factory: object, **options: Any) -> sqlite3.Connection:
        connection = _AutoClosingConnection(*arguments, **options)
        with self._lock:
            self._connection = connection
            if self._is_aborted:
                connection.close()
        return connection

    def abort(self) -> None:
        with self._lock:
            self._is_aborted = True
            if self._connection is not None:
                self._connection.close()


class SQLitePool(ConnectionPool):
    """A pool of connections whose writers take turns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.write_queue = WriteQueue()

    def _take_back(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        if driver is not None:
            driver.last_statement = None
        super()._take_back(record)


async def interrupt_for(
    driver: Any, *steps: Awaitable[object], interrupt_after: float = 0.02
) -> None:
    """Run `steps` in the driver's thread, interrupting what keeps them waiting.

    Args:
        driver: The connection of aiosqlite.
        steps: Calls of its methods.
        interrupt_after: Seconds to wait before the first interrupt, and between
            interrupts. At once it would strike the first step instead, if a cursor is
            unfinished.
    """
    done = asyncio.gather(*steps, return_exceptions=True)
    while not (await asyncio.wait((done,), timeout=interrupt_after))[0]:
        _interrupt(driver)


def _interrupt(driver: Any) -> None:
    with suppress(ValueError, sqlite3.ProgrammingError):  # The connection is closed.
        driver._conn.interrupt()


async def roll_back_and_close(driver: Any) -> None:
    """Interrupt the running statement, roll back and close the connection.

    Without the rollback, an unfinished cursor would keep the lock of the closed
    connection.
    """
    await interrupt_for(driver, driver.rollback(), driver.close())


# Connections of the parent process. Their finalizers would disturb it.
_inherited: list[Any] = []


def abandon(driver: Any, *, is_forked: bool, is_idle: bool) -> None:
    """Close a connection whose event loop is closed, or that a fork has inherited.

    A forked process has none of the driver's threads, so an idle connection is closed
    directly: while SQLite knows of it, it would take the parent's locks for its own.
    """
    if not is_forked:
        _stop_thread(driver)
        if driver._thread.is_alive():
            return  # The thread closes the connection when it comes to that.
    if is_idle or not is_forked:
        with suppress(ValueError, sqlite3.Error):
            if not is_forked:
                driver._conn.rollback()  # An unfinished cursor would keep its lock.
            driver._conn.close()
        driver._connection = None  # Otherwise it warns that it was not closed.
    else:
        _inherited.append(driver)  # A finalizer would end the parent's transaction.


def _stop_thread(driver: Any) -> None:
    """Stop the driver's thread and the statement that runs in it.

    The thread cannot report to the closed loop, and would print that to standard error.
    """
    driver._thread._invoke_excepthook = _do_nothing
    # stop() looks for a running loop to answer to. A thread of its own has none.
    stopping = Thread(target=driver.stop)
    stopping.start()
    stopping.join()
    deadline = monotonic() + THREAD_STOP_TIMEOUT
    while driver._thread.is_alive() and monotonic() < deadline:
        _interrupt(driver)
        driver._thread.join(0.01)


def _do_nothing(_: object) -> None: ...
