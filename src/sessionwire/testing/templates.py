"""Databases from a template, for tests that need real commits and real concurrency.

A template is migrated and seeded once, and a copy takes little time. Its number is in the names of its databases and
in a lock, which ends with the process that holds it: all who use the template share it, and who can have it alone knows
that nobody does. So what a killed process has left is dropped by the next that opens a template, and nothing else is.
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
from sessionwire.settings import DatabaseSettings, settings_of

from ._template_stores import NUMBER, TIMEOUT, Directory, Place, Server, digest

GRACE = 2.0  # seconds in which connections that were closed must be gone
POLL = 0.1  # seconds between two attempts to have a lock

Seed: TypeAlias = Callable[[DatabaseSessionManager], Awaitable[object]]


@dataclass
class DatabaseCopy:
    """A database copied from a template: the settings to open it with.

    `connections_left` tells, once it is dropped, how many connections to it were still open; on SQLite 1 means any.
    """

    settings: DatabaseSettings
    connections_left: int = 0


class DatabaseTemplate:
    """A database that is migrated and seeded once, to be copied: `async with DatabaseTemplate(url, seed) as template:`.

    `seed` is an async function of an open `DatabaseSessionManager`. Template and copies are made beside the database of
    the URL, which is left alone; on PostgreSQL it must exist. For `sqlite://` they are in the directory for temporary
    files. Who opens a template there with the same `key` while it is open shares it: the first makes it, the others
    wait for it, the last drops it. Raises `ConfigurationError`, `ConnectionFailedError`, and what `seed` raises.
    """

    def __init__(self, database: DatabaseSettings | str | URL, seed: Seed, *, key: str | None = None) -> None:
        self._settings = settings_of(database)
        self._kind = make_url(self._settings.url).get_backend_name()
        if self._kind not in ("postgresql", "embedded", "sqlite"):
            raise ConfigurationError(f"url: templates are made of PostgreSQL and SQLite databases, not of {self._kind}")
        self._seed = seed
        self._number = secrets.token_hex(NUMBER // 2) if key is None else digest(key, NUMBER)
        self._place: Place | None = None

    async def __aenter__(self) -> Self:
        self._block = self._open()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._block.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def copy(self) -> AsyncGenerator[DatabaseCopy]:
        """A copy of one's own, dropped at the block's end, also where connections to it are still open.

        Raises `SessionwireError` where the template is not open.
        """
        if (place := self._place) is None:
            raise SessionwireError("the template is not open: call copy() inside `async with template:`")
        name = place.name(self._number, secrets.token_hex(4))
        copy = DatabaseCopy(place.settings(name))

        async def drop() -> None:
            copy.connections_left = await _connections_left(place, name)
            await place.drop(name)

        async with _at_the_end(drop):
            await place.create(name, place.name(self._number, "template"))
            yield copy

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[None]:
        async with (Directory if self._kind == "sqlite" else Server).open(self._settings) as place:
            for number in await place.numbers():
                await _drop_unused(place, number)

            async def leave() -> None:
                self._place = None
                await _drop_unused(place, self._number)

            async with _at_the_end(leave):
                while not await self._join(place):
                    await asyncio.sleep(POLL)
                self._place = place
                yield

    async def _join(self, place: Place) -> bool:
        template = place.name(self._number, "template")
        if await _drop_unused(place, self._number):
            await self._make(place, template)
        return await place.share(self._number) and template in await place.databases(self._number)

    async def _make(self, place: Place, template: str) -> None:
        name = place.name(self._number, "unfinished")
        await place.create(name)
        async with DatabaseSessionManager(place.settings(name)) as manager:
            await self._seed(manager)
        if await _connections_left(place, name):
            raise SessionwireError(
                "the seed left a connection to the template open, and so it cannot be copied: "
                "dispose each engine that the seed makes"
            )
        await place.rename(name, template)


async def _drop_unused(place: Place, number: str) -> bool:
    """Whether no other uses this template: then what is there of it is dropped, and its lock is had."""
    unused = await place.lock(number)
    for name in await place.databases(number) if unused else ():
        await place.drop(name)
    return unused


async def _connections_left(place: Place, name: str) -> int:
    left, loop = 0, asyncio.get_running_loop()
    for grace in (GRACE / 10, GRACE):
        deadline = loop.time() + grace
        while (left := await place.connections(name)) and loop.time() < deadline:
            await asyncio.sleep(0.005)
        if left:
            gc.collect()  # a cursor that was cut off keeps a file of SQLite's open until it is collected
    return left


@asynccontextmanager
async def _at_the_end(clean_up: Callable[[], Coroutine[Any, Any, None]]) -> AsyncGenerator[None]:
    """Clean up after the block, whatever is cancelled meanwhile; after its error, what fails is a note on that."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            await run_shielded(clean_up(), TIMEOUT)
        except Exception as trouble:
            if error is None:
                raise
            error.add_note(f"then the clean-up failed, and is left to the next run: {summarize(trouble)}")
