"""A statement cancelled in a savepoint is stopped, and only the savepoint is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    DatabaseSessionManager,
    Propagation,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from sessionwire._database import savepoints
from sessionwire.testing import sandbox

from .cancellation import each_cancellation
from .conftest import Postgres, assert_all_returned, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, kill, running, through, until

SOON = 0.5
MARGIN = 1.0  # for a busy machine: half a second is meant
LIMIT = savepoints.STOP_TIMEOUT
NESTED = Propagation.NESTED
READ = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
}


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(manager: DatabaseSessionManager) -> AsyncIterator[None]:
    """Check after each test that the pool is whole and no cancellation is pending."""
    yield
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert checked_out(manager) == 0
    async with asyncio.timeout(5), manager.transaction() as session:
        session.add(Note(text="the next one"))
        await session.flush()
        manager.transaction.set_rollback_only()


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give statements more time to stop. Tests of that limit set it back."""
    monkeypatch.setattr(savepoints, "STOP_TIMEOUT", 5 * LIMIT)


Way = Callable[[DatabaseSessionManager, AsyncSession, str], Awaitable[None]]


async def by_deadline(manager: DatabaseSessionManager, session: AsyncSession, sql: str) -> None:
    with pytest.raises(TransactionTimeoutError):
        async with manager.transaction(NESTED, timeout=SOON):
            await session.execute(insert(Note).values(text="lost"))
            await session.execute(text(sql))


async def by_deadline_of_a_joined_block(
    manager: DatabaseSessionManager, session: AsyncSession, sql: str
) -> None:
    with pytest.raises(TransactionTimeoutError):
        async with manager.transaction(NESTED):
            await session.execute(insert(Note).values(text="lost"))
            async with manager.transaction(timeout=SOON):
                await session.execute(text(sql))


async def by_timeout_outside(
    manager: DatabaseSessionManager, session: AsyncSession, sql: str
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SOON), manager.transaction(NESTED):
            await session.execute(insert(Note).values(text="lost"))
            await session.execute(text(sql))


async def by_timeout_inside(
    manager: DatabaseSessionManager, session: AsyncSession, sql: str
) -> None:
    with pytest.raises(
        UnexpectedRollbackError, match="let the cancellation leave the block of the savepoint"
    ):
        async with manager.transaction(NESTED):
            await session.execute(insert(Note).values(text="lost"))
            with suppress(TimeoutError):
                async with asyncio.timeout(SOON):
                    await session.execute(text(sql))


async def by_hand(manager: DatabaseSessionManager, session: AsyncSession, sql: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SOON), session.begin_nested():
            await session.execute(insert(Note).values(text="lost"))
            await session.execute(text(sql))


WAYS = [by_deadline, by_deadline_of_a_joined_block, by_timeout_outside, by_timeout_inside, by_hand]


@pytest.mark.parametrize("way", WAYS)
async def test_the_transaction_goes_on_after_a_statement_in_a_savepoint_was_stopped(
    manager: DatabaseSessionManager, backend: str, way: Way
) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="before"))
        await session.flush()
        began = time.monotonic()
        await way(manager, session, READ[backend])
        assert time.monotonic() - began < SOON + MARGIN
        assert list(await session.scalars(select(Note.text))) == ["before"]
        session.add(Note(text="behind"))
    assert await notes(manager) == ["before", "behind"]


@pytest.mark.parametrize("way", WAYS)
async def test_the_transaction_in_a_sandbox_goes_on_after_a_savepoint_was_stopped(
    manager: DatabaseSessionManager, backend: str, way: Way
) -> None:
    async with sandbox(manager):
        async with manager.transaction() as session:
            session.add(Note(text="before"))
            await session.flush()
            await way(manager, session, READ[backend])
            session.add(Note(text="behind"))
        assert await notes(manager) == ["before", "behind"]


async def test_the_enclosing_savepoint_goes_on_after_an_inner_one_was_stopped(
    manager: DatabaseSessionManager, backend: str
) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="transaction"))
        async with manager.transaction(NESTED):
            session.add(Note(text="savepoint"))
            await by_deadline(manager, session, READ[backend])
            session.add(Note(text="behind"))
    assert await notes(manager) == ["behind", "savepoint", "transaction"]


async def test_several_savepoints_of_one_transaction_can_be_stopped(
    manager: DatabaseSessionManager, backend: str
) -> None:
    async with manager.transaction() as session:
        for number in range(3):
            await by_deadline(manager, session, READ[backend])
            session.add(Note(text=str(number)))
    assert await notes(manager) == ["0", "1", "2"]


