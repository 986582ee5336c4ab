"""Messages to the server, and the replacement of idle, dead or old connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings, Propagation

from .cancellation import each_cancellation
from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, kill, through, until

PID = text("SELECT pg_backend_pid()")


async def read(manager: DatabaseSessionManager) -> object:
    async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
        return await session.scalar(PID)


async def write(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(text("INSERT INTO note (text) VALUES (gen_random_uuid())"))


async def idle() -> None:
    await asyncio.sleep(0.06)  # longer than `ping_after` below


class TestMessages(OnPostgres):
    """Each question is a round trip."""

    @pytest.fixture
    def network(self) -> FaultyNetwork:
        return FaultyNetwork()

    @pytest.fixture
    async def counted(
        self,
        network: FaultyNetwork,
        postgres: Postgres,
        manager: DatabaseSessionManager,
        database_url: str,
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with through(
            network, postgres, database_url, pool=PoolSettings(ping_after=0.05)
        ) as counted:
            for _ in range(2):  # so that statements are prepared
                await read(counted)
                await write(counted)
            yield counted

    @pytest.mark.parametrize(
        ("work", "round_trips", "without_pipeline"),
        [(read, 1, 3), (write, 2, 3)],
        ids=["a read", "a write of one row"],
    )
    async def test_a_block_sends_no_more_messages_than_needed_and_one_more_after_idling(
        self,
        network: FaultyNetwork,
        counted: DatabaseSessionManager,
        settings: DatabaseSettings,
        work: Callable[[DatabaseSessionManager], Awaitable[object]],
        round_trips: int,
        without_pipeline: int,
    ) -> None:
        if not settings.pipeline:
            round_trips = without_pipeline
        if counted.engine.dialect.driver == "psycopg":
            round_trips += work is write  # It asks for the id with a message of its own.
        await work(counted)
        network.round_trips = 0
        await work(counted)
        assert network.round_trips == round_trips
        await idle()
        await work(counted)
        assert network.round_trips == 2 * round_trips + 1

    async def test_a_scope_without_a_statement_sends_nothing(
        self, network: FaultyNetwork, counted: DatabaseSessionManager
    ) -> None:
        await idle()
        network.round_trips = 0
        async with (
            counted.transaction(),
            counted.session(),
            counted.transaction(Propagation.REQUIRES_NEW),
        ):
            pass
        assert network.round_trips == 0

    async def test_a_connection_that_died_while_idle_is_replaced_silently(
        self, postgres: Postgres, manager: DatabaseSessionManager, database_url: str
    ) -> None:
        network = FaultyNetwork()
        pool = PoolSettings(ping_after=0.05)
        async with through(
            network, postgres, database_url, pool=pool, connect_timeout=0.3, rollback_timeout=0.3
        ) as living:
            before = await read(living)
            network.swallow_what_is_open()
            await idle()
            assert await read(living) != before
            assert checked_out(living) == 0


class TestPing(OnPostgres):
    @pytest.fixture
    async def pinging(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> AsyncIterator[DatabaseSessionManager]:
        pool = PoolSettings(size=1, max_overflow=0, ping_after=0)
        async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as pinging:
            yield pinging
            assert checked_out(pinging) == 0

    async def test_a_killed_connection_is_replaced_silently(
        self, pinging: DatabaseSessionManager, server: Postgres
    ) -> None:
        before = await read(pinging)
        await kill(server, pinging)
        assert await read(pinging) != before
        await write(pinging)

    @pytest.mark.parametrize("again_after", [None, 1], ids=["once", "twice"])
    async def test_a_cancellation_at_any_await_of_the_liveness_check_leaves_no_connection_behind(
        self, pinging: DatabaseSessionManager, again_after: int | None
    ) -> None:
        tasks = asyncio.all_tasks()

        async def work() -> None:
            await write(pinging)
            await read(pinging)

        async for _ in each_cancellation(work, again_after=again_after):
            assert checked_out(pinging) == 0
            async with asyncio.timeout(5):
                while asyncio.all_tasks() != tasks:
                    await asyncio.sleep(
                        0
                    )  # a connection that was given up is closed in the background
            await write(pinging)


class TestAge(OnPostgres):
    async def test_a_connection_is_replaced_when_its_lifetime_is_over(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        pool = PoolSettings(size=1, max_overflow=0, max_lifetime=0.4)
        async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as aging:
            first = await read(aging)
            assert await read(aging) == first

            async def is_another() -> bool:
                return await read(aging) != first

            await until(is_another)

    async def test_connections_of_one_age_are_not_all_replaced_at_once(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        pool = PoolSettings(size=12, max_overflow=0, max_lifetime=1)

        async def all_pids() -> set[object]:
            together = asyncio.Barrier(12)

            async def one() -> object:
                async with aging.transaction(Propagation.SUPPORTS, read_only=True) as session:
                    pid = await session.scalar(PID)
                    await together.wait()
                    return pid

            return set(await asyncio.gather(*(one() for _ in range(12))))

        async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as aging:
            first = await all_pids()
            left = [len(first)]

            async def none_is_left() -> bool:
                left.append(len(first & await all_pids()))
                return not left[-1]

            await until(none_is_left)
            assert any(0 < count < 12 for count in left), left


class TestReadOnlyTransactions(OnPostgres):
    """Without the pipeline, reads run in READ ONLY transactions."""

    @pytest.fixture
    def settings(self, database_url: str) -> DatabaseSettings:
        return DatabaseSettings(url=database_url, pipeline=False)

    async def test_a_read_only_scope_takes_one_connection_of_the_only_pool(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            assert await session.scalar(text("SHOW transaction_read_only")) == "on"
            assert await session.scalar(text("SHOW default_transaction_read_only")) == "off"
            assert checked_out(manager) == 1
            async with manager.transaction(Propagation.SUPPORTS, read_only=True) as joined:
                assert joined is session
        await write(manager)
        assert len(await notes(manager)) == 1

    async def test_the_server_refuses_a_write_in_a_read_only_scope(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(DBAPIError, match="read-only"):
            async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
                session.add(Note(text="lost"))
        assert await notes(manager) == []


class TestStreams:
    async def test_a_read_only_transaction_can_stream_rows(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add_all([Note(text=f"{number}") for number in range(10)])
        async with manager.transaction(read_only=True) as session:
            assert len([note async for note in await session.stream_scalars(select(Note))]) == 10

    async def test_a_scope_without_a_transaction_streams_rows_or_says_what_it_needs(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings, backend: str
    ) -> None:
        async def stream(session: Any) -> int:
            return len([note async for note in await session.stream_scalars(select(Note))])

        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            # Without the pipeline, the server has a READ ONLY transaction here.
            if backend == "sqlite" or not settings.pipeline:
                assert await stream(session) == 0
            else:
                with pytest.raises(Exception, match="outside of a transaction") as refused:
                    await stream(session)
                assert "transaction(read_only=True)" in refused.value.__notes__[0]
                assert await session.scalar(select(1)) == 1


async def test_a_full_pool_raises_after_its_timeout_and_recovers(
    settings: DatabaseSettings,
) -> None:
    pool = PoolSettings(size=1, max_overflow=0, timeout=0.1)
    async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager:
        async with manager.session() as first:
            await first.execute(select(1))
            with pytest.raises(PoolTimeoutError):
                async with manager.session() as second:
                    await second.execute(select(1))
        async with manager.session() as third:
            await third.execute(select(1))
