"""Stores of templates: their databases, and the locks on those that are in use."""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._config.url import DatabaseURL
from sessionwire._database.driver_errors import INVALID_CATALOG_NAME, sqlstate
from sessionwire._shield import run_shielded
from sessionwire.embedded import EmbeddedServer, run_in_thread
from sessionwire.errors import ConfigurationError, ConnectionFailedError
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings

DATABASE_TIMEOUT = 120.0  # seconds to create a database, and to clean up
ID_LENGTH = 14  # hexadecimal digits
INSUFFICIENT_PRIVILEGE = "42501"  # an SQLSTATE


def hex_digest(text: str, digits: int) -> str:
    return blake2b(text.encode(), digest_size=digits // 2).hexdigest()


class TemplateStore(ABC):
    """The templates beside the database of a URL, of which it locks one at a time."""

    separator = "_"

    def __init__(
        self, settings: DatabaseSettings, url: URL, name: str, user: str | int, directory: str = ""
    ) -> None:
        self._settings = settings
        self._url = url
        # PostgreSQL limits names to 63 bytes, so only a part of the database's name is
        # in them. The digest contains the user, who could not drop the databases that
        # another one left.
        readable = name.encode()[:24].decode(errors="ignore")
        digest = hex_digest(f"{directory}{name} {user}", 8)
        self._prefix = f"{directory}{readable}_{digest}_"

    def database_name(self, template_id: str, suffix: str) -> str:
        return f"{self._prefix}{template_id}{self.separator}{suffix}"

    def settings_of_database(self, name: str) -> DatabaseSettings:
        url = DatabaseURL._make(self._url.set(database=name))
        return self._settings.model_copy(update={"url": url})

    async def template_ids(self) -> set[str]:
        names = [name for name in await self.list_databases() if name.startswith(self._prefix)]
        return {name.removeprefix(self._prefix)[:ID_LENGTH] for name in names}

    async def databases_of(self, template_id: str) -> list[str]:
        prefix = self.database_name(template_id, "")
        return [name for name in await self.list_databases() if name.startswith(prefix)]

    @abstractmethod
    async def list_databases(self) -> list[str]: ...

    @abstractmethod
    async def create(self, name: str, template: str | None = None) -> None: ...

    @abstractmethod
    async def rename(self, name: str, to: str) -> None: ...

    @abstractmethod
    async def drop(self, name: str) -> None: ...

    @abstractmethod
    async def count_connections(self, name: str) -> int: ...

    @abstractmethod
    async def try_lock_exclusive(self, template_id: str) -> bool:
        """Release the lock held so far, and try to take this one in exclusive mode."""

    @abstractmethod
    async def try_lock_shared(self, template_id: str) -> bool:
        """Try to take the lock in shared mode.

        Coming from exclusive mode, nobody can take it in between.
        """


class PostgresTemplateStore(TemplateStore):
    """Templates in PostgreSQL, locked with advisory locks.

    One connection holds the locks and executes everything. No cancellation may abort
    it.
    """

    def __init__(
        self, settings: DatabaseSettings, connection: AsyncConnection, database: str, user: str
    ) -> None:
        super().__init__(settings, make_url(settings.url), database, user)
        self._connection = connection
        self._connection_lock = asyncio.Lock()
        self._has_exclusive_lock = False

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: DatabaseSettings) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as stack:
            url = make_url(settings.url)
            if url.drivername == "embedded":
                server = EmbeddedServer(url.database or "")
                stack.push_async_callback(run_in_thread, server.stop)
                await run_in_thread(server.start)
                settings = settings.model_copy(update={"url": server.url})
            try:
                manager = await stack.enter_async_context(DatabaseSessionManager(settings))
            except ConnectionFailedError as error:
                if sqlstate(error.__cause__) == INVALID_CATALOG_NAME:
                    error.add_note(
                        "name one that exists, such as 'postgres': templates are made beside it"
                    )
                raise
            engine = manager.engine.execution_options(isolation_level="AUTOCOMMIT")
            connection = await stack.enter_async_context(engine.connect())
            named = await connection.exec_driver_sql("SELECT current_database(), current_user")
            yield cls(settings, connection, *map(str, named.one()))

    async def list_databases(self) -> list[str]:
        return await self._execute("SELECT datname FROM pg_database")

    async def create(self, name: str, template: str | None = None) -> None:
        # with the default strategy, WAL_LOG: the checkpoints of FILE_COPY are slow if
        # the server waits for its disk
        source = f" TEMPLATE {self._quoted(template)}" if template else ""
        try:
            await self._execute(f"CREATE DATABASE {self._quoted(name)}{source}")
        except DBAPIError as error:
            if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
                raise
            raise ConfigurationError(
                f"url: user {self._url.username!r} may not create databases: "
                "grant the right with ALTER ROLE … CREATEDB, or name another user"
            ) from error

    async def rename(self, name: str, to: str) -> None:
        await self._execute(f"ALTER DATABASE {self._quoted(name)} RENAME TO {self._quoted(to)}")

    async def drop(self, name: str) -> None:
        await self._execute(f"DROP DATABASE IF EXISTS {self._quoted(name)} WITH (FORCE)")

    async def count_connections(self, name: str) -> int:
        # autovacuum has no user
        clients = "SELECT datname FROM pg_stat_activity WHERE usesysid IS NOT NULL"
        return (await self._execute(clients)).count(name)

    async def try_lock_exclusive(self, template_id: str) -> bool:
        await self._execute("SELECT pg_advisory_unlock_all()")
        key = self._lock_key(template_id)
        (self._has_exclusive_lock,) = await self._execute(f"SELECT pg_try_advisory_lock({key})")
        return self._has_exclusive_lock

    async def try_lock_shared(self, template_id: str) -> bool:
        key = self._lock_key(template_id)
        (is_shared,) = await self._execute(f"SELECT pg_try_advisory_lock_shared({key})")
        if self._has_exclusive_lock:
            await self._execute(f"SELECT pg_advisory_unlock({key})")
        return bool(is_shared)

    def _lock_key(self, template_id: str) -> int:
        # 14 hexadecimal digits are 56 bits, and an advisory lock's key has at most 63
        return int(hex_digest(self._prefix + template_id, 14), 16)

    async def _execute(self, statement: str) -> list[Any]:
        async def execute() -> list[Any]:
            result = await self._connection.exec_driver_sql(statement)
            return list(result.scalars()) if result.returns_rows else []

        async with self._connection_lock:
            return await run_shielded(execute(), DATABASE_TIMEOUT)

    def _quoted(self, name: str) -> str:
        return self._connection.dialect.identifier_preparer.quote_identifier(name)


