"""What a transaction on SQLite asks of the driver's thread, which each call has to wake."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire import DatabaseSessionManager

from .conftest import notes
from .models import Note


@pytest.fixture
def backend() -> str:
    return "sqlite"


class Calls(logging.Handler):
    """The calls that the thread has executed, as aiosqlite logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("executing"):
            self.made.append(message)

    def names(self) -> list[str]:
        """Return the methods' names, in order."""
        known = "executescript", "executemany", "execute", "fetchall", "commit", "rollback", "close"
        return [next((name for name in known if name in call), call) for call in self.made]


@pytest.fixture
def calls() -> Iterator[Calls]:
    handler, logger = Calls(), logging.getLogger("aiosqlite")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def driver_of(connection: AsyncConnection) -> Any:
    return cast(Any, await connection.get_raw_connection()).driver_connection


async def test_a_write_waits_for_its_begin_its_statement_and_its_commit_only(
    manager: DatabaseSessionManager, calls: Calls
) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="warm"))
    calls.made.clear()
    async with manager.transaction() as session:
        session.add(Note(text="kept"))
    assert calls.names() == ["executescript", "execute", "commit"]
    assert await notes(manager) == ["kept", "warm"]


async def test_a_transaction_is_rolled_back_once(
    manager: DatabaseSessionManager, calls: Calls
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="lost"))
            calls.made.clear()
            raise ZeroDivisionError
    assert calls.names() == ["rollback"]
    assert await notes(manager) == []


async def test_a_query_is_fetched_and_leaves_no_cursor_to_close(
    manager: DatabaseSessionManager, calls: Calls
) -> None:
    async with manager.transaction() as session:
        await session.execute(insert(Note).values(text="kept"))
        calls.made.clear()
        assert (await session.scalars(select(Note.text))).all() == ["kept"]
        assert calls.names() == ["execute", "fetchall"]


async def test_a_cursor_that_may_have_rows_left_is_closed(
    manager: DatabaseSessionManager, calls: Calls
) -> None:
    async with manager.connect() as connection:
        await connection.execute(insert(Note), [{"text": f"{number}"} for number in range(3)])
        rows = await connection.stream(select(Note.text))
        assert await rows.fetchone() == ("0",)
        calls.made.clear()
        await rows.close()
        assert calls.names() == ["close"]


async def test_what_a_transaction_has_left_is_rolled_back_though_one_was_committed_before(
    manager: DatabaseSessionManager, calls: Calls
) -> None:
    async with manager.engine.connect() as connection:
        await connection.execute(insert(Note).values(text="kept"))
        await connection.commit()
        driver = await driver_of(connection)
        await driver.execute("BEGIN")  # past SQLAlchemy
        await driver.execute("INSERT INTO note (text) VALUES ('lost')")
        calls.made.clear()
    assert calls.names() == ["rollback"]
    assert not driver.in_transaction
    assert await notes(manager) == ["kept"]


async def test_the_connection_of_the_driver_has_the_interface_of_aiosqlite(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.connect() as connection:
        driver = await driver_of(connection)
        async with driver.cursor() as cursor:
            await cursor.executemany("INSERT INTO note (text) VALUES (?)", [("a",), ("b",)])
        cursor = await driver.cursor()
        await cursor.execute("SELECT text FROM note ORDER BY text")
        assert await cursor.fetchone() == ("a",)
        assert [row async for row in cursor] == [("b",)]
        await cursor.close()
        async with driver.execute("SELECT count(*) FROM note") as counted:
            assert await counted.fetchall() == [(2,)]
