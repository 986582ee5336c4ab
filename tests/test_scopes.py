"""Scopes: which session is the current one, for whom, and until when."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, Session

from sessionwire import (
    ConcurrentSessionError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    NoSessionError,
    ScopeOwnsTransactionError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
)

from .conftest import checked_out, notes
from .models import Note


@pytest.fixture
def current(manager: DatabaseSessionManager) -> CurrentSession:
    return CurrentSession(manager)


class TestCurrentSession:
    async def test_a_current_session_is_an_async_session_and_holds_none(
        self, current: CurrentSession
    ) -> None:
        assert isinstance(current, AsyncSession)
        with pytest.raises(
            NoSessionError, match=r"wrap the call in transaction\(\), @transactional or session\(\)"
        ):
            await current.execute(select(1))

    async def test_a_current_session_behaves_as_the_session_of_the_scope(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        async with manager.session() as session:
            note = Note(text="one")
            current.add(note)
            assert note in current
            assert list(current.new) == [note] == list(current)
            assert current.sync_session is session.sync_session
            assert current.bind is session.bind
            assert getattr(current, "binds", None) == getattr(
                session, "binds", None
            )  # SQLAlchemy 2.0 has none
            assert current.info is session.info
            await current.flush()
            assert await current.run_sync(lambda sync: sync.get(Note, note.id)) is note
            assert current.in_transaction()
            assert current.get_transaction() is not None
            assert await current.get(Note, note.id) is note
            assert (await current.connection()) is (await session.connection())
            with current.no_autoflush:
                assert not current.autoflush
            async with current.begin_nested():
                current.add(Note(text="two"))
            async for row in await current.stream_scalars(select(Note.text).order_by(Note.id)):
                assert row in ("one", "two")
            await current.commit()
        assert await notes(manager) == ["one", "two"]

    async def test_an_unknown_attribute_of_a_current_session_is_an_attribute_error(
        self, current: CurrentSession
    ) -> None:
        for name in ("__wrapped__", "__iter_me__", "no_such_thing"):
            assert not hasattr(current, name)

    async def test_lazy_loads_and_awaitable_attributes_use_the_same_session(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            parent = Note(text="parent")
            session.add_all([parent, Note(text="child", parent=parent)])
        async with manager.session() as session:
            child = (await session.scalars(select(Note).where(Note.text == "child"))).one()
            assert (await child.awaitable_attrs.parent).text == "parent"


class TestNesting:
    async def test_a_nested_session_is_current_inside_its_block_only(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        async with manager.session() as outer:
            async with manager.session() as inner:
                assert current.sync_session is inner.sync_session is not outer.sync_session
                await outer.execute(select(1))  # It may still be used.
            assert current.sync_session is outer.sync_session
        with pytest.raises(NoSessionError):
            _ = current.sync_session

    async def test_nested_sessions_can_end_in_any_order(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        first, second = manager.session(), manager.session()
        await first.__aenter__()
        inner = await second.__aenter__()
        await first.__aexit__(None, None, None)
        assert current.sync_session is inner.sync_session
        await second.__aexit__(None, None, None)
        with pytest.raises(NoSessionError):
            _ = current.sync_session

    async def test_a_session_can_end_in_another_task(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        block = manager.session()
        session = await block.__aenter__()
        await session.execute(select(1))

        async def end() -> None:
            await block.__aexit__(None, None, None)

        await asyncio.create_task(end(), context=contextvars.Context())
        with pytest.raises(NoSessionError):
            _ = current.sync_session
        assert checked_out(manager) == 0

    async def test_an_ended_scope_is_not_current_for_a_task_that_inherited_it(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        ended = asyncio.Event()

        async def later() -> None:
            await ended.wait()
            await current.execute(select(1))

        async with manager.session():
            task = asyncio.create_task(later())
        ended.set()
        with pytest.raises(NoSessionError):
            await task

    async def test_the_session_of_an_ended_scope_is_refused(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            pass
        for use in (session.execute(select(1)), session.commit(), session.rollback()):
            with pytest.raises(NoSessionError, match="scope of this session has ended"):
                await use

    async def test_objects_can_be_read_after_their_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            note = Note(text="read me")
            session.add(note)
        assert (note.text, note.id, note.parent_id) == ("read me", 1, None)
        async with manager.session() as session:
            found = await session.get(Note, 1)
        assert found is not None
        assert found.text == "read me"

    async def test_scopes_of_two_managers_never_mix(
        self, manager: DatabaseSessionManager, current: CurrentSession, settings: DatabaseSettings
    ) -> None:
        async with DatabaseSessionManager(settings) as other, other.session() as session:
            with pytest.raises(NoSessionError, match="was the right one injected"):
                _ = current.sync_session
            async with manager.session() as own:
                assert current.sync_session is own.sync_session
                assert CurrentSession(other).sync_session is session.sync_session


class TestGenerators:
    """An async generator sets the context of whoever consumes it."""

    @staticmethod
    async def rows(manager: DatabaseSessionManager) -> AsyncGenerator[int, None]:
        async with manager.session() as session:
            for number in range(3):
                yield await session.scalar(select(number)) or 0

    async def test_a_generator_closed_late_ends_only_its_own_scope(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        rows = self.rows(manager)
        await anext(rows)
        async with manager.session() as own:
            await rows.aclose()
            assert current.sync_session is own.sync_session
        with pytest.raises(NoSessionError):
            _ = current.sync_session

    async def test_a_generator_closed_in_another_task_ends_its_scope(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        rows = self.rows(manager)
        await anext(rows)

        async def close() -> None:
            await rows.aclose()

        await asyncio.create_task(close(), context=contextvars.Context())
        with pytest.raises(NoSessionError):
            _ = current.sync_session
        assert checked_out(manager) == 0

    async def test_a_generator_that_is_never_closed_ends_its_scope_when_collected(
        self, manager: DatabaseSessionManager
    ) -> None:
        rows = self.rows(manager)
        await anext(rows)
        assert checked_out(manager) == 1
        del rows
        gc.collect()
        async with asyncio.timeout(5):
            while checked_out(manager):
                await asyncio.sleep(0.01)

    async def test_a_context_manager_function_passes_its_scope_to_its_block(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        @asynccontextmanager
        async def dependency() -> AsyncGenerator[AsyncSession, None]:
            async with manager.transaction() as session:
                yield session

        async with dependency() as session:
            assert current.sync_session is session.sync_session
        with pytest.raises(NoSessionError):
            _ = current.sync_session


class TestConcurrency:
    @pytest.mark.parametrize("warm", [False, True])
    async def test_two_concurrent_operations_of_one_session_are_refused(
        self, manager: DatabaseSessionManager, warm: bool
    ) -> None:
        with pytest.raises(ConcurrentSessionError, match="another operation is running"):
            async with manager.session() as session:
                if warm:
                    await session.execute(select(1))
                await asyncio.gather(session.execute(select(1)), session.execute(select(2)))
        assert checked_out(manager) == 0

    USES: tuple[Callable[[AsyncSession], Awaitable[object]], ...] = (
        lambda session: session.execute(select(1)),
        lambda session: session.scalar(select(1)),
        lambda session: session.scalars(select(1)),
        lambda session: session.get(Note, 1),
        lambda session: session.stream(select(1)),
        lambda session: session.flush(),
        lambda session: session.connection(),
        lambda session: session.commit(),
        lambda session: session.rollback(),
        lambda session: session.run_sync(lambda sync: sync.scalar(select(1))),
        lambda session: session.begin_nested().start(),
        lambda session: session.merge(Note(id=1, text="merged")),
    )

    @pytest.mark.parametrize("use", USES)
    async def test_every_kind_of_operation_is_refused_during_another_one(
        self, manager: DatabaseSessionManager, use: Callable[[AsyncSession], Awaitable[object]]
    ) -> None:
        async with manager.session() as session:
            running = asyncio.create_task(session.execute(select(1)))
            await asyncio.sleep(0)
            with pytest.raises(ConcurrentSessionError):
                await use(session)
            await running

    async def test_a_commit_after_a_failed_statement_is_refused_during_another_operation(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT nonsense"))
            running = asyncio.create_task(session.execute(select(1)))
            await asyncio.sleep(0)
            with pytest.raises(ConcurrentSessionError):
                await session.commit()
            await asyncio.wait((running,))
            with pytest.raises(UnexpectedRollbackError):
                await session.commit()

    async def test_a_session_is_free_after_an_operation_in_another_task(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        async with manager.session():
            await asyncio.wait_for(
                current.execute(select(1)), 5
            )  # a task of its own on Python 3.11
            await asyncio.create_task(current.execute(select(1)))  # type: ignore[arg-type]
            await current.execute(select(1))

    async def test_a_block_that_another_task_joined_excludes_all_other_tasks(
        self, manager: DatabaseSessionManager, current: CurrentSession
    ) -> None:
        joined, leave = asyncio.Event(), asyncio.Event()

        async def join() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="joined"))
                # A task started inside the block belongs to it.
                await asyncio.create_task(session.flush())
                joined.set()
                await leave.wait()

        async with manager.transaction():
            task = asyncio.create_task(join())
            await joined.wait()
            with pytest.raises(ConcurrentSessionError, match="joined it in another task"):
                await current.execute(select(1))
            with pytest.raises(ConcurrentSessionError, match="joined it in another task"):
                async with manager.transaction():
                    pass
            leave.set()
            await task
            await current.execute(select(1))
        assert await notes(manager) == ["joined"]

    async def test_a_transaction_that_ends_before_a_joined_block_in_another_task_rolls_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        joined, leave = asyncio.Event(), asyncio.Event()

        async def join() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="joined"))
                joined.set()
                await leave.wait()

        with pytest.raises(
            UnexpectedRollbackError, match="a block that joined this one is still open"
        ):
            async with manager.transaction():
                task = asyncio.create_task(join())
                await joined.wait()
        leave.set()
        with pytest.raises(
            UnexpectedRollbackError, match="outer block ended before this joined block"
        ):
            await task
        assert await notes(manager) == []

    async def test_a_block_that_ends_during_an_operation_waits_for_it_and_rolls_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(ConcurrentSessionError, match="still had an operation running"):
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                task = asyncio.create_task(session.execute(select(1)))
                await asyncio.sleep(0)
        await task
        assert await notes(manager) == []

    async def test_two_tasks_have_separate_sessions(self, manager: DatabaseSessionManager) -> None:
        current = CurrentSession(manager)
        seen = []

        async def work(name: str) -> None:
            async with manager.transaction():
                seen.append(current.sync_session)
                current.add(Note(text=name))
                await asyncio.sleep(0)
                await current.flush()

        await asyncio.gather(*(work(str(number)) for number in range(5)))
        assert len(set(map(id, seen))) == 5
        assert await notes(manager) == ["0", "1", "2", "3", "4"]


class TestOwnedTransaction:
    CALLS: tuple[Callable[[AsyncSession], Awaitable[object]], ...] = (
        lambda session: session.commit(),
        lambda session: session.rollback(),
        lambda session: session.close(),
        lambda session: session.begin().start(),
        lambda session: session.reset(),
        lambda session: session.invalidate(),
        lambda session: session.run_sync(lambda sync: sync.commit()),
    )

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("through", ["the session", "the stand-in"])
    async def test_commit_and_rollback_are_refused_inside_transaction(
        self,
        manager: DatabaseSessionManager,
        call: Callable[[AsyncSession], Awaitable[object]],
        through: str,
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            with pytest.raises(
                ScopeOwnsTransactionError,
                match=r"set_rollback_only\(\).*Propagation.NESTED.*session\(\)",
            ):
                await call(session if through == "the session" else CurrentSession(manager))
        assert await notes(manager) == ["kept"]

    async def test_begin_nested_is_allowed_inside_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            with pytest.raises(ValueError, match="undo"):
                async with session.begin_nested():
                    session.add(Note(text="undone"))
                    raise ValueError("undo")
        assert await notes(manager) == ["kept"]

    async def test_commit_and_rollback_work_in_a_session_as_in_sqlalchemy(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            async with session.begin():
                session.add(Note(text="begun"))
            session.add(Note(text="committed"))
            await session.commit()
            session.add(Note(text="rolled back"))
            await session.rollback()
        assert await notes(manager) == ["begun", "committed"]


class TestUncommittedChanges:
    WRITES: tuple[Callable[[AsyncSession], Awaitable[object]], ...] = (
        lambda session: session.execute(insert(Note).values(text="lost")),
        lambda session: session.execute(text("INSERT INTO note (text) VALUES ('lost')")),
        lambda session: session.run_sync(lambda sync: sync.add(Note(text="lost"))),
        lambda session: session.run_sync(lambda sync: (sync.add(Note(text="lost")), sync.flush())),
    )

    @pytest.mark.parametrize("write", WRITES)
    async def test_a_session_with_uncommitted_changes_warns(
        self, manager: DatabaseSessionManager, write: Callable[[AsyncSession], Awaitable[object]]
    ) -> None:
        with pytest.warns(UncommittedChangesWarning, match="now lost") as warned:
            async with manager.session() as session:
                await write(session)
        assert warned[0].filename == __file__
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    @pytest.mark.parametrize("write", WRITES)
    async def test_a_session_that_was_committed_or_rolled_back_does_not_warn(
        self,
        manager: DatabaseSessionManager,
        write: Callable[[AsyncSession], Awaitable[object]],
        end: str,
    ) -> None:
        async with manager.session() as session:
            await write(session)
            await getattr(session, end)()
        assert await notes(manager) == (["lost"] if end == "commit" else [])

    async def test_a_session_that_only_read_does_not_warn(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="a"))
        async with manager.session() as session:
            note = (await session.scalars(select(Note))).one()
            note.text = "a"  # no change

    async def test_a_session_warns_of_a_bulk_write_that_is_not_committed(
        self, manager: DatabaseSessionManager
    ) -> None:
        def write(session: Session) -> None:
            mapper: Mapper[Note] = inspect(Note)
            session.bulk_insert_mappings(mapper, [{"text": "lost"}])

        async def lose_work() -> None:
            async with manager.session() as session:
                await session.run_sync(write)

        with pytest.warns(UncommittedChangesWarning):
            await lose_work()
        assert await notes(manager) == []

    async def test_a_session_that_ends_with_an_error_does_not_warn(
        self, manager: DatabaseSessionManager
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="enough"):
                async with manager.session() as session:
                    session.add(Note(text="lost"))
                    raise ValueError("enough")
        assert await notes(manager) == []

    async def test_a_warning_of_uncommitted_changes_raised_as_an_error_leaks_nothing(
        self, manager: DatabaseSessionManager
    ) -> None:
        # This test run turns warnings into errors.
        with pytest.raises(UncommittedChangesWarning):
            async with manager.session() as session:
                await session.execute(insert(Note).values(text="lost"))
        assert checked_out(manager) == 0
