"""`DatabaseEngines`: create the engines of a database, abort connections, dispose."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import tempfile
import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, cast

from sqlalchemy import URL, AdaptedConnection, Connection, Engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sessionwire._config.url import DatabaseURL
from sessionwire._log_events import DRIVER_UNCERTIFIED
from sessionwire.credentials import CredentialsFunction
from sessionwire.embedded import EmbeddedServer
from sessionwire.errors import ConfigurationError, NotInitializedError
from sessionwire.settings import DatabaseSettings
from sessionwire.status import OpenBlock

from . import postgresql, psycopg_driver, sqlite, sqlite_connections
from .begin_hooks import BeginHooks
from .connect_hooks import ConnectHooks
from .connection_pool import ConnectionPool
from .credential_source import credential_source
from .driver_errors import install_disconnect_listener
from .engine_options import EngineOptions
from .failed_statements import install_failure_listener, record_savepoints
from .holders import Holders, Unit
from .options import CONNECTION_OPTIONS, ConnectionOptions
from .poolers import PROCESS, check_pooler, explain_lost_statements
from .postgresql_pool import EXPIRES_AT, Cleanup, LifetimeOver, PostgreSQLPool
from .savepoints import install_cancellation_listener
from .server_settings import server_settings
from .slow_statements import watch_statements
from .totals import Totals

if TYPE_CHECKING:
    from .commit_resolver import CommitResolver
    from .credential_source import CredentialSource

LIFETIME_JITTER = 0.2  # of the lifetime
POOL_CLOSE_WAIT = 0.25  # seconds that a pool waits for a connection to be closed


class PostgreSQLDriver(Protocol):
    """What the modules of the drivers for PostgreSQL have in common."""

    @property
    def Pool(self) -> type[PostgreSQLPool]: ...
    @property
    def SENDS_AHEAD(self) -> bool: ...
    def split_url(self, url: URL, settings: DatabaseSettings) -> tuple[URL, dict[str, Any]]: ...
    def configure_engine(
        self,
        engine: Engine,
        settings: DatabaseSettings,
        server: EmbeddedServer | None,
        cleanup_of: Callable[[Any], Cleanup | None],
        resolver: CommitResolver | None,
        credentials: CredentialSource | None,
    ) -> None: ...
    def set_up(
        self, connection: Connection, options: ConnectionOptions, settings: Mapping[str, str]
    ) -> None: ...
    def abandon(self, driver: Any, *, is_forked: bool) -> None: ...


POSTGRESQL_DRIVERS: dict[str, PostgreSQLDriver] = {
    "postgresql+asyncpg": postgresql,
    "postgresql+psycopg": psycopg_driver,
}


class DatabaseEngines:
    """The engines of one database, and the resources to release with them.

    `primary` and its variants share one pool.

    Args:
        settings: The settings of the database.
        begin_hooks: The hooks of `on_begin`, which more may be added to later.
        connect_hooks: The hooks of `on_connect`, likewise.
        units: The units that are open, at any time.
        totals: The counters of the manager.
        options: What the user adds to the engine.
        credentials: Returns the password of a new connection.
    """

    resolver: CommitResolver | None = None
    _postgresql: PostgreSQLDriver | None = None

    def __init__(
        self,
        settings: DatabaseSettings,
        begin_hooks: BeginHooks,
        connect_hooks: ConnectHooks,
        units: Collection[Unit],
        totals: Totals,
        options: EngineOptions,
        credentials: CredentialsFunction | None = None,
    ) -> None:
        self._options = options
        url = make_url(settings.url)
        self.server: EmbeddedServer | None = None
        if url.drivername == "embedded":
            self.server = EmbeddedServer(url.database or "")
            url = URL.create("postgresql+asyncpg", "postgres", database="postgres")
        self._temporary_file: Path | None = None
        if url.get_backend_name() == "sqlite" and sqlite.is_in_memory(url):
            # In memory all sessions would share one connection, and the data would be
            # lost with the first cancelled statement.
            self._temporary_file = Path(tempfile.gettempdir(), f"sessionwire-{uuid.uuid4()}.db")
            url = URL.create(url.drivername, database=str(self._temporary_file))
        self._url = url
        self._settings = settings
        self._begin_hooks, self._connect_hooks = begin_hooks, connect_hooks
        self.units, self.totals = units, totals
        self.is_closed = False  # by the manager's close(): nothing commits any more
        self._is_disposing = False
        self._connections: set[AdaptedConnection] = set()
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()  # all places of the pool
        # The cleanup task of each driver's connection that has been aborted.
        self._cleanups: weakref.WeakKeyDictionary[Any, asyncio.Future[Any]]
        self._cleanups = weakref.WeakKeyDictionary()
        self.cleanup_tasks: set[asyncio.Future[Any]] = set()  # those that are running
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._postgresql = POSTGRESQL_DRIVERS.get(url.drivername)
        if not (self.is_sqlite or self._postgresql):
            _admit_uncertified_driver(url, settings)
        is_server = not self.is_sqlite and self.server is None
        self._credentials = credential_source(settings, credentials, is_server=is_server)
        self.primary = self._build_engine()
        self.holders = Holders(units, totals, settings.pool.warn_held_after, _last_statement)
        self.pool.watch(self.holders, totals)
        self.tell_observer()
        # Statements can be sent ahead of others.
        self.sends_ahead = (
            settings.pipeline and self._postgresql is not None and self._postgresql.SENDS_AHEAD
        )
        # Each transaction is given the server's settings, behind a pooler.
        self.sets_up_transactions = bool(self._postgresql and server_settings(settings).at_begin)
        # A read-only connection is kept from writing without a transaction.
        self.refuses_writes_in_autocommit = self.is_sqlite or self.sends_ahead
        self._variants: dict[ConnectionOptions, AsyncEngine] = {}

    @property
    def pool(self) -> ConnectionPool:
        return cast(ConnectionPool, self.primary.sync_engine.pool)

    def list_blocks(self) -> tuple[OpenBlock, ...]:
        """List the open blocks, the oldest first."""
        return self.holders.list_blocks(self.pool.waiting)

    def tell_observer(self) -> None:
        """Let the observer of the database listen to the engine, if there is one."""
        if self.totals.observer is not None:
            self.totals.observer.watch(self.primary.sync_engine, self._settings)

    def set_up(
        self, connection: Connection, options: ConnectionOptions, settings: Mapping[str, str]
    ) -> None:
        """Set the options of a transaction before its BEGIN is sent.

        Args:
            connection: The connection of the transaction.
            options: The options.
            settings: What is sent ahead of each statement that has no transaction.
        """
        if self._postgresql:
            self._postgresql.set_up(connection, options, settings)

    def releases_at_once(self, options: ConnectionOptions) -> bool:
        """Tell whether a connection goes back to the pool without anything to wait for.

        That is so if no transaction is to be ended, no connection has to be closed
        because the pool is full, and no listener of a user has to be called.
        """
        pool = self.pool
        return (
            options.autocommit
            and not options.transaction_per_statement
            and self.sends_ahead
            and pool.overflow() <= 0
            and not (pool.dispatch.checkin or pool.dispatch.reset)
        )

    def includes(self, engine: Engine) -> bool:
        """Return whether `engine` is one of these; they share a pool."""
        return engine.pool is self.primary.pool

    def engine_for(self, options: ConnectionOptions) -> AsyncEngine:
        """Return the engine whose connections have these options."""
        if options.execution_options:
            # It is not cached: values may be unhashable, or new at every call.
            return self._with_options(options)
        if not options.transaction_per_statement:
            if self._postgresql:
                return self.primary  # Each transaction is given its options at its begin.
            if options.settings:
                options = replace(options, settings=())  # They go to the transaction.
        engine = self._variants.get(options)
        if engine is None:
            engine = self._variants[options] = self._with_options(options)
        return engine

    def _with_options(self, options: ConnectionOptions) -> AsyncEngine:
        engine = self.primary
        execution_options = options.copy_execution_options()
        if self.is_sqlite:
            execution_options[CONNECTION_OPTIONS] = options  # sqlite.py begins by them.
        elif not self._postgresql:
            isolation = options.isolation
            if options.autocommit and not options.transaction_per_statement:
                isolation = "AUTOCOMMIT"
            if isolation:
                execution_options["isolation_level"] = isolation
        if options.transaction_per_statement:
            execution_options[CONNECTION_OPTIONS] = options
            variant = engine.execution_options(**execution_options)
            variant.sync_engine.dialect = self._dialect_with_transaction_per_statement
            return variant
        return engine.execution_options(**execution_options) if execution_options else engine

    @functools.cached_property
    def _dialect_with_transaction_per_statement(self) -> Any:
        return self._begin_hooks.with_transaction_per_statement(self.primary.dialect)

    # Create

    def _build_engine(self) -> AsyncEngine:
        if self.is_sqlite:
            engine = self._build_sqlite()
        elif self._postgresql:
            engine = self._build_postgresql(self._postgresql)
        else:
            engine = self._build_other()
        sync_engine = engine.sync_engine
        event.listen(sync_engine, "connect", self._on_connect)
        if not isinstance(sync_engine.pool, PostgreSQLPool):  # It looks itself.
            event.listen(sync_engine, "checkout", _check_lifetime)
        event.listen(sync_engine, "invalidate", self._on_invalidate)
        event.listen(sync_engine, "close", self._on_close)
        install_disconnect_listener(sync_engine)
        self._begin_hooks.watch(sync_engine)
        install_failure_listener(sync_engine)
        record_savepoints(engine.dialect)
        install_cancellation_listener(sync_engine)
        watch_statements(sync_engine, self._settings, self.totals)
        return engine

    def _build_sqlite(self) -> AsyncEngine:
        engine = self._create_engine(
            self._url,
            connect_args=sqlite_connections.CONNECT_ARGS,
            poolclass=sqlite_connections.SQLitePool,
        )
        file = Path(self._url.database or "")

        @event.listens_for(engine.sync_engine, "do_connect")
        def create_file(*_: Any) -> None:
            if not str(file).startswith("file:"):
                file.parent.mkdir(parents=True, exist_ok=True)
            if self._temporary_file and not file.exists():
                os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))
                weakref.finalize(self, sqlite.delete_database_files, file)

        lock_timeout = self._settings.pool.timeout
        sqlite.configure_engine(engine.sync_engine, lock_timeout=lock_timeout)
        dialect: Any = engine.dialect
        # SQLAlchemy waits for the driver's thread, and a second cancellation would
        # leave a task behind for good.
        dialect.do_terminate = self.abort
        return engine

    def _build_postgresql(self, driver: PostgreSQLDriver) -> AsyncEngine:
        url, connect_args = driver.split_url(self._url, self._settings)
        engine = self._create_engine(url, connect_args=connect_args, poolclass=driver.Pool)
        dialect: Any = engine.dialect
        # SQLAlchemy waits for two seconds or forever. If it is cancelled meanwhile, it
        # leaves the statement running in the server.
        dialect.do_close = dialect.do_terminate = self._close_for_pool
        # asyncpg asks ahead of COMMIT, and psycopg with a message of its own.
        can_ask = self._settings.pipeline or not driver.SENDS_AHEAD
        if self._settings.resolve_commits and can_ask:
            from .commit_resolver import CommitResolver  # asyncpg is not needed on SQLite

            self.resolver = CommitResolver(
                self._connect_beside_pool, self._settings.commit_timeout, self.totals
            )
        driver.configure_engine(
            engine.sync_engine,
            self._settings,
            self.server,
            self._cleanup_of,
            self.resolver,
            self._credentials,
        )
        explain_lost_statements(engine.sync_engine)
        return engine

    async def check_connection(self, connection: AsyncConnection) -> None:
        """Find out whether a connection works, and what the server lets be done.

        Raises:
            ConfigurationError: The settings can't work with a pooler in front of it.
        """
        is_remote = self._postgresql is not None and self.server is None
        result = await connection.scalar(text(PROCESS if is_remote else "SELECT 1"))
        if self.resolver is not None:
            await self.resolver.prove(connection)
        if is_remote:
            await check_pooler(connection, result, self._settings, self._connect_beside_pool)

    def _connect_beside_pool(self) -> Any:
        if self.is_closed:
            raise NotInitializedError("the manager was closed meanwhile")
        self.totals.made += 1
        pool: Any = self.pool
        connection = pool._invoke_creator(None)
        connection.autocommit = True
        return connection

    def _build_other(self) -> AsyncEngine:
        engine = self._create_engine(self._url, poolclass=ConnectionPool)
        credentials = self._credentials
        if credentials is not None:

            @event.listens_for(engine.sync_engine, "do_connect")
            def add_credentials(
                dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]
            ) -> None:
                credentials.add_to(parameters, dialect.loaded_dbapi)

        return engine

    def _create_engine(self, url: URL, **options: Any) -> AsyncEngine:
        pool = self._settings.pool
        return self._options.create_engine(
            DatabaseURL._make(url),
            self._settings,
            echo=self._settings.echo,
            pool_size=pool.size,
            max_overflow=pool.max_overflow,
            pool_timeout=pool.timeout,
            pool_use_lifo=True,  # Connections that are not needed stay idle and age out.
            **options,
        )

    # Listen to the pool

    def _on_connect(self, connection: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        self.totals.made += 1
        self._connections.add(connection)
        self._records.add(record)
        lifetime = self._settings.pool.max_lifetime or float("inf")
        # Without jitter, a pool that was filled at once would be renewed at once.
        jitter = random.uniform(1 - LIFETIME_JITTER, 1)
        record.info[EXPIRES_AT] = monotonic() + lifetime * jitter
        if self._connect_hooks:
            self._connect_hooks.run(self.primary.sync_engine, connection, record)

    def _on_invalidate(
        self, connection: AdaptedConnection, _record: Any, error: BaseException | None
    ) -> None:
        if isinstance(error, LifetimeOver):
            self.totals.replaced += 1
        elif isinstance(error, Exception) and connection.driver_connection not in self._cleanups:
            self.totals.lost += 1

    def _on_close(self, connection: AdaptedConnection, _record: Any) -> None:
        self._connections.discard(connection)

    # Abort and dispose

    def refuse_checkouts(self) -> None:
        """Let nobody get a connection any more, not even a task that waits for one.

        It may be made during the close, and nobody would close it later. If its
        checkout fails, the pool closes it.
        """
        self.is_closed = True
        event.listen(self.primary.sync_engine, "checkout", _refuse_checkout)

    def abort(self, dbapi_connection: Any) -> None:
        """Abort a connection without waiting.

        In the background its statement is cancelled and its transaction rolled back.
        """
        self._start_cleanup(dbapi_connection)

    async def abort_all(self) -> None:
        """Abort all connections and wait until they are closed. Nothing commits."""
        for connection in list(self._connections):
            self.abort(connection)
        await asyncio.gather(*self.cleanup_tasks, return_exceptions=True)

    def _start_cleanup(self, dbapi_connection: Any) -> asyncio.Future[Any]:
        """Return the task that cancels what runs on a connection and closes it."""
        driver = dbapi_connection.driver_connection
        task = self._cleanups.get(driver)
        if task is None:  # aiosqlite would wait forever if it was closed twice at once.
            close = sqlite_connections.roll_back_and_close if self.is_sqlite else self._close
            task = self._cleanups[driver] = asyncio.ensure_future(close(driver))
            self.cleanup_tasks.add(task)
            task.add_done_callback(self.cleanup_tasks.discard)
        return task

    def _cleanup_of(self, driver: Any) -> asyncio.Future[Any] | None:
        return self._cleanups.get(driver)

    async def _close(self, driver: Any) -> None:
        """Cancel what runs on a connection and close it, within `rollback_timeout`."""
        with suppress(Exception):
            async with asyncio.timeout(self._settings.rollback_timeout):
                await driver.close()

    def _close_for_pool(self, dbapi_connection: Any) -> None:
        """Close a connection for its pool, in the background if it takes long."""
        if not in_greenlet():  # It was garbage-collected while it was checked out.
            dbapi_connection.driver_connection.terminate()
            return
        cleanup = self._start_cleanup(dbapi_connection)
        if not self._is_disposing:
            await_only(_wait_briefly(cleanup))

    async def dispose(self) -> None:
        """Close the pool and delete a temporary file."""
        self._is_disposing = True  # The connections are closed at once, not one by one.
        self.holders.stop()
        await self.primary.dispose()
        if self.resolver is not None:
            self.resolver.stop_watching()
        await asyncio.gather(*self.cleanup_tasks, return_exceptions=True)
        if self._temporary_file:
            sqlite.delete_database_files(self._temporary_file)

    def abandon(self, *, is_forked: bool) -> None:
        """Drop all connections without awaiting anything.

        Args:
            is_forked: They belong to the parent process; otherwise their event loop is
                closed.
        """
        self.holders.forget()
        in_use = [record.driver_connection for record in self._records if record.in_use]
        for record in self._records:
            record.fairy_ref = None  # Otherwise the garbage collector would release it.
        self.primary.sync_engine.dispose(close=False)
        for task in cast(set[Any], self.cleanup_tasks):
            task._log_destroy_pending = False
        for driver in {each.driver_connection for each in self._connections} | set(self._cleanups):
            if self.is_sqlite:
                is_idle = driver not in in_use and driver not in self._cleanups
                sqlite_connections.abandon(driver, is_forked=is_forked, is_idle=is_idle)
            elif self._postgresql:
                self._postgresql.abandon(driver, is_forked=is_forked)
        if self.resolver is not None:
            self.resolver.abandon()
        self._connections, self.cleanup_tasks = set(), set()
        self._cleanups = weakref.WeakKeyDictionary()


def _admit_uncertified_driver(url: URL, settings: DatabaseSettings) -> None:
    """Refuse a driver that the library was not made for, or warn of it if that is set.

    Raises:
        ConfigurationError: The setting `uncertified_driver` is false.
    """
    if not settings.uncertified_driver:
        instead = (
            "write postgresql+asyncpg or postgresql+psycopg"
            if url.get_backend_name() == "postgresql"
            else "use PostgreSQL or SQLite"
        )
        raise ConfigurationError(
            f"url: {url.drivername!r} is no certified driver, and what this library promises "
            f"does not hold on it: {instead}, or set uncertified_driver: true beside url, and "
            "do without that"
        )
    DRIVER_UNCERTIFIED.log(driver=url.drivername)


def _check_lifetime(
    _connection: AdaptedConnection, record: ConnectionPoolEntry, _proxy: Any
) -> None:
    if monotonic() > record.info[EXPIRES_AT]:
        raise LifetimeOver


def _refuse_checkout(*_: object) -> None:
    raise NotInitializedError("the manager was closed while this waited for a connection")


def _last_statement(connection: Any) -> str | None:
    driver = connection.driver_connection
    # asyncpg's protocol knows it; of other drivers than ours nobody does.
    return getattr(getattr(driver, "_protocol", driver), "last_statement", None)


async def _wait_briefly(cleanup: asyncio.Future[Any]) -> None:
    """Wait for a moment even if the current task is cancelled, then re-raise that."""
    deadline = monotonic() + POOL_CLOSE_WAIT
    cancellation: asyncio.CancelledError | None = None
    while not cleanup.done() and (left := deadline - monotonic()) > 0:
        try:
            await asyncio.wait((cleanup,), timeout=left)
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation
