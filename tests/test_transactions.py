"""Transactions: what begins, what joins, and how each block ends."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    ScopeError,
    ScopeOwnsTransactionError,
    TransactionManager,
    UnexpectedRollbackError,
    transactional,
)
from sessionwire.testing import sandbox

from .conftest import notes
from .models import Note


class Repository:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, text: str) -> Note:
        note = Note(text=text)
        self.session.add(note)
        await self.session.flush()
        return note


class Service:
    def __init__(self, notes: Repository, transaction: TransactionManager) -> None:
        self.notes = notes
        self.transaction = transaction

    @transactional
    async def write(self, *texts: str, fail: bool = False) -> list[int]:
        """Write notes."""
        written = [(await self.notes.add(text)).id for text in texts]
        if fail:
            raise ValueError("as asked")
        return written


@pytest.fixture(params=[nullcontext, sandbox], ids=["committed", "in a sandbox"])
async def manager(
    manager: DatabaseSessionManager, request: pytest.FixtureRequest
) -> AsyncIterator[DatabaseSessionManager]:
    """Run these tests in a sandbox, too."""
    async with request.param(manager):
        yield manager


@pytest.fixture
def service(manager: DatabaseSessionManager) -> Service:
    return Service(Repository(CurrentSession(manager)), TransactionManager(manager))


class TestBlocks:
    async def test_transaction_commits_if_the_block_ends_normally(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize(
        "error", [ValueError, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit]
    )
    async def test_transaction_rolls_back_on_any_error(
        self, manager: DatabaseSessionManager, error: type[BaseException]
    ) -> None:
        with pytest.raises(error):
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                raise error
        assert await notes(manager) == []

    async def test_transaction_raises_the_error_of_its_final_flush(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                session.add_all([Note(text="twice"), Note(text="twice")])
        assert await notes(manager) == []

    async def test_a_transaction_joins_the_current_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        assert not manager.transaction.active
        async with manager.transaction() as outer:
            outer.add(Note(text="outer"))
            async with TransactionManager(manager)() as inner:
                assert inner is outer
                assert manager.transaction.active
                inner.add(Note(text="inner"))
            assert await notes_inside(outer) == ["inner", "outer"]
        assert not manager.transaction.active
        assert await notes(manager) == ["inner", "outer"]

    async def test_a_failed_joined_block_rolls_the_outer_block_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(ValueError, match="inner"):
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                async with manager.transaction():
                    raise ValueError("inner")
        assert await notes(manager) == []

    async def test_a_caught_failure_of_a_joined_block_is_reported(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="ValueError: inner") as raised:
            async with manager.transaction() as session:
                session.add(Note(text="outer"))
                try:
                    async with manager.transaction():
                        raise ValueError("inner")
                except ValueError:
                    pass
        assert isinstance(raised.value.__cause__, ValueError)
        assert await notes(manager) == []

    async def test_a_caught_failure_of_a_flush_is_reported(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(
            UnexpectedRollbackError, match=r"(?s)IntegrityError.*Propagation\.NESTED"
        ):
            async with manager.transaction() as session:
                session.add_all([Note(text="twice"), Note(text="twice")])
                with pytest.raises(IntegrityError):
                    await session.flush()
        assert await notes(manager) == []

    async def test_a_transaction_in_a_session_also_commits_earlier_work(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="before"))
            async with manager.transaction() as same:
                assert same is session
                session.add(Note(text="inside"))
            assert await notes(manager) == ["before", "inside"]
            assert await session.scalar(select(1)) == 1

    async def test_a_transaction_in_a_session_also_rolls_earlier_work_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="before"))
            with pytest.raises(ValueError, match="inside"):
                async with manager.transaction():
                    raise ValueError("inside")
            assert await session.scalar(select(1)) == 1
        assert await notes(manager) == []

    async def test_a_transaction_without_a_statement_sends_nothing(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            assert not session.in_transaction()
            assert manager.engine.pool.status().endswith("connections: 0")


class TestTransactional:
    async def test_a_transactional_method_is_a_transaction(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        assert len(await service.write("a", "b")) == 2
        with pytest.raises(ValueError, match="as asked"):
            await service.write("c", fail=True)
        assert await notes(manager) == ["a", "b"]

    async def test_a_transactional_method_joins_the_enclosing_transaction(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        with pytest.raises(ValueError, match="outer"):
            async with manager.transaction():
                await service.write("a")
                raise ValueError("outer")
        assert await notes(manager) == []

    async def test_a_transactional_function_gets_the_manager_as_a_parameter(
        self, manager: DatabaseSessionManager
    ) -> None:
        @transactional
        async def write(text: str, transaction: TransactionManager) -> None:
            CurrentSession(manager).add(Note(text=text))

        await write("by position", manager.transaction)
        await write(text="by name", transaction=manager.transaction)
        assert await notes(manager) == ["by name", "by position"]

    def test_transactional_keeps_name_docstring_and_signature(self) -> None:
        assert Service.write.__name__ == "write"
        assert Service.write.__doc__ == "Write notes."
        assert inspect.iscoroutinefunction(Service.write)

    def test_transactional_refuses_a_synchronous_function(self) -> None:
        with pytest.raises(TypeError, match="write 'async def"):

            @transactional  # type: ignore[arg-type]
            def write(self: object) -> None: ...

    async def test_transactional_says_which_manager_is_missing(self) -> None:
        class Incomplete:
            @transactional
            async def write(self) -> None: ...

        with pytest.raises(
            TypeError, match=r"the attribute 'transaction' of Incomplete is missing"
        ):
            await Incomplete().write()

        with pytest.raises(TypeError, match="neither a parameter 'transaction' nor a self"):

            @transactional
            async def write() -> None: ...


async def notes_inside(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Note.text).order_by(Note.text)))


class TestObjectsAfterTheEnd:
    async def test_an_object_that_was_rolled_back_can_be_added_again(
        self, manager: DatabaseSessionManager
    ) -> None:
        note = Note(text="again")
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                session.add(note)
                await session.flush()
                raise ZeroDivisionError
        async with manager.transaction() as session:
            session.add(note)
            await session.flush()
            manager.transaction.set_rollback_only()
        async with manager.transaction() as session:
            session.add(note)
        assert await notes(manager) == ["again"]

    async def test_an_object_that_a_session_did_not_commit_can_be_added_again(
        self, manager: DatabaseSessionManager
    ) -> None:
        note = Note(text="again")
        with pytest.raises(ZeroDivisionError):
            async with manager.session() as session:
                session.add(note)
                await session.flush()
                raise ZeroDivisionError
        async with manager.transaction() as session:
            session.add(note)
        assert await notes(manager) == ["again"]

    async def test_a_change_that_was_rolled_back_can_be_made_again(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            note = Note(text="a")
            session.add(note)

        async def change() -> None:
            nonlocal attempts
            attempts += 1
            session = CurrentSession(manager)
            session.add(note)
            await session.refresh(note)
            note.text += "b"
            await session.flush()
            if attempts == 1:
                raise DBAPIError("", None, OSError(), connection_invalidated=True)

        attempts = 0
        await manager.transaction.run(change, retries=1)
        assert await notes(manager) == ["ab"]

    async def test_an_object_that_was_only_read_stays_readable_after_an_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="read"))
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                note = (await session.scalars(select(Note))).one()
                raise ZeroDivisionError
        assert note.text == "read"

    async def test_setting_an_attribute_to_its_old_value_is_no_change(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="same"))
        async with manager.transaction() as session:
            (await session.scalars(select(Note))).one().text = "same"
        assert await notes(manager) == ["same"]

    async def test_a_before_commit_listener_can_add_a_row(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            event.listen(
                session.sync_session,
                "before_commit",
                lambda sync: sync.add(Note(text="audit")),
                once=True,
            )
            session.add(Note(text="work"))
        assert await notes(manager) == ["audit", "work"]


class TestOptions:
    async def test_execution_options_with_changing_values_are_not_cached(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def in_block(number: int) -> None:
            async with manager.transaction(
                execution_options={"logging_token": f"{number}"}
            ) as session:
                connection = (await session.connection()).sync_connection
                assert connection is not None
                assert connection.get_execution_options()["logging_token"] == f"{number}"
                engines.append(weakref.ref(connection.engine))

        engines: list[weakref.ref[Engine]] = []
        for number in range(3):
            await in_block(number)
        gc.collect()
        assert [engine() for engine in engines] == [None] * 3


class TestBlocksThatCannotBe:
    @pytest.mark.parametrize("sql", ["ROLLBACK", "commit", "-- now\nEND;", "BEGIN", "ABORT"])
    async def test_transaction_control_as_text_is_refused_and_loses_nothing(
        self, manager: DatabaseSessionManager, sql: str
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            await session.flush()
            with pytest.raises(ScopeOwnsTransactionError, match=r"text\('[A-Z]+'\) is not allowed"):
                await session.execute(text(sql))
        assert await notes(manager) == ["kept"]

    async def test_savepoints_as_text_are_left_to_the_caller(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(text("SAVEPOINT here"))
            await session.execute(insert(Note).values(text="undone"))
            await session.execute(text("ROLLBACK TO SAVEPOINT here"))
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize("timeout", ["soon", object(), [1]])
    async def test_an_invalid_timeout_is_refused_before_the_block(
        self, manager: DatabaseSessionManager, timeout: Any
    ) -> None:
        with pytest.raises((TypeError, ValueError)):
            manager.transaction(timeout=timeout)
        assert not manager.transaction.active

    @pytest.mark.parametrize(
        ("option", "remedy"),
        [
            ({"isolation_level": "AUTOCOMMIT"}, "isolation=…"),
            ({"postgresql_readonly": True}, "read_only=True"),
        ],
    )
    async def test_reserved_execution_options_are_refused(
        self, manager: DatabaseSessionManager, option: dict[str, Any], remedy: str
    ) -> None:
        with pytest.raises(ValueError, match=remedy):
            manager.transaction(execution_options=option)

    @pytest.mark.parametrize("kind", ["transaction", "session"])
    async def test_a_block_cannot_be_entered_twice(
        self, manager: DatabaseSessionManager, kind: str
    ) -> None:
        block = getattr(manager, kind)()
        async with block as session:
            session.add(Note(text="first"))
            with pytest.raises(ScopeError, match="a block can be entered only once"):
                await block.__aenter__()
            await session.flush()
            if kind == "session":
                await session.commit()
        with pytest.raises(ScopeError, match="a block can be entered only once"):
            await block.__aenter__()
        assert await notes(manager) == ["first"]

    async def test_ending_a_transaction_object_of_a_block_is_refused_or_reported(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                session.add(Note(text="a"))
                begun = session.get_transaction()
                assert begun is not None
                with pytest.raises(ScopeOwnsTransactionError):
                    await begun.commit()
                raise ZeroDivisionError
        with pytest.raises(UnexpectedRollbackError, match="without going through the session"):
            async with manager.transaction() as session:
                session.add(Note(text="b"))
                await session.flush()
                begun = session.get_transaction()
                assert begun is not None
                await begun.rollback()
        assert await notes(manager) == []
