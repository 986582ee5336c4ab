"""PostgreSQL through asyncpg: connect arguments, pool, liveness, corrected commits."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast
from urllib.parse import urlencode

from sqlalchemy import URL, AdaptedConnection, Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import await_only

from sessionwire._config.url_parameters import LIBPQ_KEYS, typed_arguments
from sessionwire.embedded import EmbeddedServer
from sessionwire.errors import ConfigurationError
from sessionwire.settings import DatabaseSettings

from .fair_queue import FairQueue
from .options import ConnectionOptions
from .pipeline import Pipeline, Statement
from .transaction_settings import ahead_of_each

# The driver's names. The server treats the first two levels alike, and the driver knows
# only the second.
ISOLATION_LEVELS = {
    "READ UNCOMMITTED": "read_committed",
    "READ COMMITTED": "read_committed",
    "REPEATABLE READ": "repeatable_read",
    "SERIALIZABLE": "serializable",
}
# What keeps a statement from writing, if sent ahead of it.
READ_ONLY: tuple[Statement, ...] = (("SET transaction_read_only = on",),)
# In the info of a connection: when it was last used, by the monotonic clock.
LAST_USED = "sessionwire_last_used"
# In the info of a place in the pool: a function that returns the task which closes the
# connection, or None.
GET_CLEANUP = "sessionwire_get_cleanup"

Cleanup = asyncio.Future[Any]


def split_url(url: URL, settings: DatabaseSettings) -> tuple[URL, dict[str, Any]]:
    """Return the URL for SQLAlchemy and the arguments for `asyncpg.connect()`.

    Raises:
        ConfigurationError: A file that the URL names does not exist.
    """
    from .asyncpg_connection import connection_class  # asyncpg is not needed on SQLite

    libpq = {key: value for key, value in url.query.items() if key in LIBPQ_KEYS}
    for key in ("sslrootcert", "sslcert", "sslkey"):
        if key in libpq and not Path(str(libpq[key])).expanduser().is_file():
            raise ConfigurationError(f"url: {key}: there is no file {libpq[key]!r} on this machine")
    server_settings: dict[str, str] = {}
    if settings.application_name:
        server_settings["application_name"] = settings.application_name
    typed = typed_arguments(url)  # In the URL they would be text.
    connect_args: dict[str, Any] = {
        "timeout": settings.connect_timeout,
        "server_settings": server_settings,
        "connection_class": connection_class(
            tcp_timeout=settings.tcp_timeout, pipeline=settings.pipeline
        ),
        **typed,
    }
    if libpq:  # In its DSN asyncpg gives them the meaning that they have in libpq.
        connect_args["dsn"] = "postgresql://?" + urlencode(libpq, doseq=True)
    return url.difference_update_query([*typed, *libpq]), connect_args


def configure_engine(
    engine: Engine,
    settings: DatabaseSettings,
    server: EmbeddedServer | None,
    cleanup_of: Callable[[Any], Cleanup | None],
) -> None:
    """Set up an engine's connections.

    Args:
        engine: The engine to set up.
        settings: The settings of its database.
        server: The embedded server to connect to, if the URL names one.
        cleanup_of: Returns the task that closes a driver's connection, or None.
    """

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _record: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
        if server:
            parameters["host"] = server.socket_directory
        asyncpg = dialect.loaded_dbapi.asyncpg
        try:
            adapted = dialect.connect(*arguments, **parameters)
        except (OSError, dialect.loaded_dbapi.Error, asyncpg.PostgresError) as error:
            raise _connect_error(dialect.loaded_dbapi, error) from (error.__cause__ or error)
        adapted.autocommit = True  # SQLAlchemy asks for the version, and needs no transaction.
        return adapted

    # `insert` puts this ahead of listeners that may fail.
    @event.listens_for(engine, "connect", insert=True)
    def on_connect(connection: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        record.info[LAST_USED] = monotonic()
        place: Any = record.record_info
        place[GET_CLEANUP] = partial(cleanup_of, connection.driver_connection)

    # SQLAlchemy's listener, which asks, comes before this one.
    @event.listens_for(engine, "connect")
    def leave_autocommit(connection: Any, _record: ConnectionPoolEntry) -> None:
        connection.autocommit = False

    @event.listens_for(engine, "handle_error")
    def name_the_cause(context: ExceptionContext) -> None:
        """Note on a statement's error that a statement ahead of it has failed."""
        connection, error = context.connection, context.sqlalchemy_exception
        if connection is None or connection.invalidated or error is None:
            return
        driver: Any = connection.connection.driver_connection
        pipeline: Pipeline | None = getattr(driver, "pipeline", None)
        if pipeline is not None and pipeline.failed and not pipeline.unanswered:
            failed = pipeline.failed[0]
            error.add_note(f"it was sent after {failed!r}, which failed, and did not run")

    @event.listens_for(engine, "checkout")
    def check_liveness(
        connection: AdaptedConnection, record: ConnectionPoolEntry, _proxy: Any
    ) -> None:
        driver: Any = connection.driver_connection
        if driver.is_closed():
            raise DisconnectionError("the server closed this connection")
        if monotonic() - record.info[LAST_USED] > settings.pool.ping_after:
            _ping(driver, settings.connect_timeout)

    @event.listens_for(engine, "checkin")
    def on_checkin(connection: AdaptedConnection | None, record: ConnectionPoolEntry) -> None:
        record.info[LAST_USED] = monotonic()
        # The next user must not find a transaction, not even one that a statement
        # began.
        driver: Any = connection and connection.driver_connection
        if driver is None or driver.is_closed():
            return
        adapted: Any = connection
        adapted.autocommit = adapted.readonly = False
        if not driver.end_use():
            record.invalidate()


