"""`manager.status()`: what is open now, and totals since the manager was made."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import FrozenInstanceError, asdict
from itertools import count
from random import Random
from typing import Any

import pytest
from sqlalchemy import Insert, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionwire import (
    CommitOutcomeUnknownError,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from sessionwire.status import ConnectionTotals, PoolStatus, TransactionTotals
from sessionwire.testing import sandbox

from .conftest import Postgres
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, OnPostgres, kill, run_at_commit, until

QUERY = text("SELECT 1")


class Counted:
    """The ends of transactions since the last look."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self._manager = manager
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        return asdict(self._manager.status().transactions)

    def since(self) -> dict[str, int]:
        now, before = self._now(), self._before
        self._before = now
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}


@pytest.fixture
def counted(manager: DatabaseSessionManager) -> Counted:
    return Counted(manager)


numbers = count()


def a_note() -> Insert:
    return insert(Note).values(text=f"note {next(numbers)}")


def test_before_init_nothing_is_open_and_all_totals_are_zero() -> None:
    status = DatabaseSessionManager().status()
    assert not status.is_open
    assert (status.open_scopes, status.pool, status.holders) == (0, PoolStatus(), ())
    assert (status.transactions, status.retries) == (TransactionTotals(), {})
    assert status.connections == ConnectionTotals()
    with pytest.raises(FrozenInstanceError):
        status.open_scopes = 1  # type: ignore[misc]


async def test_totals_survive_a_close(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings)
    for times in (1, 2):
        async with manager, manager.connect() as connection:
            await connection.execute(QUERY)
            assert manager.status().is_open
        status = manager.status()
        assert not status.is_open
        assert status.pool == PoolStatus()
        assert status.transactions.committed == times
        assert status.connections.made == times


async def test_the_pool_is_shown_as_it_is(database_url: str) -> None:
    pool = PoolSettings(size=1, max_overflow=1, timeout=0.2)
    async with DatabaseSessionManager(DatabaseSettings(url=database_url, pool=pool)) as manager:
        assert manager.status().pool == PoolStatus(in_use=0, idle=1, waiting=0, limit=2)
        async with manager.connect(), manager.session() as session:
            assert manager.status().open_scopes == 2
            assert manager.status().pool == PoolStatus(in_use=1, idle=0, waiting=0, limit=2)
            await session.execute(QUERY)
            third = asyncio.create_task(_fails_for_want_of_a_connection(manager))

            async def waits() -> bool:
                return manager.status().pool.waiting == 1

            await until(waits)
            assert manager.status().pool.in_use == 2
            await third
            assert manager.status().pool.waiting == 0
            assert manager.status().connections.timed_out == 1
            assert manager.status().transactions.timed_out == 0
        assert manager.status().connections.waited_for >= 0.2
        assert manager.status().connections.held_for >= 0.4
        assert manager.status().connections.made == 2


async def _fails_for_want_of_a_connection(manager: DatabaseSessionManager) -> None:
    with pytest.raises(PoolTimeoutError):
        async with manager.connect():
            raise AssertionError


