"""`NullTransactionManager`: services run in unit tests that have no database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, select
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import OperationalError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    IncompatibleTransactionError,
    NoSessionError,
    Propagation,
    TransactionManager,
    TransactionRequiredError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    read_only,
    transactional,
)
from sessionwire.testing import NullTransactionManager
from tests.models import Note


class Notebook:
    """A service with a repository in memory."""

    def __init__(self, transaction: TransactionManager) -> None:
        self.transaction = transaction
        self.texts: list[str] = []
        self.sent: list[str] = []

    @transactional
    async def add(self, text: str) -> None:
        self.texts.append(text)
        self.transaction.on_commit(lambda: self.sent.append(text))
        self.transaction.on_rollback(lambda: self.texts.remove(text))
        if text == "forbidden":
            raise ValueError(text)
        if text == "unwanted":
            self.transaction.set_rollback_only()

    @transactional(retries=3, isolation="SERIALIZABLE", timeout=60)
    async def add_after_conflicts(self, text: str, conflicts: list[Exception]) -> None:
        if conflicts:
            raise conflicts.pop()
        await self.add(text)

    @transactional
    async def add_what_is_allowed(self, *texts: str) -> None:
        for text in texts:
            try:
                async with self.transaction(Propagation.NESTED):
                    await self.add(text)
            except ValueError:
                pass

    @read_only
    async def read(self) -> list[str]:
        assert not self.transaction.active
        return self.texts


@pytest.fixture
def transaction() -> NullTransactionManager:
    return NullTransactionManager()


@pytest.fixture
def notebook(transaction: NullTransactionManager) -> Notebook:
    return Notebook(transaction)


async def test_a_decorated_method_runs_and_its_hooks_after_it(notebook: Notebook) -> None:
    await notebook.add("milk")
    assert await notebook.read() == notebook.sent == ["milk"]


async def test_an_error_or_set_rollback_only_calls_the_rollback_hooks(notebook: Notebook) -> None:
    with pytest.raises(ValueError, match="forbidden"):
        await notebook.add("forbidden")
    await notebook.add("unwanted")
    assert notebook.texts == notebook.sent == []


class SerializationFailureError(Exception):
    sqlstate = "40001"


async def test_a_conflict_is_retried(notebook: Notebook) -> None:
    conflicts = [OperationalError("", None, SerializationFailureError()) for _ in range(2)]
    await notebook.add_after_conflicts("milk", list(conflicts))
    assert notebook.sent == ["milk"]

    with pytest.raises(OperationalError):
        await notebook.add_after_conflicts("tea", conflicts * 2)
    assert notebook.texts == ["milk"]


async def test_a_savepoint_that_fails_leaves_the_rest(notebook: Notebook) -> None:
    await notebook.add_what_is_allowed("milk", "forbidden", "tea")
    assert notebook.texts == notebook.sent == ["milk", "tea"]


async def test_the_state_of_a_transaction_is_that_of_a_real_one(
    transaction: NullTransactionManager,
) -> None:
    assert not transaction.active
    async with transaction():
        assert transaction.active
        async with transaction(Propagation.NOT_SUPPORTED):
            assert not transaction.active
        async with transaction(Propagation.REQUIRES_NEW):
            transaction.set_rollback_only()
    with pytest.raises(TransactionRequiredError):
        transaction.set_rollback_only()
    with pytest.raises(TransactionRequiredError):
        await transaction(Propagation.MANDATORY).__aenter__()
    with pytest.raises(UnexpectedRollbackError):
        async with transaction(), transaction():
            transaction.set_rollback_only()
    with pytest.raises(IncompatibleTransactionError):
        async with transaction(read_only=True), transaction():
            pass
    with pytest.raises(TransactionTimeoutError):
        async with transaction(timeout=0.01):
            await asyncio.Event().wait()
    async with transaction(settings={"app.tenant": "7"}, execution_options={"marked": True}):
        assert await transaction.run(asyncio.sleep, 0) is None


USES: list[Callable[[AsyncSession], Any]] = [
    lambda session: session.execute(select(Note)),
    lambda session: session.execute(insert(Note).values(text="milk")),
    lambda session: session.stream(select(Note)),
    lambda session: session.get(Note, 1),
    lambda session: session.execute(sqlite_insert(Note).on_conflict_do_nothing()),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("options", [{}, {"read_only": True}])
async def test_its_session_refuses_to_send_sql(
    use: Callable[[AsyncSession], Any], options: dict[str, Any], transaction: NullTransactionManager
) -> None:
    with pytest.raises(NoSessionError, match="NullTransactionManager has no database"):
        async with transaction(**options) as session:
            await use(session)


async def test_its_connection_refuses_to_send_sql(transaction: NullTransactionManager) -> None:
    async with transaction() as session:
        connection = await session.connection()
        with pytest.raises(StatementError, match="NullTransactionManager has no database"):
            await connection.exec_driver_sql("SELECT 1")


async def test_an_object_that_was_added_to_its_session_is_not_lost_in_silence(
    transaction: NullTransactionManager,
) -> None:
    with pytest.raises(NoSessionError, match="NullTransactionManager has no database"):
        async with transaction() as session:
            session.add(Note(text="milk"))


def test_one_manager_serves_many_event_loops_at_once() -> None:
    transaction, both = NullTransactionManager(), threading.Barrier(2, timeout=10)

    async def enter() -> None:
        async with transaction(), transaction(Propagation.NESTED):
            await asyncio.to_thread(both.wait)

    threads = [threading.Thread(target=lambda: asyncio.run(enter())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both.broken is False
    asyncio.run(Notebook(transaction).add("milk"))
