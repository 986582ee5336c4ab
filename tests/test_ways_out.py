"""Every way out of a block: cancellation at each await, a refused commit, a killed connection, a full pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, delete, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.util import await_only

from sessionwire import (
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
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
from .postgres import Network, OnPostgres, at_commit, kill, running, through, until


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


async def cancel_everywhere(
    manager: DatabaseSessionManager,
    work: Work,
    *,
    again_after: int | None = None,
    warm: bool = True,
) -> AsyncIterator[list[str]]:
    """What was written, for each suspension of the work that it was cancelled at. Nothing may be left behind."""
    tasks = asyncio.all_tasks()
    async for _ in each_cancellation(lambda: work(manager), again_after=again_after):
        assert checked_out(manager) == 0
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != tasks:
                await asyncio.sleep(0)  # a connection that was given up is closed in the background
        yield await notes(manager)
        async with manager.transaction() as session:
            await session.execute(delete(Note))
        if not warm:
            await manager.engine.dispose()


@pytest.mark.parametrize("again_after", [ONCE, TWICE, TWICE_LATER])
@pytest.mark.parametrize("work", WAYS_IN)
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


async def test_a_loop_that_cancels_all_its_tasks_leaves_all_or_nothing_and_no_connection_behind(
    manager: DatabaseSessionManager,
) -> None:
    """As it does when it is shut down: those too in which the library ends what it has begun."""
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

    async def test_in_a_savepoint(
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

    async def test_in_a_joined_block_around_which_the_cancellation_is_swallowed(
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

    async def test_in_a_transaction_of_its_own(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        """The inner one stands for itself; the outer one commits after it."""

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

    async def test_in_a_scope_that_reads(
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

    async def test_with_hooks(
        self, manager: DatabaseSessionManager, again_after: int | None
    ) -> None:
        """They tell the truth: those of a commit run exactly where there was one."""

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

    async def test_in_attempts_and_the_pauses_between_them(
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


class TestRefusedCommit:
    """A deferred constraint is checked by the commit."""

    @pytest.fixture(autouse=True)
    async def parts(self, manager: DatabaseSessionManager) -> None:
        async with manager.connect() as connection:
            await connection.execute(
                text(
                    "CREATE TABLE part (id INTEGER PRIMARY KEY, "
                    "whole INTEGER REFERENCES part (id) DEFERRABLE INITIALLY DEFERRED)"
                )
            )

    @staticmethod
    async def parts_in(manager: DatabaseSessionManager) -> object:
        async with manager.connect() as connection:
            return await connection.scalar(text("SELECT count(*) FROM part"))

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_it_is_the_servers_error_and_nothing_is_kept(
        self, manager: DatabaseSessionManager, kind: str
    ) -> None:
        with pytest.raises(IntegrityError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text("INSERT INTO part VALUES (1, 99)"))
                if kind == "session":
                    await opened.commit()
        assert checked_out(manager) == 0
        assert await self.parts_in(manager) == 0

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    @pytest.mark.parametrize("next_kind", ["transaction", "connect", "session"])
    async def test_the_next_one_on_its_connection_begins_anew(
        self, manager: DatabaseSessionManager, kind: str, next_kind: str
    ) -> None:
        with pytest.raises(IntegrityError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text("INSERT INTO part VALUES (1, 99)"))
                if kind == "session":
                    await opened.commit()
        async with getattr(manager, next_kind)() as opened:
            assert await opened.scalar(text("SELECT count(*) FROM part")) == 0
            await opened.execute(text("INSERT INTO part VALUES (99, NULL)"))
            if next_kind == "session":
                await opened.commit()
        assert await self.parts_in(manager) == 1

    async def test_a_bare_session_goes_on_after_it(self, manager: DatabaseSessionManager) -> None:
        async with manager.session() as session:
            await session.execute(text("INSERT INTO part VALUES (1, 99)"))
            with pytest.raises(IntegrityError):
                await session.commit()
            await session.rollback()
            await session.execute(text("INSERT INTO part VALUES (2, NULL)"))
            await session.commit()
        assert await self.parts_in(manager) == 1

    async def test_so_it_does_after_a_transaction_in_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            with pytest.raises(IntegrityError):
                async with manager.transaction():
                    await session.execute(text("INSERT INTO part VALUES (1, 99)"))
            async with manager.transaction():
                await session.execute(text("INSERT INTO part VALUES (2, NULL)"))
        assert await self.parts_in(manager) == 1

    async def test_its_hooks_are_those_of_a_rollback(self, manager: DatabaseSessionManager) -> None:
        ran: list[str] = []
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                manager.transaction.on_commit(partial(ran.append, "committed"))
                manager.transaction.on_rollback(partial(ran.append, "rolled back"))
                await session.execute(text("INSERT INTO part VALUES (1, 99)"))
        assert ran == ["rolled back"]


class TestCancelledCommit:
    """A commit that is under way is waited for."""

    @pytest.fixture
    def answer(self) -> asyncio.Event:
        """What the commit waits for."""
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
    async def test_it_is_kept_and_the_cancellation_goes_on(
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

    async def test_a_timeout_around_it_waits_for_it_too(
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
    """What only a server can do to a client."""

    @pytest.fixture
    def server(self, postgres: Postgres) -> Postgres:
        return postgres

    @pytest.mark.parametrize("kind", ["session", "transaction", "connect"])
    async def test_a_connection_that_is_killed_in_a_block_is_an_error_and_is_replaced(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                await kill(server, manager)
                await opened.execute(select(1))
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_one_that_is_killed_before_the_commit_is_an_error_whose_outcome_is_known(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                connection = opened if kind == "connect" else await opened.connection()
                driver = (await connection.get_raw_connection()).driver_connection

                async def noticed() -> bool:
                    return bool(driver.is_closed())

                await kill(server, manager, "INSERT%")
                await until(noticed)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_one_that_is_killed_in_the_commit_is_an_outcome_unknown(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        async def work() -> None:
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))

        await at_commit(manager, "PERFORM pg_sleep(60)")
        task = asyncio.create_task(work())
        await until(lambda: running(server, manager, "COMMIT%"))
        await kill(server, manager, "COMMIT%")
        with pytest.raises(CommitOutcomeUnknownError, match="look in the database"):
            await task
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_one_that_is_killed_after_the_commit_is_nobodys_error(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            manager.transaction.on_commit(lambda: kill(server, manager))
        assert await notes(manager) == ["kept"]

    async def test_a_serialization_failure_in_the_commit_is_the_servers_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def count(session: CurrentSession) -> int | None:
            return await session.scalar(select(func.count()).select_from(Note))

        session = CurrentSession(manager)
        ran: list[str] = []
        with pytest.raises(DBAPIError) as raised:
            async with manager.transaction(isolation="SERIALIZABLE"):
                manager.transaction.on_rollback(partial(ran.append, "rolled back"))
                session.add(Note(text=f"outer saw {await count(session)}"))
                await session.flush()
                async with manager.transaction(Propagation.REQUIRES_NEW, isolation="SERIALIZABLE"):
                    session.add(Note(text=f"inner saw {await count(session)}"))
                ran.append("ended well")
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"
        assert ran == ["ended well", "rolled back"]
        assert await notes(manager) == ["inner saw 0"]

    async def test_a_cancellation_while_the_server_commits_waits_for_its_answer(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await at_commit(manager, "PERFORM pg_sleep(0.3)")
        task = asyncio.create_task(in_a_transaction(manager))
        await until(lambda: running(server, manager, "COMMIT%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert raised.value.__cause__ is None
        assert await notes(manager) == ["a", "b"]

    async def test_a_cancellation_while_the_server_refuses_the_commit_has_that_as_its_cause(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await at_commit(manager, "PERFORM pg_sleep(0.3); RAISE integrity_constraint_violation")
        task = asyncio.create_task(in_a_transaction(manager))
        await until(lambda: running(server, manager, "COMMIT%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, IntegrityError)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_the_error_of_the_block_is_raised_and_that_of_its_rollback_is_noted(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        with pytest.raises(ValueError, match="mine") as raised:
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                await kill(server, manager)
                raise ValueError("mine")
        assert "the rollback failed" in raised.value.__notes__[0]
        assert checked_out(manager) == 0

    async def test_an_idle_connection_that_was_killed_is_replaced_unseen(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await notes(manager)
        await kill(server, manager)
        assert await notes(manager) == []

    async def test_a_task_that_never_stops_using_the_session_costs_the_connection_and_no_more(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async with DatabaseSessionManager(
            settings.model_copy(update={"rollback_timeout": 0.2})
        ) as hasty:
            with pytest.raises(ConcurrentSessionError):
                async with hasty.transaction() as session:
                    session.add(Note(text="lost"))
                    await session.flush()
                    sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(60)")))
                    await asyncio.sleep(0.05)
            with pytest.raises(DBAPIError):
                await sleeping
            assert checked_out(hasty) == 0
        assert await notes(manager) == []

    async def test_a_cancelled_statement_is_ended_in_the_server_too(
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


class TestNetwork(OnPostgres):
    """A network that swallows all that is sent, or cuts the connection."""

    @pytest.fixture
    def network(self) -> Network:
        return Network()

    @pytest.fixture
    async def remote(
        self,
        network: Network,
        database_url: str,
        postgres: Postgres,
        manager: DatabaseSessionManager,
    ) -> AsyncIterator[DatabaseSessionManager]:
        """A manager that reaches the database through it."""
        async with through(
            network, postgres, database_url, commit_timeout=0.2, rollback_timeout=0.2
        ) as remote:
            yield remote
            assert checked_out(remote) == 0

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_without_an_answer_is_an_outcome_unknown(
        self, remote: DatabaseSessionManager, network: Network, kind: str
    ) -> None:
        with pytest.raises(CommitOutcomeUnknownError, match="look in the database"):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="who knows"))
                network.swallows = True

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_it_is_where_the_commit_was_carried_out_and_the_answer_was_lost(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: Network,
        kind: str,
    ) -> None:
        network.cuts_answer_to = b"COMMIT"
        with pytest.raises(CommitOutcomeUnknownError):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="kept, as it happens"))
        assert await notes(manager) == ["kept, as it happens"]

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_it_is_where_the_commit_was_lost_on_its_way(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: Network,
        kind: str,
    ) -> None:
        network.cuts_at = b"COMMIT"
        with pytest.raises(CommitOutcomeUnknownError):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost, as it happens"))
        assert await notes(manager) == []

    async def test_a_statement_that_was_lost_on_its_way_is_not(
        self, manager: DatabaseSessionManager, remote: DatabaseSessionManager, network: Network
    ) -> None:
        network.cuts_at = b"INSERT"
        with pytest.raises(DBAPIError):
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
        assert await notes(manager) == []

    async def test_nor_is_a_flush_at_the_end_of_the_block(
        self, manager: DatabaseSessionManager, remote: DatabaseSessionManager, network: Network
    ) -> None:
        network.cuts_at = b"INSERT"
        with pytest.raises(DBAPIError):
            async with remote.transaction() as session:
                session.add(Note(text="lost"))
        assert await notes(manager) == []

    async def test_a_cancellation_of_an_unanswered_commit_goes_on_and_has_the_unknown_outcome_as_its_cause(
        self, remote: DatabaseSessionManager, network: Network
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

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_a_rollback_without_an_answer_costs_the_connection_and_no_more_time_than_allowed(
        self, remote: DatabaseSessionManager, network: Network, kind: str
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(ValueError, match="mine"):
                async with getattr(remote, kind)() as opened:
                    await opened.execute(insert(Note).values(text="lost"))
                    network.swallows = True
                    raise ValueError("mine")

    async def test_a_savepoint_whose_rollback_has_no_answer_takes_the_transaction_with_it(
        self, manager: DatabaseSessionManager, remote: DatabaseSessionManager, network: Network
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(UnexpectedRollbackError):
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="lost"))
                    with pytest.raises(ValueError, match="mine"):
                        async with remote.transaction(Propagation.NESTED):
                            await session.execute(insert(Note).values(text="lost too"))
                            network.swallows = True
                            raise ValueError("mine")
                    network.swallows = False
        assert await notes(manager) == []

    async def test_a_statement_without_an_answer_can_be_cancelled_in_time(
        self, remote: DatabaseSessionManager, network: Network
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), remote.transaction() as opened:
                    await opened.execute(insert(Note).values(text="lost"))
                    network.swallows = True
                    await opened.execute(select(1))


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


async def test_a_cancelled_wait_for_a_connection_leaves_the_pool_whole(
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


class TestSQLiteLock:
    """One writer excludes another."""

    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    async def test_a_writer_waits_for_the_one_before_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def write(name: str) -> None:
            async with manager.transaction() as session:
                await session.execute(select(Note))
                await asyncio.sleep(0.01)
                session.add(Note(text=name))

        await asyncio.gather(*(write(str(number)) for number in range(5)))
        assert len(await notes(manager)) == 5

    async def test_a_wait_that_is_cancelled_ends_at_once(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            waiting = asyncio.create_task(manager.transaction.detached(in_a_connection(manager)))
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

    async def test_a_cancelled_statement_does_not_keep_the_lock(
        self, manager: DatabaseSessionManager
    ) -> None:
        count = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        )

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
        assert (
            kept.value.__traceback__ is not None
        )  # what it refers to must not hold the lock either
        assert await notes(manager) == ["a", "b"]
