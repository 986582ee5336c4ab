"""`PostgreSQLPool`: hands out connections that live, in turn, and takes them back clean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Self, cast

from sqlalchemy import AdaptedConnection, Engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only

from sessionwire.settings import DatabaseSettings

from .connection_pool import ConnectionPool

Cleanup = asyncio.Future[Any]

# In the info of a connection, by the monotonic clock: the end of its lifetime, and when
# it was last used.
EXPIRES_AT = "sessionwire_expires_at"
LAST_USED = "sessionwire_last_used"
# In the info of a place in the pool: a function that returns the task which closes the
# connection, or None.
GET_CLEANUP = "sessionwire_get_cleanup"


class LifetimeOver(DisconnectionError):
    """A connection has reached `pool.max_lifetime`, and another one replaces it."""

    def __init__(self) -> None:
        super().__init__("this connection has reached pool.max_lifetime")


class PostgreSQLPool(ConnectionPool):
    """A pool of connections to PostgreSQL, here of asyncpg.

    A place becomes free only when its connection is closed. Listeners of the pool would
    do for the rest, but SQLAlchemy takes a longer way for a pool that has some.
    """

    ping_after = float("inf")  # seconds that a connection may idle before it is asked
    ping_timeout = 0.0  # seconds

    def recreate(self) -> Self:
        pool = super().recreate()
        pool.ping_after, pool.ping_timeout = self.ping_after, self.ping_timeout
        return pool

    # Hand out

    def _do_get(self) -> ConnectionPoolEntry:
        record = super()._do_get()
        if record.dbapi_connection is None:
            return record
        try:
            if defect := self._find_defect(record):
                record.invalidate(defect)  # SQLAlchemy opens another one.
        except BaseException as error:
            try:
                record.invalidate(error)
            finally:
                self._do_return_conn(record)
            raise
        return record

    def _find_defect(self, record: ConnectionPoolEntry) -> DisconnectionError | None:
        """Return why a connection can't be used, or None."""
        info, now, adapted = record.info, monotonic(), record.dbapi_connection
        driver: Any = adapted and adapted.driver_connection
        if now > info[EXPIRES_AT]:
            return LifetimeOver()
        if driver.is_closed():
            return DisconnectionError("the server closed this connection")
        if now - info[LAST_USED] > self.ping_after and not _answers(driver, self.ping_timeout):
            return DisconnectionError("the server does not answer on this connection")
        return None

    async def _ask(self, connection: PoolProxiedConnection) -> None:
        driver: Any = connection.driver_connection
        await _ping(driver)

    # Take back

    def _take_back(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is not None:
            self._end_use(record, record.dbapi_connection)
        if self._overflow > 0 and self._pool.full():
            record.close()
        cleanup = _take_cleanup(record) if record.dbapi_connection is None else None
        if cleanup is None or cleanup.done():
            super()._take_back(record)
        else:
            cleanup.add_done_callback(partial(self._return_late, record))

    def _end_use(self, record: ConnectionPoolEntry, adapted: Any) -> None:
        """Reset a connection. Discard it if it is in a transaction.

        The next user must not find one, not even one that a statement began.
        """
        record.info[LAST_USED] = monotonic()
        if not adapted.driver_connection.is_closed() and not self._reset(adapted):
            record.invalidate()

    def _reset(self, adapted: Any) -> bool:
        """Reset the options of transactions. Return whether no transaction is open."""
        adapted.autocommit = adapted.readonly = False
        is_idle: bool = adapted.driver_connection.end_use()
        return is_idle

    def _return_late(self, record: ConnectionPoolEntry, _cleanup: Cleanup) -> None:
        super()._take_back(record)


def watch_connections(
    engine: Engine, settings: DatabaseSettings, cleanup_of: Callable[[Any], Cleanup | None]
) -> None:
    """Let an engine's pool know of each connection what it needs to judge that.

    Args:
        engine: The engine.
        settings: The settings of its database.
        cleanup_of: Returns the task that closes a driver's connection, or None.
    """
    pool = cast(PostgreSQLPool, engine.pool)
    pool.ping_after, pool.ping_timeout = settings.pool.ping_after, settings.connect_timeout

    # `insert` puts this ahead of listeners that may fail.
    @event.listens_for(engine, "connect", insert=True)
    def on_connect(connection: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        record.info[LAST_USED] = monotonic()
        place: Any = record.record_info
        place[GET_CLEANUP] = partial(cleanup_of, connection.driver_connection)


def _answers(driver: Any, timeout: float) -> bool:
    """Ping the server with one message; SQLAlchemy's own ping takes three."""
    try:
        await_only(_ping(driver, timeout))
    except Exception:
        return False
    return True


async def _ping(driver: Any, timeout: float | None = None) -> None:
    try:
        await driver.ping(timeout)
    except BaseException:
        # There is nothing worth cancelling in a server that may not even answer to that.
        driver.terminate()
        raise


def _take_cleanup(record: ConnectionPoolEntry) -> Cleanup | None:
    place: Any = record.record_info
    get_cleanup: Callable[[], Cleanup | None] | None = place.pop(GET_CLEANUP, None)
    return get_cleanup and get_cleanup()
