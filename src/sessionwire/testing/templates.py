"""Databases copied from a template, for tests with real commits and concurrency.

A template is migrated and seeded once, and copying it is fast. Its id is part of its
databases' names and identifies a lock that ends with the process. Users hold the lock
in shared mode, so whoever gets it exclusively knows that the template is unused.
Therefore what a killed process has left is dropped when the next template is opened,
and nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from sqlalchemy import URL, make_url

from sessionwire._error_reports import summarize
from sessionwire._shield import run_shielded
from sessionwire.errors import ConfigurationError, SessionwireError
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings, as_settings

from ._template_stores import (
    DATABASE_TIMEOUT,
    ID_LENGTH,
    PostgresTemplateStore,
    SQLiteTemplateStore,
    TemplateStore,
    hex_digest,
)

CLOSE_GRACE = 2.0  # seconds in which closed connections must be gone
LOCK_POLL_INTERVAL = 0.1  # seconds between two attempts to lock a template

Seed: TypeAlias = Callable[[DatabaseSessionManager], Awaitable[object]]


@dataclass
class DatabaseCopy:
    """A database copied from a template.

    Attributes:
        settings: The settings to open it with.
        connections_left: The number of connections that were still open when it was
            dropped; on SQLite 1 if there were any.
    """

    settings: DatabaseSettings
    connections_left: int = 0


class DatabaseTemplate:
    """A database that is migrated and seeded once, to be copied.

    Open it with `async with DatabaseTemplate(url, seed) as template:`, then open copies
    with `async with template.copy() as copy:`.

    The template and its copies are made beside the database of the URL, which stays as
    it is. On PostgreSQL that database must exist. For `sqlite://` they are in the
    directory for temporary files. Processes that open a template with one `key` share
    it: the first one makes it, the others wait for it, and the last one drops it.

    Args:
        database: Settings or a URL of PostgreSQL or SQLite.
        seed: An async function that takes an open `DatabaseSessionManager`, and makes
            the tables and rows of the template.
        key: The name of a shared template; None: the template is not shared.

    Raises:
        ConfigurationError: The URL is of another database, or its user may not create
            databases.
        ConnectionFailedError: The database cannot be reached.
        Exception: Any error of `seed`.
    """

    def __init__(
        self, database: DatabaseSettings | str | URL, seed: Seed, *, key: str | None = None
    ) -> None:
        self._settings = as_settings(database)
        self._backend = make_url(self._settings.url).get_backend_name()
        if self._backend not in ("postgresql", "embedded", "sqlite"):
            raise ConfigurationError(
                "url: templates are made of PostgreSQL and SQLite databases, not of "
                f"{self._backend}"
            )
        self._seed = seed
        self._id = secrets.token_hex(ID_LENGTH // 2) if key is None else hex_digest(key, ID_LENGTH)
        self._store: TemplateStore | None = None

    async def __aenter__(self) -> Self:
        self._block = self._open()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._block.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def copy(self) -> AsyncGenerator[DatabaseCopy]:
        """Copy the template, and drop the copy at the end of the block.

        Connections to the copy that are still open are closed.

        Raises:
            SessionwireError: The template is not open.
        """
        if (store := self._store) is None:
            raise SessionwireError(
                "the template is not open: call copy() inside `async with template:`"
            )
        name = store.database_name(self._id, secrets.token_hex(4))
        copy = DatabaseCopy(store.settings_of_database(name))

        async def drop() -> None:
            copy.connections_left = await _connections_left(store, name)
            await store.drop(name)

        async with _cleanup_on_exit(drop):
            await store.create(name, store.database_name(self._id, "template"))
            yield copy

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[None]:
        store_type = SQLiteTemplateStore if self._backend == "sqlite" else PostgresTemplateStore
        async with store_type.open(self._settings) as store:
            for template_id in await store.template_ids():
                await _drop_if_unused(store, template_id)

            async def leave() -> None:
                self._store = None
                await _drop_if_unused(store, self._id)

            async with _cleanup_on_exit(leave):
                while not await self._try_acquire(store):
                    await asyncio.sleep(LOCK_POLL_INTERVAL)
                self._store = store
                yield

    async def _try_acquire(self, store: TemplateStore) -> bool:
        """Lock the template in shared mode; build it if it is unused.

        Returns:
            Whether it is locked and built. If not, another process builds or drops it.
        """
        template = store.database_name(self._id, "template")
        if await _drop_if_unused(store, self._id):
            await self._build_template(store, template)
        return await store.try_lock_shared(self._id) and template in await store.databases_of(
            self._id
        )

    async def _build_template(self, store: TemplateStore, template: str) -> None:
        unfinished = store.database_name(self._id, "unfinished")
        await store.create(unfinished)
        async with DatabaseSessionManager(store.settings_of_database(unfinished)) as manager:
            await self._seed(manager)
        if await _connections_left(store, unfinished):
            raise SessionwireError(
                "the seed left a connection to the template open, so it cannot be copied: "
                "dispose each engine that the seed creates"
            )
        await store.rename(unfinished, template)


async def _drop_if_unused(store: TemplateStore, template_id: str) -> bool:
    """Drop the databases of a template that nobody else uses.

    Returns:
        Whether it was unused. If so, the exclusive lock is kept.
    """
    unused = await store.try_lock_exclusive(template_id)
    for name in await store.databases_of(template_id) if unused else ():
        await store.drop(name)
    return unused


async def _connections_left(store: TemplateStore, name: str) -> int:
    """Count the connections to a database; wait for those that are being closed."""
    left, loop = 0, asyncio.get_running_loop()
    for grace in (CLOSE_GRACE / 10, CLOSE_GRACE):
        deadline = loop.time() + grace
        while (left := await store.count_connections(name)) and loop.time() < deadline:
            await asyncio.sleep(0.005)
        if left:
            # a cursor of an aborted connection keeps SQLite's file open until freed
            gc.collect()
    return left


@asynccontextmanager
async def _cleanup_on_exit(
    clean_up: Callable[[], Coroutine[Any, Any, None]],
) -> AsyncGenerator[None]:
    """Clean up after the block, even if the task is cancelled meanwhile.

    After an error of the block, a failure of the clean-up is noted on that error.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            await run_shielded(clean_up(), DATABASE_TIMEOUT)
        except Exception as failure:
            if error is None:
                raise
            reason = summarize(failure)
            error.add_note(f"then the clean-up failed, and is left to the next run: {reason}")