def set_up(connection: Connection, options: ConnectionOptions, settings: Mapping[str, str]) -> None:
    """Set the options of a transaction before its BEGIN is sent.

    SQLAlchemy would set them by listeners for each connection, which cost more. They
    are reset at the return of the connection.
    """
    adapted: Any = connection.connection.dbapi_connection
    adapted.readonly = options.read_only
    if options.autocommit and not options.transaction_per_statement:
        adapted.isolation_level = "autocommit"
        ahead = READ_ONLY if options.read_only else ()
        if settings:
            ahead = (*ahead, ahead_of_each(settings))
        adapted.driver_connection.send_ahead_of_each(ahead)
    elif options.isolation:
        adapted.isolation_level = ISOLATION_LEVELS[options.isolation]


def _connect_error(dbapi: Any, error: Exception) -> Exception:
    """Turn what `connect()` raised into an error that SQLAlchemy wraps."""
    reason = error.__cause__ or error
    wrapped: Any = dbapi.OperationalError(f"could not connect: {type(reason).__name__}: {reason}")
    wrapped.pgcode = wrapped.sqlstate = getattr(reason, "sqlstate", None)
    return cast(Exception, wrapped)


def _ping(driver: Any, timeout: float) -> None:
    """Ping the server with one message; SQLAlchemy's own ping takes three.

    Raises:
        DisconnectionError: No answer came. The pool then takes another connection.
    """
    try:
        await_only(driver.execute("SELECT 1", timeout=timeout))
    except Exception as error:
        driver.terminate()
        raise DisconnectionError("the server does not answer on this connection") from error


class PostgreSQLPool(AsyncAdaptedQueuePool):
    """A pool whose places become free only when their connection is closed."""

    _queue_class = FairQueue

    def _do_get(self) -> ConnectionPoolEntry:
        if sys.version_info >= (3, 12):
            return super()._do_get()
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        record = super()._do_get()
        if task and task.cancelling() > cancellations:
            # Before Python 3.12, asyncio.wait_for() swallows a cancellation that
            # arrives together with the connection.
            self._do_return_conn(record)
            raise asyncio.CancelledError
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._overflow > 0 and self._pool.full():
            record.close()
        cleanup = _take_cleanup(record) if record.dbapi_connection is None else None
        if cleanup is None or cleanup.done():
            super()._do_return_conn(record)
        else:
            cleanup.add_done_callback(partial(self._return_late, record))

    def _return_late(self, record: ConnectionPoolEntry, _cleanup: Cleanup) -> None:
        super()._do_return_conn(record)


def _take_cleanup(record: ConnectionPoolEntry) -> Cleanup | None:
    place: Any = record.record_info
    get_cleanup = place.pop(GET_CLEANUP, None)
    cleanup: Cleanup | None = get_cleanup and get_cleanup()
    return cleanup


# Connections of the parent process. Their finalizers would disturb it.
_inherited: list[Any] = []


def abandon(driver: Any, *, is_forked: bool) -> None:
    """Close a connection whose event loop is closed, or that a fork has inherited.

    No transport closes its socket once its loop is closed. A forked process sends
    nothing.
    """
    transport = driver._transport
    if not is_forked:
        with suppress(Exception):  # It fails on the closed loop, after the goodbye was sent.
            driver.terminate()
    tls = getattr(transport, "_ssl_protocol", None)
    close = getattr(tls._transport if tls else transport, "_call_connection_lost", None)
    if close is not None:
        with suppress(Exception):  # Those who waited for the connection are gone.
            close(None)
        with suppress(Exception):
            driver._protocol.connection_lost(None)  # TLS leaves this call to the loop.
    elif is_forked:  # It is uvloop's transport. A closed loop of uvloop has closed its own.
        _inherited.append(driver)