@pytest.mark.parametrize("again_after", [None, 1], ids=["once", "twice"])
async def test_a_cancellation_at_any_await_rolls_the_savepoint_back_or_raises(
    manager: DatabaseSessionManager, again_after: int | None
) -> None:
    """Cancel statements that write too, and those whose rows are not fetched yet."""

    async def work() -> None:
        try:
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                await session.flush()
                with suppress(asyncio.CancelledError):
                    async with manager.transaction(NESTED):
                        session.add_all(
                            [Note(text="inner"), Note(text="inner too")]
                        )  # INSERT … RETURNING
                        await session.flush()
                        await session.scalars(select(Note.text))
                    ended.append("released")
                await session.scalar(select(1))
            ended.append("kept")
        except UnexpectedRollbackError:
            ended.append("told")

    seen: list[list[str]] = []
    ended: list[str] = []
    async for _ in each_cancellation(work, again_after=again_after):
        kept = await notes(manager)
        if "told" in ended:
            assert kept == []
        elif "kept" in ended:
            assert kept == (["inner", "inner too", "outer"] if "released" in ended else ["outer"])
            seen.append(kept)
        else:  # the cancellation struck outside of the savepoint, perhaps the commit
            assert kept in ([], ["inner", "inner too", "outer"])
        async with manager.connect() as connection:
            await connection.execute(text("DELETE FROM note"))
        ended.clear()
    if again_after is None:
        # psycopg waits once for each statement.
        assert seen.count(["outer"]) >= (2 if manager.engine.dialect.driver == "psycopg" else 3)


class TestOnSQLite:
    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    async def test_a_savepoint_waits_for_a_write_that_ends_soon_on_sqlite(
        self, manager: DatabaseSessionManager
    ) -> None:
        """SQLite rolls the whole transaction back if a write is interrupted."""

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return "lost"

        async with manager.transaction() as session:
            session.add(Note(text="outer"))
            connection = await (await session.connection()).get_raw_connection()
            assert connection.driver_connection is not None
            await connection.driver_connection.create_function("wait", 1, wait)
            with pytest.raises(TimeoutError):
                async with manager.transaction(NESTED):
                    async with asyncio.timeout(0.02):
                        await session.execute(
                            text("INSERT INTO note (text) VALUES (wait(0.1)) RETURNING id")
                        )
        assert await notes(manager) == ["outer"]

    async def test_a_write_stopped_in_a_savepoint_rolls_the_transaction_back_on_sqlite(
        self, manager: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(savepoints, "STOP_TIMEOUT", LIMIT)
        sql = f"INSERT INTO note (text) {READ['sqlite']}"
        began = time.monotonic()
        with pytest.raises(
            UnexpectedRollbackError, match=r"could not be stopped within .* run the whole"
        ) as raised:
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                await by_deadline(manager, session, sql)
                assert time.monotonic() - began < SOON + MARGIN
                with pytest.raises(UnexpectedRollbackError, match="not be stopped within"):
                    await session.scalar(select(1))
        assert isinstance(raised.value.__cause__, UnexpectedRollbackError)
        assert await notes(manager) == []


class TestOnPostgres(OnPostgres):
    async def test_the_server_stops_the_statement_of_a_savepoint(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async with manager.transaction() as session:
            await by_deadline(manager, session, "SELECT pg_sleep(60)")
            assert not await running(postgres, manager, "SELECT pg_sleep%")

    @pytest.mark.several_connections("another transaction holds a lock")
    async def test_the_server_stops_a_write_and_a_wait_for_a_lock_in_a_savepoint(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="locked"))
        async with manager.transaction() as session:
            session.add(Note(text="outer"))
            await by_deadline(
                manager, session, "INSERT INTO note (text) SELECT 'lost too' FROM pg_sleep(60)"
            )
            async with manager.connect() as other:
                await other.execute(text("SELECT * FROM note FOR UPDATE"))
                await by_deadline(
                    manager, session, "SELECT * FROM note WHERE text = 'locked' FOR UPDATE"
                )
        assert await notes(manager) == ["locked", "outer"]

    async def test_a_savepoint_without_an_answer_of_the_server_rolls_the_transaction_back(
        self,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        database_url: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(savepoints, "STOP_TIMEOUT", LIMIT)
        network = FaultyNetwork()
        async with through(network, postgres, database_url, rollback_timeout=0.3) as remote:
            with pytest.raises(UnexpectedRollbackError, match="not be stopped within"):
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="outer"))
                    with pytest.raises(TransactionTimeoutError):
                        async with remote.transaction(NESTED, timeout=SOON):
                            await session.execute(select(1))
                            network.swallows = True
                            began = time.monotonic()
                            await session.execute(select(1))
                    assert time.monotonic() - began < SOON + MARGIN
            await assert_all_returned(remote)
        assert await notes(manager) == []

    async def test_a_savepoint_whose_server_process_ends_rolls_the_transaction_back(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="outer"))
                with suppress(asyncio.CancelledError):
                    async with manager.transaction(NESTED):
                        await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(work())
        await until(lambda: running(postgres, manager, "SELECT pg_sleep%"))
        await kill(postgres, manager, "SELECT pg_sleep%")
        task.cancel()
        await asyncio.wait((task,))
        assert task.exception() is not None
        assert await notes(manager) == []
