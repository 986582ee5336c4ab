"""Deadlines: what `timeout` ends, what it leaves alone, and cancellation beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

import pytest
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.util import await_only

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    transactional,
)

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, running, through, until

SOON = 0.1
LONG = {
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
    async with asyncio.timeout(5):
        async with manager.transaction() as session:
            session.add(Note(text="the next one"))
            await session.flush()
            manager.transaction.set_rollback_only()


def not_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0


async def in_a_block(manager: DatabaseSessionManager, timeout: float | timedelta, sql: str) -> None:
    async with manager.transaction(timeout=timeout) as session:
        session.add(Note(text="lost"))
        await session.flush()
        await session.execute(text(sql))


async def in_a_method(
    manager: DatabaseSessionManager, timeout: float | timedelta, sql: str
) -> None:
    class Service:
        transaction = manager.transaction

        @transactional(timeout=timeout)
        async def work(self) -> None:
            await in_the_current(manager, sql)

    await Service().work()


async def in_a_run(manager: DatabaseSessionManager, timeout: float | timedelta, sql: str) -> None:
    await manager.transaction.run(in_the_current, manager, sql, timeout=timeout)


async def in_the_current(manager: DatabaseSessionManager, sql: str) -> None:
    await CurrentSession(manager).execute(insert(Note).values(text="lost"))
    await CurrentSession(manager).execute(text(sql))


class TestOfABlock:
    @pytest.mark.parametrize("way", [in_a_block, in_a_method, in_a_run])
    @pytest.mark.parametrize("timeout", [SOON, timedelta(seconds=SOON)], ids=["float", "timedelta"])
    async def test_a_deadline_ends_the_running_statement_and_rolls_back(
        self,
        manager: DatabaseSessionManager,
        backend: str,
        way: Callable[[DatabaseSessionManager, float | timedelta, str], Awaitable[None]],
        timeout: float | timedelta,
    ) -> None:
        began = time.monotonic()
        with pytest.raises(TransactionTimeoutError, match=r"within 0\.1 s: rolled back") as raised:
            await way(manager, timeout, LONG[backend])
        assert SOON <= time.monotonic() - began < 5
        assert isinstance(raised.value, TimeoutError)
        assert not_cancelling()
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_a_deadline_ends_a_wait_for_something_else_than_the_database(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=SOON) as session:
                await session.execute(insert(Note).values(text="lost"))
                await asyncio.sleep(60)
        assert await notes(manager) == []

    async def test_a_deadline_ends_the_wait_for_a_connection(
        self, settings: DatabaseSettings
    ) -> None:
        pool = PoolSettings(size=1, max_overflow=0, timeout=60)
        async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as small:
            async with small.session() as holder:
                await holder.execute(select(1))
                with pytest.raises(TransactionTimeoutError):
                    async with small.transaction(Propagation.REQUIRES_NEW, timeout=SOON) as session:
                        await session.execute(select(1))
            async with small.transaction() as session:
                assert await session.scalar(select(1)) == 1
            assert checked_out(small) == 0

    async def test_a_deadline_holds_for_reads_without_a_transaction(
        self, manager: DatabaseSessionManager, backend: str
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(
                Propagation.SUPPORTS, read_only=True, timeout=SOON
            ) as session:
                await session.execute(text(LONG[backend]))

    async def test_a_deadline_leaves_a_block_alone_that_ends_in_time(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(timeout=30) as session:
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]
        assert not_cancelling()

    async def test_an_error_before_the_deadline_is_raised(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction(timeout=30):
                raise ZeroDivisionError
        with pytest.raises(TimeoutError) as raised:
            async with manager.transaction(timeout=30):
                raise TimeoutError("of something else")
        assert not isinstance(raised.value, TransactionTimeoutError)

    async def test_a_passed_deadline_does_not_cut_the_on_rollback_hooks_short(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        async def hook() -> None:
            await asyncio.sleep(0.02)
            ran.append("rolled back")

        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=SOON):
                manager.transaction.on_rollback(hook)
                await asyncio.sleep(60)
        assert ran == ["rolled back"]


class TestABlockThatResists:
    async def test_a_deadline_holds_if_the_block_swallows_the_cancellation(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=SOON) as session:
                session.add(Note(text="lost"))
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
        assert not_cancelling()
        assert await notes(manager) == []

    async def test_a_deadline_holds_if_the_block_continues_after_the_cancellation(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=SOON) as session:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
                session.add(Note(text="lost"))
                await session.flush()
                await asyncio.sleep(0.01)
        assert not_cancelling()
        assert await notes(manager) == []

    async def test_a_deadline_holds_if_the_block_turns_the_cancellation_into_another_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError) as raised:
            async with manager.transaction(timeout=SOON):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    raise ZeroDivisionError from None
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        assert not_cancelling()

    async def test_a_deadline_holds_if_the_block_never_yields_to_the_event_loop(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.01) as session:
                await session.execute(insert(Note).values(text="lost"))
                time.sleep(0.05)  # noqa: ASYNC251  # it computes
        assert not_cancelling()
        assert await notes(manager) == []


class TestTheCommit:
    @staticmethod
    def slow(manager: DatabaseSessionManager, what: str) -> None:
        """Make every one of these take longer than the deadline."""

        def wait(connection: Connection, *_: object) -> None:
            await_only(asyncio.sleep(3 * SOON))

        event.listen(manager.engine.sync_engine, what, wait)

    async def test_a_deadline_does_not_cut_a_commit_that_was_sent(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        self.slow(manager, "commit")
        async with manager.transaction(timeout=SOON) as session:
            session.add(Note(text="kept"))
            manager.transaction.on_commit(lambda: ran.append("committed"))
        assert not_cancelling()
        assert ran == ["committed"]
        assert await notes(manager) == ["kept"]

    async def test_a_deadline_cuts_the_flush_before_the_commit(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(select(Note))
        self.slow(manager, "before_cursor_execute")
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=SOON) as session:
                session.add(Note(text="lost"))
        assert await notes(manager) == []

    async def test_a_deadline_does_not_apply_to_on_commit_hooks(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        async def hook() -> None:
            await asyncio.sleep(2 * SOON)
            ran.append("done")

        async with manager.transaction(timeout=SOON):
            manager.transaction.on_commit(hook)
        assert ran == ["done"]


class TestWithinAnother:
    async def test_the_deadline_of_a_joined_block_rolls_the_outer_block_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="TransactionTimeoutError") as raised:
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                with pytest.raises(TransactionTimeoutError):
                    async with manager.transaction(timeout=SOON):
                        await asyncio.sleep(60)
                assert not_cancelling()
        assert isinstance(raised.value.__cause__, TransactionTimeoutError)
        assert await notes(manager) == []

    async def test_the_deadline_of_a_joined_block_that_swallows_it_rolls_the_outer_block_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                async with manager.transaction(timeout=SOON):
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(60)
        assert await notes(manager) == []

    async def test_the_deadline_of_the_outer_block_holds_in_a_joined_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError, match=r"0\.1 s"):
            async with (
                manager.transaction(timeout=SOON),
                manager.transaction(timeout=30) as session,
            ):
                session.add(Note(text="lost"))
                await session.flush()
                await asyncio.sleep(60)
        assert not_cancelling()
        assert await notes(manager) == []

    async def test_the_deadline_of_a_savepoint_rolls_back_only_the_savepoint(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(Propagation.NESTED, timeout=5 * SOON):
                    await session.execute(insert(Note).values(text="lost"))
                    await asyncio.sleep(60)
            session.add(Note(text="kept too"))
        assert await notes(manager) == ["kept", "kept too"]

    async def test_the_deadline_of_a_savepoint_stops_its_statement_and_the_outer_block_goes_on(
        self, manager: DatabaseSessionManager, backend: str
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="outer"))
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(Propagation.NESTED, timeout=SOON):
                    await session.execute(insert(Note).values(text="lost"))
                    await session.execute(text(LONG[backend]))
            session.add(Note(text="outer too"))
        assert await notes(manager) == ["outer", "outer too"]

    async def test_the_deadline_of_requires_new_leaves_the_outer_transaction_alone(
        self, manager: DatabaseSessionManager, backend: str
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="outer"))
            await session.flush()
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(
                    Propagation.REQUIRES_NEW, read_only=True, timeout=SOON
                ) as other:
                    await other.execute(text(LONG[backend]))
        assert await notes(manager) == ["outer"]

    async def test_the_deadline_of_a_transaction_in_a_session_rolls_the_session_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="before"))
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(timeout=SOON):
                    await asyncio.sleep(60)
            assert not session.new
            assert await session.scalar(select(1)) == 1
        assert await notes(manager) == []

    async def test_a_deadline_does_not_make_a_joined_block_incompatible(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(timeout=30), manager.transaction(timeout=60) as session:
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]


class TestWithCancellation:
    async def test_a_timeout_around_the_block_raises_its_own_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TimeoutError) as raised:
            async with asyncio.timeout(SOON):
                async with manager.transaction(timeout=30) as session:
                    await session.execute(insert(Note).values(text="lost"))
                    await asyncio.sleep(60)
        assert not isinstance(raised.value, TransactionTimeoutError)
        assert not_cancelling()
        assert await notes(manager) == []

    async def test_the_deadline_of_a_block_does_not_expire_a_timeout_around_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with asyncio.timeout(30) as outside:
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(timeout=SOON):
                    await asyncio.sleep(60)
            await asyncio.sleep(0)
        assert not outside.expired()

    async def test_a_deadline_together_with_a_timeout_around_it_is_that_timeout(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                async with manager.transaction(timeout=0.02) as session:
                    await session.execute(insert(Note).values(text="lost"))
                    # Both have passed before either can strike.
                    time.sleep(0.03)  # noqa: ASYNC251
                    await asyncio.sleep(60)
        assert not_cancelling()
        assert await notes(manager) == []

    @pytest.mark.parametrize("first", ["deadline", "cancellation"])
    async def test_a_cancellation_together_with_a_deadline_is_not_lost(
        self, manager: DatabaseSessionManager, first: str
    ) -> None:
        async def work() -> None:
            try:
                async with manager.transaction(timeout=SOON) as session:
                    await session.execute(insert(Note).values(text="lost"))
                    task = asyncio.current_task()
                    assert task is not None
                    loop = asyncio.get_running_loop()
                    if first == "cancellation":
                        loop.call_soon(task.cancel)
                    # The deadline strikes in this iteration of the event loop.
                    time.sleep(2 * SOON)  # noqa: ASYNC251
                    if first == "deadline":
                        loop.call_later(0, task.cancel)
                    await asyncio.sleep(60)
            finally:
                task = asyncio.current_task()
                assert task is not None
                left.append(task.cancelling())

        left: list[int] = []
        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert left == [1]
        assert await notes(manager) == []

    async def test_a_deadline_that_passes_while_a_cancellation_is_handled_keeps_the_cancellation(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            async with manager.transaction(timeout=SOON) as session:
                await session.execute(insert(Note).values(text="lost"))
                started.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    # The deadline interrupts this clean-up.
                    await asyncio.sleep(60)

        started = asyncio.Event()
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await notes(manager) == []

    async def test_a_cancellation_in_the_rollback_after_a_deadline_has_the_deadline_as_its_cause(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            async with manager.transaction(timeout=SOON) as session:
                await session.execute(insert(Note).values(text="lost"))
                await asyncio.sleep(60)

        task = asyncio.create_task(work())

        event.listen(
            manager.engine.sync_engine, "rollback", lambda _: task.cancel()
        )  # once done, it has no effect
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, TransactionTimeoutError)
        assert await notes(manager) == []

    async def test_a_cancellation_before_the_deadline_stays_a_cancellation(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            async with manager.transaction(timeout=30) as session:
                await session.execute(insert(Note).values(text="lost"))
                started.set()
                await asyncio.sleep(60)

        started = asyncio.Event()
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await notes(manager) == []


async def test_many_concurrent_deadlines_leak_no_place_in_the_pool(
    manager: DatabaseSessionManager, backend: str
) -> None:
    async def work(number: int) -> None:
        async with manager.transaction(timeout=SOON + number / 100, read_only=True) as session:
            await session.execute(text(LONG[backend]))

    results = await asyncio.gather(*(work(number) for number in range(10)), return_exceptions=True)
    assert [type(result) for result in results] == [TransactionTimeoutError] * 10
    async with asyncio.timeout(5):
        while checked_out(manager):
            await asyncio.sleep(0.01)

    async def use() -> int | None:
        async with manager.session() as session:
            return await session.scalar(select(1))

    assert await asyncio.gather(*(use() for _ in range(5))) == [1] * 5


class TestPostgres(OnPostgres):
    async def test_a_deadline_also_stops_the_statement_in_the_server(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        task = asyncio.create_task(in_a_block(manager, 1, "SELECT pg_sleep(60)"))
        await until(lambda: running(postgres, manager, "SELECT pg_sleep%"))
        with pytest.raises(TransactionTimeoutError):
            await task

        async def ended() -> bool:
            return not await running(postgres, manager, "SELECT pg_sleep%")

        await until(ended)

    async def test_a_deadline_ends_a_wait_for_a_lock(self, manager: DatabaseSessionManager) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="a"))
        async with manager.transaction() as session:
            await session.scalars(select(Note).with_for_update())
            with pytest.raises(TransactionTimeoutError):
                async with manager.transaction(Propagation.REQUIRES_NEW, timeout=SOON) as other:
                    await other.scalars(select(Note).with_for_update())

    async def test_a_deadline_holds_if_the_server_stops_answering(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
    ) -> None:
        network = FaultyNetwork()
        async with through(network, postgres, database_url, rollback_timeout=0.2) as remote:
            began = time.monotonic()
            with pytest.raises(TransactionTimeoutError):
                async with remote.transaction(timeout=SOON) as session:
                    await session.execute(insert(Note).values(text="lost"))
                    network.swallows = True
                    await session.execute(select(1))
            assert time.monotonic() - began < 5
            assert checked_out(remote) == 0

    async def test_an_unanswered_commit_at_the_deadline_is_no_timeout(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
    ) -> None:
        network = FaultyNetwork()
        async with through(
            network, postgres, database_url, commit_timeout=0.3, rollback_timeout=0.2
        ) as remote:
            with pytest.raises(CommitOutcomeUnknownError):
                async with remote.transaction(timeout=SOON) as session:
                    await session.execute(insert(Note).values(text="who knows"))
                    network.swallows = True
