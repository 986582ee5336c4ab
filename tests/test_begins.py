"""A BEGIN that fails leaves a pooled connection that is clean, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext

import asyncpg
import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings, Propagation

from .cluster import cluster
from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, at_port
from .proxy import ClientConnection

ONE = PoolSettings(
    size=1, max_overflow=0
)  # so that the next transaction has the connection that is left


async def write(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction() as session:
        await session.execute(insert(Note).values(text=note))


async def write_past_sqlalchemy(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        async with driver.transaction():
            await driver.execute("INSERT INTO note (text) VALUES ($1)", note)


class SlowBegin(FaultyNetwork):
    """The answer to the next BEGIN takes `delay` seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.delay = 0.0
        self._late: set[ClientConnection] = set()

    def ask(self, data: bytes, client: ClientConnection) -> None:
        if self.delay and b"BEGIN" in data:
            self._late.add(client)
        super().ask(data, client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        if client in self._late:
            self._late.discard(client)
            asyncio.get_running_loop().call_later(self.delay, super().answer, data, client)
            self.delay = 0
        else:
            super().answer(data, client)


@pytest.mark.parametrize("write_first", [write, write_past_sqlalchemy])
@pytest.mark.asyncpg_only("its command_timeout, and its note of a transaction, are at fault")
class TestUnanswered(OnPostgres):
    @pytest.fixture
    def network(self) -> SlowBegin:
        return SlowBegin()

    @pytest.fixture
    async def one(
        self,
        network: SlowBegin,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        database_url: str,
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with network.open(postgres.host) as port:
            url = at_port(port, database_url) + "&command_timeout=0.3"
            async with DatabaseSessionManager(DatabaseSettings(url=url, pool=ONE)) as one:
                await write(one, "first")
                yield one
                await write(one, "next")
                assert checked_out(one) == 0
        assert await notes(manager) == ["first", "next"]

    async def test_the_next_transaction_is_kept_after_a_begin_that_timed_out(
        self,
        network: SlowBegin,
        one: DatabaseSessionManager,
        write_first: Callable[[DatabaseSessionManager, str], Awaitable[None]],
    ) -> None:
        network.delay = 0.4
        # asyncpg gives the connection up if the ROLLBACK has to wait too long as well.
        with pytest.raises((TimeoutError, asyncpg.InterfaceError)):
            await write_first(one, "lost")

    async def test_the_next_transaction_is_kept_after_a_begin_that_was_cancelled(
        self,
        network: SlowBegin,
        one: DatabaseSessionManager,
        write_first: Callable[[DatabaseSessionManager, str], Awaitable[None]],
    ) -> None:
        network.delay = 0.3
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await write_first(one, "lost")


async def test_a_begin_that_a_standby_refused_leaves_a_clean_connection_after_the_promotion() -> (
    None
):
    async with cluster() as servers:
        await servers.primary.execute("CREATE TABLE note (id serial PRIMARY KEY, text text)")
        await servers.catch_up()
        async with DatabaseSessionManager(
            DatabaseSettings(url=servers.standby.url("postgres"), pool=ONE)
        ) as one:
            async with one.transaction(read_only=True) as session:
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
            for read_only in (True, False):
                with pytest.raises(DBAPIError, match="serializable mode in a hot standby"):
                    async with one.transaction(
                        isolation="SERIALIZABLE", read_only=read_only
                    ) as session:
                        await session.scalar(text("SELECT 1"))
            assert await notes(one) == []
            await servers.standby.promote()
            async with one.transaction(isolation="SERIALIZABLE") as session:
                await session.execute(insert(Note).values(text="kept"))
                assert await session.scalar(text("SELECT pg_backend_pid()")) == pid
            assert await servers.standby.execute("SELECT text FROM note") == [("kept",)]


class TestByHand(OnPostgres):
    """One that SQLAlchemy and asyncpg know nothing of."""

    @pytest.fixture
    def settings(self, database_url: str) -> DatabaseSettings:
        return DatabaseSettings(url=database_url, pool=ONE)

    async def test_a_connection_with_a_begin_left_open_by_hand_is_discarded(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(text("BEGIN"))
            await session.execute(insert(Note).values(text="lost"))
        assert checked_out(manager) == 0
        await write(manager, "next")
        assert await notes(manager) == ["next"]


class TestSettings(OnPostgres):
    @pytest.fixture
    def settings(self, database_url: str) -> DatabaseSettings:
        return DatabaseSettings(url=database_url, pool=ONE)

    @pytest.mark.parametrize("end", [None, ValueError("mine")])
    async def test_a_wrong_setting_that_no_statement_follows_is_not_sent_ahead(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings, end: Exception | None
    ) -> None:
        async with manager.transaction() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
        result = pytest.raises(ValueError, match="mine") if end else nullcontext()
        if not settings.pipeline:
            result = pytest.raises(DBAPIError, match="invalid value for parameter")
        with result:
            async with manager.transaction(settings={"statement_timeout": "never"}) as session:
                await session.connection()
                if end is not None:
                    raise end
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="next"))
            # Without the pipeline, a connection on which a transaction fails to begin is closed.
            is_same = await session.scalar(text("SELECT pg_backend_pid()")) == pid
            assert is_same is settings.pipeline
        assert await notes(manager) == ["next"]
