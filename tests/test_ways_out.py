"""Every way out of a block: cancellation at each await, a killed connection, a full pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import delete, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionwire import CommitOutcomeUnknownError, DatabaseSessionManager, DatabaseSettings, PoolSettings

from .conftest import Postgres, checked_out, notes
from .stepping import each_cancellation
from .tables import Note


async def in_a_transaction(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="a"))
        await session.flush()
        session.add(Note(text="b"))


async def in_a_joined_transaction(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="a"))
        async with manager.transaction():
            await session.execute(insert(Note).values(text="b"))


async def in_a_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(insert(Note).values(text="a"))
        await session.execute(insert(Note).values(text="b"))
        await session.commit()


async def in_a_transaction_of_a_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        session.add(Note(text="a"))
        async with manager.transaction():
            session.add(Note(text="b"))


async def in_a_connection(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(insert(Note).values(text="a"))
        await connection.execute(insert(Note).values(text="b"))


async def with_a_failure(manager: DatabaseSessionManager) -> None:
    with pytest.raises(ValueError, match="fail"):
        async with manager.transaction() as session:
            session.add(Note(text="never"))
            await session.flush()
            raise ValueError("fail")
    await in_a_transaction(manager)


WAYS_IN = [
    in_a_transaction,
    in_a_joined_transaction,
    in_a_session,
    in_a_transaction_of_a_session,
    in_a_connection,
    with_a_failure,
]
Work = Callable[[DatabaseSessionManager], Coroutine[Any, Any, None]]


@pytest.mark.parametrize("again_after", [None, 1, 2], ids=["once", "twice", "twice, later"])
@pytest.mark.parametrize("work", WAYS_IN)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_a_cancellation_at_any_await_leaves_all_or_nothing_and_no_connection_behind(
    manager: DatabaseSessionManager, work: Work, warm: bool, again_after: int | None
) -> None:
    tasks = asyncio.all_tasks()
    cancelled = 0
    async for steps in each_cancellation(lambda: work(manager), again_after=again_after):
        assert checked_out(manager) == 0
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != tasks:
                await asyncio.sleep(0)  # a connection that was given up is closed in the background
        written = await notes(manager)
        assert written in ([], ["a", "b"]), f"cancelled at {steps.cancel_at}"
        cancelled += not written
        async with manager.transaction() as session:
            await session.execute(delete(Note))
        if not warm:
            await manager.engine.dispose()
    assert cancelled, "no cancellation came in time to undo anything"


class TestPostgres:
    """What only a server can do to a client."""

    @pytest.fixture
    def backend(self) -> str:
        return "postgresql"

    @pytest.fixture
    def server(self, postgres: Postgres) -> Postgres:
        return postgres

    @staticmethod
    async def kill(server: Postgres, manager: DatabaseSessionManager) -> None:
        """Kill all server processes of the manager's database."""
        database = manager.engine.url.database
        query = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1"
        assert await server.execute(query, database)

    @pytest.mark.parametrize("kind", ["session", "transaction", "connect"])
    async def test_a_connection_that_is_killed_in_a_block_is_an_error_and_is_replaced(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                await self.kill(server, manager)
                await opened.execute(select(1))
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_one_that_is_killed_before_the_commit_is_an_error(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                await self.kill(server, manager)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_the_error_of_the_block_is_raised_and_that_of_its_rollback_is_noted(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        with pytest.raises(ValueError, match="mine") as raised:
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                await self.kill(server, manager)
                raise ValueError("mine")
        assert "the rollback failed" in raised.value.__notes__[0]
        assert checked_out(manager) == 0

    async def test_an_idle_connection_that_was_killed_is_replaced_unseen(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await notes(manager)
        await self.kill(server, manager)
        assert await notes(manager) == []

    async def test_a_cancelled_statement_is_ended_in_the_server_too(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        async def sleep() -> None:
            async with manager.transaction() as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        async def sleeping() -> bool:
            return bool(await server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))

        task = asyncio.create_task(sleep())
        async with asyncio.timeout(5):
            while not await sleeping():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while await sleeping():
                await asyncio.sleep(0.01)
        assert checked_out(manager) == 0


class TestBlackHole:
    """A network that swallows all that is sent."""

    @pytest.fixture
    def backend(self) -> str:
        return "postgresql"

    @pytest.fixture
    async def hole(
        self, database_url: str, postgres: Postgres, manager: DatabaseSessionManager
    ) -> AsyncIterator[tuple[DatabaseSessionManager, asyncio.Event]]:
        """A manager that reaches the database through a proxy, and the event that ends the proxy's service."""
        swallow = asyncio.Event()
        copiers = set()

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                if not swallow.is_set():
                    writer.write(data)
            writer.close()

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to_server = await asyncio.open_unix_connection(f"{postgres.host}/.s.PGSQL.5432")
            for ends in ((reader, to_server[1]), (to_server[0], writer)):
                copiers.add(asyncio.create_task(copy(*ends)))

        database = make_url(database_url).database
        async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
            host, port = proxy.sockets[0].getsockname()
            settings = DatabaseSettings(
                url=f"postgresql://postgres@{host}:{port}/{database}?sslmode=disable",
                commit_timeout=0.2,
                rollback_timeout=0.2,
            )
            async with asyncio.timeout(30), DatabaseSessionManager(settings) as through:
                yield through, swallow
                assert checked_out(through) == 0
            for copier in copiers:
                copier.cancel()
            await asyncio.gather(*copiers, return_exceptions=True)

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_without_an_answer_is_an_outcome_unknown(
        self, hole: tuple[DatabaseSessionManager, asyncio.Event], kind: str
    ) -> None:
        through, swallow = hole
        with pytest.raises(CommitOutcomeUnknownError, match="look in the database"):
            async with getattr(through, kind)() as opened:
                await opened.execute(insert(Note).values(text="who knows"))
                swallow.set()

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_a_rollback_without_an_answer_costs_the_connection_and_no_more_time_than_allowed(
        self, hole: tuple[DatabaseSessionManager, asyncio.Event], kind: str
    ) -> None:
        through, swallow = hole
        async with asyncio.timeout(5):
            with pytest.raises(ValueError, match="mine"):
                async with getattr(through, kind)() as opened:
                    await opened.execute(insert(Note).values(text="lost"))
                    swallow.set()
                    raise ValueError("mine")


async def test_a_full_pool_is_an_error_in_time_and_recovers(settings: DatabaseSettings) -> None:
    pool = PoolSettings(size=1, max_overflow=0, timeout=0.1)
    async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager:
        async with manager.session() as first:
            await first.execute(select(1))
            with pytest.raises(PoolTimeoutError):
                async with manager.session() as second:
                    await second.execute(select(1))
        async with manager.session() as third:
            await third.execute(select(1))


async def test_a_cancelled_wait_for_a_connection_leaves_the_pool_whole(settings: DatabaseSettings) -> None:
    pool = PoolSettings(size=1, max_overflow=0)
    async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager:

        async def use() -> None:
            async with manager.session() as session:
                await session.execute(select(1))

        async with manager.session() as holder:
            await holder.execute(select(1))
            waiting = [asyncio.create_task(use()) for _ in range(10)]
            await asyncio.sleep(0.01)
            for task in waiting[::2]:
                task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert [task.cancelled() for task in waiting] == [True, False] * 5
        assert checked_out(manager) == 0


class TestSQLiteLock:
    """One writer excludes another."""

    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    async def test_a_writer_waits_for_the_one_before_it(self, manager: DatabaseSessionManager) -> None:
        async def write(name: str) -> None:
            async with manager.transaction() as session:
                await session.execute(select(Note))
                await asyncio.sleep(0.01)
                session.add(Note(text=name))

        await asyncio.gather(*(write(str(number)) for number in range(5)))
        assert len(await notes(manager)) == 5

    async def test_a_wait_that_is_cancelled_ends_at_once(self, manager: DatabaseSessionManager) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            waiting = asyncio.create_task(in_a_connection(manager))
            await asyncio.sleep(0.05)
            waiting.cancel()
            async with asyncio.timeout(1):
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        assert await notes(manager) == ["first"]

    async def test_a_wait_that_lasts_longer_than_the_pools_timeout_is_an_error(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        impatient = settings.model_copy(update={"pool": PoolSettings(timeout=0.05)})
        async with DatabaseSessionManager(impatient) as other, manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            with pytest.raises(OperationalError, match="locked"):
                await in_a_transaction(other)
            async with other.session() as reader:  # which no writer keeps out
                assert (await reader.scalars(select(Note))).all() == []

    async def test_a_cancelled_statement_does_not_keep_the_lock(self, manager: DatabaseSessionManager) -> None:
        count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

        async def run() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                await session.execute(text(count))

        task = asyncio.create_task(run())
        await asyncio.sleep(0.1)
        task.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError) as kept:
                await task
            await in_a_transaction(manager)
        assert kept.value.__traceback__ is not None  # what it refers to must not hold the lock either
        assert await notes(manager) == ["a", "b"]
