"""`on_connect(function)`: each new connection, before anyone uses it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire import (
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    TransactionError,
)
from sessionwire.testing import count_statements, sandbox

from .cancellation import each_cancellation
from .conftest import Postgres, assert_all_returned, checked_out, notes
from .models import Note
from .postgres import OnPostgres, kill


class Refused(Exception):
    pass


@pytest.fixture
async def fresh(
    settings: DatabaseSettings, manager: DatabaseSessionManager
) -> AsyncIterator[DatabaseSessionManager]:
    """A manager with tables that has no connection yet."""
    fresh = DatabaseSessionManager(settings)
    fresh.init(settings)
    yield fresh
    await assert_all_returned(fresh)
    await fresh.close()


class TestAnyDatabase:
    async def test_it_is_called_once_for_each_connection_before_its_first_use(
        self, fresh: DatabaseSessionManager
    ) -> None:
        seen: list[object] = []

        @fresh.transaction.on_connect
        async def look(connection: AsyncConnection) -> None:
            assert checked_out(fresh) <= 1
            seen.append(await connection.scalar(text("SELECT 1")))

        await fresh.open()
        assert seen == [1]
        for _ in range(3):
            async with fresh.transaction() as session:
                await session.execute(text("SELECT 2"))
        async with fresh.engine.connect() as connection:
            await connection.execute(text("SELECT 3"))
        assert seen == [1]
        await fresh.engine.dispose()
        async with fresh.engine.connect():
            assert seen == [1, 1]

    async def test_sync_functions_are_called_in_the_order_given(
        self, fresh: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        fresh.transaction.on_connect(lambda _: called.append("first"))
        fresh.transaction.on_connect(lambda connection: called.append(connection.dialect.name))
        async with fresh.engine.connect() as connection:
            assert called == ["first", connection.dialect.name]

    async def test_it_holds_for_connections_that_are_made_after_it_was_given(
        self, manager: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        manager.transaction.on_connect(lambda _: called.append("new"))
        assert await notes(manager) == []
        assert called == []
        await manager.engine.dispose()
        assert await notes(manager) == []
        assert called == ["new"]

    async def test_each_of_its_statements_commits_by_itself(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def write(connection: AsyncConnection) -> None:
            await connection.execute(text("INSERT INTO note (text) VALUES ('a')"))

        async with fresh.engine.connect() as connection:
            await connection.rollback()
        assert await notes(fresh) == ["a"]
        async with fresh.transaction() as session:  # The connection begins as usual.
            session.add(Note(text="b"))
            await session.flush()
            fresh.transaction.set_rollback_only()
        assert await notes(fresh) == ["a"]

    async def test_its_error_names_it_and_is_the_error_of_the_caller_each_time(
        self, fresh: DatabaseSessionManager
    ) -> None:
        tried: list[int] = []

        @fresh.transaction.on_connect
        async def refuse(_: AsyncConnection) -> None:
            tried.append(1)
            raise Refused

        for number in range(1, 8):  # More often than the pool has places.
            with pytest.raises(Refused) as raised:
                async with fresh.transaction() as session:
                    await session.execute(text("SELECT 1"))
            assert "the on_connect function " in raised.value.__notes__[0]
            assert "refuse" in raised.value.__notes__[0]
            assert len(tried) == number
        assert checked_out(fresh) == 0
        with pytest.raises(ConnectionFailedError):
            await fresh.open()

    async def test_an_error_of_a_statement_in_it_is_one_of_sqlalchemy(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def misspell(connection: AsyncConnection) -> None:
            await connection.execute(text("SELEKT 1"))

        with pytest.raises(DBAPIError, match="SELEKT"):
            async with fresh.engine.connect():
                raise AssertionError("never")

    async def test_it_may_begin_and_end_a_transaction_of_its_own_on_the_driver(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def begin(connection: AsyncConnection) -> None:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            for sql in ("BEGIN", "INSERT INTO note (text) VALUES ('a')", "COMMIT"):
                await driver.execute(sql)

        assert await notes(fresh) == ["a"]

    async def test_a_transaction_that_it_leaves_open_is_refused(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def begin(connection: AsyncConnection) -> None:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute("BEGIN")

        with pytest.raises(TransactionError, match="left a transaction open"):
            async with fresh.engine.connect():
                raise AssertionError("never")

    async def test_it_runs_ahead_of_the_hooks_of_the_transaction(
        self, fresh: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        fresh.transaction.on_begin(lambda _: called.append("begin"))

        @fresh.transaction.on_connect
        async def connect(connection: AsyncConnection) -> None:
            await connection.execute(text("SELECT 1"))
            called.append("connect")

        async with fresh.transaction() as session:
            await session.execute(text("SELECT 1"))
        assert called == ["connect", "begin"]

    async def test_its_statements_are_not_counted_for_the_code_that_needed_a_connection(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def look(connection: AsyncConnection) -> None:
            await connection.execute(text("SELECT 1"))

        with count_statements(fresh, at_most=1):
            async with fresh.transaction() as session:
                await session.execute(text("SELECT 2"))

    async def test_a_sandbox_has_it_too(self, fresh: DatabaseSessionManager) -> None:
        called: list[object] = []

        @fresh.transaction.on_connect
        async def look(connection: AsyncConnection) -> None:
            called.append(await connection.scalar(text("SELECT 1")))

        async with sandbox(fresh), fresh.transaction() as session:
            assert called == [1]
            session.add(Note(text="a"))
        assert await notes(fresh) == []

    @pytest.mark.parametrize("again_after", [None, 1, 2])
    async def test_a_cancellation_at_any_await_leaves_no_connection_and_no_task(
        self, fresh: DatabaseSessionManager, again_after: int | None
    ) -> None:
        @fresh.transaction.on_connect
        async def look(connection: AsyncConnection) -> None:
            await asyncio.sleep(0)
            await connection.execute(text("SELECT 1"))
            await connection.execute(text("SELECT 2"))

        async def work() -> None:
            async with fresh.transaction() as session:
                await session.execute(text("SELECT 3"))

        tasks = asyncio.all_tasks()
        async for _ in each_cancellation(work, again_after=again_after):
            async with asyncio.timeout(5):
                while asyncio.all_tasks() != tasks:
                    await asyncio.sleep(0)
            assert checked_out(fresh) == 0
            await fresh.engine.dispose()


class TestPostgres(OnPostgres):
    async def test_a_codec_of_the_driver_holds_for_all_uses_of_the_connection(
        self, fresh: DatabaseSessionManager
    ) -> None:
        @fresh.transaction.on_connect
        async def set_codec(connection: AsyncConnection) -> None:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.set_type_codec(
                "point",
                schema="pg_catalog",
                encoder=json.dumps,
                decoder=lambda given: f"at {given}",
            )

        point = text("SELECT point(1, 2)")
        for _ in range(2):
            async with fresh.transaction() as session:
                assert await session.scalar(point) == "at (1,2)"
            async with fresh.transaction(read_only=True) as session:
                assert await session.scalar(point) == "at (1,2)"
            async with fresh.engine.connect() as connection:
                assert await connection.scalar(point) == "at (1,2)"

    async def test_a_role_survives_commits_rollbacks_and_the_pool(
        self, fresh: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        await postgres.execute("DROP ROLE IF EXISTS app_of_on_connect")
        await postgres.execute("CREATE ROLE app_of_on_connect")

        @fresh.transaction.on_connect
        async def set_role(connection: AsyncConnection) -> None:
            await connection.execute(text("SET ROLE app_of_on_connect"))

        async def role() -> object:
            async with fresh.transaction(read_only=True) as session:
                return await session.scalar(text("SELECT current_user"))

        try:
            for end in ("commit", "rollback"):
                async with fresh.engine.connect() as connection:
                    await connection.execute(text("SELECT 1"))
                    await getattr(connection, end)()
                assert await role() == "app_of_on_connect"
            async with fresh.transaction() as session:
                await session.execute(text("SELECT 1"))
                fresh.transaction.set_rollback_only()
            assert await role() == "app_of_on_connect"
        finally:
            await fresh.engine.dispose()
            await postgres.execute("DROP ROLE app_of_on_connect")

    async def test_a_connection_that_is_lost_in_it_is_retried_as_often_as_asked(
        self, fresh: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        tried: list[int] = []

        @fresh.transaction.on_connect
        async def lose(connection: AsyncConnection) -> None:
            tried.append(1)
            await connection.execute(text("SELECT 'lost'"))
            await kill(postgres, fresh, "%lost%")
            await connection.execute(text("SELECT 1"))

        async def work() -> None:
            async with fresh.transaction() as session:
                await session.execute(text("SELECT 1"))

        with pytest.raises(DBAPIError):
            await fresh.transaction.run(work, retries=2)
        assert len(tried) == 3
