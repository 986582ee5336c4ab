"""Cancellation at each await of a block, during its commit, and while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

import pytest
from sqlalchemy import Connection, delete, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.util import await_only

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    UnexpectedRollbackError,
)
from sessionwire._database.runtime import database_of

from .cancellation import ONCE, TWICE, TWICE_LATER, each_cancellation
from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, OnPostgres, run_at_commit, running, until
from .units_of_work import UNITS_OF_WORK, Work, in_a_transaction


async def cancel_everywhere(
    manager: DatabaseSessionManager,
    work: Work,
    *,
    again_after: int | None = None,
    warm: bool = True,
) -> AsyncIterator[list[str]]:
    """Yield the notes after a cancellation at each suspension. Nothing may be left."""
    tasks = asyncio.all_tasks()
    async for _ in each_cancellation(lambda: work(manager), again_after=again_after):
        assert checked_out(manager) == 0
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != tasks:
                # An aborted connection is closed in the background.
                await asyncio.sleep(0)
        yield await notes(manager)
        async with manager.transaction() as session:
            await session.execute(delete(Note))
        if not warm:
            await manager.engine.dispose()


@pytest.mark.parametrize("again_after", [ONCE, TWICE, TWICE_LATER])
@pytest.mark.parametrize("work", UNITS_OF_WORK)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_a_cancellation_at_any_await_leaves_all_or_nothing_and_no_connection_behind(
    manager: DatabaseSessionManager, work: Work, warm: bool, again_after: int | None
) -> None:
    results = [
        written
        async for written in cancel_everywhere(manager, work, again_after=again_after, warm=warm)
    ]
    assert [] in results, "no cancellation came in time to undo anything"
    assert results[-1] == ["a", "b"]
    assert all(written in ([], ["a", "b"]) for written in results)


async def test_cancelling_all_tasks_of_the_loop_leaves_all_or_nothing_and_no_connection(
    manager: DatabaseSessionManager,
) -> None:
    """Cancel all tasks, as a shutdown does, including those that end a block."""
    await in_a_transaction(manager)  # warm
    for turns in range(0, 60, 2):
        async with manager.connect() as connection:
            await connection.execute(delete(Note))
        here = asyncio.current_task()
        task = asyncio.create_task(in_a_transaction(manager))
        for _ in range(turns):
            await asyncio.sleep(0)
        for each in asyncio.all_tasks() - {here}:
            each.cancel()
        await asyncio.wait([task])
        await until_given_back(manager)
        assert await notes(manager) in ([], ["a", "b"])


async def until_given_back(manager: DatabaseSessionManager) -> None:
    async def given_back() -> bool:
        return checked_out(manager) == 0

    await until(given_back)


@pytest.mark.parametrize("again_after", [ONCE, TWICE_LATER])
class TestCancelledEverywhere:
    async def all_or_nothing(
        self, manager: DatabaseSessionManager, work: Work, again_after: int | None
    ) -> None:
        results = [
            written async for written in cancel_everywhere(manager, work, again_after=again_after)
        ]
        assert [] in results
        assert results[-1] == ["a", "b"]
        assert all(written in ([], ["a", "b"]) for written in results)

    async def test_a_cancellation_in_a_savepoint_leaves_all_or_nothing(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        async def work(manager: DatabaseSessionManager) -> None:
            async with manager.transaction() as session:
                session.add(Note(text="a"))
                async with manager.transaction(Propagation.NESTED):
                    await session.execute(insert(Note).values(text="b"))
                with pytest.raises(ZeroDivisionError):
                    async with manager.transaction(Propagation.NESTED):
                        await session.execute(insert(Note).values(text="never"))
                        raise ZeroDivisionError

        await self.all_or_nothing(manager, work, again_after)

    async def test_a_cancellation_swallowed_around_a_joined_block_leaves_all_or_nothing(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        async def work(manager: DatabaseSessionManager) -> None:
            with suppress(UnexpectedRollbackError):
                async with manager.transaction() as session:
                    session.add(Note(text="a"))
                    with suppress(asyncio.CancelledError):
                        async with manager.transaction():
                            await session.execute(insert(Note).values(text="b"))

        await self.all_or_nothing(manager, work, again_after)

    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    async def test_a_cancellation_around_requires_new_leaves_each_transaction_whole(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        """The inner transaction is separate, and the outer one commits after it."""

        async def work(manager: DatabaseSessionManager) -> None:
            async with manager.transaction(read_only=database_of(manager).is_sqlite) as outer:
                if not database_of(manager).is_sqlite:
                    await outer.execute(insert(Note).values(text="outer"))
                async with manager.transaction(Propagation.REQUIRES_NEW) as inner:
                    await inner.execute(insert(Note).values(text="inner"))
                assert await outer.scalar(select(1)) == 1

        results = [
            written async for written in cancel_everywhere(manager, work, again_after=again_after)
        ]
        all_of_it = ["inner"] if database_of(manager).is_sqlite else ["inner", "outer"]
        assert [] in results
        assert results[-1] == all_of_it
        assert all(written in ([], ["inner"], all_of_it) for written in results)

    @pytest.mark.several_connections("each of the two blocks has its own")
    async def test_a_cancellation_in_a_read_only_scope_leaves_no_connection_behind(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        async def work(manager: DatabaseSessionManager) -> None:
            async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
                await session.execute(select(Note))
                async with manager.transaction(Propagation.NOT_SUPPORTED, read_only=True) as other:
                    await other.execute(select(Note))
                await session.execute(select(Note))
            async with manager.transaction(read_only=True) as session:
                await session.execute(select(Note))

        results = [
            written async for written in cancel_everywhere(manager, work, again_after=again_after)
        ]
        assert len(results) > 4

    async def test_a_cancellation_runs_the_hooks_that_match_the_outcome(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        """The hooks of a commit run exactly if there was one."""

        async def work(manager: DatabaseSessionManager) -> None:
            ran.clear()
            async with manager.transaction() as session:
                manager.transaction.on_commit(partial(ran.append, "committed"))
                manager.transaction.on_commit(partial(asyncio.sleep, 0))
                manager.transaction.on_commit(partial(ran.append, "and the next"))
                manager.transaction.on_rollback(partial(ran.append, "rolled back"))
                manager.transaction.on_rollback(partial(asyncio.sleep, 0))
                session.add_all([Note(text="a"), Note(text="b")])

        ran: list[str] = []
        async for written in cancel_everywhere(manager, work, again_after=again_after):
            assert ran == (["committed", "and the next"] if written else ["rolled back"])
            assert written in ([], ["a", "b"])

    async def test_a_cancellation_in_an_attempt_or_a_pause_leaves_all_or_nothing(
        self,
        manager: DatabaseSessionManager,
        again_after: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async def attempt() -> None:
            attempts.append(1)
            session = CurrentSession(manager)
            await session.execute(insert(Note).values(text="a"))
            if len(attempts) < 3:
                raise DBAPIError("INSERT", None, OSError("gone"), connection_invalidated=True)
            await session.execute(insert(Note).values(text="b"))

        async def work(manager: DatabaseSessionManager) -> None:
            attempts.clear()
            await manager.transaction.run(attempt, retries=5)

        attempts: list[int] = []
        monkeypatch.setattr("random.uniform", lambda *_: 0)
        await self.all_or_nothing(manager, work, again_after)


class TestCancelledCommit:
    """A commit that is under way is waited for."""

    @pytest.fixture
    def answer(self) -> asyncio.Event:
        """Return the event that the commit waits for."""
        return asyncio.Event()

    @pytest.fixture
    def sent(self, manager: DatabaseSessionManager, answer: asyncio.Event) -> asyncio.Event:
        sent = asyncio.Event()

        def wait(connection: Connection) -> None:
            sent.set()
            await_only(answer.wait())

        event.listen(manager.engine.sync_engine, "commit", wait)
        return sent

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    @pytest.mark.parametrize("times", [1, 3])
    async def test_a_commit_under_way_is_kept_and_the_cancellation_goes_on(
        self,
        manager: DatabaseSessionManager,
        sent: asyncio.Event,
        answer: asyncio.Event,
        kind: str,
        times: int,
    ) -> None:
        async def work() -> None:
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="kept"))

        task = asyncio.create_task(work())
        await sent.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
            assert not task.done()
        answer.set()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert raised.value.__cause__ is None
        assert checked_out(manager) == 0
        assert await notes(manager) == ["kept"]

    async def test_a_timeout_around_a_block_waits_for_a_commit_under_way(
        self, manager: DatabaseSessionManager, sent: asyncio.Event, answer: asyncio.Event
    ) -> None:
        async def pass_the_deadline_then_answer() -> None:
            await sent.wait()
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(0.05)
            answer.set()

        answering = asyncio.create_task(pass_the_deadline_then_answer())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit, manager.transaction() as session:
                session.add(Note(text="kept"))
        await answering
        assert await notes(manager) == ["kept"]


class TestPostgres(OnPostgres):
    @pytest.fixture
    def server(self, postgres: Postgres) -> Postgres:
        return postgres

    async def test_a_cancellation_waits_for_the_servers_answer_to_a_commit(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await run_at_commit(manager, "PERFORM pg_sleep(0.3)")
        task = asyncio.create_task(in_a_transaction(manager))
        await until(lambda: running(server, manager, "COMMIT%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert raised.value.__cause__ is None
        assert await notes(manager) == ["a", "b"]

    async def test_a_cancellation_during_a_refused_commit_has_the_refusal_as_its_cause(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await run_at_commit(manager, "PERFORM pg_sleep(0.3); RAISE integrity_constraint_violation")
        task = asyncio.create_task(in_a_transaction(manager))
        await until(lambda: running(server, manager, "COMMIT%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, IntegrityError)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_a_cancelled_statement_is_also_stopped_in_the_server(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        async def sleep() -> None:
            async with manager.transaction() as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        async def sleeping() -> bool:
            return bool(
                await server.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
                )
            )

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


class TestNetwork(OnFaultyNetwork):
    @pytest.mark.asyncpg_only("psycopg asks for the id before, and gets no answer to that")
    async def test_a_cancellation_during_an_unanswered_commit_is_caused_by_the_unknown_outcome(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        async def work() -> None:
            async with remote.transaction() as opened:
                await opened.execute(insert(Note).values(text="who knows"))
                network.swallows = True

        async def sent() -> bool:
            return b"COMMIT" in network.asked

        task = asyncio.create_task(work())
        await until(sent)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, CommitOutcomeUnknownError)

    async def test_a_timeout_ends_a_statement_that_gets_no_answer(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), remote.transaction() as opened:
                    await opened.execute(insert(Note).values(text="lost"))
                    network.swallows = True
                    await opened.execute(select(1))


async def test_a_cancelled_wait_for_a_connection_leaks_no_place_in_the_pool(
    settings: DatabaseSettings,
) -> None:
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
