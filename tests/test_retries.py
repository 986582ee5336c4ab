"""Retries: only if it is certain that nothing was committed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionManager,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    transactional,
)

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import OnPostgres, kill, run_at_commit, until

Work = Callable[[AsyncSession], Awaitable[object]]


class Clerk:
    """Does a piece of work, and counts how often it was tried."""

    def __init__(self, manager: DatabaseSessionManager, work: Work) -> None:
        self.session = CurrentSession(manager)
        self.transaction = manager.transaction
        self.attempts = 0
        self._work = work

    async def work(self) -> str:
        self.attempts += 1
        assert self.transaction.active
        await self._work(self.session)
        return "done"

    @transactional(retries=3)
    async def work_in_a_transaction(self) -> str:
        return await self.work()


def lost_connection() -> DBAPIError:
    return DBAPIError("SELECT 1", None, OSError("gone"), connection_invalidated=True)


class TestAnyDatabase:
    async def test_run_calls_a_successful_function_once_and_returns_its_result(
        self, manager: DatabaseSessionManager
    ) -> None:
        clerk = Clerk(manager, lambda session: session.execute(insert(Note).values(text="a")))
        assert await manager.transaction.run(clerk.work, retries=3) == "done"
        assert clerk.attempts == 1
        assert await notes(manager) == ["a"]

    async def test_run_passes_arguments_to_the_function_and_options_to_the_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work(first: int, second: str) -> tuple[int, str, object]:
            connection = await CurrentSession(manager).connection()
            return first, second, connection.engine.get_execution_options()["answer"]

        result = await manager.transaction.run(
            work, 1, "b", retries=1, execution_options={"answer": 42}
        )
        assert result == (1, "b", 42)

    @pytest.mark.parametrize("retries", [0, 1, 3])
    async def test_exhausted_retries_raise_the_last_error(
        self, manager: DatabaseSessionManager, retries: int
    ) -> None:
        errors = [lost_connection() for _ in range(retries + 1)]
        given = iter(errors)

        async def fail(_: AsyncSession) -> None:
            raise next(given)

        clerk = Clerk(manager, fail)
        with pytest.raises(DBAPIError) as raised:
            await manager.transaction.run(clerk.work, retries=retries)
        assert raised.value is errors[-1]
        assert clerk.attempts == retries + 1

    @pytest.mark.parametrize(
        "error", [ValueError, TimeoutError, CommitOutcomeUnknownError, KeyboardInterrupt]
    )
    async def test_an_error_of_the_application_is_not_retried(
        self, manager: DatabaseSessionManager, error: type[BaseException]
    ) -> None:
        async def fail(_: AsyncSession) -> None:
            raise error

        clerk = Clerk(manager, fail)
        with pytest.raises(error):
            await clerk.work_in_a_transaction()
        assert clerk.attempts == 1

    async def test_a_violated_constraint_and_a_passed_deadline_are_not_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        clerk = Clerk(
            manager, lambda session: session.execute(insert(Note), [{"text": "a"}, {"text": "a"}])
        )
        with pytest.raises(IntegrityError):
            await clerk.work_in_a_transaction()
        assert clerk.attempts == 1

        clerk = Clerk(manager, lambda _: asyncio.sleep(60))
        with pytest.raises(TransactionTimeoutError):
            await manager.transaction.run(clerk.work, retries=3, timeout=0.02)
        assert clerk.attempts == 1

    async def test_every_attempt_has_a_new_session_without_objects_of_failed_attempts(
        self, manager: DatabaseSessionManager
    ) -> None:
        sessions: list[object] = []

        async def work(session: AsyncSession) -> None:
            assert not session.new
            assert list(await session.scalars(select(Note.text))) == []
            sessions.append(session.sync_session)
            session.add(Note(text="only once"))
            if len(sessions) < 3:
                await session.flush()
                raise lost_connection()

        clerk = Clerk(manager, work)
        await clerk.work_in_a_transaction()
        assert len({id(session) for session in sessions}) == 3
        assert await notes(manager) == ["only once"]

    async def test_hooks_of_retried_attempts_never_run(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        async def work(_: AsyncSession) -> None:
            manager.transaction.on_commit(partial(ran.append, f"{clerk.attempts} committed"))
            manager.transaction.on_rollback(partial(ran.append, f"{clerk.attempts} rolled back"))
            if clerk.attempts < 3:
                raise lost_connection()

        clerk = Clerk(manager, work)
        await clerk.work_in_a_transaction()
        assert ran == ["3 committed"]

        ran.clear()
        clerk.attempts = 0
        with pytest.raises(DBAPIError):
            await manager.transaction.run(clerk.work, retries=1)
        assert ran == ["2 rolled back"]

    async def test_hooks_of_an_attempt_that_ends_in_another_error_run(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        async def work(_: AsyncSession) -> None:
            manager.transaction.on_rollback(partial(ran.append, str(clerk.attempts)))
            raise lost_connection() if clerk.attempts == 1 else ZeroDivisionError

        clerk = Clerk(manager, work)
        with pytest.raises(ZeroDivisionError):
            await clerk.work_in_a_transaction()
        assert ran == ["2"]

    async def test_an_error_of_a_hook_after_the_commit_is_not_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work(session: AsyncSession) -> None:
            session.add(Note(text="kept"))
            manager.transaction.on_commit(fail)

        def fail() -> None:
            raise lost_connection()

        clerk = Clerk(manager, work)
        with pytest.raises(DBAPIError):
            await clerk.work_in_a_transaction()
        assert clerk.attempts == 1
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize("around", ["transaction", "session", "read scope", "savepoint"])
    async def test_run_inside_another_scope_makes_one_attempt(
        self, manager: DatabaseSessionManager, around: str
    ) -> None:
        async def fail(_: AsyncSession) -> None:
            raise lost_connection()

        async def work() -> None:
            propagation = Propagation.NESTED if around == "savepoint" else Propagation.REQUIRED
            await manager.transaction.run(
                clerk.work, retries=3, propagation=propagation, read_only=reads
            )

        reads = around == "read scope"
        scopes: dict[str, Callable[[], Any]] = {
            "transaction": manager.transaction,
            "savepoint": manager.transaction,
            "session": manager.session,
            "read scope": partial(manager.transaction, Propagation.SUPPORTS, read_only=True),
        }
        clerk = Clerk(manager, fail)
        with pytest.raises(DBAPIError):
            async with scopes[around]():
                await work()
        assert clerk.attempts == 1

    async def test_run_in_autocommit_makes_one_attempt(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            attempts.append(1)
            await CurrentSession(manager).execute(
                insert(Note).values(text=f"attempt {len(attempts)}")
            )
            raise lost_connection()

        attempts: list[int] = []
        with pytest.raises(DBAPIError):
            await manager.transaction.run(work, retries=3, propagation=Propagation.SUPPORTS)
        assert await notes(manager) == ["attempt 1"]

    async def test_a_cancellation_in_the_pause_ends_the_retries(
        self, manager: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(_: AsyncSession) -> None:
            raise lost_connection()

        monkeypatch.setattr("random.uniform", lambda *_: 60)
        clerk = Clerk(manager, fail)
        task = asyncio.create_task(clerk.work_in_a_transaction())

        async def tried() -> bool:
            return clerk.attempts == 1 and not checked_out(manager)

        await until(tried)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clerk.attempts == 1

    async def test_a_cancellation_in_an_attempt_is_not_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def wait(session: AsyncSession) -> None:
            await session.execute(select(1))
            started.set()
            await asyncio.sleep(60)

        started = asyncio.Event()
        clerk = Clerk(manager, wait)
        task = asyncio.create_task(clerk.work_in_a_transaction())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clerk.attempts == 1

    async def test_the_pauses_between_attempts_grow_to_a_limit_with_full_jitter(
        self, manager: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ranges: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            ranges.append((low, high))
            return 0

        async def fail(_: AsyncSession) -> None:
            raise lost_connection()

        monkeypatch.setattr("random.uniform", uniform)
        with pytest.raises(DBAPIError):
            await manager.transaction.run(Clerk(manager, fail).work, retries=12)
        lows, highs = zip(*ranges, strict=True)
        assert set(lows) == {0}
        assert len(highs) == 12
        assert list(highs) == sorted(highs)
        assert highs[1] == 2 * highs[0]
        assert 0 < highs[0] < 0.1
        assert highs[-1] == highs[-2] <= 5


class GoneError(Exception):
    """What a service says when something is not there yet."""


class TestErrorsOfOnesOwn:
    """`retry_on=` adds to the errors after which there is another attempt."""

    @staticmethod
    async def attempts(
        manager: DatabaseSessionManager, error: Exception, retry_on: Any, cause: Any = None
    ) -> int:
        """Return how often work was tried that fails twice with this error."""
        tried = 0

        async def work() -> str:
            nonlocal tried
            tried += 1
            if tried < 3:
                raise error from cause
            return "done"

        with suppress(type(error)):
            assert await manager.transaction.run(work, retries=5, retry_on=retry_on) == "done"
        return tried

    @pytest.mark.parametrize(
        ("error", "cause", "retry_on"),
        [
            pytest.param(GoneError(), None, GoneError, id="a type"),
            pytest.param(KeyError("a"), None, (GoneError, LookupError), id="one of several"),
            pytest.param(ValueError(), GoneError(), GoneError, id="a cause"),
            pytest.param(
                ExceptionGroup("all", [ValueError(), GoneError()]), None, GoneError, id="in a group"
            ),
            pytest.param(GoneError("now"), None, lambda error: "now" in str(error), id="by text"),
            pytest.param(lost_connection(), None, GoneError, id="retryable anyway"),
        ],
    )
    async def test_what_is_named_is_retried(
        self, manager: DatabaseSessionManager, error: Exception, cause: Any, retry_on: Any
    ) -> None:
        assert await self.attempts(manager, error, retry_on, cause) == 3

    @pytest.mark.parametrize(
        ("error", "cause", "retry_on"),
        [
            pytest.param(GoneError(), None, KeyError, id="another type"),
            pytest.param(GoneError(), None, (), id="no type"),
            pytest.param(GoneError(), None, lambda _: False, id="denied"),
            pytest.param(ValueError(), GoneError(), lambda e: type(e) is GoneError, id="a cause"),
            pytest.param(
                CommitOutcomeUnknownError("lost"), None, Exception, id="an unknown outcome"
            ),
            pytest.param(GoneError(), CommitOutcomeUnknownError("lost"), GoneError, id="from it"),
            pytest.param(TransactionTimeoutError(), None, lambda _: True, id="a deadline"),
        ],
    )
    async def test_what_is_not_named_or_final_is_not_retried(
        self, manager: DatabaseSessionManager, error: Exception, cause: Any, retry_on: Any
    ) -> None:
        assert await self.attempts(manager, error, retry_on, cause) == 1

    async def test_the_decorator_takes_it_too_and_each_attempt_is_rolled_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Service:
            def __init__(self) -> None:
                self.transaction, self.tried = manager.transaction, 0

            @transactional(retries=2, retry_on=IntegrityError)
            async def write(self) -> None:
                self.tried += 1
                session = CurrentSession(manager)
                await session.execute(insert(Note).values(text="twice"))
                if self.tried < 3:
                    await session.execute(insert(Note).values(text="twice"))

        service = Service()
        await service.write()
        assert (service.tried, await notes(manager)) == (3, ["twice"])
        assert manager.status().retries == {"retry_on": 2}

    async def test_a_swallowed_error_that_is_named_is_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def swallow(session: AsyncSession) -> None:
            await session.execute(insert(Note).values(text="a"))
            with suppress(IntegrityError):
                await session.execute(insert(Note).values(text="a"))

        clerk = Clerk(manager, swallow)
        with pytest.raises(UnexpectedRollbackError):
            await manager.transaction.run(clerk.work, retries=2, retry_on=IntegrityError)
        assert (clerk.attempts, await notes(manager)) == (3, [])

    async def test_a_cancellation_is_not_retried(self, manager: DatabaseSessionManager) -> None:
        asked: list[Exception] = []

        async def work() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await manager.transaction.run(
                work, retries=2, retry_on=lambda error: not asked.append(error)
            )
        assert asked == []

    async def test_an_error_of_the_function_is_noted_and_ends_the_attempts(
        self, manager: DatabaseSessionManager
    ) -> None:
        called: list[str] = []

        async def work() -> None:
            manager.transaction.on_rollback(lambda: called.append("rolled back"))
            raise GoneError

        def decide(_: Exception) -> bool:
            raise ZeroDivisionError("no answer")

        with pytest.raises(GoneError) as raised:
            await manager.transaction.run(work, retries=2, retry_on=decide)
        assert raised.value.__notes__ == ["then retry_on failed: ZeroDivisionError: no answer"]
        assert called == ["rolled back"]

    async def test_inside_another_scope_there_is_one_attempt(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction():
                assert await self.attempts(manager, GoneError(), GoneError) == 1


class TestPostgres(OnPostgres):
    @pytest.fixture
    async def clash(self, manager: DatabaseSessionManager) -> Work:
        """Return work that conflicts with another transaction the first time."""
        async with manager.transaction() as session:
            session.add(Note(text="start"))
        interferences = iter([True])

        async def work(session: AsyncSession) -> None:
            found = await session.scalar(select(Note.text))
            if next(interferences, False):
                async with manager.transaction(
                    Propagation.REQUIRES_NEW, isolation="SERIALIZABLE"
                ) as rival:
                    await rival.execute(update(Note).values(text="rival"))
            await session.execute(update(Note).values(text=f"{found}, work"))

        return work

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_serialization_failure_is_retried(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        clerk = Clerk(manager, clash)
        await manager.transaction.run(clerk.work, isolation="SERIALIZABLE", retries=3)
        assert clerk.attempts == 2
        assert await notes(manager) == ["rival, work"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_serialization_failure_without_retries_is_raised(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        clerk = Clerk(manager, clash)
        with pytest.raises(DBAPIError) as raised:
            await manager.transaction.run(clerk.work, isolation="SERIALIZABLE")
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"
        assert await notes(manager) == ["rival"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_swallowed_serialization_failure_is_retried(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        async def swallow(session: AsyncSession) -> None:
            try:
                await clash(session)
            except DBAPIError:
                swallowed.append(clerk.attempts)

        swallowed: list[int] = []
        clerk = Clerk(manager, swallow)
        await manager.transaction.run(clerk.work, isolation="SERIALIZABLE", retries=3)
        assert (swallowed, clerk.attempts) == ([1], 2)
        assert await notes(manager) == ["rival, work"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_swallowed_failure_after_which_a_statement_failed_is_retried(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        async def go_on_regardless(session: AsyncSession) -> None:
            with suppress(DBAPIError):
                await clash(session)
            await session.execute(select(Note))

        clerk = Clerk(manager, go_on_regardless)
        await manager.transaction.run(clerk.work, isolation="SERIALIZABLE", retries=3)
        assert clerk.attempts == 2
        assert await notes(manager) == ["rival, work"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_swallowed_failure_without_retries_causes_an_unexpected_rollback(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        async def swallow(session: AsyncSession) -> None:
            with pytest.raises(DBAPIError):
                await clash(session)

        with pytest.raises(UnexpectedRollbackError) as raised:
            await manager.transaction.run(Clerk(manager, swallow).work, isolation="SERIALIZABLE")
        assert isinstance(raised.value.__cause__, DBAPIError)

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_serialization_failure_in_a_joined_method_is_retried_by_the_outer_one(
        self, manager: DatabaseSessionManager, clash: Work
    ) -> None:
        async def call_joined(_: AsyncSession) -> None:
            await inner.work_in_a_transaction()

        inner, outer = Clerk(manager, clash), Clerk(manager, call_joined)
        await manager.transaction.run(outer.work, isolation="SERIALIZABLE", retries=3)
        assert (inner.attempts, outer.attempts) == (2, 2)
        assert await notes(manager) == ["rival, work"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_a_serialization_failure_at_the_commit_is_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        """Use write skew: the server finds the conflict when the second one commits."""
        async with manager.transaction() as session:
            session.add_all([Note(text="left"), Note(text="right")])

        async def work(session: AsyncSession) -> None:
            count = await session.scalar(select(func.count()).select_from(Note))
            session.add(Note(text=f"work saw {count}"))
            await session.flush()
            if clerk.attempts == 1:
                async with manager.transaction(
                    Propagation.REQUIRES_NEW, isolation="SERIALIZABLE"
                ) as rival:
                    count = await rival.scalar(select(func.count()).select_from(Note))
                    rival.add(Note(text=f"rival saw {count}"))
            ended_well.append(clerk.attempts)

        ended_well: list[int] = []
        clerk = Clerk(manager, work)
        await manager.transaction.run(clerk.work, isolation="SERIALIZABLE", retries=3)
        assert ended_well == [1, 2]
        assert await notes(manager) == ["left", "right", "rival saw 2", "work saw 3"]

    @pytest.mark.several_connections("two transactions conflict")
    async def test_the_victim_of_a_deadlock_is_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add_all([Note(id=1, text="1"), Note(id=2, text="2")])
        both_hold_one = asyncio.Barrier(2)

        async def add_one(session: AsyncSession, number: int) -> None:
            await session.execute(
                update(Note).values(text=Note.text + "+").where(Note.id == number)
            )

        async def work(first: int, second: int, session: AsyncSession) -> None:
            await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
            await add_one(session, first)
            if clerks[first].attempts == 1:
                await both_hold_one.wait()
            await add_one(session, second)

        clerks = {1: Clerk(manager, partial(work, 1, 2)), 2: Clerk(manager, partial(work, 2, 1))}
        await asyncio.gather(*(clerk.work_in_a_transaction() for clerk in clerks.values()))
        assert sorted(clerk.attempts for clerk in clerks.values()) == [1, 2]
        assert await notes(manager) == ["1++", "2++"]

    @pytest.mark.parametrize(
        "when", ["before a statement", "before the commit", "before the flush"]
    )
    async def test_a_connection_lost_before_the_commit_is_sent_is_retried(
        self, manager: DatabaseSessionManager, postgres: Postgres, when: str
    ) -> None:
        async def work(session: AsyncSession) -> None:
            await session.execute(insert(Note).values(text="a"))
            if clerk.attempts == 1:
                driver = (await (await session.connection()).get_raw_connection()).driver_connection
                assert driver is not None

                async def noticed() -> bool:
                    return bool(driver.is_closed())

                await kill(postgres, manager, "INSERT%")
                await until(noticed)
            if when == "before a statement":
                await session.execute(select(1))
            elif when == "before the flush":
                session.add(Note(text="b"))

        clerk = Clerk(manager, work)
        await clerk.work_in_a_transaction()
        assert clerk.attempts == 2
        assert await notes(manager) == (["a", "b"] if when == "before the flush" else ["a"])

    async def test_a_commit_with_an_unknown_outcome_is_not_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'no idea' USING ERRCODE = '40003'")
        clerk = Clerk(manager, lambda session: session.execute(insert(Note).values(text="a")))
        with pytest.raises(CommitOutcomeUnknownError):
            await clerk.work_in_a_transaction()
        assert clerk.attempts == 1

    async def test_a_serialization_failure_rolled_back_by_a_savepoint_is_not_retried(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work(session: AsyncSession) -> None:
            with pytest.raises(DBAPIError):
                async with manager.transaction(Propagation.NESTED):
                    await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))
            session.add(Note(text="kept"))

        clerk = Clerk(manager, work)
        await clerk.work_in_a_transaction()
        assert clerk.attempts == 1
        assert await notes(manager) == ["kept"]


class TestSQLite:
    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    async def test_a_lock_that_is_not_released_in_time_is_retried(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async def work(session: AsyncSession) -> None:
            if clerk.attempts == 2:
                release.set()
                await holder
            await session.execute(insert(Note).values(text="second"))

        async def hold() -> None:
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="first"))
                held.set()
                await release.wait()

        held, release = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold())
        await held.wait()
        impatient = settings.model_copy(update={"pool": PoolSettings(timeout=0.05)})
        async with DatabaseSessionManager(impatient) as other:
            clerk = Clerk(other, work)
            await clerk.work_in_a_transaction()
        assert clerk.attempts == 2
        assert await notes(manager) == ["first", "second"]

    async def test_a_lock_that_is_never_released_is_the_error_after_all_attempts(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        impatient = settings.model_copy(update={"pool": PoolSettings(timeout=0.02)})
        async with DatabaseSessionManager(impatient) as other, manager.transaction() as session:
            await session.execute(insert(Note).values(text="first"))
            clerk = Clerk(
                other, lambda session: session.execute(insert(Note).values(text="second"))
            )
            with pytest.raises(OperationalError, match="locked"):
                await clerk.work_in_a_transaction()
        assert clerk.attempts == 4
        assert await notes(manager) == ["first"]


async def test_run_and_the_decorator_accept_any_transaction_manager(
    manager: DatabaseSessionManager,
) -> None:
    @transactional(retries=2)
    async def work(transaction: TransactionManager) -> int:
        attempts.append(1)
        if len(attempts) < 3:
            raise lost_connection()
        return len(attempts)

    attempts: list[int] = []
    assert await work(TransactionManager(manager)) == 3
