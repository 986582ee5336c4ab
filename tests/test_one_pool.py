"""Reads and writes share one pool, whose engine is `manager.engine`."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from sqlalchemy import DDL, AdaptedConnection, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
)

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import OnPostgres

WRITE = "INSERT INTO note (text) VALUES ('written')"


def reading(manager: DatabaseSessionManager) -> AbstractAsyncContextManager[AsyncSession]:
    return manager.transaction(Propagation.SUPPORTS, read_only=True)


async def test_size_and_overflow_bound_the_connections_of_reads_and_writes(
    database_url: str, server: Postgres | None
) -> None:
    pool = PoolSettings(size=2, max_overflow=1, timeout=0.1)
    settings = DatabaseSettings(url=database_url, pool=pool, application_name="bounded")
    async with DatabaseSessionManager(settings) as manager:
        enough = asyncio.Event()

        async def use(block: AbstractAsyncContextManager[AsyncSession]) -> None:
            async with block as session:
                await session.scalar(select(1))
                await enough.wait()

        write = manager.transaction if server else manager.session  # SQLite has one writer
        users = [asyncio.create_task(use(block)) for block in (write(), reading(manager), write())]
        async with asyncio.timeout(5):
            while checked_out(manager) < 3:
                await asyncio.sleep(0.01)
        for block in (reading(manager), manager.transaction(read_only=True)):
            with pytest.raises(PoolTimeoutError):
                async with block as session:
                    await session.scalar(select(1))
        if server:
            count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'bounded'"
            assert (await server.execute(count))[0][0] == 3
        enough.set()
        await asyncio.gather(*users)


async def test_a_read_inside_a_writer_on_a_pool_of_one_is_explained_and_does_not_hang(
    database_url: str,
) -> None:
    pool = PoolSettings(size=1, max_overflow=0, timeout=0.1)
    settings = DatabaseSettings(url=database_url, pool=pool)
    async with DatabaseSessionManager(settings) as manager, manager.transaction() as outer:
        await outer.scalar(select(1))
        with pytest.raises(PoolTimeoutError) as caught:
            async with manager.transaction(Propagation.NOT_SUPPORTED, read_only=True) as session:
                await session.scalar(select(1))
        assert any("pool.size + pool.max_overflow" in note for note in caught.value.__notes__)


async def test_listeners_of_the_engine_see_reads_and_writes_alike(
    manager: DatabaseSessionManager,
) -> None:
    await manager.engine.dispose()
    made: list[AdaptedConnection] = []
    sent: list[str] = []
    engine = manager.engine.sync_engine
    event.listen(engine, "connect", lambda connection, _record: made.append(connection))
    event.listen(engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
    async with reading(manager) as session:
        await session.scalar(text("SELECT 1"))
    async with manager.transaction() as session:
        await session.execute(text(WRITE))
    async with manager.session() as session:
        await session.scalar(text("SELECT 2"))
    assert sent == ["SELECT 1", WRITE, "SELECT 2"]
    assert len(made) == 1


async def test_a_write_leaves_nothing_on_the_connection_of_a_read(
    manager: DatabaseSessionManager,
) -> None:
    for _ in range(2):
        async with reading(manager) as session:
            with pytest.raises(DBAPIError, match=r"read-only|readonly"):
                await session.execute(text(WRITE))
        async with manager.engine.connect() as connection:
            await connection.execute(text(WRITE))
            await connection.rollback()
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(text("DELETE FROM note"))
    async with manager.transaction() as session:
        session.add(Note(text="kept"))
    assert await notes(manager) == ["kept"]


class TestOnTheServer(OnPostgres):
    async def test_a_table_changed_by_the_manager_is_read_anew(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.connect() as connection:
            await connection.execute(text("CREATE TABLE changed (a int)"))
        columns = text("SELECT * FROM changed")
        for expected in (["a"], ["a", "b"]):
            async with reading(manager) as session:
                assert list((await session.execute(columns)).keys()) == expected
            if len(expected) == 1:
                async with manager.connect() as connection:
                    await connection.execute(DDL("ALTER TABLE changed ADD b int"))

    @pytest.mark.parametrize(
        "way",
        [
            "execute",
            *(
                pytest.param(way, marks=pytest.mark.asyncpg_only("the driver's own methods"))
                for way in ("fetch", "executemany", "copy", "prepared", "prepared, many")
            ),
        ],
    )
    async def test_the_server_refuses_a_write_past_sqlalchemy_in_a_read(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings, way: str
    ) -> None:
        async with reading(manager) as session:
            if not settings.pipeline:
                # The READ ONLY transaction begins with a statement through SQLAlchemy.
                await session.scalar(select(1))
            connection = await session.connection()
            driver: Any = (await connection.get_raw_connection()).driver_connection
            with pytest.raises(Exception, match="read-only transaction"):
                match way:
                    case "execute":
                        await driver.execute(WRITE)
                    case "fetch":
                        await driver.fetch("INSERT INTO note (text) VALUES ($1)", "written")
                    case "executemany":
                        sql = "INSERT INTO note (text) VALUES ($1)"
                        await driver.executemany(sql, [("a",), ("b",)])
                    case "copy":
                        await driver.copy_records_to_table(
                            "note", columns=["text"], records=[("a",)]
                        )
                    case "prepared":
                        await (await driver.prepare(WRITE)).fetchval()
                    case "prepared, many":
                        sql = "INSERT INTO note (text) VALUES ($1)"
                        await (await driver.prepare(sql)).executemany([("a",)])
            if settings.pipeline:
                assert await driver.fetchval("SELECT 1") == 1
        assert await notes(manager) == []

    @pytest.mark.asyncpg_only("psycopg begins a transaction by itself")
    async def test_a_connection_of_the_pool_that_served_reads_writes_without_a_begin(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with reading(manager) as session:
            await session.scalar(select(1))
        raw: Any = await manager.engine.raw_connection()
        await raw.driver_connection.execute(WRITE)
        raw.close()
        assert await notes(manager) == ["written"]


def test_the_former_setting_is_refused_with_the_reason() -> None:
    former: Any = {"read_only_connections": False}
    with pytest.raises(ConfigurationError, match="reads and writes share one pool"):
        DatabaseSettings(url="sqlite://", **former)
    with pytest.raises(ConfigurationError, match="reads and writes share one pool"):
        DatabaseSettings.load({"url": "sqlite://", "read_only_connections": True})