class TestEndsOfTransactions:
    async def test_commits(self, manager: DatabaseSessionManager, counted: Counted) -> None:
        async with manager.transaction() as session:
            await session.execute(a_note())
        assert counted.since() == {"committed": 1}
        async with manager.connect() as connection:
            await connection.execute(a_note())
        assert counted.since() == {"committed": 1}
        async with manager.session() as session:
            await session.execute(a_note())
            await session.commit()
            await session.commit()  # of nothing
            await session.execute(a_note())
            await session.commit()
            async with session.begin():
                await session.execute(a_note())
        assert counted.since() == {"committed": 3}

    async def test_rollbacks(self, manager: DatabaseSessionManager, counted: Counted) -> None:
        with suppress(LookupError):
            async with manager.transaction() as session:
                await session.execute(a_note())
                raise LookupError
        assert counted.since() == {"rolled_back": 1}
        async with manager.transaction() as session:
            await session.execute(a_note())
            manager.transaction.set_rollback_only()
        assert counted.since() == {"rolled_back": 1}
        with suppress(LookupError):
            async with manager.connect() as connection:
                await connection.execute(a_note())
                raise LookupError
        assert counted.since() == {"rolled_back": 1}
        with suppress(LookupError):
            async with manager.session() as session:
                await session.execute(a_note())
                await session.rollback()
                await session.execute(a_note())
                await session.close()
                await session.execute(a_note())
                raise LookupError
        assert counted.since() == {"rolled_back": 3}

    async def test_a_session_that_only_read_counts_nothing(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        async with manager.session() as session:
            await session.execute(QUERY)
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            await session.execute(QUERY)
        assert counted.since() == {}

    async def test_savepoints_and_joined_blocks_count_nothing(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(a_note())
            async with manager.transaction():
                pass
            with suppress(LookupError):
                async with manager.transaction(Propagation.NESTED):
                    raise LookupError
            async with session.begin_nested():
                await session.execute(a_note())
        assert counted.since() == {"committed": 1}

    async def test_a_transaction_in_a_session_counts_once(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        async with manager.session() as session:
            async with manager.transaction():
                await session.execute(a_note())
            assert counted.since() == {"committed": 1}
            with suppress(LookupError):
                async with manager.transaction():
                    await session.execute(a_note())
                    raise LookupError
        assert counted.since() == {"rolled_back": 1}

    async def test_swallowed_errors_are_unexpected(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction() as session:
                with suppress(DBAPIError):
                    await session.execute(text("SELECT nothing FROM nowhere"))
        assert counted.since() == {"unexpected": 1}
        with pytest.raises(UnexpectedRollbackError):
            async with manager.connect() as connection:
                with suppress(DBAPIError):
                    await connection.execute(text("SELECT nothing FROM nowhere"))
        assert counted.since() == {"unexpected": 1}
        async with manager.session() as session:
            with suppress(DBAPIError):
                await session.execute(text("SELECT nothing FROM nowhere"))
            with pytest.raises(UnexpectedRollbackError):
                await session.commit()
        assert counted.since() == {"unexpected": 1}

    async def test_an_inner_error_is_a_rollback_for_the_outer_transaction(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction():
                raise UnexpectedRollbackError
        assert counted.since() == {"rolled_back": 1}
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction() as session:
                await session.execute(QUERY)
                async with manager.transaction(timeout=0.01):
                    await asyncio.sleep(5)
        assert counted.since() == {"rolled_back": 1}

    async def test_deadlines(self, manager: DatabaseSessionManager, counted: Counted) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.01) as session:
                await session.execute(a_note())
                await asyncio.sleep(5)
        assert counted.since() == {"timed_out": 1}

    async def test_a_cancelled_block_is_rolled_back(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        begun = asyncio.Event()

        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(a_note())
                begun.set()
                await asyncio.sleep(5)

        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert counted.since() == {"rolled_back": 1}

    async def test_a_refused_insert_is_rolled_back(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                for _ in range(2):
                    await session.execute(insert(Note).values(text="tea"))
        assert counted.since() == {"rolled_back": 1}

    async def test_they_are_counted_in_a_sandbox_too(
        self, manager: DatabaseSessionManager, counted: Counted
    ) -> None:
        async with sandbox(manager):
            async with manager.transaction() as session:
                await session.execute(a_note())
                assert manager.status().pool.in_use == 1
            assert manager.status().is_open
        assert counted.since() == {"committed": 1}


class TestOnPostgres(OnPostgres):
    async def test_a_refused_commit_is_rolled_back(self, manager: DatabaseSessionManager) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'refused'")
        counted = Counted(manager)
        with pytest.raises(DBAPIError):
            async with manager.transaction() as session:
                await session.execute(a_note())
        with pytest.raises(DBAPIError):
            async with manager.connect() as connection:
                await connection.execute(a_note())
        async with manager.session() as session:
            await session.execute(a_note())
            with pytest.raises(DBAPIError):
                await session.commit()
            await session.rollback()
            assert counted.since() == {"rolled_back": 3}
            with pytest.raises(DBAPIError):
                async with session.begin():
                    await session.execute(a_note())
        assert counted.since() == {"rolled_back": 1}

    async def test_a_commit_that_outlives_a_cancellation_is_committed(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(manager, "PERFORM pg_sleep(0.3)")
        counted = Counted(manager)

        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(a_note())

        task = asyncio.create_task(work())
        await asyncio.sleep(0.15)
        task.cancel()
        await asyncio.wait((task,))
        assert counted.since() == {"committed": 1}

    async def test_each_attempt_counts_once_and_each_retry_by_its_reason(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(
            manager,
            "IF (SELECT count(*) FROM note) < 3 THEN "
            "PERFORM nextval('tries'); IF currval('tries') < 3 THEN "
            "RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END IF; END IF",
        )
        async with manager.connect() as connection:
            await connection.execute(text("CREATE SEQUENCE tries"))
        counted = Counted(manager)

        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(a_note())

        await manager.transaction.run(work, retries=5)
        assert counted.since() == {"rolled_back": 2, "committed": 1}
        assert manager.status().retries == {"serialization_failure": 2}

    async def test_a_killed_backend_is_a_lost_connection(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        before = manager.status()
        counted = Counted(manager)
        times = 0

        async def work() -> None:
            nonlocal times
            times += 1
            async with manager.transaction() as session:
                await session.execute(QUERY)
                if times == 1:
                    await kill(postgres, manager)
                await session.execute(QUERY)

        await manager.transaction.run(work, retries=5)
        after = manager.status()
        assert counted.since() == {"rolled_back": 1, "committed": 1}
        assert after.retries == {"connection_lost": 1}
        assert after.connections.lost - before.connections.lost == 1
        assert after.connections.made - before.connections.made == 1

    async def test_a_connection_at_the_end_of_its_lifetime_is_replaced(
        self, database_url: str
    ) -> None:
        pool = PoolSettings(size=1, max_lifetime=0.01)
        settings = DatabaseSettings(url=database_url, pool=pool)
        async with DatabaseSessionManager(settings) as manager:
            await asyncio.sleep(0.02)
            async with manager.connect() as connection:
                await connection.execute(QUERY)
            connections = manager.status().connections
        assert (connections.made, connections.replaced, connections.lost) == (2, 1, 0)


class TestOnFaultyNetwork(OnFaultyNetwork):
    async def test_a_commit_whose_answer_is_lost_is_unknown(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        counted = Counted(remote)
        with pytest.raises(CommitOutcomeUnknownError):
            async with remote.transaction() as session:
                await session.execute(a_note())
                network.swallows = True
        network.swallows = False
        assert counted.since() == {"unknown": 1}


async def test_after_many_blocks_no_connection_is_in_use_and_the_sums_agree(
    manager: DatabaseSessionManager,
) -> None:
    random, counted, begun = Random(7), Counted(manager), 0

    async def one(kind: str, end: str) -> None:
        nonlocal begun
        block: Any = getattr(manager, kind)
        with suppress(LookupError, TransactionTimeoutError):
            async with block() as user:
                begun += 1
                if kind == "session":  # whose transactions count by their ends
                    await user.execute(a_note())
                    await (user.commit() if end == "well" else user.rollback())
                    return
                await user.execute(QUERY)
                if end == "a deadline":
                    async with asyncio.timeout(0.01):
                        await asyncio.sleep(5)
                if end == "an error":
                    raise LookupError

    async def cancelled() -> None:
        nonlocal begun
        async with manager.transaction():
            begun += 1
            await asyncio.sleep(5)

    for _ in range(20):
        kinds = [random.choice(["transaction", "connect", "session"]) for _ in range(8)]
        ends = [random.choice(["well", "an error", "a deadline"]) for _ in kinds]
        to_cancel = [asyncio.create_task(cancelled()) for _ in range(2)]
        await asyncio.gather(*map(one, kinds, ends), return_exceptions=True)
        for task in to_cancel:
            task.cancel()
        await asyncio.wait(to_cancel)

    async def is_all_back() -> bool:
        return manager.status().pool.in_use == 0

    await until(is_all_back)
    status = manager.status()
    assert (status.open_scopes, status.holders, status.pool.waiting) == (0, (), 0)
    totals = counted.since()
    assert set(totals) == {"committed", "rolled_back"}
    assert sum(totals.values()) == begun == 200
