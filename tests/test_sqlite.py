"""SQLite's files are closed after cancelled work, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import text

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    Propagation,
    TransactionTimeoutError,
)

from .postgres import until

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
COUNT, ROWS = text(ENDLESS.format("count(*)")), text(ENDLESS.format("i"))
Work = Callable[[DatabaseSessionManager], Awaitable[object]]


@pytest.fixture
def backend() -> str:
    return "sqlite"


async def count_in_a_transaction(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(COUNT)


async def count_in_a_read_only_block(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
        await session.execute(COUNT)


async def count_in_a_connection(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(COUNT)


async def stream_in_a_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        async for _ in await session.stream(ROWS):
            await asyncio.sleep(0)


async def write_from_an_endless_query(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(text(f"INSERT INTO note (text) {ENDLESS.format('i')}"))


async def count_past_the_manager(manager: DatabaseSessionManager) -> None:
    async with manager.engine.connect() as connection:
        await connection.execute(COUNT)


WORKS: list[Work] = [
    count_in_a_transaction,
    count_in_a_read_only_block,
    count_in_a_connection,
    count_past_the_manager,
    stream_in_a_session,
    write_from_an_endless_query,
]


class TestFiles:
    """None is left open; nor may it need the garbage collector, which is off."""

    @pytest.fixture(autouse=True)
    def _without_a_collector(self) -> Iterator[None]:
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("work", WORKS)
    @pytest.mark.parametrize("seconds", [0, 0.002, 0.03])
    async def test_sqlite_files_of_cancelled_work_are_closed(
        self, manager: DatabaseSessionManager, work: Work, seconds: float
    ) -> None:
        for number in range(4):
            task = asyncio.create_task(work(manager))  # type: ignore[arg-type]
            await asyncio.sleep(seconds)
            task.cancel()
            if number % 2:
                await asyncio.sleep(0)
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await manager.engine.dispose()
        await self.none_is_left(manager)

    async def test_sqlite_files_of_cancelled_connection_attempts_are_closed(
        self, manager: DatabaseSessionManager
    ) -> None:
        file = str(manager.engine.url.database)
        for turns in range(40):
            await manager.engine.dispose()
            tasks = [
                asyncio.create_task(manager.transaction.run(self.read, manager, read_only=True))
                for _ in range(3)
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await manager.engine.dispose()
        await self.none_is_left(manager, file)

    async def test_sqlite_files_of_a_block_past_its_deadline_are_closed(
        self, manager: DatabaseSessionManager
    ) -> None:
        for _ in range(3):
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(timeout=0.02) as session:
                    await session.execute(COUNT)
        await manager.engine.dispose()
        await self.none_is_left(manager)

    @pytest.mark.parametrize("seconds", [0, 0.003, 0.05])
    async def test_sqlite_files_of_blocks_that_close_aborted_are_closed(
        self, settings: DatabaseSettings, seconds: float
    ) -> None:
        async with DatabaseSessionManager(
            settings.model_copy(update={"drain_timeout": seconds})
        ) as manager:
            async with manager.connect() as connection:
                await connection.run_sync(manager.metadata.create_all)
            file = str(manager.engine.url.database)
            tasks = [asyncio.create_task(work(manager)) for work in WORKS]  # type: ignore[arg-type]
            await asyncio.sleep(0)
        await self.none_is_left(manager, file)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self.none_is_left(manager, file)

    async def read(self, manager: DatabaseSessionManager) -> None:
        async with manager.transaction() as session:
            await session.execute(text("SELECT 1"))

    async def none_is_left(self, manager: DatabaseSessionManager, file: str = "") -> None:
        file = file or str(manager.engine.url.database)

        async def none() -> bool:
            return not open_files(file) and not drivers()

        await until(none)


def open_files(database: str) -> list[str]:
    """Return the descriptors of this process that lead to the database."""
    found: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that by which the directory is read
            found.append(os.readlink(descriptor))
    return [name for name in found if name.startswith(database)]


def drivers() -> list[threading.Thread]:
    """Return the threads of connections."""
    return [
        thread for thread in threading.enumerate() if "_connection_worker_thread" in thread.name
    ]
