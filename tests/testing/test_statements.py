"""`count_statements`: the statements of a block, their lines, and a limit for them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from dependency_injector import containers, providers
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    ConfigurationError,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionManager,
    read_only,
)
from sessionwire.testing import count_statements
from tests.models import Note
from tests.sample_app import create_tables


class Notebook:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session, self.transaction = session, transaction

    @read_only
    async def read(self) -> list[str]:
        ids = (await self.session.scalars(select(Note.id).order_by(Note.id))).all()
        return [await self.text_of(note) for note in ids]

    async def text_of(self, note: int) -> str:
        return str(await self.session.scalar(select(Note.text).where(Note.id == note)))


@pytest.fixture
async def notebook(manager: DatabaseSessionManager) -> Notebook:
    """Return a notebook with three notes."""
    async with manager.transaction() as session:
        session.add_all([Note(text=text) for text in ("secret 1", "secret 2", "secret 3")])
    return Notebook(CurrentSession(manager), manager.transaction)


def line_of(function: Callable[..., object], part: str) -> int:
    """Return the first line of a function that contains this part."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    return next(number for number, line in enumerate(lines, first) if part in line)


# What counts


async def test_each_statement_is_recorded_with_the_line_that_sent_it(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with count_statements(manager) as sent:
        await notebook.read()
    # Even the first statement of a read-only connection comes without others.
    assert len(sent) == 4
    assert sent[0].sql.startswith("SELECT note.id")
    assert [statement.sql.startswith("SELECT note.text") for statement in sent] == [
        False,
        True,
        True,
        True,
    ]
    assert sent[0].where.startswith("test_statements.py:")
    assert sent[0].where.endswith(" in Notebook.read")
    line = line_of(Notebook.text_of, "self.session.scalar")
    assert {statement.where for statement in sent[1:]} == {
        f"test_statements.py:{line} in Notebook.text_of"
    }


async def test_statements_at_the_end_of_a_block_are_recorded_with_the_line_of_the_block(
    manager: DatabaseSessionManager,
) -> None:
    async def write() -> None:
        async with manager.transaction() as session:
            session.add(Note(text="a"))

    async def write_with_a_stack() -> None:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(manager.transaction())
            session.add(Note(text="b"))

    for function in (write, write_with_a_stack):
        with count_statements(manager) as sent:
            await function()
        line = line_of(function, "async with")
        assert [statement.where for statement in sent] == [
            f"test_statements.py:{line} in {function.__qualname__}"
        ]


async def test_a_lazy_load_is_recorded_with_the_line_that_awaits_it(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    async with manager.session() as session:
        note = (await session.scalars(select(Note))).first()
        assert note is not None
        session.expire(note)
        with count_statements(manager) as sent:
            await note.awaitable_attrs.text
    here = test_a_lazy_load_is_recorded_with_the_line_that_awaits_it
    line = line_of(here, "await note.awaitable_attrs")
    assert [statement.where for statement in sent] == [
        f"test_statements.py:{line} in {here.__name__}"
    ]


async def test_begin_commit_and_savepoints_are_not_counted(manager: DatabaseSessionManager) -> None:
    with count_statements(manager) as sent:
        async with manager.transaction() as session:
            async with manager.transaction(Propagation.NESTED):
                session.add(Note(text="a"))
            async with session.begin_nested() as savepoint:
                await session.execute(text("SELECT 1"))
                await savepoint.rollback()
        async with manager.session() as session:
            await session.execute(text("SELECT 2"))
            await session.rollback()
    assert [statement.sql[:8] for statement in sent] == ["INSERT I", "SELECT 1", "SELECT 2"]


async def test_statements_are_counted_with_all_connection_options(
    manager: DatabaseSessionManager,
) -> None:
    with count_statements(manager) as sent:
        for options in (
            {"isolation": "SERIALIZABLE"},
            {"read_only": True},
            {"execution_options": {"a": 1}},
        ):
            async with manager.transaction(**options) as session:
                await session.execute(select(1))
        async with manager.transaction(Propagation.NOT_SUPPORTED, read_only=True) as session:
            await session.execute(select(1))
        async with manager.connect() as connection:
            await connection.execute(select(1))
        async with manager.engine.execution_options(a=2).connect() as connection:
            await connection.execute(select(1))
    assert len(sent) == 6


async def test_a_liveness_check_is_not_counted(settings: DatabaseSettings) -> None:
    always = settings.model_copy(update={"pool": PoolSettings(ping_after=0)})
    async with DatabaseSessionManager(always) as manager:
        with count_statements(manager) as sent:
            for _ in range(2):
                async with manager.session() as session:
                    await session.execute(select(1))
    assert len(sent) == 2


async def test_statements_of_other_managers_are_not_counted(
    manager: DatabaseSessionManager, settings: DatabaseSettings
) -> None:
    async with DatabaseSessionManager(settings) as other:
        with count_statements(manager) as sent, count_statements(other) as sent_by_other:
            async with other.session() as session:
                await session.execute(select(1))
            assert (len(sent), len(sent_by_other)) == (0, 1)
            async with manager.session() as session:
                await session.execute(select(1))
    assert (len(sent), len(sent_by_other)) == (1, 1)


async def test_statements_of_other_tasks_are_counted(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with count_statements(manager) as sent:
        await asyncio.gather(*(notebook.read() for _ in range(3)))
    assert len(sent) == 12


async def test_no_statement_is_recorded_after_the_block(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with count_statements(manager) as sent:
        await notebook.read()
    with pytest.raises(ZeroDivisionError), count_statements(manager) as failed:
        raise ZeroDivisionError
    await notebook.read()
    assert (len(sent), len(failed)) == (4, 0)


async def test_a_manager_can_be_opened_while_statements_are_counted(
    settings: DatabaseSettings,
) -> None:
    manager = DatabaseSessionManager(settings)
    with count_statements(manager) as sent:
        async with manager, manager.session() as session:
            await session.execute(text("SELECT 2"))
    # open() asks whether the database answers, and on PostgreSQL what the server lets be
    # done.
    assert sent[-1].sql == "SELECT 2"
    assert 2 <= len(sent) <= 3


class Two(containers.DeclarativeContainer):
    here = providers.Container(DatabaseContainer)
    there = providers.Container(DatabaseContainer)


async def test_statements_of_all_databases_of_a_container_are_counted(
    manager: DatabaseSessionManager, settings: DatabaseSettings
) -> None:
    container = Two()
    container.here.sessionmanager.override(manager)
    container.there.settings.override(settings)
    async with container.there.sessionmanager() as other:
        await create_tables(other)
        with count_statements(container) as sent:
            for each in (manager, other):
                async with each.session() as session:
                    await session.execute(select(1))
        with count_statements(container.there.container) as sent_there:
            async with manager.session() as session, other.session() as session_there:
                await session.execute(select(1))
                await session_there.execute(select(2))
    assert (len(sent), len(sent_there)) == (2, 1)


def test_counting_statements_of_a_container_without_a_database_is_refused() -> None:
    with (
        pytest.raises(ConfigurationError, match="give the manager"),
        count_statements(containers.DynamicContainer()),
    ):
        pass


# How many are allowed


async def test_too_many_statements_fail_and_list_the_repeated_one_first(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with pytest.raises(AssertionError) as failed, count_statements(manager, at_most=3):
        await notebook.read()
    first = line_of(Notebook.read, "select(Note.id)")
    second = line_of(Notebook.text_of, "self.session.scalar")
    number = {
        "aiosqlite": "?",
        "asyncpg": "$1::INTEGER",
        "psycopg": "%(id_1)s::INTEGER",
    }[manager.engine.dialect.driver]
    assert str(failed.value).splitlines() == [
        "at most 3 statements were expected, and 4 were sent:",
        f"    3 × SELECT note.text FROM note WHERE note.id = {number} — "  # noqa: RUF001
        f"test_statements.py:{second} in Notebook.text_of",
        f"    1 × SELECT note.id FROM note ORDER BY note.id — "  # noqa: RUF001
        f"test_statements.py:{first} in Notebook.read",
    ]


async def test_the_error_of_too_many_statements_shows_no_parameters_and_no_long_statement(
    manager: DatabaseSessionManager,
) -> None:
    with pytest.raises(AssertionError) as failed, count_statements(manager, at_most=0) as sent:
        async with manager.transaction() as session:
            await session.execute(
                insert(Note).values([{"text": f"secret {number}"} for number in range(50)])
            )
    assert len(sent) == 1
    assert "secret" not in f"{failed.value} {sent}"
    assert len(str(failed.value)) < 400


async def test_as_many_statements_as_allowed_pass(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with count_statements(manager, at_most=4):
        await notebook.read()
    with count_statements(manager, at_most=0):
        pass


async def test_the_error_of_the_block_is_raised_instead_of_the_statement_limit(
    notebook: Notebook, manager: DatabaseSessionManager
) -> None:
    with pytest.raises(ZeroDivisionError), count_statements(manager, at_most=0):
        await notebook.read()
        raise ZeroDivisionError
