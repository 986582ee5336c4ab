"""`ConnectionPool`: a pool that knows who holds its connections."""

from __future__ import annotations

from collections.abc import Collection
from time import monotonic
from typing import Any, Self, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.pool.base import _ConnectionRecord  # pyright: ignore[reportPrivateUsage]
from sqlalchemy.util import greenlet_spawn

from sessionwire._shield import run_shielded
from sessionwire.status import PoolStatus

from .fair_queue import FairQueue
from .holders import Holders, Waiting
from .totals import Totals

RESET_TIMEOUT = 1.0  # seconds


class ConnectionPool(AsyncAdaptedQueuePool):
    """A pool that knows who holds its connections. If it has none left, it says so.

    It closes a connection if setting it up fails or is cancelled.
    """

    _queue_class = FairQueue
    _sqla_logger_namespace = "sqlalchemy.pool.ConnectionPool"  # users set levels for that
    holders: Holders

    def watch(self, holders: Holders, totals: Totals) -> None:
        """Note who holds its connections from now on, and tell an observer."""
        self.holders = holders
        self._totals = self._queue.totals = totals
        connect: Any = self._invoke_creator

        def connect_observed(rec: ConnectionPoolEntry) -> Any:
            if totals.observer is None:
                return connect(rec)
            since = monotonic()
            connection = connect(rec)
            totals.observer.make_connection(monotonic() - since)
            return connection

        self._invoke_creator = connect_observed

    def recreate(self) -> Self:
        pool = cast(Self, super().recreate())
        pool.watch(self.holders, self._totals)
        return pool

    @property
    def _queue(self) -> FairQueue:
        return cast(FairQueue, self._pool)

    @property
    def waiting(self) -> Collection[Waiting]:
        """Those that wait for a connection, the longest first."""
        return self._queue.waiting

    def status_now(self) -> PoolStatus:
        return PoolStatus(
            in_use=len(self.holders),
            idle=self.checkedin(),
            waiting=len(self.waiting),
            limit=self.size() + self._max_overflow,
        )

    async def ping(self, connection: PoolProxiedConnection) -> None:
        """Let the server answer on a connection, and give it back.

        If it does not answer, or the task is cancelled, the connection is closed.
        """
        try:
            await self._ask(connection)
        except BaseException as error:
            await greenlet_spawn(connection.invalidate, error)
            raise
        await run_shielded(greenlet_spawn(connection.close), RESET_TIMEOUT)

    async def _ask(self, connection: PoolProxiedConnection) -> None:
        dialect: Any = self._dialect
        await greenlet_spawn(dialect.do_ping, connection.dbapi_connection)

    def _do_get(self) -> ConnectionPoolEntry:
        observer = self._totals.observer
        since = 0.0 if observer is None else monotonic()
        try:
            place = super()._do_get()
        except PoolTimeoutError:
            self._totals.waits_timed_out += 1
            raise self._timeout_error() from None
        self.holders.begin(place)
        if observer is not None:
            observer.take(place, monotonic() - since)
        return place

    def _create_connection(self) -> _ConnectionRecord:
        record = _ConnectionRecord(self, connect=False)
        try:
            record.get_connection()
        except BaseException as error:
            record.invalidate(error)
            raise
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self.holders.end(record)
        self._take_back(record)

    def _take_back(self, record: ConnectionPoolEntry) -> None:
        """Give the place of a connection to the next user."""
        super()._do_return_conn(record)

    def _timeout_error(self) -> PoolTimeoutError:
        now = self.status_now()
        return PoolTimeoutError(
            f"no connection became free within {self.timeout():g} s (pool.timeout): "
            f"{now.in_use} of {now.limit} (pool.size + pool.max_overflow) are in use, and "
            f"{now.waiting} more task(s) wait. They are held for\n"
            f"{self.holders.describe()}\n"
            "Let a block end before it waits for anything but the database, or raise pool.size; "
            "with pool.warn_held_after such blocks are logged",
            code="3o7r",
        )
