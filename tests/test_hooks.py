"""Hooks: called after a commit, after a rollback, and when a transaction begins."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from functools import partial

import pytest
from sqlalchemy import event, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    NoSessionError,
    Propagation,
    TransactionManager,
    TransactionRequiredError,
    UnexpectedRollbackError,
    read_only,
)
from sessionwire._database.runtime import database_of

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import OnPostgres, kill, run_at_commit, running, until


class Diary:
    """What was called, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def note(self, entry: str) -> None:
        self.entries.append(entry)

    async def note_later(self, entry: str) -> None:
        await asyncio.sleep(0)
        self.entries.append(entry)

    def register(self, transaction: TransactionManager, name: str) -> None:
        """Register hooks of both kinds, sync and async."""
        transaction.on_commit(partial(self.note, f"{name} committed"))
        transaction.on_rollback(partial(self.note_later, f"{name} rolled back"))


@pytest.fixture
def diary() -> Diary:
    return Diary()


class TestAfterTheEnd:
    async def test_on_commit_hooks_run_after_the_commit_in_the_order_given(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def look() -> None:
            diary.note(f"saw {await notes(manager)}")

        async with manager.transaction() as session:
            manager.transaction.on_commit(partial(diary.note, "first"))
            manager.transaction.on_commit(partial(diary.note_later, "second"))
            manager.transaction.on_rollback(partial(diary.note, "never"))
            manager.transaction.on_commit(look)
            manager.transaction.on_commit(lambda: diary.note_later("fourth"))
            session.add(Note(text="a"))
            assert diary.entries == []
        assert diary.entries == ["first", "second", "saw ['a']", "fourth"]

    async def test_on_rollback_hooks_run_after_the_rollback_in_the_order_given(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def look() -> None:
            diary.note(f"saw {await notes(manager)}")

        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                manager.transaction.on_rollback(partial(diary.note, "first"))
                manager.transaction.on_commit(partial(diary.note, "never"))
                manager.transaction.on_rollback(partial(diary.note_later, "second"))
                manager.transaction.on_rollback(look)
                session.add(Note(text="a"))
                await session.flush()
                raise ZeroDivisionError
        assert diary.entries == ["first", "second", "saw []"]

    async def test_a_block_that_sent_nothing_runs_its_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction():
            diary.register(manager.transaction, "empty")
        assert diary.entries == ["empty committed"]

    async def test_a_block_that_cannot_commit_runs_its_on_rollback_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                diary.register(manager.transaction, "failed flush")
                session.add_all([Note(text="twice"), Note(text="twice")])
        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction() as session:
                diary.register(manager.transaction, "swallowed failure")
                with pytest.raises(IntegrityError):
                    await session.execute(insert(Note), [{"text": "twice"}, {"text": "twice"}])
        assert diary.entries == ["failed flush rolled back", "swallowed failure rolled back"]

    async def test_set_rollback_only_runs_the_on_rollback_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction():
            diary.register(manager.transaction, "it")
            manager.transaction.set_rollback_only()
        assert diary.entries == ["it rolled back"]

    async def test_hooks_of_a_joined_block_run_at_the_end_of_the_outermost_block(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction():
            async with manager.transaction():
                diary.register(manager.transaction, "joined")
            assert diary.entries == []
            diary.register(manager.transaction, "outer")
        assert diary.entries == ["joined committed", "outer committed"]

    async def test_hooks_of_a_transaction_in_a_session_run_at_the_end_of_the_transaction(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.session() as session:
            async with manager.transaction():
                diary.register(manager.transaction, "inside")
                manager.transaction.on_commit(
                    lambda: diary.note(f"active: {manager.transaction.active}")
                )
                session.add(Note(text="a"))
            assert diary.entries == ["inside committed", "active: False"]
            with pytest.raises(ZeroDivisionError):
                async with manager.transaction():
                    diary.register(manager.transaction, "again")
                    raise ZeroDivisionError
            assert diary.entries[2:] == ["again rolled back"]
            await session.rollback()
        assert len(diary.entries) == 3

    async def test_hooks_run_in_the_task_and_context_of_the_caller(
        self, manager: DatabaseSessionManager
    ) -> None:
        seen: ContextVar[object] = ContextVar("seen")

        async def look() -> None:
            seen.set(asyncio.current_task())

        async with manager.transaction() as session:
            session.add(Note(text="a"))
            manager.transaction.on_commit(look)
        assert seen.get() is asyncio.current_task()

    async def test_hooks_do_not_find_the_scope_that_has_ended(
        self, manager: DatabaseSessionManager
    ) -> None:
        refused: list[str] = []

        def look() -> None:
            assert not manager.transaction.active
            for ended in (session, CurrentSession(manager)):
                with pytest.raises(NoSessionError) as raised:
                    ended.add(
                        Note(text="late")
                    ) if ended is not session else ended.sync_session.connection()
                refused.append(str(raised.value))

        async with manager.transaction() as session:
            manager.transaction.on_commit(look)
        assert len(refused) == 2
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                manager.transaction.on_rollback(look)
                raise ZeroDivisionError
        assert len(refused) == 4


class TestSavepoints:
    async def test_the_on_commit_hook_of_a_kept_savepoint_runs_at_the_outermost_end(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction():
            async with manager.transaction(Propagation.NESTED):
                diary.register(manager.transaction, "savepoint")
            assert diary.entries == []
        assert diary.entries == ["savepoint committed"]

    async def test_a_rolled_back_savepoint_runs_only_on_rollback_at_the_outermost_end(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction():
            diary.register(manager.transaction, "before")
            with pytest.raises(ZeroDivisionError):
                async with manager.transaction(Propagation.NESTED):
                    diary.register(manager.transaction, "savepoint")
                    async with manager.transaction(Propagation.NESTED):
                        diary.register(manager.transaction, "kept within it")
                    async with manager.transaction():
                        diary.register(manager.transaction, "joined to it")
                    raise ZeroDivisionError
            assert diary.entries == []
            diary.register(manager.transaction, "after")
        assert diary.entries == [
            "before committed",
            "savepoint rolled back",
            "kept within it rolled back",
            "joined to it rolled back",
            "after committed",
        ]

    async def test_set_rollback_only_in_a_savepoint_runs_its_on_rollback_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async with manager.transaction(), manager.transaction(Propagation.NESTED):
            diary.register(manager.transaction, "savepoint")
            manager.transaction.set_rollback_only()
        assert diary.entries == ["savepoint rolled back"]

    async def test_a_rollback_of_the_transaction_includes_a_kept_savepoint(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction():
                async with manager.transaction(Propagation.NESTED):
                    diary.register(manager.transaction, "savepoint")
                raise ZeroDivisionError
        assert diary.entries == ["savepoint rolled back"]


class TestTransactionsOfTheirOwn:
    async def test_hooks_of_requires_new_run_at_its_own_end(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        reads = database_of(manager).is_sqlite  # One writer excludes another there.
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction():
                diary.register(manager.transaction, "outer")
                async with manager.transaction(Propagation.REQUIRES_NEW, read_only=reads):
                    diary.register(manager.transaction, "new")
                assert diary.entries == ["new committed"]
                with pytest.raises(KeyError):
                    async with manager.transaction(Propagation.REQUIRES_NEW, read_only=reads):
                        diary.register(manager.transaction, "newer")
                        raise KeyError
                assert diary.entries == ["new committed", "newer rolled back"]
                diary.register(manager.transaction, "outer again")
                raise ZeroDivisionError
        assert diary.entries[2:] == ["outer rolled back", "outer again rolled back"]

    async def test_a_hook_of_requires_new_runs_in_the_outer_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as outer:
            async with manager.transaction(Propagation.REQUIRES_NEW, read_only=True):
                manager.transaction.on_commit(
                    lambda: CurrentSession(manager).add(Note(text="from the hook"))
                )
            assert len(outer.new) == 1
        assert await notes(manager) == ["from the hook"]

    @pytest.mark.parametrize("end", ["on_commit", "on_rollback"])
    async def test_a_hook_can_open_a_transaction_with_its_own_hooks(
        self, manager: DatabaseSessionManager, diary: Diary, end: str
    ) -> None:
        async def follow_up() -> None:
            async with manager.transaction() as session:
                diary.register(manager.transaction, "follow-up")
                session.add(Note(text="follow-up"))
            diary.note("hook done")

        async with manager.transaction() as session:
            session.add(Note(text="it"))
            getattr(manager.transaction, end)(follow_up)
            getattr(manager.transaction, end)(partial(diary.note, "next"))
            if end == "on_rollback":
                manager.transaction.set_rollback_only()
        assert diary.entries == ["follow-up committed", "hook done", "next"]
        assert await notes(manager) == (
            ["follow-up", "it"] if end == "on_commit" else ["follow-up"]
        )

    async def test_a_hook_registered_in_a_hook_finds_no_transaction(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        def register() -> None:
            manager.transaction.on_commit(partial(diary.note, "at once"))
            manager.transaction.on_rollback(partial(diary.note, "never"))
            with pytest.raises(TransactionRequiredError):
                manager.transaction.on_commit(partial(diary.note_later, "refused"))
            diary.note("registered")

        async with manager.transaction():
            manager.transaction.on_commit(register)
            manager.transaction.on_commit(partial(diary.note, "next"))
        assert diary.entries == ["at once", "registered", "next"]


class TestWithoutATransaction:
    async def test_a_sync_on_commit_hook_without_a_transaction_runs_at_once(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        diary.register(manager.transaction, "nothing open")
        async with manager.transaction(Propagation.SUPPORTS):
            diary.register(manager.transaction, "supports")
        async with manager.transaction(), manager.transaction(Propagation.NOT_SUPPORTED):
            diary.register(manager.transaction, "not supported")
            assert len(diary.entries) == 3
        assert diary.entries == [
            f"{name} committed" for name in ("nothing open", "supports", "not supported")
        ]

    async def test_an_error_of_a_hook_without_a_transaction_reaches_the_caller(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            manager.transaction.on_commit(lambda: 1 / 0)

    async def test_an_async_on_commit_hook_without_a_transaction_is_refused(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        class Send:
            async def __call__(self) -> None:
                diary.note("never")

        for hook in (partial(diary.note_later, "never"), lambda: diary.note_later("never"), Send()):
            with pytest.raises(TransactionRequiredError, match="await it"):
                manager.transaction.on_commit(hook)
        assert diary.entries == []


class TestErrors:
    async def test_a_hook_that_raises_rolls_nothing_back_and_stops_no_other_hook(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def fail() -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError("the first")

        def fail_too() -> None:
            raise KeyError("the second")

        with pytest.raises(ZeroDivisionError, match="the first") as raised:
            async with manager.transaction() as session:
                session.add(Note(text="kept"))
                manager.transaction.on_commit(fail)
                manager.transaction.on_commit(partial(diary.note, "after the first"))
                manager.transaction.on_commit(fail_too)
                manager.transaction.on_commit(partial(diary.note_later, "after the second"))
        assert diary.entries == ["after the first", "after the second"]
        assert len(raised.value.__notes__) == 1
        assert "KeyError: 'the second'" in raised.value.__notes__[0]
        assert await notes(manager) == ["kept"]
        assert checked_out(manager) == 0

    async def test_errors_of_hooks_are_notes_on_the_error_of_the_block(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        def fail(why: str) -> None:
            raise KeyError(why)

        with pytest.raises(ValueError, match="mine") as raised:
            async with manager.transaction():
                manager.transaction.on_rollback(partial(fail, "first"))
                manager.transaction.on_rollback(partial(fail, "second"))
                manager.transaction.on_rollback(partial(diary.note, "still called"))
                raise ValueError("mine")
        assert ["first" in raised.value.__notes__[0], "second" in raised.value.__notes__[1]] == [
            True,
            True,
        ]
        assert diary.entries == ["still called"]

    async def test_a_system_exit_in_a_hook_is_not_hidden_by_an_earlier_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        def leave() -> None:
            raise SystemExit(3)

        with pytest.raises(SystemExit) as raised:
            async with manager.transaction():
                manager.transaction.on_commit(lambda: 1 / 0)
                manager.transaction.on_commit(leave)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)

    async def test_an_error_of_a_hook_does_not_roll_the_outer_transaction_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            with pytest.raises(ZeroDivisionError):
                async with manager.transaction():
                    session.add(Note(text="kept"))
                    manager.transaction.on_commit(lambda: 1 / 0)
            async with manager.transaction():
                session.add(Note(text="next"))
        assert await notes(manager) == ["kept", "next"]


class TestCancellation:
    async def test_a_cancelled_block_runs_its_on_rollback_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def work() -> None:
            async with manager.transaction() as session:
                diary.register(manager.transaction, "it")
                await session.execute(insert(Note).values(text="lost"))
                started.set()
                await asyncio.sleep(60)

        started = asyncio.Event()
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert diary.entries == ["it rolled back"]

    async def test_a_cancellation_during_a_commit_lets_the_on_commit_hooks_run(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def work() -> None:
            async with manager.transaction() as session:
                diary.register(manager.transaction, "it")
                manager.transaction.on_commit(partial(diary.note_later, "and waited for"))
                session.add(Note(text="kept"))
            diary.note("never")

        task = asyncio.create_task(work())
        event.listen(manager.engine.sync_engine, "commit", lambda _: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert diary.entries == ["it committed", "and waited for"]
        assert await notes(manager) == ["kept"]

    async def test_a_cancelled_hook_stops_no_other_and_the_cancellation_goes_on(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        async def wait() -> None:
            waiting.set()
            await asyncio.sleep(60)

        async def work() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="kept"))
                manager.transaction.on_commit(wait)
                manager.transaction.on_commit(partial(diary.note_later, "still called"))

        waiting = asyncio.Event()
        task = asyncio.create_task(work())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert diary.entries == ["still called"]
        assert await notes(manager) == ["kept"]

    async def test_a_cancellation_in_a_hook_is_not_hidden_by_the_error_of_the_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def wait() -> None:
            waiting.set()
            await asyncio.sleep(60)

        async def work() -> None:
            async with manager.transaction():
                manager.transaction.on_rollback(wait)
                raise ValueError("mine")

        waiting = asyncio.Event()
        task = asyncio.create_task(work())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, ValueError)


class TestRobust:
    """`on_commit(function, robust=True)`: its failure is logged and not raised."""

    @staticmethod
    def fail() -> None:
        raise ZeroDivisionError("sync")

    @staticmethod
    async def fail_later() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError("async")

    @pytest.mark.parametrize("hook", [fail, fail_later, partial(fail)], ids=["s", "a", "p"])
    async def test_its_failure_is_logged_and_the_others_go_on(
        self,
        manager: DatabaseSessionManager,
        diary: Diary,
        caplog: pytest.LogCaptureFixture,
        hook: Callable[[], object],
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="a"))
            manager.transaction.on_commit(hook, robust=True)
            manager.transaction.on_commit(partial(diary.note_later, "next"))
        assert diary.entries == ["next"]
        assert await notes(manager) == ["a"]
        (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
        assert record.name == "sessionwire.hooks"
        assert record.getMessage().startswith("the on_commit hook fail")
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], ZeroDivisionError)

    async def test_one_that_succeeds_is_called_and_awaited(
        self, manager: DatabaseSessionManager, diary: Diary, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with manager.transaction():
            manager.transaction.on_commit(partial(diary.note, "sync"), robust=True)
            manager.transaction.on_commit(partial(diary.note_later, "async"), robust=True)
        assert diary.entries == ["sync", "async"]
        assert caplog.records == []

    async def test_in_a_session_and_without_a_transaction_it_is_logged_too(
        self, manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with manager.session() as session:
            manager.transaction.on_commit(self.fail_later, robust=True)
            await session.commit()
        manager.transaction.on_commit(self.fail, robust=True)
        with pytest.raises(TransactionRequiredError):
            manager.transaction.on_commit(self.fail_later, robust=True)
        said = [record.getMessage() for record in caplog.records]
        assert said == ["the on_commit hook fail_later failed", "the on_commit hook fail failed"]

    async def test_a_cancellation_in_it_goes_on(self, manager: DatabaseSessionManager) -> None:
        async def be_cancelled() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            async with manager.transaction():
                manager.transaction.on_commit(be_cancelled, robust=True)


class TestUnknownOutcome(OnPostgres):
    async def test_a_commit_with_an_unknown_outcome_runs_no_hooks(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'no idea' USING ERRCODE = '40003'")
        with pytest.raises(CommitOutcomeUnknownError):
            async with manager.transaction() as session:
                diary.register(manager.transaction, "who knows")
                session.add(Note(text="a"))
        assert diary.entries == []

    @pytest.mark.pipeline_only("the id is asked for by the pipeline")
    async def test_a_commit_that_was_looked_up_as_not_committed_runs_the_on_rollback_hooks(
        self, manager: DatabaseSessionManager, postgres: Postgres, diary: Diary
    ) -> None:
        async def work() -> None:
            async with manager.transaction() as session:
                diary.register(manager.transaction, "lost")
                session.add(Note(text="a"))

        await run_at_commit(manager, "PERFORM pg_sleep(60)")
        task = asyncio.create_task(work())
        await until(lambda: running(postgres, manager, "COMMIT%"))
        await kill(postgres, manager, "COMMIT%")
        with pytest.raises(DBAPIError, match="not committed"):
            await task
        assert diary.entries == ["lost rolled back"]


class TestOnBegin:
    async def test_a_sync_on_begin_hook_can_send_statements_in_every_kind_of_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        def look(connection: AsyncConnection) -> None:
            found.append(connection.sync_connection.scalar(select(1)))

        found: list[int | None] = []
        manager.transaction.on_begin(look)
        async with manager.transaction() as session:
            await session.execute(select(1))
        async with manager.session() as session:
            await session.execute(select(1))
        async with manager.connect():
            pass
        assert found == [1, 1, 1]

    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    async def test_an_on_begin_hook_runs_for_every_transaction_and_no_savepoint(
        self, manager: DatabaseSessionManager, is_async: bool
    ) -> None:
        begun: list[AsyncConnection] = []

        async def look(connection: AsyncConnection) -> None:
            assert await connection.scalar(text("SELECT 1")) == 1
            begun.append(connection)

        manager.transaction.on_begin(look if is_async else begun.append)
        async with manager.transaction() as session:
            assert begun == []  # It has not begun in the database either.
            session.add(Note(text="a"))
            await session.flush()
            assert len(begun) == 1
            async with manager.transaction(Propagation.NESTED):
                session.add(Note(text="b"))
            async with manager.transaction():
                await session.execute(select(1))
            assert len(begun) == 1
            async with manager.transaction(Propagation.REQUIRES_NEW, read_only=True) as other:
                await other.execute(select(1))
            assert len(begun) == 2
        async with manager.session() as session:
            await session.execute(select(1))
            await session.commit()
            await session.execute(select(1))
            assert len(begun) == 4
        async with manager.connect() as connection:
            assert len(begun) == 5
            assert begun[4].sync_connection is connection.sync_connection

    async def test_an_on_begin_hook_runs_again_for_every_attempt(
        self, manager: DatabaseSessionManager
    ) -> None:
        begun: list[AsyncConnection] = []
        attempts = 0
        manager.transaction.on_begin(begun.append)

        async def work() -> None:
            nonlocal attempts
            attempts += 1
            await CurrentSession(manager).execute(select(1))
            if attempts < 3:
                raise DBAPIError("SELECT", None, OSError(), connection_invalidated=True)

        await manager.transaction.run(work, retries=5)
        assert (attempts, len(begun)) == (3, 3)

    async def test_on_begin_hooks_run_in_order_on_the_connection_of_the_transaction(
        self, manager: DatabaseSessionManager, diary: Diary
    ) -> None:
        @manager.transaction.on_begin
        async def first(connection: AsyncConnection) -> None:
            diary.note("first")
            await connection.execute(insert(Note).values(text="from on_begin"))

        manager.transaction.on_begin(lambda _: diary.note("second"))
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                assert list(await session.scalars(select(Note.text))) == ["from on_begin"]
                raise ZeroDivisionError
        assert diary.entries == ["first", "second"]
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == []

    async def test_an_on_begin_hook_makes_reads_run_in_a_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Reader:
            transaction = manager.transaction

            @read_only
            async def count(self) -> int:
                session = CurrentSession(manager)
                await session.execute(select(Note))
                assert len(begun) == 1
                return len((await session.scalars(select(Note))).all())

        begun: list[AsyncConnection] = []
        manager.transaction.on_begin(begun.append)
        assert await Reader().count() == 0
        assert len(begun) == 1

    async def test_an_on_begin_hook_that_fails_stops_every_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        @manager.transaction.on_begin
        async def fail(connection: AsyncConnection) -> None:
            await connection.execute(text("SELECT 1"))
            raise PermissionError("no tenant")

        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction() as session:
                with pytest.raises(PermissionError):
                    await session.execute(insert(Note).values(text="a"))
                with pytest.raises(Exception, match="rolled back"):
                    await session.execute(insert(Note).values(text="b"))
        with pytest.raises(PermissionError, match="no tenant"):
            async with manager.transaction() as session:
                session.add(Note(text="c"))
        with pytest.raises(PermissionError, match="no tenant"):
            async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
                await session.execute(select(Note))
        with pytest.raises(PermissionError, match="no tenant"):
            async with manager.session() as session:
                session.add(Note(text="d"))
                await session.commit()
        with pytest.raises(PermissionError, match="no tenant"):
            async with manager.connect():
                raise AssertionError("never")
        assert checked_out(manager) == 0
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == []

    async def test_a_session_is_usable_after_the_rollback_of_a_failed_on_begin_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        failures = [PermissionError("not yet")]

        @manager.transaction.on_begin
        def fail(_: AsyncConnection) -> None:
            if failures:
                raise failures.pop()

        async with manager.session() as session:
            with pytest.raises(PermissionError):
                await session.execute(select(1))
            await session.rollback()
            assert await session.scalar(select(1)) == 1


class TestRowLevelSecurity(OnPostgres):
    """`SET LOCAL` in on_begin, a policy in the database, and a role subject to it."""

    @pytest.fixture
    async def role(self, manager: DatabaseSessionManager, postgres: Postgres) -> AsyncIterator[str]:
        role = f"clerk_{uuid.uuid4().hex}"
        async with manager.connect() as connection:
            for sql in (
                f"CREATE ROLE {role} LOGIN",
                f"GRANT SELECT, INSERT, UPDATE ON note TO {role}",
                f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}",
                "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY tenant ON note "
                "USING (text LIKE current_setting('app.tenant') || ':%')",
            ):
                await connection.execute(text(sql))
        yield role
        async with manager.connect() as connection:
            await connection.execute(text(f"DROP OWNED BY {role}"))
        await postgres.execute(f"DROP ROLE {role}")

    async def test_row_level_security_separates_tenants_in_every_kind_of_block(
        self, manager: DatabaseSessionManager, database_url: str, role: str
    ) -> None:
        tenant: ContextVar[str] = ContextVar("tenant")

        async def set_tenant(connection: AsyncConnection) -> None:
            await connection.execute(
                text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant.get()}
            )

        async def serve(name: str) -> list[list[str]]:
            tenant.set(name)
            query = select(Note.text).order_by(Note.text)
            seen: list[list[str]] = []
            async with shop.transaction() as session:
                session.add_all([Note(text=f"{name}:1"), Note(text=f"{name}:2")])
            async with shop.transaction(read_only=True) as session:
                seen.append(list(await session.scalars(query)))
            async with shop.transaction(Propagation.SUPPORTS, read_only=True) as session:
                seen.append(list(await session.scalars(query)))
            async with shop.session() as session:
                seen.append(list(await session.scalars(query)))
            async with shop.connect() as connection:
                seen.append(list(await connection.scalars(query)))
            with pytest.raises(DBAPIError, match="row-level security"):
                async with shop.transaction() as session:
                    session.add(Note(text="somebody else's:1"))
            return seen

        url = make_url(database_url).set(username=role)
        async with DatabaseSessionManager(DatabaseSettings(url=url.render_as_string())) as shop:
            shop.transaction.on_begin(set_tenant)
            red, blue = await asyncio.gather(serve("red"), serve("blue"))
            assert red == [["red:1", "red:2"]] * 4
            assert blue == [["blue:1", "blue:2"]] * 4
            with pytest.raises(LookupError):  # nobody's: nothing is let through
                async with shop.transaction() as session:
                    await session.execute(select(Note))
        assert await notes(manager) == ["blue:1", "blue:2", "red:1", "red:2"]
