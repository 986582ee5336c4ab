"""After each way out of a block none of its objects stays alive."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    SessionwireError,
)
from sessionwire._core.scope import Scope
from sessionwire._core.transaction_block import TransactionBlock

from .conftest import Postgres
from .models import Note
from .postgres import OnPostgres, kill

COUNTED = (
    Session,
    AsyncSession,
    Connection,
    AsyncConnection,
    Scope,
    TransactionBlock,
    asyncio.Task,
)
REFUSED_AT_COMMIT = insert(Note).values(text="b", parent_id=-1)
SLOW = {
    "postgresql": "SELECT pg_sleep(10)",
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
    "SELECT max(x) FROM n",
}


@pytest.fixture
async def manager(settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    """Yield a manager whose table has a constraint that is checked at the COMMIT."""
    deferred = "REFERENCES note DEFERRABLE INITIALLY DEFERRED"
    async with DatabaseSessionManager(settings) as manager:
        async with manager.connect() as connection:
            key = "SERIAL" if manager.engine.dialect.name == "postgresql" else "INTEGER"
            await connection.execute(
                text(
                    f"CREATE TABLE note (id {key} PRIMARY KEY, text TEXT UNIQUE NOT NULL, "
                    f"parent_id INTEGER {deferred})"
                )
            )
        yield manager


@pytest.fixture(autouse=True)
def nothing_of_other_tests_is_counted() -> None:
    """Exclude objects of other tests, which would also slow each collection down."""
    gc.collect()
    gc.freeze()


Way = Callable[[DatabaseSessionManager], Awaitable[None]]
WAYS: list[Way] = []


def way_out(way: Way) -> Way:
    WAYS.append(way)
    return way


@way_out
async def commit(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(select(Note))


@way_out
async def refused_commit(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(REFUSED_AT_COMMIT)


@way_out
async def refused_commit_of_a_connection(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(REFUSED_AT_COMMIT)


@way_out
async def refused_commit_of_a_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(REFUSED_AT_COMMIT)
        await session.commit()


@way_out
async def error_in_the_block(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="a"))
        await session.flush()
        raise ValueError


@way_out
async def error_in_a_connection(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(text("SELECT no_such_column"))


@way_out
async def failed_statement(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(text("SELECT no_such_column"))


@way_out
async def swallowed_failure(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        with suppress(Exception):
            await session.execute(text("SELECT no_such_column"))


@way_out
async def failed_flush_in_a_joined_block(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(), manager.transaction() as session:
        session.add(Note(text=None))  # type: ignore[arg-type]


@way_out
async def failed_savepoint(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        with suppress(Exception):
            async with manager.transaction(Propagation.NESTED):
                await session.execute(text("SELECT no_such_column"))


@way_out
async def rollback_only(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(select(Note))
        manager.transaction.set_rollback_only()


@way_out
async def uncommitted_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(select(Note))


@way_out
async def failed_read(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
        await session.execute(text("SELECT no_such_column"))


@way_out
async def failure_in_autocommit(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
        await session.execute(text("SELECT no_such_column"))


@way_out
async def deadline(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(timeout=0.05) as session:
        await session.execute(text(SLOW[manager.engine.dialect.name]))


@way_out
async def cancellation(manager: DatabaseSessionManager) -> None:
    async def work() -> None:
        async with manager.transaction() as session:
            await session.execute(text(SLOW[manager.engine.dialect.name]))

    await asyncio.wait_for(work(), 0.05)


@way_out
async def cancellation_of_a_connection(manager: DatabaseSessionManager) -> None:
    async def work() -> None:
        async with manager.connect() as connection:
            await connection.execute(text(SLOW[manager.engine.dialect.name]))

    await asyncio.wait_for(work(), 0.05)


@way_out
async def failed_hook(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(select(Note))
        manager.transaction.on_commit(lambda: 1 / 0)


@way_out
async def failed_attempts(manager: DatabaseSessionManager) -> None:
    async def attempt() -> None:
        async with manager.session() as session:
            await session.execute(text("SELECT no_such_column"))

    await manager.transaction.run(attempt, retries=2)


@way_out
async def wrong_place_for_a_commit(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.commit()


def alive() -> Counter[str]:
    gc.collect()
    # by type(): an isinstance() would wake lazy objects of other libraries
    return Counter(
        kind.__name__
        for each in gc.get_objects()
        for kind in COUNTED
        if issubclass(type(each), kind)
    )


async def leave(way: Way, manager: DatabaseSessionManager, times: int) -> None:
    for _ in range(times):
        with suppress(Exception):
            await way(manager)


async def settled(before: Counter[str]) -> Counter[str]:
    """Return what is alive beyond `before`, once background aborts have ended."""
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            while alive() - before:
                await asyncio.sleep(0.01)
    return alive() - before


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
async def test_no_object_stays_alive_after_a_block_ended(
    way: Way, manager: DatabaseSessionManager
) -> None:
    await leave(way, manager, 1)
    before = alive()

    await leave(way, manager, 5)

    assert await settled(before) == Counter()


@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "way", [refused_commit, refused_commit_of_a_connection, refused_commit_of_a_session]
)
async def test_memory_does_not_grow_with_refused_commits(
    way: Way, manager: DatabaseSessionManager, times: int
) -> None:
    await leave(way, manager, 20)
    gc.collect()
    before = len(gc.get_objects())

    await leave(way, manager, times)

    gc.collect()
    assert len(gc.get_objects()) < before + times  # not one object for each


async def test_no_object_stays_alive_after_a_full_pool(database_url: str) -> None:
    settings = DatabaseSettings(
        url=database_url, pool=PoolSettings(size=1, max_overflow=0, timeout=0.05)
    )

    async def wait_for_a_place(manager: DatabaseSessionManager) -> None:
        async with manager.transaction() as session:
            await session.execute(text("SELECT 1"))

    async with DatabaseSessionManager(settings) as manager, manager.session() as session:
        await session.execute(text("SELECT 1"))
        await leave(wait_for_a_place, manager, 1)
        before = alive()
        await leave(wait_for_a_place, manager, 5)
        assert await settled(before) == Counter()


async def test_no_object_stays_alive_after_close_aborted_a_block(database_url: str) -> None:
    manager = DatabaseSessionManager(DatabaseSettings(url=database_url, drain_timeout=0))

    async def be_aborted() -> weakref.ref[Any]:
        await manager.open()
        async with manager.transaction() as session:
            await session.execute(text("SELECT 1"))
            await asyncio.create_task(manager.transaction.detached(manager.close()))
            return weakref.ref(session)

    before = alive()
    for _ in range(3):
        with suppress(SessionwireError):
            await be_aborted()

    assert await settled(before) == Counter()


class TestOnPostgres(OnPostgres):
    async def test_no_object_stays_alive_after_a_lost_connection(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def lose_it() -> None:
            async with manager.transaction() as session:
                await session.execute(text("SELECT 1"))
                await kill(postgres, manager)
                await session.execute(text("SELECT 1"))

        with suppress(Exception):
            await lose_it()
        before = alive()
        for _ in range(3):
            with suppress(Exception):
                await lose_it()

        assert await settled(before) == Counter()
