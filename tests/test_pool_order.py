"""A pool serves those that wait for a connection in turn, and takes connections back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings, Propagation

from .postgres import OnPostgres


@pytest.fixture
async def manager(database_url: str) -> AsyncIterator[DatabaseSessionManager]:
    """Yield a manager whose pool has one connection, already open."""
    pool = PoolSettings(size=1, max_overflow=0, timeout=30)
    async with DatabaseSessionManager(DatabaseSettings(url=database_url, pool=pool)) as manager:
        async with manager.session() as session:
            await session.scalar(select(1))
        yield manager


class TestOrder(OnPostgres):
    async def test_a_task_that_comes_later_does_not_overtake_those_that_wait(
        self, manager: DatabaseSessionManager
    ) -> None:
        served: list[int] = []

        async def use(number: int) -> None:
            async with manager.connect() as connection:
                served.append(number)
                await connection.scalar(select(1))

        tasks: list[asyncio.Task[None]] = []
        for number in range(200):
            tasks.append(asyncio.create_task(use(number)))
            # One comes in each iteration of the event loop, so one comes when a
            # connection is given back and the task that waits for it has not run yet.
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert served == sorted(served)

    async def test_a_task_that_is_cancelled_in_its_turn_passes_the_connection_on(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def use() -> int | None:
            async with manager.session() as session:
                return await session.scalar(select(1))

        async with manager.connect() as connection:
            first, second = asyncio.create_task(use()), asyncio.create_task(use())
            # Nothing but the pool can let them wait longer than a round trip.
            await connection.scalar(select(1))
            await connection.scalar(select(1))
        # The block has given the connection to the first task, which has not run since.
        first.cancel()
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await use() == 1


class TestReturn(OnPostgres):
    async def test_a_listener_that_sends_something_at_the_end_of_a_read_is_waited_for(
        self, manager: DatabaseSessionManager
    ) -> None:
        found: list[Any] = []

        @event.listens_for(manager.engine.sync_engine, "reset")
        def ask(connection: Any, _record: object, _state: object) -> None:
            cursor = connection.cursor()
            cursor.execute("SELECT pg_backend_pid()")
            found.append(cursor.fetchone()[0])

        async def read() -> Any:
            async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
                return await session.scalar(select(func.pg_backend_pid()))

        assert [await read(), await read()] == found
        assert found[0] == found[1]

    async def test_the_surplus_connection_of_a_read_is_closed_and_the_other_is_kept(
        self, database_url: str
    ) -> None:
        pool = PoolSettings(size=1, max_overflow=1)
        settings = DatabaseSettings(url=database_url, pool=pool)
        async with DatabaseSessionManager(settings) as manager:

            async def read(begun: asyncio.Barrier) -> int | None:
                async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
                    backend: int | None = await session.scalar(select(func.pg_backend_pid()))
                    await begun.wait()
                    return backend

            barrier = asyncio.Barrier(2)
            used = set(await asyncio.gather(read(barrier), read(barrier)))
            assert len(used) == 2
            here = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")

            async def backends() -> set[int]:
                async with manager.connect() as connection:
                    return set(await connection.scalars(here))

            async with asyncio.timeout(5):
                while len(left := await backends()) > 1:
                    await asyncio.sleep(0.01)
            assert left < used
