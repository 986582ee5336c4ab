"""Settings in, engines out: what each database needs to behave."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import socket as socket_options
import tempfile
import uuid
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast
from urllib.parse import urlencode

from sqlalchemy import URL, AdaptedConnection, Engine, event, make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sessionwire._config.url import LIBPQ_KEYS, DatabaseURL, typed_arguments
from sessionwire.embedded import EmbeddedServer
from sessionwire.errors import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    NotInitializedError,
    UnexpectedRollbackError,
)
from sessionwire.settings import DatabaseSettings

from . import sqlite
from .begin_hooks import BeginHooks
from .driver_errors import watch_disconnects
from .failed_statements import watch_failures
from .options import TERMS, Terms
from .savepoints import keep_connections

LAST_USED, EXPIRES = "sessionwire_last_used", "sessionwire_expires"  # of a pooled connection, by the monotonic clock
JITTER = 0.2  # of its lifetime
CLOSES = "sessionwire_closes"  # of a place in the pool: tells what closes the connection that has it
MOMENT = 0.25  # seconds


class Engines:
    """The engine of a database with its variants, and what has to be gone when it is disposed.

    `primary` is the `AsyncEngine`. Sessions that only read without a transaction are on a second one, in autocommit,
    whose connections the server opens read-only.
    """

    def __init__(self, settings: DatabaseSettings, begin_hooks: BeginHooks | None = None) -> None:
        url = make_url(settings.url)
        self.server = EmbeddedServer(url.database or "") if url.drivername == "embedded" else None
        self._settings = settings
        self._begin_hooks = BeginHooks() if begin_hooks is None else begin_hooks
        self._file: Path | None = None
        if url.get_backend_name() == "sqlite" and (
            url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
        ):
            # one connection in memory would be shared by all, and die with the first cancelled statement
            self._file = Path(tempfile.gettempdir(), f"sessionwire-{uuid.uuid4()}.db")
            url = URL.create(url.drivername, database=str(self._file))
        self._url = url
        self._variants: dict[Terms, AsyncEngine] = {}
        self.is_retired = False  # by the manager's close(): nothing may commit through it any more
        self._connections: set[AdaptedConnection] = set()
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()  # of pools
        self._ended: weakref.WeakKeyDictionary[Any, asyncio.Future[Any]] = weakref.WeakKeyDictionary()
        self._is_disposing = False
        self._endings: set[asyncio.Future[Any]] = set()
        self.primary = self._make(read_only=False)
        self._reading = self._make(read_only=True)

    @property
    def is_sqlite(self) -> bool:
        return self.primary.dialect.name == "sqlite"

    def owns(self, engine: Engine) -> bool:
        """Whether it is one of these, or a variant of one, which shares its pool."""
        return engine.pool in self.pools

    @property
    def pools(self) -> list[Pool]:
        return [self.primary.pool, self._reading.pool]

    @property
    def endings(self) -> set[asyncio.Future[Any]]:
        """What stops and undoes in the background what was given up."""
        return self._endings

    def on(self, terms: Terms) -> AsyncEngine:
        """The engine to bind a session to, so that its connection is on these terms."""
        if terms.execution_options:  # of any value: without a hash, or another one each time
            return self._variant(terms)
        variant = self._variants.get(terms)
        if variant is None:
            variant = self._variants[terms] = self._variant(terms)
        return variant

    def _variant(self, terms: Terms) -> AsyncEngine:
        engine = self._reading if terms.autocommit and terms.read_only else self.primary
        options = terms.copy_options()
        if self.is_sqlite:  # where the driver's own isolation level is in the way
            options[TERMS] = terms
        elif engine is self.primary:
            isolation = "AUTOCOMMIT" if terms.autocommit and not terms.hooked else terms.isolation
            if engine.dialect.name == "postgresql":
                if terms.read_only:
                    options["postgresql_readonly"] = True
                if isolation == "READ UNCOMMITTED":
                    isolation = "READ COMMITTED"  # as the server itself takes it; the driver doesn't know the other
            if isolation:
                options["isolation_level"] = isolation
        if terms.hooked:
            hooked = engine.execution_options(**{**options, TERMS: terms})
            hooked.sync_engine.dialect = self._one_by_one
            return hooked
        return engine.execution_options(**options) if options else engine

    @functools.cached_property
    def _one_by_one(self) -> Any:
        return self._begin_hooks.one_by_one(self.primary.dialect)

    def _make(self, *, read_only: bool) -> AsyncEngine:
        if self._url.get_backend_name() == "sqlite":
            engine = self._sqlite(read_only)
        elif self.server or self._url.drivername == "postgresql+asyncpg":
            engine = self._postgresql(read_only)
        else:
            engine = self._create(self._url, read_only, {})
        event.listen(engine.sync_engine, "connect", self._connected)
        event.listen(engine.sync_engine, "checkout", self._refuse_retired)
        event.listen(engine.sync_engine, "checkout", self._replace_aged)
        event.listen(engine.sync_engine, "checkin", self._returned)
        event.listen(engine.sync_engine, "close", self._closed)
        watch_disconnects(engine.sync_engine, read_only=read_only)
        self._begin_hooks.watch(engine.sync_engine, autocommit=read_only)
        if not read_only:  # whose connections have no transactions
            watch_failures(engine.sync_engine)
            keep_connections(engine.sync_engine)
        return engine

    def _create(self, url: URL, read_only: bool, arguments: dict[str, Any], **options: Any) -> AsyncEngine:
        pool = self._settings.pool
        if read_only and url.get_backend_name() != "sqlite":
            options |= {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
        return create_async_engine(
            DatabaseURL._make(url),
            echo=self._settings.echo,
            pool_size=pool.size,
            max_overflow=pool.max_overflow,
            pool_timeout=pool.timeout,
            pool_use_lifo=True,  # idle connections stay idle, and age out
            connect_args=arguments,
            **options,
        )

    def _postgresql(self, read_only: bool) -> AsyncEngine:
        url = URL.create("postgresql+asyncpg", "postgres", database="postgres") if self.server else self._url
        libpq = {key: value for key, value in url.query.items() if key in LIBPQ_KEYS}
        for key in ("sslrootcert", "sslcert", "sslkey"):
            if key in libpq and not Path(str(libpq[key])).expanduser().is_file():
                raise ConfigurationError(f"url: {key}: there is no file {libpq[key]!r} on this machine")
        server_settings: dict[str, str] = {}
        if self._settings.application_name:
            server_settings["application_name"] = self._settings.application_name
        if read_only:
            server_settings["default_transaction_read_only"] = "on"
        arguments: dict[str, Any] = {
            "timeout": self._settings.connect_timeout,
            "server_settings": server_settings,
            "connection_class": _asyncpg_connection(self._settings.tcp_timeout),
        }
        typed = typed_arguments(url)  # which in the URL would be text
        url = url.difference_update_query(typed)
        arguments |= typed
        if libpq:  # in its DSN asyncpg gives them the meaning that they have in libpq
            url = url.difference_update_query(libpq)
            arguments["dsn"] = "postgresql://?" + urlencode(libpq, doseq=True)
        engine = self._create(url, read_only, arguments, poolclass=_Pool)
        pg_dialect: Any = engine.dialect
        # SQLAlchemy's own waits for two seconds, or for good; cancelled meanwhile, it leaves the server at work
        pg_dialect.do_close = pg_dialect.do_terminate = self._close_in_turn
        event.listen(engine.sync_engine, "connect", self._note_place, insert=True)  # ahead of what may fail

        @event.listens_for(engine.sync_engine, "do_connect")
        def connect(dialect: Any, _record: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
            if self.server:
                parameters["host"] = self.server.socket_directory
            try:
                return dialect.connect(*arguments, **parameters)
            except (OSError, dialect.loaded_dbapi.Error, dialect.loaded_dbapi.asyncpg.PostgresError) as error:
                raise _connect_error(dialect.loaded_dbapi, error) from (error.__cause__ or error)

        @event.listens_for(engine.sync_engine, "checkout")
        def check(connection: AdaptedConnection, record: ConnectionPoolEntry, _proxy: Any) -> None:
            if connection.driver_connection.is_closed():  # known without asking the server
                raise DisconnectionError("the server closed this connection")
            if monotonic() - record.info[LAST_USED] > self._settings.pool.ping_after:
                self._ping(connection.driver_connection)

        @event.listens_for(engine.sync_engine, "checkin")
        def drop_unclean(connection: AdaptedConnection | None, record: ConnectionPoolEntry) -> None:
            """Not even a BEGIN that was sent as a statement is left to the next one."""
            driver: Any = connection and connection.driver_connection
            if driver is not None and not driver.is_closed() and driver.is_in_transaction():
                record.invalidate()

        return engine

    def _sqlite(self, read_only: bool) -> AsyncEngine:
        engine = self._create(self._url, read_only, sqlite.ARGUMENTS, poolclass=sqlite.FilePool)
        file = Path(self._url.database or "")

        @event.listens_for(engine.sync_engine, "do_connect")
        def make_file(*_: Any) -> None:
            if not str(file).startswith("file:"):
                file.parent.mkdir(parents=True, exist_ok=True)
            if self._file and not self._file.exists():
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL, 0o600))
                weakref.finalize(self, sqlite.remove, self._file)

        sqlite.prepare(engine.sync_engine, read_only=read_only, patience=self._settings.pool.timeout)
        dialect: Any = engine.dialect
        # SQLAlchemy's own waits for the thread, where a second cancellation would leave a task behind for good
        dialect.do_terminate = self.end
        return engine

    def _connected(self, connection: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        self._connections.add(connection)
        self._records.add(record)
        lifetime = self._settings.pool.max_lifetime or float("inf")
        # with a jitter, or a pool that was filled at once would be renewed at once
        record.info[EXPIRES] = monotonic() + lifetime * random.uniform(1 - JITTER, 1)
        record.info[LAST_USED] = monotonic()

    def _refuse_retired(self, *_: object) -> None:
        """Whatever was made during the close: nobody would end it any more, so the pool is told to."""
        if self.is_retired:
            raise NotInitializedError("it was closed while this waited for a connection")

    def _replace_aged(self, _connection: AdaptedConnection, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if monotonic() > record.info[EXPIRES]:
            raise DisconnectionError("this connection has reached pool.max_lifetime")

    def _returned(self, _connection: AdaptedConnection | None, record: ConnectionPoolEntry) -> None:
        record.info[LAST_USED] = monotonic()

    def _ping(self, driver: Any) -> None:
        """One message; SQLAlchemy's own ping is three. Raises `DisconnectionError`, and the pool takes another one."""
        try:
            await_only(driver.execute("SELECT 1", timeout=self._settings.connect_timeout))
        except Exception as error:
            driver.terminate()
            raise DisconnectionError("the server does not answer on this connection") from error

    def _note_place(self, connection: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        place: Any = record.record_info
        place[CLOSES] = partial(self._ended.get, connection.driver_connection)

    def _closed(self, connection: AdaptedConnection, _record: Any) -> None:
        self._connections.discard(connection)

    def end(self, dbapi_connection: Any) -> None:
        """Give up a connection without waiting for it: what runs on it is stopped and undone in the background."""
        self._begin_to_end(dbapi_connection)

    def _begin_to_end(self, dbapi_connection: Any) -> asyncio.Future[Any]:
        driver = dbapi_connection.driver_connection
        ending = self._ended.get(driver)
        if ending is None:  # aiosqlite waits for good where it is closed twice at once
            # on SQLite undone first: unfinished cursors would keep a closed one's lock
            stop = sqlite.stop(driver, driver.rollback(), driver.close()) if self.is_sqlite else self._close(driver)
            ending = self._ended[driver] = asyncio.ensure_future(stop)
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
        return ending

    async def _close(self, driver: Any) -> None:
        """Stop what runs on it and wait until the server has hung up; where that takes too long, don't wait."""
        with suppress(Exception):
            async with asyncio.timeout(self._settings.rollback_timeout):
                await driver.close()

    def _close_in_turn(self, dbapi_connection: Any) -> None:
        """Close a connection for its pool. Where that takes more than a moment, it goes on in the background."""
        if not in_greenlet():  # where the garbage collector found it
            dbapi_connection.terminate()
            return
        ending = self._begin_to_end(dbapi_connection)
        if not self._is_disposing:
            await_only(_wait_a_moment(ending))

    async def terminate(self) -> None:
        """Cut every connection off: what runs on it is stopped, and nothing of it commits."""
        for connection in list(self._connections):
            self.end(connection)
        await asyncio.gather(*self._endings, return_exceptions=True)

    def abandon(self, *, is_forked: bool) -> None:
        """Drop all connections without awaiting: their event loop is closed, or they are the parent process's."""
        in_use = [record.driver_connection for record in self._records if record.in_use]
        for record in self._records:
            record.fairy_ref = None  # the garbage collector would give it back
        for engine in (self._reading, self.primary):
            engine.sync_engine.dispose(close=False)
        for task in cast(set[Any], self._endings):
            task._log_destroy_pending = False
        for driver in {connection.driver_connection for connection in self._connections} | set(self._ended):
            if self.is_sqlite:
                is_idle = driver not in in_use and driver not in self._ended
                sqlite.drop(driver, is_forked=is_forked, is_idle=is_idle)
            elif hasattr(driver, "_transport"):  # asyncpg's
                _drop(driver, is_forked=is_forked)
        self._connections, self._endings = set(), set()
        self._ended = weakref.WeakKeyDictionary()

    async def dispose(self) -> None:
        """Close the pools and remove a temporary file."""
        self._is_disposing = True  # all connections at once, not one after the other
        for engine in (self._reading, self.primary):
            await engine.dispose()
        await asyncio.gather(*self._endings, return_exceptions=True)
        if self._file:
            sqlite.remove(self._file)


async def _wait_a_moment(ending: asyncio.Future[Any]) -> None:
    """Wait for it, whatever is cancelled meanwhile; then let that go on."""
    deadline = monotonic() + MOMENT
    cancellation: asyncio.CancelledError | None = None
    while not ending.done() and (left := deadline - monotonic()) > 0:
        try:
            await asyncio.wait((ending,), timeout=left)
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation


# PostgreSQL


def _connect_error(dbapi: Any, error: Exception) -> Exception:
    """What asyncpg raises from `connect()`, as the driver's error, for SQLAlchemy to wrap like that of a statement."""
    reason = error.__cause__ or error
    wrapped: Any = dbapi.OperationalError(f"could not connect: {type(reason).__name__}: {reason}")
    wrapped.pgcode = wrapped.sqlstate = getattr(reason, "sqlstate", None)
    return cast(Exception, wrapped)


class _Pool(AsyncAdaptedQueuePool):
    """A place in it is free only once the connection that had it is closed."""

    def _do_get(self) -> ConnectionPoolEntry:
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        record = super()._do_get()
        if task and task.cancelling() > cancellations:
            # asyncio.wait_for() before Python 3.12 passes by one that comes together with the connection
            self._do_return_conn(record)
            raise asyncio.CancelledError
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._pool.full():
            record.close()
        ending = _ending_of(record) if record.dbapi_connection is None else None
        if ending is None or ending.done():
            super()._do_return_conn(record)
        else:
            ending.add_done_callback(partial(self._return_late, record))

    def _return_late(self, record: ConnectionPoolEntry, _ending: asyncio.Future[Any]) -> None:
        super()._do_return_conn(record)


def _ending_of(record: ConnectionPoolEntry) -> asyncio.Future[Any] | None:
    place: Any = record.record_info
    closes = place.pop(CLOSES, None)
    ending: asyncio.Future[Any] | None = closes and closes()
    return ending


def _notice_silence(socket: Any, seconds: float) -> None:
    """Let a TCP connection fail whose other side has acknowledged nothing for so long, as far as the platform can."""
    if socket is None or socket.family not in (socket_options.AF_INET, socket_options.AF_INET6):
        return
    socket.setsockopt(socket_options.SOL_SOCKET, socket_options.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", seconds / 2),
        ("TCP_KEEPALIVE", seconds / 2),  # its name on macOS
        ("TCP_KEEPINTVL", seconds / 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", seconds * 1000),
    ):
        if hasattr(socket_options, name):
            socket.setsockopt(socket_options.IPPROTO_TCP, getattr(socket_options, name), max(1, round(value)))


@functools.cache
def _asyncpg_connection(tcp_timeout: float) -> Any:
    """asyncpg's connection, but for what asyncpg takes for success and what it would not forget.

    A COMMIT that the server answers with ROLLBACK is an error, and so is one whose wait for a synchronous standby was
    cancelled, of which the server only warns. A BEGIN that fails leaves nothing behind: asyncpg has
    taken note of the transaction by then, and would take each later one for a savepoint in it.
    """
    import asyncpg

    class Connection(asyncpg.Connection):
        def __init__(self, protocol: Any, transport: Any, *others: Any) -> None:
            super().__init__(protocol, transport, *others)
            if tcp_timeout:
                _notice_silence(transport.get_extra_info("socket"), tcp_timeout)

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
            try:
                status: str = await super().execute(query, *args, timeout=timeout)
            except BaseException as error:
                if query.startswith("BEGIN") and not self.is_closed():
                    self._forget_transaction(error)
                raise
            if status == "ROLLBACK" and query == "COMMIT;":
                raise UnexpectedRollbackError("the server answered the commit with a rollback: a statement had failed")
            return status

        def _forget_transaction(self, error: BaseException) -> None:
            if not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
                self.terminate()  # the answer is still to come, and the transaction may have begun
            elif not self.is_in_transaction():
                self._top_xact = None

        def _process_log_message(self, fields: dict[str, str], last_query: str | None) -> None:
            parent: Any = super()
            parent._process_log_message(fields, last_query)
            if fields.get("R") == "SyncRepWaitForLSN":  # the server's routine: the text is in any language
                raise CommitOutcomeUnknownError(  # which the command fails with that is being answered
                    "committed here, perhaps not replicated: the wait for a synchronous standby was cancelled. Look in "
                    "the database whether it was kept, before trying again, above all after a failover"
                )

    return Connection


_inherited: list[Any] = []  # of the parent process, which their finalizers would disturb


def _drop(driver: Any, *, is_forked: bool) -> None:
    """Close the socket, which no transport does once its loop is closed. In a forked process nothing is sent on it."""
    transport = driver._transport
    if not is_forked:
        with suppress(Exception):  # the loop is closed; the goodbye has been sent by then
            driver.terminate()
    tls = getattr(transport, "_ssl_protocol", None)
    close = getattr(tls._transport if tls else transport, "_call_connection_lost", None)
    if close is not None:
        with suppress(Exception):  # those who waited are gone
            close(None)
        with suppress(Exception):
            driver._protocol.connection_lost(None)  # which TLS leaves to the loop
    elif is_forked:  # uvloop's; a closed loop has closed its own
        _inherited.append(driver)
