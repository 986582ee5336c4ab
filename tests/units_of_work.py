"""Units of work that write the notes "a" and "b", one for each kind of block."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import insert

from sessionwire import DatabaseSessionManager

from .models import Note


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


UNITS_OF_WORK = [
    in_a_transaction,
    in_a_joined_transaction,
    in_a_session,
    in_a_transaction_of_a_session,
    in_a_connection,
    with_a_failure,
]
Work = Callable[[DatabaseSessionManager], Coroutine[Any, Any, None]]
