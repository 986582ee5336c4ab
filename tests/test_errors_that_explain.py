"""Errors name their cause: a closed manager, another task, an earlier failure."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    NoSessionError,
    UnexpectedRollbackError,
)

from .conftest import Postgres
from .models import Note
from .postgres import OnPostgres, kill


async def test_a_session_that_close_aborted_says_so(database_url: str) -> None:
    manager = DatabaseSessionManager(DatabaseSettings(url=database_url, drain_timeout=0))
    await manager.open()
    session = CurrentSession(manager)
    with pytest.raises(UnexpectedRollbackError, match="closed before this block ended"):
        async with manager.transaction():
            await session.execute(text("SELECT 1"))
            await asyncio.create_task(manager.transaction.detached(manager.close()))
            with pytest.raises(
                NoSessionError, match=r"close\(\) of the manager has rolled it back"
            ):
                await session.execute(text("SELECT 1"))


async def test_a_block_that_another_task_entered_says_so(manager: DatabaseSessionManager) -> None:
    """Before Python 3.12 `wait_for(block.__aenter__(), …)` does this."""
    block = manager.transaction()
    await asyncio.create_task(block.__aenter__())
    with pytest.raises(NoSessionError, match=r"entered in another task.*asyncio\.timeout"):
        await CurrentSession(manager).execute(text("SELECT 1"))
    await block.__aexit__(None, None, None)
    with pytest.raises(NoSessionError, match="wrap the call"):
        await CurrentSession(manager).execute(text("SELECT 1"))


async def test_a_session_that_a_failed_flush_ended_says_so(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        session.add(Note(text=None))  # type: ignore[arg-type]
        with pytest.raises(DBAPIError) as first:
            await session.flush()
        with pytest.raises(PendingRollbackError) as pending:
            await session.execute(select(Note))
        assert pending.value.__cause__ is first.value
        await session.rollback()


class TestLostConnections(OnPostgres):
    async def test_a_session_names_the_statement_that_lost_its_connection(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async with manager.session() as session:
            await session.execute(insert(Note).values(text="a"))
            await kill(postgres, manager)
            with pytest.raises(DBAPIError) as first:
                await session.execute(select(Note))
            with pytest.raises(PendingRollbackError) as pending:
                await session.execute(select(Note))
            assert pending.value.__cause__ is first.value
            await session.rollback()

    async def test_a_connection_names_the_statement_that_lost_it(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        with pytest.raises(PendingRollbackError) as pending:
            async with manager.connect() as connection:
                await connection.execute(insert(Note).values(text="a"))
                await kill(postgres, manager)
                with suppress(DBAPIError):
                    await connection.execute(text("SELECT 'lost'"))
                await connection.execute(select(Note))
        assert "SELECT 'lost'" in str(pending.value.__cause__)


class TestTablesOfManyProcesses(OnPostgres):
    async def test_create_all_in_many_processes_creates_each_table_once(
        self, database_url: str
    ) -> None:
        """Without turns, all processes but one would meet half-created tables."""

        async def start() -> None:
            async with (
                DatabaseSessionManager(database_url) as manager,
                manager.connect() as connection,
            ):
                await manager.create_all(connection)
                await asyncio.sleep(0.01)

        for _ in range(3):
            await asyncio.gather(*(start() for _ in range(5)))
            async with (
                DatabaseSessionManager(database_url) as manager,
                manager.connect() as connection,
            ):
                await manager.drop_all(connection)

    async def test_create_all_takes_the_lock_with_the_documented_key(
        self, manager: DatabaseSessionManager
    ) -> None:
        key = "classid::bigint << 32 | objid::bigint"
        held = text(
            f"SELECT {key} FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )
        async with manager.connect() as connection:
            await manager.create_all(connection)
            assert await connection.scalar(held) == 8315179226536832631
        async with manager.connect() as connection:
            assert await connection.scalar(held) is None