class SQLiteTemplateStore(TemplateStore):
    """Templates in SQLite: each is a directory of files, which is also its lock."""

    separator = os.sep

    def __init__(self, settings: DatabaseSettings) -> None:
        url = make_url(settings.url)
        file = url.database or ":memory:"
        if file.startswith((":memory:", "file:")) or url.query.get("mode") == "memory":
            url, file = url.set(query={}), str(Path(tempfile.gettempdir(), "sessionwire"))
        directory = f"{Path(file).resolve().parent}{os.sep}"
        super().__init__(settings, url, Path(file).name, os.getuid(), directory)
        self._lock_fd: int | None = None
        self._exclusive_id: str | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: DatabaseSettings) -> AsyncGenerator[Self]:
        store = cls(settings)
        try:
            yield store
        finally:
            store._release()

    async def list_databases(self) -> list[str]:
        directories = glob.escape(self._prefix) + "*"
        return glob.glob(directories) + glob.glob(f"{directories}/*")

    async def create(self, name: str, template: str | None = None) -> None:
        if template:  # otherwise SQLite creates the file
            await run_shielded(asyncio.to_thread(shutil.copy, template, name), DATABASE_TIMEOUT)

    async def rename(self, name: str, to: str) -> None:
        os.rename(name, to)

    async def drop(self, name: str) -> None:
        for file in (f"{name}-wal", f"{name}-shm", name):
            with suppress(FileNotFoundError):
                os.unlink(file)

    async def count_connections(self, name: str) -> int:
        # the last connection to close removes the file, unless two close at once
        if os.access(f"{name}-wal", os.F_OK):
            with suppress(sqlite3.Error), closing(sqlite3.connect(name, timeout=0)) as connection:
                connection.execute("PRAGMA schema_version")
        return int(os.access(f"{name}-wal", os.F_OK))

    async def try_lock_exclusive(self, template_id: str) -> bool:
        self._release()
        self._exclusive_id = template_id if self._flock(template_id, exclusive=True) else None
        return self._exclusive_id is not None

    async def try_lock_shared(self, template_id: str) -> bool:
        self._exclusive_id = None
        return self._flock(template_id, exclusive=False)

    def _flock(self, template_id: str, *, exclusive: bool) -> bool:
        import fcntl  # missing on Windows

        directory = self.database_name(template_id, "")
        with suppress(BlockingIOError, FileNotFoundError):
            if self._lock_fd is None:
                os.makedirs(directory, 0o700, exist_ok=True)
                self._lock_fd = os.open(directory, os.O_RDONLY)
            fcntl.flock(
                self._lock_fd, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            )
            # not so if the previous holder has removed the directory meanwhile
            if os.path.samestat(os.fstat(self._lock_fd), os.stat(directory)):
                return True
        self._release()
        return False

    def _release(self) -> None:
        if self._exclusive_id:
            # the template is unused, but a cancelled connection may have recreated a
            # file
            shutil.rmtree(self.database_name(self._exclusive_id, ""), ignore_errors=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = self._exclusive_id = None
