"""`slow_statement`, `slow_block` and `annotate_statements`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, literal, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    Propagation,
    TransactionManager,
    read_only,
    transactional,
)
from sessionwire.testing import sandbox

from .models import Note
from .postgres import until

SECRET = "the password is swordfish"


class Notebook:
    def __init__(self, transaction: TransactionManager) -> None:
        self.transaction = transaction

    @transactional
    async def add(self, note: str) -> None:
        async with self.transaction() as session:
            await session.execute(insert(Note).values(text=note))

    @transactional(retries=1)
    async def add_in_savepoint(self, note: str) -> None:
        async with self.transaction(Propagation.NESTED) as session:
            await session.execute(insert(Note).values(text=note))

    @read_only
    async def first(self) -> str | None:
        async with self.transaction(Propagation.SUPPORTS, read_only=True) as session:
            return (await session.scalars(select(Note.text))).first()


@asynccontextmanager
async def opened(
    settings: DatabaseSettings, **changes: object
) -> AsyncIterator[DatabaseSessionManager]:
    """Open a manager with its tables."""
    async with DatabaseSessionManager(settings) as manager, manager.connect() as connection:
        await manager.create_all(connection)
    async with DatabaseSessionManager(settings.model_copy(update=changes)) as manager:
        yield manager


def records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(each) for each in caplog.records if each.name == "sessionwire.slow"]


class TestStatements:
    @pytest.fixture
    async def manager(self, settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
        async with opened(settings, slow_statement=1e-9) as manager:  # all are slow
            yield manager

    async def test_a_slow_one_is_logged_with_its_place_and_without_values(
        self, manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        await Notebook(manager.transaction).add(SECRET)
        record = records(caplog)[-1]
        assert (record["event"], record["levelname"]) == ("slow_statement", "WARNING")
        assert record["statement"].startswith("INSERT INTO note (text) VALUES (")
        assert record["parameter_types"] == "str"
        assert record["call_site"].endswith("in Notebook.add")
        assert record["line"].startswith("test_slow.py:")
        assert record["line"].endswith("in Notebook.add")
        assert record["duration"] > 0
        assert SECRET not in caplog.text
        assert not any(SECRET in str(value) for value in record.values())

    async def test_the_status_has_the_last_twenty(self, manager: DatabaseSessionManager) -> None:
        before = len(manager.status().slow_statements)
        await Notebook(manager.transaction).first()
        slow = manager.status().slow_statements
        assert len(slow) == before + 1
        assert slow[0].statement.startswith("SELECT note.text")
        assert slow[0].parameter_types == ()
        assert slow[0].at.tzinfo is not None
        async with manager.connect() as connection:
            for number in range(30):
                await connection.execute(select(literal(number)))
        slow = manager.status().slow_statements
        assert len(slow) == 20
        assert all(each.parameter_types == ("int",) for each in slow)
        assert slow[0].at >= slow[-1].at

    async def test_one_that_fails_is_logged_too(
        self, manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        with suppress(DBAPIError):
            async with manager.transaction() as session:
                await session.execute(text("SELECT missing"))
        record = records(caplog)[-1]
        assert record["statement"] == "SELECT missing"

    async def test_many_rows_have_the_types_of_the_first(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.connect() as connection:
            values = [{"text": "a"}, {"text": "b"}]
            await connection.execute(text("INSERT INTO note (text) VALUES (:text)"), values)
        assert manager.status().slow_statements[0].parameter_types == ("str",)

    async def test_one_on_the_engine_is_said_to_be_by_hand(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        assert manager.status().slow_statements[0].call_site == "manager.engine"

    async def test_a_sandbox_logs_them_too(self, manager: DatabaseSessionManager) -> None:
        async with sandbox(manager), manager.transaction() as session:
            await session.execute(text("SELECT 42"))
        assert manager.status().slow_statements[0].statement == "SELECT 42"

    async def test_a_quick_one_is_not_logged(
        self, settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with opened(settings, slow_statement=60) as manager:
            await Notebook(manager.transaction).add("a")
            assert manager.status().slow_statements == ()
        assert records(caplog) == []


class TestBlocks:
    @pytest.fixture
    async def manager(self, settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
        async with opened(settings, slow_block=0.05) as manager:
            yield manager

    async def test_each_kind_of_block_is_logged_once_with_its_place(
        self, manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def last(seconds: float) -> None:
            loop = asyncio.get_running_loop()
            end = loop.time() + seconds

            async def is_over() -> bool:
                return loop.time() > end

            await until(is_over)

        async with manager.transaction(), manager.transaction():
            await last(0.06)
        async with manager.session():
            await last(0.06)
        async with manager.connect():
            await last(0.06)
        async with manager.transaction():
            pass
        slow = records(caplog)
        assert [record["event"] for record in slow] == ["slow_block"] * 3
        assert all(record["duration"] > 0.05 for record in slow)
        name = "TestBlocks.test_each_kind_of_block_is_logged_once_with_its_place"
        assert all(record["call_site"].endswith(f"in {name}") for record in slow)

    async def test_it_holds_for_the_settings_of_the_next_init(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        await manager.close()
        manager.init(settings)
        async with manager.transaction():
            await asyncio.sleep(0)


class TestAnnotations:
    @pytest.fixture
    async def sent(self, settings: DatabaseSettings) -> AsyncIterator[list[str]]:
        async with opened(settings, annotate_statements=True) as manager:
            sent: list[str] = []

            @event.listens_for(manager.engine.sync_engine, "after_cursor_execute", named=True)
            def note(statement: str, **_: Any) -> None:
                sent.append(statement)

            self.manager = manager
            yield sent

    async def test_each_statement_has_the_name_of_the_method(self, sent: list[str]) -> None:
        notebook = Notebook(self.manager.transaction)
        for note in ("a", "b"):
            await notebook.add(note)
            await notebook.first()
        inserts, selects = sent[::2], sent[1::2]
        # They don't change from call to call, so each stays one prepared statement.
        assert len({*inserts}) == len({*selects}) == 1
        assert inserts[0].endswith(" /* Notebook.add */")
        assert selects[0].endswith(" /* Notebook.first */")

    async def test_savepoints_stay_as_they_are(self, sent: list[str]) -> None:
        await Notebook(self.manager.transaction).add_in_savepoint("a")
        assert [each for each in sent if "/*" in each] == [sent[1]]
        assert sent[1].endswith(" /* Notebook.add_in_savepoint */")

    async def test_a_block_without_a_method_has_the_function_that_opened_it(
        self, sent: list[str]
    ) -> None:
        async with self.manager.transaction() as session:
            await session.execute(text("SELECT 1"))
        async with self.manager.connect() as connection:
            await connection.execute(text("SELECT 2"))
        async with self.manager.engine.connect() as connection:
            await connection.execute(text("SELECT 3"))
        name = self.test_a_block_without_a_method_has_the_function_that_opened_it.__qualname__
        assert sent == [f"SELECT 1 /* {name} */", f"SELECT 2 /* {name} */", "SELECT 3"]

    async def test_errors_and_the_slow_log_show_the_annotated_text(
        self, sent: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(DBAPIError, match=r"SELECT missing /\* TestAnnotations"):
            async with self.manager.transaction() as session:
                await session.execute(text("SELECT missing"))
        assert not sent


async def test_without_the_settings_no_listener_is_added(
    settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sessionwire")

    def listeners(manager: DatabaseSessionManager) -> tuple[int, int]:
        dispatch = manager.engine.sync_engine.dispatch
        return len(dispatch.before_cursor_execute), len(dispatch.after_cursor_execute)

    changes = {"slow_statement": 60, "annotate_statements": True}
    async with opened(settings) as manager, opened(settings, **changes) as watched:
        before, after = listeners(manager)
        assert listeners(watched) == (before + 2, after + 1)
        await Notebook(manager.transaction).add("a")
        assert manager.status().slow_statements == ()
