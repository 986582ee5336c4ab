"""Settings in, engines out: what each database needs to behave."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import uuid
import weakref
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import URL, AdaptedConnection, Connection, event, make_url
from sqlalchemy.exc import DisconnectionError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .embedded import EmbeddedServer
from .errors import ConfigurationError
from .settings import DatabaseSettings
from .url import LIBPQ_KEYS, DatabaseURL

WRITES = "sessionwire_writes"  # execution option of the engine variant whose transactions are begun to write


class Engines:
    """The engine of a database, what its sessions are bound to, and what has to be gone when it is disposed.

    `primary` is the `AsyncEngine`; `writing` is its variant for transactions that write, on the same pool.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        url = make_url(settings.url)
        self.server = EmbeddedServer(url.database or "") if url.drivername == "embedded" else None
        self._connections: set[Any] = set()
        self._ended: weakref.WeakSet[Any] = weakref.WeakSet()
        self._endings: set[asyncio.Future[Any]] = set()
        self._file: Path | None = None
        if url.get_backend_name() == "sqlite":
            self.primary = self._sqlite(url, settings)
        elif self.server or url.drivername == "postgresql+asyncpg":
            self.primary = self._postgresql(url, settings)
        else:
            self.primary = _create(url, settings)

        @event.listens_for(self.primary.sync_engine, "connect")
        def connected(connection: AdaptedConnection, _record: Any) -> None:
            self._connections.add(connection)

        @event.listens_for(self.primary.sync_engine, "close")
        def closed(connection: AdaptedConnection, _record: Any) -> None:
            self._connections.discard(connection)

        self.writing = self.primary.execution_options(**{WRITES: True})

    def _postgresql(self, url: URL, settings: DatabaseSettings) -> AsyncEngine:
        libpq = {key: value for key, value in url.query.items() if key in LIBPQ_KEYS}
        for key in ("sslrootcert", "sslcert", "sslkey"):
            if key in libpq and not Path(str(libpq[key])).expanduser().is_file():
                raise ConfigurationError(f"url: {key}: there is no file {libpq[key]!r} on this machine")
        arguments: dict[str, Any] = {"timeout": settings.connect_timeout}
        if libpq:  # in its DSN asyncpg gives them the meaning that they have in libpq
            url = url.difference_update_query(libpq)
            arguments["dsn"] = "postgresql://?" + urlencode(libpq, doseq=True)
        if settings.application_name:
            arguments["server_settings"] = {"application_name": settings.application_name}
        if self.server:
            url = URL.create("postgresql+asyncpg", "postgres", database="postgres")
        engine = _create(DatabaseURL._make(url), settings, connect_args=arguments)
        if server := self.server:

            @event.listens_for(engine.sync_engine, "do_connect")
            def find_server(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
                parameters["host"] = server.socket_directory

        @event.listens_for(engine.sync_engine, "checkout")
        def replace_closed(connection: AdaptedConnection, _record: Any, _proxy: Any) -> None:
            if connection.driver_connection.is_closed():  # known without asking the server
                raise DisconnectionError("the server closed this connection")

        return engine

    def _sqlite(self, url: URL, settings: DatabaseSettings) -> AsyncEngine:
        if url.database in (None, "", ":memory:") or url.query.get("mode") == "memory":
            # one connection in memory would be shared by all, and die with the first cancelled statement
            self._file = Path(tempfile.gettempdir(), f"sessionwire-{uuid.uuid4()}.db")
            url = DatabaseURL.create(url.drivername, database=str(self._file))
        file = Path(url.database or "")
        is_uri = str(file).startswith("file:")
        arguments = {
            "isolation_level": None,  # the driver would begin late, and not know savepoints
            "timeout": BUSY_TIMEOUT,
            "factory": _SelfClosing,
            "check_same_thread": False,
        }
        engine = _create(DatabaseURL._make(url), settings, connect_args=arguments)

        @event.listens_for(engine.sync_engine, "do_connect")
        def make_file(*_: Any) -> None:
            if not is_uri:
                file.parent.mkdir(parents=True, exist_ok=True)
            if self._file and not self._file.exists():
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL, 0o600))
                weakref.finalize(self, _remove, self._file)

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            _begin_sqlite(connection, settings.pool.timeout)

        dialect: Any = engine.dialect
        commit = dialect.do_commit

        def commit_or_undo(connection: Any) -> None:
            try:
                commit(connection)
            except Exception:
                connection.rollback()  # as PostgreSQL does: what is left open, the next one would commit
                raise

        dialect.do_commit = commit_or_undo
        # SQLAlchemy's own waits for the thread, where a second cancellation would leave a task behind for good
        dialect.do_terminate = self._end
        return engine

    def _end(self, dbapi_connection: Any) -> None:
        """Give up a connection without waiting for it: what runs on it is stopped and undone in the background."""
        driver = dbapi_connection.driver_connection
        if driver in self._ended:
            return  # aiosqlite waits for good where it is closed twice at once
        self._ended.add(driver)
        ending = _end_sqlite(driver) if self.primary.dialect.name == "sqlite" else driver.close()
        task = asyncio.ensure_future(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def terminate(self) -> None:
        """Cut every connection off: what runs on it is stopped, and nothing of it commits."""
        for connection in list(self._connections):
            self._end(connection)
        await asyncio.gather(*self._endings, return_exceptions=True)

    async def dispose(self) -> None:
        """Close the pool and remove a temporary file."""
        await self.primary.dispose()
        await asyncio.gather(*self._endings, return_exceptions=True)
        if self._file:
            _remove(self._file)


class _SelfClosing(sqlite3.Connection):
    """Closes itself where a cancelled `connect()` lets go of it."""

    def __del__(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # it was never open
            self.close()


async def _end_sqlite(driver: Any) -> None:
    """Stop what runs in the driver's thread, undo and close: unfinished cursors would keep a closed one's lock."""
    steps: list[Awaitable[None]] = [driver.rollback(), driver.close()]
    endings = asyncio.gather(*steps, return_exceptions=True)
    while not (await asyncio.wait((endings,), timeout=0.02))[0]:
        with suppress(ValueError, sqlite3.ProgrammingError):  # closed
            driver._conn.interrupt()  # only now: where a cursor is unfinished, it would strike the rollback instead


def _create(url: URL, settings: DatabaseSettings, **options: Any) -> AsyncEngine:
    pool = settings.pool
    return create_async_engine(
        url,
        echo=settings.echo,
        pool_size=pool.size,
        max_overflow=pool.max_overflow,
        pool_timeout=pool.timeout,
        pool_recycle=pool.recycle or -1,
        pool_use_lifo=True,  # idle connections stay idle, and age out
        **options,
    )


BUSY_TIMEOUT = 5.0  # seconds that a statement waits for a lock, in the driver's thread, where it can't be cancelled
BEGIN = f"PRAGMA busy_timeout={BUSY_TIMEOUT * 1000:.0f}; BEGIN"
BEGIN_IMMEDIATE = f"PRAGMA busy_timeout=20; BEGIN IMMEDIATE; PRAGMA busy_timeout={BUSY_TIMEOUT * 1000:.0f}"


def _begin_sqlite(connection: Connection, timeout: float) -> None:
    """Begin for real, which the driver leaves until the first write. One that writes takes the write lock now, since a
    transaction that has read cannot wait for it (SQLITE_BUSY_SNAPSHOT); it waits in short turns, to be cancellable.
    """
    writes = connection.get_execution_options().get(WRITES, False)
    begin = BEGIN_IMMEDIATE if writes else BEGIN
    driver_connection: Any = connection.connection.dbapi_connection

    def execute(driver: Any) -> Any:
        return driver.executescript(begin)

    deadline = monotonic() + timeout
    while True:
        try:
            driver_connection.run_async(execute)
            return
        except Exception as error:
            busy = getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")
            if not busy or not writes or monotonic() > deadline:
                raise OperationalError(begin, None, error) from error


def _remove(file: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
