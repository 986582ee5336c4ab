"""Where the databases of templates are made, and the locks that tell which of them are in use."""

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
from sessionwire._database.driver_errors import sqlstate
from sessionwire._shield import run_shielded
from sessionwire.embedded import EmbeddedServer, run_in_thread
from sessionwire.errors import ConfigurationError, ConnectionFailedError
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings

TIMEOUT = 120.0  # seconds to make a database, and to clean up
NUMBER = 14  # hexadecimal digits of a template's number
NO_SUCH_DATABASE, NO_RIGHT = "3D000", "42501"  # SQLSTATEs


def digest(text: str, digits: int) -> str:
    return blake2b(text.encode(), digest_size=digits // 2).hexdigest()


class Place(ABC):
    """The databases of templates, beside the one that a URL names; and their locks, of which it has one at a time."""

    separator = "_"

    def __init__(self, settings: DatabaseSettings, url: URL, name: str, user: str | int, directory: str = "") -> None:
        self._settings = settings
        self._url = url
        # PostgreSQL takes 63 bytes: a part of the name for people, and a digest; one user can't drop what another left
        shown, digested = name.encode()[:24].decode(errors="ignore"), digest(f"{directory}{name} {user}", 8)
        self._prefix = f"{directory}{shown}_{digested}_"

    def name(self, number: str, suffix: str) -> str:
        return f"{self._prefix}{number}{self.separator}{suffix}"

    def settings(self, name: str) -> DatabaseSettings:
        return self._settings.model_copy(update={"url": DatabaseURL._make(self._url.set(database=name))})

    async def numbers(self) -> set[str]:
        names = [name for name in await self.names() if name.startswith(self._prefix)]
        return {name.removeprefix(self._prefix)[:NUMBER] for name in names}

    async def databases(self, number: str) -> list[str]:
        return [name for name in await self.names() if name.startswith(self.name(number, ""))]

    @abstractmethod
    async def names(self) -> list[str]: ...

    @abstractmethod
    async def create(self, name: str, template: str | None = None) -> None: ...

    @abstractmethod
    async def rename(self, name: str, to: str) -> None: ...

    @abstractmethod
    async def drop(self, name: str) -> None: ...

    @abstractmethod
    async def connections(self, name: str) -> int: ...

    @abstractmethod
    async def lock(self, number: str) -> bool:
        """Try to have this lock alone; the one that was had before is given up."""

    @abstractmethod
    async def share(self, number: str) -> bool:
        """Try to have this lock together with others; nobody can take it in between where it was had alone."""


class Server(Place):
    """PostgreSQL: advisory locks, and all over the one connection that has them, which no cancellation may cut off."""

    def __init__(self, settings: DatabaseSettings, connection: AsyncConnection, database: str, user: str) -> None:
        super().__init__(settings, make_url(settings.url), database, user)
        self._connection = connection
        self._turn = asyncio.Lock()
        self._is_alone = False

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
                if sqlstate(error.__cause__) == NO_SUCH_DATABASE:
                    error.add_note("name one that exists, such as 'postgres': templates are made beside it")
                raise
            engine = manager.engine.execution_options(isolation_level="AUTOCOMMIT")
            connection = await stack.enter_async_context(engine.connect())
            named = await connection.exec_driver_sql("SELECT current_database(), current_user")
            yield cls(settings, connection, *map(str, named.one()))

    async def names(self) -> list[str]:
        return await self._execute("SELECT datname FROM pg_database")

    async def create(self, name: str, template: str | None = None) -> None:
        # the server's strategy, WAL_LOG: FILE_COPY is slower by its checkpoints where writes must reach the disk
        source = f" TEMPLATE {self._quoted(template)}" if template else ""
        try:
            await self._execute(f"CREATE DATABASE {self._quoted(name)}{source}")
        except DBAPIError as error:
            if sqlstate(error) != NO_RIGHT:
                raise
            raise ConfigurationError(
                f"url: user {self._url.username!r} may not create databases: "
                "allow it with ALTER ROLE … CREATEDB, or name one that may"
            ) from error

    async def rename(self, name: str, to: str) -> None:
        await self._execute(f"ALTER DATABASE {self._quoted(name)} RENAME TO {self._quoted(to)}")

    async def drop(self, name: str) -> None:
        await self._execute(f"DROP DATABASE IF EXISTS {self._quoted(name)} WITH (FORCE)")

    async def connections(self, name: str) -> int:
        clients = "SELECT datname FROM pg_stat_activity WHERE usesysid IS NOT NULL"  # autovacuum is no user
        return (await self._execute(clients)).count(name)

    async def lock(self, number: str) -> bool:
        await self._execute("SELECT pg_advisory_unlock_all()")
        (self._is_alone,) = await self._execute(f"SELECT pg_try_advisory_lock({self._lock(number)})")
        return self._is_alone

    async def share(self, number: str) -> bool:
        (is_shared,) = await self._execute(f"SELECT pg_try_advisory_lock_shared({self._lock(number)})")
        if self._is_alone:
            await self._execute(f"SELECT pg_advisory_unlock({self._lock(number)})")
        return bool(is_shared)

    def _lock(self, number: str) -> int:
        return int(digest(self._prefix + number, 14), 16)  # of the 63 bits that it may have

    async def _execute(self, statement: str) -> list[Any]:
        async def execute() -> list[Any]:
            result = await self._connection.exec_driver_sql(statement)
            return list(result.scalars()) if result.returns_rows else []

        async with self._turn:
            return await run_shielded(execute(), TIMEOUT)

    def _quoted(self, name: str) -> str:
        return self._connection.dialect.identifier_preparer.quote_identifier(name)


class Directory(Place):
    """SQLite: a template and its copies are files in a directory, which is the lock too."""

    separator = os.sep

    def __init__(self, settings: DatabaseSettings) -> None:
        url = make_url(settings.url)
        file = url.database or ":memory:"
        if file.startswith((":memory:", "file:")) or url.query.get("mode") == "memory":
            url, file = url.set(query={}), str(Path(tempfile.gettempdir(), "sessionwire"))
        super().__init__(settings, url, Path(file).name, os.getuid(), f"{Path(file).resolve().parent}{os.sep}")
        self._lock: int | None = None
        self._alone: str | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: DatabaseSettings) -> AsyncGenerator[Self]:
        place = cls(settings)
        try:
            yield place
        finally:
            place._release()

    async def names(self) -> list[str]:
        directories = glob.escape(self._prefix) + "*"
        return glob.glob(directories) + glob.glob(f"{directories}/*")

    async def create(self, name: str, template: str | None = None) -> None:
        if template:  # else SQLite makes it
            await run_shielded(asyncio.to_thread(shutil.copy, template, name), TIMEOUT)

    async def rename(self, name: str, to: str) -> None:
        os.rename(name, to)

    async def drop(self, name: str) -> None:
        for file in (f"{name}-wal", f"{name}-shm", name):
            with suppress(FileNotFoundError):
                os.unlink(file)

    async def connections(self, name: str) -> int:
        if os.access(f"{name}-wal", os.F_OK):  # the last to close removes it, but none where two close at once
            with suppress(sqlite3.Error), closing(sqlite3.connect(name, timeout=0)) as connection:
                connection.execute("PRAGMA schema_version")
        return int(os.access(f"{name}-wal", os.F_OK))

    async def lock(self, number: str) -> bool:
        self._release()
        self._alone = number if self._flock(number, alone=True) else None
        return self._alone is not None

    async def share(self, number: str) -> bool:
        self._alone = None
        return self._flock(number, alone=False)

    def _flock(self, number: str, *, alone: bool) -> bool:
        import fcntl  # not there on Windows

        directory = self.name(number, "")
        with suppress(BlockingIOError, FileNotFoundError):
            if self._lock is None:
                os.makedirs(directory, 0o700, exist_ok=True)
                self._lock = os.open(directory, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
            if os.path.samestat(os.fstat(self._lock), os.stat(directory)):  # else who had it has removed it meanwhile
                return True
        self._release()
        return False

    def _release(self) -> None:
        if self._alone:  # with a file that a cancelled connection may have made anew
            shutil.rmtree(self.name(self._alone, ""), ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self._alone = None
