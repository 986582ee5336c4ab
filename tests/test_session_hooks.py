"""`on_commit()` in a bare `session()`: it waits for the `commit()` of that session."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    NoSessionError,
    PoolSettings,
    Propagation,
)

from .conftest import Postgres, notes
from .models import Note
from .postgres import OnPostgres, kill

Act = Callable[[DatabaseSessionManager, AsyncSession], Awaitable[object]]


async def add(session: AsyncSession, *texts: str) -> None:
    await session.execute(insert(Note), [{"text": text} for text in texts])


async def by_commit(_: DatabaseSessionManager, session: AsyncSession) -> None:
    await session.commit()


async def by_current_session(manager: DatabaseSessionManager, _: AsyncSession) -> None:
    await CurrentSession(manager).commit()


async def by_run_sync(_: DatabaseSessionManager, session: AsyncSession) -> None:
    await session.run_sync(lambda sync_session: sync_session.commit())


async def by_get_transaction(_: DatabaseSessionManager, session: AsyncSession) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.commit()


async def by_transaction(manager: DatabaseSessionManager, _: AsyncSession) -> None:
    async with manager.transaction():
        pass


async def by_rollback(_: DatabaseSessionManager, session: AsyncSession) -> None:
    await session.rollback()


async def by_close(_: DatabaseSessionManager, session: AsyncSession) -> None:
    await session.close()


async def by_reset(_: DatabaseSessionManager, session: AsyncSession) -> None:
    await session.reset()


async def by_failed_transaction(manager: DatabaseSessionManager, _: AsyncSession) -> None:
    with pytest.raises(ZeroDivisionError):
        async with manager.transaction() as session:
            await add(session, "undone")
            raise ZeroDivisionError


async def by_failed_commit(_: DatabaseSessionManager, session: AsyncSession) -> None:
    session.add_all([Note(text="twice"), Note(text="twice")])
    with pytest.raises(IntegrityError):
        await session.commit()
    await session.rollback()


class TestCommit:
    @pytest.mark.parametrize(
        "commit", [by_commit, by_current_session, by_run_sync, by_get_transaction, by_transaction]
    )
    async def test_hooks_of_a_session_run_once_after_its_commit_in_the_order_given(
        self, manager: DatabaseSessionManager, commit: Act
    ) -> None:
        async def look() -> None:
            ran.append(f"saw {await notes(manager)}")

        ran: list[str] = []
        async with manager.session() as session:
            manager.transaction.on_commit(partial(ran.append, "given before it began"))
            await add(session, "a")
            manager.transaction.on_commit(look)
            async with manager.transaction(Propagation.SUPPORTS):
                manager.transaction.on_commit(partial(ran.append, "last"))
            assert ran == []
            await commit(manager, session)
            assert ran == ["given before it began", "saw ['a']", "last"]
            await session.commit()
        assert len(ran) == 3

    async def test_hooks_registered_in_session_begin_run_at_its_end(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        async def audit() -> None:
            async with manager.transaction() as own:
                own.add(Note(text="audit"))

        async with manager.session() as session:
            async with session.begin():
                await add(session, "a")
                manager.transaction.on_commit(partial(ran.append, "first"))
                manager.transaction.on_commit(audit)
                assert ran == []
            assert ran == ["first"]
            assert list(await session.scalars(select(Note.text).order_by(Note.text))) == [
                "a",
                "audit",
            ]
            await session.rollback()
            with pytest.raises(ZeroDivisionError):
                async with session.begin():
                    manager.transaction.on_commit(lambda: 1 // 0)
                    await add(session, "kept")
            assert await notes(manager) == ["a", "audit", "kept"]
            await add(session, "more")
            await session.commit()

    async def test_each_commit_of_a_session_runs_the_hooks_registered_before_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        async with manager.session() as session:
            for name in ("first", "second"):
                await add(session, name)
                manager.transaction.on_commit(partial(ran.append, name))
                await session.commit()
                assert ran[-1:] == [name]
        assert ran == ["first", "second"]

    async def test_a_hook_of_a_session_can_open_a_transaction_on_the_only_connection(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        seen: list[object] = []

        async def follow_up() -> None:
            with pytest.raises(NoSessionError):
                await CurrentSession(small).commit()
            async with small.transaction() as own:
                seen.append(own)
                own.add(Note(text="follow-up"))

        one = settings.model_copy(
            update={"pool": PoolSettings(size=1, max_overflow=0, timeout=0.5)}
        )
        async with DatabaseSessionManager(one) as small, small.session() as session:
            await add(session, "a")
            small.transaction.on_commit(follow_up)
            await session.commit()
            assert seen[0] is not session
            assert CurrentSession(small).sync_session is session.sync_session
        assert await notes(manager) == ["a", "follow-up"]

    async def test_hooks_of_a_session_run_in_the_enclosing_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        found: list[bool] = []
        async with manager.transaction(read_only=True), manager.session() as session:
            manager.transaction.on_commit(lambda: found.append(manager.transaction.active))
            await session.commit()
        assert found == [True]

    async def test_an_error_of_a_session_hook_rolls_nothing_back_and_stops_no_other_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        async with manager.session() as session:
            await add(session, "a")
            manager.transaction.on_commit(lambda: 1 // 0)
            manager.transaction.on_commit(partial(ran.append, "still called"))
            with pytest.raises(ZeroDivisionError):
                await session.commit()
            assert ran == ["still called"]
            await add(session, "b")
            await session.commit()
        assert await notes(manager) == ["a", "b"]

    async def test_a_cancellation_in_a_session_hook_goes_on_and_stops_no_other_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        waiting = asyncio.Event()

        async def wait() -> None:
            waiting.set()
            await asyncio.sleep(60)

        async def work() -> None:
            async with manager.session() as session:
                await add(session, "a")
                manager.transaction.on_commit(wait)
                manager.transaction.on_commit(partial(ran.append, "still called"))
                await session.commit()
                ran.append("never")

        task = asyncio.create_task(work())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ran == ["still called"]
        assert await notes(manager) == ["a"]


class TestRollback:
    @pytest.mark.parametrize("begun", [True, False], ids=["begun", "unused"])
    @pytest.mark.parametrize(
        "undo", [by_rollback, by_close, by_reset, by_failed_transaction, by_failed_commit]
    )
    async def test_a_rollback_of_a_session_drops_its_hooks(
        self, manager: DatabaseSessionManager, undo: Act, begun: bool
    ) -> None:
        ran: list[str] = []
        async with manager.session() as session:
            if begun:
                await add(session, "a")
            manager.transaction.on_commit(partial(ran.append, "never"))
            manager.transaction.on_rollback(partial(ran.append, "nor this"))
            await undo(manager, session)
            await add(session, "b")
            await session.commit()
        assert ran == []
        assert await notes(manager) == ["b"]

    @pytest.mark.filterwarnings("ignore::sessionwire.UncommittedChangesWarning")
    async def test_a_session_that_ends_without_a_commit_drops_its_hooks(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        async with manager.session() as session:
            await add(session, "a")
            manager.transaction.on_commit(partial(ran.append, "never"))
        with pytest.raises(ZeroDivisionError):
            async with manager.session(), manager.session() as session, session.begin():
                await add(session, "b")
                manager.transaction.on_commit(partial(ran.append, "nor this"))
                raise ZeroDivisionError
        assert ran == []

    async def test_a_rollback_to_a_savepoint_drops_only_the_hooks_registered_inside(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []

        def register(name: str) -> None:
            manager.transaction.on_commit(partial(ran.append, name))

        async with manager.session() as session:
            await add(session, "a")
            register("before")
            with pytest.raises(ZeroDivisionError):
                async with session.begin_nested():
                    await add(session, "b")
                    register("undone")
                    async with session.begin_nested():
                        await add(session, "c")
                        register("kept within it")
                    raise ZeroDivisionError
            async with session.begin_nested():
                await add(session, "d")
                register("kept")
            register("after")
            assert ran == []
            await session.commit()
        assert ran == ["before", "kept", "after"]
        assert await notes(manager) == ["a", "d"]


async def test_hooks_do_not_keep_the_session_alive(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        gone = weakref.ref(session.sync_session)
        manager.transaction.on_commit(lambda: None)
        await add(session, "a")
        await session.commit()
        manager.transaction.on_commit(lambda: None)
    del session
    gc.collect()
    assert gone() is None


class TestLostConnection(OnPostgres):
    async def test_a_failed_commit_of_a_session_runs_no_hooks(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        ran: list[str] = []
        async with manager.session() as session:
            await add(session, "a")
            manager.transaction.on_commit(partial(ran.append, "never"))
            await kill(postgres, manager, "INSERT%")
            with pytest.raises(DBAPIError):
                await session.commit()
            await session.rollback()
        assert ran == []
        assert await notes(manager) == []
