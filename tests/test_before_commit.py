"""`before_commit(function)`: it may still write, and refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import Context
from functools import partial

import pytest
from sqlalchemy import delete, event, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    Propagation,
    TransactionError,
    TransactionRequiredError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)

from .cancellation import ONCE, TWICE_LATER, each_cancellation
from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import OnPostgres, kill, until

Opened = Callable[[DatabaseSessionManager], AbstractAsyncContextManager[AsyncSession]]


class Refused(Exception):
    pass


def refuse() -> None:
    raise Refused


def writing(manager: DatabaseSessionManager, text: str) -> Callable[[], Awaitable[None]]:
    """Return a hook that writes a note."""

    async def write() -> None:
        CurrentSession(manager).add(Note(text=text))

    return write


@asynccontextmanager
async def in_a_block(manager: DatabaseSessionManager) -> AsyncIterator[AsyncSession]:
    async with manager.transaction() as session:
        yield session


@asynccontextmanager
async def in_a_session(manager: DatabaseSessionManager) -> AsyncIterator[AsyncSession]:
    async with manager.session() as session:
        yield session
        await session.commit()


@asynccontextmanager
async def in_a_session_that_begins(
    manager: DatabaseSessionManager,
) -> AsyncIterator[AsyncSession]:
    async with manager.session() as session, session.begin():
        yield session


@asynccontextmanager
async def in_a_block_in_a_session(manager: DatabaseSessionManager) -> AsyncIterator[AsyncSession]:
    """Hooks are given to the session, and the block commits it."""
    async with manager.session() as session:
        yield session
        async with manager.transaction():
            pass


@pytest.mark.parametrize(
    "opened", [in_a_block, in_a_session, in_a_session_that_begins, in_a_block_in_a_session]
)
class TestEverywhere:
    async def test_what_the_hooks_write_is_committed_in_the_order_given(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        called: list[str] = []
        transaction = manager.transaction

        async def look() -> None:
            written = await CurrentSession(manager).scalars(select(Note.text).order_by(Note.text))
            called.append(f"saw {list(written)}")

        async with opened(manager) as session:
            session.add(Note(text="a"))
            transaction.on_commit(partial(called.append, "committed"))
            transaction.before_commit(look)
            transaction.before_commit(writing(manager, "b"))
            transaction.before_commit(partial(called.append, "sync"))
            transaction.before_commit(look)
            assert called == []
        assert called == ["saw ['a']", "sync", "saw ['a', 'b']", "committed"]
        assert await notes(manager) == ["a", "b"]

    async def test_an_error_of_a_hook_rolls_back_and_is_raised(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        called: list[str] = []
        with pytest.raises(Refused):
            async with opened(manager) as session:
                session.add(Note(text="a"))
                await session.flush()
                manager.transaction.on_commit(partial(called.append, "committed"))
                manager.transaction.before_commit(writing(manager, "b"))
                manager.transaction.before_commit(refuse)
                manager.transaction.before_commit(partial(called.append, "never"))
        assert called == []
        assert checked_out(manager) == 0
        totals = manager.status().transactions
        assert (totals.rolled_back, totals.unexpected) == (1, 0)
        assert await notes(manager) == []

    async def test_a_statement_that_fails_in_a_hook_rolls_back_though_it_was_caught(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        async def fail() -> None:
            with suppress(IntegrityError):
                await CurrentSession(manager).execute(insert(Note).values(text="a"))

        with pytest.raises(UnexpectedRollbackError):
            async with opened(manager) as session:
                await session.execute(insert(Note).values(text="a"))
                manager.transaction.before_commit(fail)
        assert await notes(manager) == []

    async def test_blocks_in_a_hook_join_and_a_failed_one_dooms_the_commit(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        async def join(text: str, error: type[Exception] | None = None) -> None:
            with suppress(Refused):
                async with manager.transaction() as session:
                    session.add(Note(text=text))
                    await session.flush()
                    if error:
                        raise error

        async with opened(manager):
            manager.transaction.before_commit(partial(join, "a"))
        assert await notes(manager) == ["a"]
        with pytest.raises(UnexpectedRollbackError, match="Refused"):
            async with opened(manager):
                manager.transaction.before_commit(partial(join, "b"))
                manager.transaction.before_commit(partial(join, "c", Refused))
        assert await notes(manager) == ["a"]

    async def test_hooks_may_add_hooks_of_both_kinds(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        called: list[str] = []
        transaction = manager.transaction

        def add_others() -> None:
            called.append("first")
            transaction.before_commit(partial(called.append, "third"))
            transaction.on_commit(partial(called.append, "after the commit"))

        async with opened(manager):
            transaction.before_commit(add_others)
            transaction.before_commit(partial(called.append, "second"))
        assert called == ["first", "second", "third", "after the commit"]

    async def test_a_hook_that_adds_itself_again_and_again_is_refused(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        def again() -> None:
            manager.transaction.before_commit(again)

        with pytest.raises(TransactionError, match="does not end"):
            async with opened(manager) as session:
                session.add(Note(text="a"))
                manager.transaction.before_commit(again)
        assert await notes(manager) == []

    async def test_a_hook_of_a_savepoint_that_was_rolled_back_is_dropped(
        self, manager: DatabaseSessionManager, opened: Opened
    ) -> None:
        called: list[str] = []
        before_commit = manager.transaction.before_commit
        async with opened(manager) as session:
            before_commit(partial(called.append, "outer"))
            with suppress(Refused):
                async with session.begin_nested():
                    session.add(Note(text="never"))
                    if opened is not in_a_block:
                        before_commit(refuse)
                    raise Refused
            async with session.begin_nested():
                before_commit(partial(called.append, "released"))
        assert called == ["outer", "released"]

    @pytest.mark.parametrize("again_after", [ONCE, TWICE_LATER])
    async def test_a_cancellation_at_any_await_leaves_all_or_nothing(
        self,
        manager: DatabaseSessionManager,
        opened: Opened,
        again_after: int | None,
    ) -> None:
        async def write() -> None:
            await asyncio.sleep(0)
            await CurrentSession(manager).execute(insert(Note).values(text="b"))

        async def work() -> None:
            async with opened(manager) as session:
                await session.execute(insert(Note).values(text="a"))
                manager.transaction.before_commit(write)

        results: list[list[str]] = []
        async for _ in each_cancellation(work, again_after=again_after):

            async def given_back() -> bool:
                return checked_out(manager) == 0

            await until(given_back)
            results.append(await notes(manager))
            async with manager.connect() as connection:
                await connection.execute(delete(Note))
        assert [] in results
        assert results[-1] == ["a", "b"]
        assert all(written in ([], ["a", "b"]) for written in results)


class TestBlocks:
    async def test_hooks_of_joined_and_nested_blocks_wait_for_the_outermost(
        self, manager: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        transaction = manager.transaction
        async with transaction():
            async with transaction():
                transaction.before_commit(partial(called.append, "joined"))
            async with transaction(Propagation.NESTED):
                transaction.before_commit(partial(called.append, "nested"))
            with suppress(Refused):
                async with transaction(Propagation.NESTED):
                    transaction.before_commit(partial(called.append, "never"))
                    raise Refused
            assert called == []
        assert called == ["joined", "nested"]

    async def test_hooks_are_not_called_if_the_block_fails_or_its_flush(
        self, manager: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        with pytest.raises(Refused):
            async with manager.transaction():
                manager.transaction.before_commit(partial(called.append, "after an error"))
                raise Refused
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                manager.transaction.before_commit(partial(called.append, "after a flush"))
                session.add_all([Note(text="a"), Note(text="a")])
        async with manager.transaction():
            manager.transaction.before_commit(partial(called.append, "on demand"))
            manager.transaction.set_rollback_only()
        async with manager.transaction():
            """What was not called is forgotten."""
        assert called == []

    async def test_a_hook_may_ask_for_a_rollback(self, manager: DatabaseSessionManager) -> None:
        called: list[str] = []
        transaction = manager.transaction
        async with transaction() as session:
            session.add(Note(text="a"))
            transaction.before_commit(transaction.set_rollback_only)
            transaction.before_commit(writing(manager, "b"))
            transaction.on_rollback(partial(called.append, "rolled back"))
        assert called == ["rolled back"]
        assert await notes(manager) == []

    async def test_a_flush_may_add_a_hook(self, manager: DatabaseSessionManager) -> None:
        called: list[str] = []

        def on_insert(*_: object) -> None:
            manager.transaction.before_commit(partial(called.append, "inserted"))

        event.listen(Note, "after_insert", on_insert)
        try:
            async with manager.transaction() as session:
                session.add(Note(text="a"))
        finally:
            event.remove(Note, "after_insert", on_insert)
        assert called == ["inserted"]

    async def test_a_hook_counts_for_the_deadline(self, manager: DatabaseSessionManager) -> None:
        async def wait() -> None:
            await asyncio.sleep(60)

        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.1) as session:
                session.add(Note(text="a"))
                manager.transaction.before_commit(wait)
        assert await notes(manager) == []

    async def test_hooks_are_called_once_by_the_attempt_that_commits(
        self, manager: DatabaseSessionManager
    ) -> None:
        tried: list[int] = []

        async def refuse_twice() -> None:
            if len(tried) < 3:
                raise Refused

        async def work() -> None:
            tried.append(len(tried))
            CurrentSession(manager).add(Note(text=str(len(tried))))
            manager.transaction.before_commit(refuse_twice)

        await manager.transaction.run(work, retries=5, retry_on=Refused)
        assert await notes(manager) == ["3"]

    async def test_an_error_that_commits_is_preceded_by_the_hooks_too(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(Refused):
            async with manager.transaction(no_rollback_for=Refused):
                manager.transaction.before_commit(writing(manager, "a"))
                raise Refused
        assert await notes(manager) == ["a"]

    async def test_a_hook_finds_the_session_though_the_block_ends_in_another_context(
        self, manager: DatabaseSessionManager
    ) -> None:
        """As in a fixture, whose end runs in a task of its own."""
        block = manager.transaction()
        await block.__aenter__()
        manager.transaction.before_commit(writing(manager, "a"))
        elsewhere = asyncio.create_task(block.__aexit__(None, None, None), context=Context())
        await elsewhere
        assert await notes(manager) == ["a"]

    async def test_a_hook_that_leaves_a_block_open_in_a_task_is_told_so(
        self, manager: DatabaseSessionManager
    ) -> None:
        left = manager.transaction()
        with pytest.raises(UnexpectedRollbackError, match="still open"):
            async with manager.transaction():
                manager.transaction.before_commit(left.__aenter__)
        with pytest.raises(UnexpectedRollbackError):
            await left.__aexit__(None, None, None)

    @pytest.mark.parametrize("mode", [None, Propagation.SUPPORTS, Propagation.NOT_SUPPORTED])
    async def test_without_a_transaction_it_is_refused(
        self, manager: DatabaseSessionManager, mode: Propagation | None
    ) -> None:
        with pytest.raises(TransactionRequiredError, match=r"before_commit\(\) is for the inside"):
            if mode is None:
                manager.transaction.before_commit(refuse)
            else:
                async with manager.transaction(mode):
                    manager.transaction.before_commit(refuse)


class TestSessions:
    async def test_a_hook_precedes_one_commit_and_a_rollback_drops_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        async with manager.session() as session:
            session.add(Note(text="a"))
            manager.transaction.before_commit(partial(called.append, "once"))
            await session.commit()
            await session.commit()
            session.add(Note(text="b"))
            await session.flush()
            manager.transaction.before_commit(partial(called.append, "dropped"))
            await session.rollback()
            await session.commit()
        assert called == ["once"]
        assert await notes(manager) == ["a"]

    async def test_after_a_refusal_the_session_can_be_used_again(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="a"))
            manager.transaction.before_commit(refuse)
            with pytest.raises(Refused):
                await session.commit()
            session.add(Note(text="b"))
            await session.commit()
        assert await notes(manager) == ["b"]


class TestLostConnections(OnPostgres):
    async def test_a_connection_that_is_lost_in_a_hook_commits_nothing_and_is_retried(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        tried: list[int] = []

        async def lose_the_first() -> None:
            if len(tried) == 1:
                await kill(postgres, manager, "%note%")
            await CurrentSession(manager).execute(insert(Note).values(text="b"))

        async def work() -> None:
            tried.append(1)
            await CurrentSession(manager).execute(insert(Note).values(text="a"))
            manager.transaction.before_commit(lose_the_first)

        with pytest.raises(DBAPIError):
            await manager.transaction.run(work)
        assert await notes(manager) == []
        tried.clear()
        await manager.transaction.run(work, retries=1)
        assert await notes(manager) == ["a", "b"]
        assert len(tried) == 2
