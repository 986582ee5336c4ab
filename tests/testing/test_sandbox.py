"""`sandbox` rolls back all work inside it at its end, and changes nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    delete,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    Lifespan,
    NotInitializedError,
    Propagation,
    SandboxError,
    TransactionManager,
    TransactionTimeoutError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
    transactional,
)
from sessionwire._database.runtime import database_of
from sessionwire.testing import sandbox
from tests import sample_app
from tests.cancellation import ONCE, TWICE_LATER, Steps
from tests.conftest import Postgres, checked_out, notes
from tests.models import Note
from tests.postgres import OnPostgres, kill
from tests.units_of_work import UNITS_OF_WORK, Work

HERE = Path(__file__).name
COUNT = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000000) "
    "SELECT count(*) FROM n"
)


@pytest.fixture
async def outside(
    settings: DatabaseSettings, manager: DatabaseSessionManager
) -> AsyncIterator[DatabaseSessionManager]:
    """Yield another manager of the same database, which has one row already."""
    async with DatabaseSessionManager(settings) as other:
        await write(other, "before")
        yield other
        assert await seen(other) == ["before"], "the sandbox has left something behind"


@pytest.fixture
async def inside(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> AsyncIterator[DatabaseSessionManager]:
    """Yield a manager in a sandbox, beside one row."""
    async with sandbox(manager):
        yield manager
    assert await notes(manager) == ["before"]


async def write(
    manager: DatabaseSessionManager, *texts: str, propagation: Propagation = Propagation.REQUIRED
) -> None:
    async with manager.transaction(propagation) as session:
        for each in texts:
            session.add(Note(text=each))
            await session.flush()


async def seen(manager: DatabaseSessionManager) -> list[str]:
    """Return the notes, read in a read-only scope."""
    async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
        return list(await session.scalars(select(Note.text).order_by(Note.text)))


def line(marker: str) -> str:
    """Return the position of that line in this file, as messages name it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (number for number, each in enumerate(lines, 1) if each.endswith(f"# {marker}"))
    return f"{HERE}:{number} in "


# What is committed


async def test_commits_in_a_sandbox_are_visible_only_inside_and_gone_afterwards(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    async with sandbox(manager) as same:
        assert same is manager
        await write(manager, "a", "b")
        assert await seen(manager) == await notes(manager) == ["a", "b", "before"]
        assert await seen(outside) == ["before"]
    assert await seen(manager) == ["before"]


async def test_other_connections_can_read_but_not_write_beside_a_sandbox_on_sqlite(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = DatabaseSettings.model_validate(
        {"url": f"sqlite:///{tmp_path / 'test.db'}", "pool": {"timeout": 0.1}}
    )
    async with (
        DatabaseSessionManager(settings) as manager,
        DatabaseSessionManager(settings) as outside,
    ):
        await sample_app.create_tables(manager)
        async with sandbox(manager):
            await write(manager, "a")
            assert await seen(outside) == []
            with pytest.raises(OperationalError, match="locked"):
                await write(outside, "b")
        await write(outside, "c")
        assert await seen(manager) == ["c"]


async def test_transactions_in_a_sandbox_see_earlier_commits(
    inside: DatabaseSessionManager,
) -> None:
    for number in range(5):
        await write(inside, str(number))
    async with inside.transaction() as session:
        await session.execute(update(Note).where(Note.text == "0").values(text="changed"))
        await session.execute(delete(Note).where(Note.text == "before"))
    assert await seen(inside) == ["1", "2", "3", "4", "changed"]


async def test_a_service_of_a_container_works_in_a_sandbox(settings: DatabaseSettings) -> None:
    async with sample_app.started(sample_app.Container(settings=settings)) as container:
        async with sandbox(container) as same:
            assert same is container
            await container.notebook().write("a", "b")
            assert await container.notebook().read() == ["a", "b"]
        assert await container.notebook().read() == []


# What is undone


async def test_a_rollback_in_a_sandbox_keeps_earlier_commits(
    inside: DatabaseSessionManager,
) -> None:
    await write(inside, "a")
    with pytest.raises(ZeroDivisionError):
        async with inside.transaction() as session:
            session.add(Note(text="never"))
            await session.flush()
            raise ZeroDivisionError
    async with inside.transaction() as session:
        session.add(Note(text="neither"))
        inside.transaction.set_rollback_only()
    assert await seen(inside) == ["a", "before"]


async def test_a_failed_statement_in_a_sandbox_fails_only_its_transaction(
    inside: DatabaseSessionManager,
) -> None:
    await write(inside, "a")
    for _ in range(2):
        with pytest.raises(IntegrityError):
            await write(inside, "never", "a")
    with pytest.raises(UnexpectedRollbackError):
        async with inside.transaction() as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT nonsense"))
    await write(inside, "b")
    assert await seen(inside) == ["a", "b", "before"]


async def test_a_failed_statement_in_autocommit_in_a_sandbox_undoes_only_itself(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.transaction(Propagation.NOT_SUPPORTED) as session:
        await session.execute(insert(Note).values(text="a"))
        for _ in range(2):
            with pytest.raises(IntegrityError):
                await session.execute(insert(Note).values(text="a"))
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT nonsense"))
        await session.execute(insert(Note).values(text="b"))
    assert await seen(inside) == ["a", "b", "before"]


async def test_a_savepoint_in_a_sandbox_is_rolled_back_alone(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.transaction() as session:
        session.add(Note(text="a"))
        with pytest.raises(IntegrityError):
            async with inside.transaction(Propagation.NESTED):
                await session.execute(insert(Note).values(text="b"))
                await session.execute(insert(Note).values(text="a"))
        async with inside.transaction(Propagation.NESTED):
            await session.execute(insert(Note).values(text="c"))
    assert await seen(inside) == ["a", "before", "c"]


async def test_a_retry_in_a_sandbox_begins_a_new_transaction(
    inside: DatabaseSessionManager,
) -> None:
    attempts: list[str] = []

    async def attempt() -> None:
        session = CurrentSession(inside)
        attempts.append(f"attempt {len(attempts)}")
        session.add(Note(text="once"))
        await session.flush()
        session.add(Note(text=attempts[-1]))
        await session.flush()
        if len(attempts) < 3:
            raise serialization_failure()

    await inside.transaction.run(attempt, retries=5)
    assert await seen(inside) == ["attempt 2", "before", "once"]


def serialization_failure() -> DBAPIError:
    cause = Exception("could not serialize access")
    cause.sqlstate = "40001"  # type: ignore[attr-defined]
    return DBAPIError("UPDATE", None, cause)


async def test_a_deadline_in_a_sandbox_rolls_back_and_later_work_succeeds(
    inside: DatabaseSessionManager,
) -> None:
    for _ in range(2):
        with pytest.raises(TransactionTimeoutError):
            async with inside.transaction(timeout=0.1) as session:
                session.add(Note(text="late"))
                await session.flush()
                await session.execute(text(COUNT))
        await write(inside, "a")
        assert await seen(inside) == ["a", "before"]
        async with inside.session() as session:
            await session.execute(delete(Note).where(Note.text == "a"))
            await session.commit()


async def test_collecting_an_interrupted_cursor_does_not_block_the_loop_on_sqlite(
    tmp_path: Path,
) -> None:
    settings = DatabaseSettings.model_validate({"url": f"sqlite:///{tmp_path / 'test.db'}"})
    loop, is_collected = asyncio.get_running_loop(), Event()

    def wait() -> bool:
        loop.call_soon_threadsafe(collect)
        return is_collected.wait(timeout=10)

    def collect() -> None:
        gc.collect()
        is_collected.set()

    async with DatabaseSessionManager(settings) as manager, sandbox(manager):
        async with manager.connect() as connection:
            raw: Any = await connection.get_raw_connection()
            await raw.driver_connection.create_function("wait", 0, wait)
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.1) as session:
                await session.execute(text(COUNT))
        async with manager.session() as session:
            assert await session.scalar(text("SELECT wait()")) == 1


# Kinds of scopes


async def test_a_session_in_a_sandbox_commits_and_rolls_back(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.session() as session:
        session.add(Note(text="a"))
        await session.commit()
        session.add(Note(text="never"))
        await session.flush()
        await session.rollback()
        session.add(Note(text="b"))
        await session.commit()
    with pytest.warns(UncommittedChangesWarning):
        async with inside.session() as session:
            await session.execute(insert(Note).values(text="neither"))
    async with inside.session() as session, session.begin():
        await session.execute(insert(Note).values(text="c"))
    assert await seen(inside) == ["a", "b", "before", "c"]


async def test_connect_in_a_sandbox_commits_at_its_end_and_rolls_back_after_an_error(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.connect() as connection:
        await connection.execute(insert(Note).values(text="a"))
    with pytest.raises(ZeroDivisionError):
        async with inside.connect() as connection:
            await connection.execute(insert(Note).values(text="never"))
            raise ZeroDivisionError
    assert await seen(inside) == ["a", "before"]


async def test_connections_of_sqlalchemy_in_a_sandbox_commit_when_asked_to(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.engine.connect() as connection:
        await connection.execute(insert(Note).values(text="a"))
        await connection.commit()
        await connection.execute(insert(Note).values(text="never"))
    async with inside.engine.begin() as connection:
        await connection.execute(insert(Note).values(text="b"))
    autocommit = inside.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with autocommit.connect() as connection:
        await connection.execute(insert(Note).values(text="c"))
    async with inside.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(insert(Note).values(text="d"))
    async with AsyncSession(inside.engine) as session, session.begin():
        session.add(Note(text="e"))
    assert await seen(inside) == ["a", "b", "before", "c", "d", "e"]


async def test_tables_created_in_a_sandbox_are_gone_afterwards(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    tables = MetaData()
    table = Table("created_inside", tables, Column("id", Integer, primary_key=True))

    async def names() -> list[str]:
        async with manager.connect() as connection:
            return await connection.run_sync(lambda sync: inspect(sync).get_table_names())

    before = await names()
    assert "note" in before
    async with sandbox(manager):
        async with manager.connect() as connection:
            await connection.run_sync(tables.create_all)
            await connection.execute(insert(table))
        assert "created_inside" in await names()
        async with manager.connect() as connection:
            await manager.drop_all(connection)
        assert await names() == ["created_inside"]
    assert await names() == before


@pytest.mark.several_connections("REQUIRES_NEW takes another")
async def test_requires_new_in_a_sandbox_sees_commits_and_commits_separately(
    manager: DatabaseSessionManager, inside: DatabaseSessionManager
) -> None:
    if database_of(inside).is_sqlite:
        async with inside.transaction():
            with pytest.raises(IncompatibleTransactionError, match="one writer"):
                await write(inside, "b", propagation=Propagation.REQUIRES_NEW)
        return
    async with inside.transaction() as session:
        session.add(Note(text="a"))
        await session.flush()
        await write(inside, "b", propagation=Propagation.REQUIRES_NEW)
        with pytest.raises(ZeroDivisionError):
            async with inside.transaction(Propagation.REQUIRES_NEW) as inner:
                await inner.execute(insert(Note).values(text="never"))
                raise ZeroDivisionError
        session.add(Note(text="c"))
    assert await seen(inside) == ["a", "b", "before", "c"]


@pytest.mark.several_connections("REQUIRES_NEW takes another")
async def test_requires_new_inside_a_read_only_transaction_of_a_sandbox_writes_or_says_why(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.transaction(read_only=True) as session:
        assert await session.scalar(select(Note.text)) == "before"
        if database_of(inside).is_sqlite:
            await write(inside, "a", propagation=Propagation.REQUIRES_NEW)
        else:
            with pytest.raises(
                SandboxError, match="cannot begin inside a read-only one in a sandbox"
            ):
                await write(inside, "a", propagation=Propagation.REQUIRES_NEW)
        assert await session.scalar(select(func.count()).select_from(Note)) == (
            2 if database_of(inside).is_sqlite else 1
        )
    await write(inside, "b")
    assert "b" in await seen(inside)


@pytest.mark.several_connections("each of the two blocks has its own")
async def test_a_sandbox_reports_a_commit_lost_with_the_enclosing_transaction(
    inside: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    if database_of(inside).is_sqlite:  # It is refused there, as without a sandbox.
        async with (
            inside.transaction() as session,
            inside.transaction(Propagation.NOT_SUPPORTED) as audit,
        ):
            await session.execute(select(Note))
            with pytest.raises(IncompatibleTransactionError, match="one writer"):
                await audit.execute(insert(Note).values(text="refused"))
        return
    with caplog.at_level(logging.WARNING, "sessionwire"), suppress(ZeroDivisionError):
        async with inside.transaction() as session:  # the outer one
            await session.execute(select(Note))
            async with inside.transaction(Propagation.NOT_SUPPORTED) as audit:  # the inner one
                await audit.execute(insert(Note).values(text="refused"))
            async with inside.transaction(Propagation.NOT_SUPPORTED, read_only=True) as reading:
                await reading.execute(select(Note))
            raise ZeroDivisionError
    (told,) = caplog.messages
    assert re.match(
        f"what was committed at {line('the inner one')}\\S+ is rolled back together with", told
    )
    assert line("the outer one") in told
    assert await seen(inside) == ["before"]


@pytest.mark.several_connections("each of the two blocks has its own")
@pytest.mark.parametrize("propagation", [Propagation.REQUIRED, Propagation.SUPPORTS])
async def test_the_database_refuses_a_write_in_a_read_only_scope_of_a_sandbox(
    inside: DatabaseSessionManager, propagation: Propagation
) -> None:
    with pytest.raises(DBAPIError, match=r"readonly|read-only"):
        async with inside.transaction(propagation, read_only=True) as session:
            await session.execute(insert(Note).values(text="never"))
    await write(inside, "a")
    async with inside.transaction() as session:
        await session.execute(insert(Note).values(text="b"))
        async with inside.transaction(Propagation.NOT_SUPPORTED, read_only=True) as reading:
            with pytest.raises(DBAPIError, match=r"readonly|read-only"):
                await reading.execute(insert(Note).values(text="never"))
        await session.execute(insert(Note).values(text="c"))
    assert await seen(inside) == ["a", "b", "before", "c"]


@pytest.mark.several_connections("REQUIRES_NEW takes another")
async def test_a_reader_open_when_its_enclosing_transaction_fails_leaves_no_trace(
    inside: DatabaseSessionManager,
) -> None:
    outer, inner = AsyncExitStack(), AsyncExitStack()
    session = await outer.enter_async_context(inside.transaction())
    await session.execute(insert(Note).values(text="never"))
    inside.transaction.set_rollback_only()
    reader = await inner.enter_async_context(
        inside.transaction(Propagation.REQUIRES_NEW, read_only=True)
    )
    await reader.execute(select(Note))
    await outer.aclose()
    with pytest.raises(
        SandboxError, match="was rolled back together with the enclosing transaction"
    ):
        await reader.execute(select(Note))
    with pytest.raises(
        SandboxError, match="was rolled back together with the enclosing transaction"
    ):
        await inner.aclose()
    await write(inside, "a")
    assert await seen(inside) == ["a", "before"]


# Hooks


async def test_hooks_in_a_sandbox_run_when_the_outermost_scope_inside_ends(
    inside: DatabaseSessionManager,
) -> None:
    called: list[str] = []

    async def found() -> None:
        called.append(",".join(await seen(inside)))

    async with inside.transaction():
        await write(inside, "a")
        inside.transaction.on_commit(found)
        inside.transaction.on_rollback(partial(called.append, "never"))
        async with inside.transaction(Propagation.NESTED):
            inside.transaction.on_commit(partial(called.append, "committed"))
        assert called == []
    assert called == ["a,before", "committed"]
    with pytest.raises(ZeroDivisionError):
        async with inside.transaction():
            inside.transaction.on_commit(partial(called.append, "never"))
            inside.transaction.on_rollback(partial(called.append, "rolled back"))
            raise ZeroDivisionError
    assert called[2:] == ["rolled back"]


async def test_on_begin_hooks_in_a_sandbox_run_for_each_transaction_only(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    begun: list[int] = []

    @manager.transaction.on_begin
    async def note(connection: AsyncConnection) -> None:
        begun.append((await connection.scalar(select(func.count()).select_from(Note))) or 0)

    async with sandbox(manager):
        assert begun == []
        await write(manager, "a")
        await write(manager, "b")
        assert await seen(manager) == ["a", "b", "before"]
        assert begun == [1, 2, 3]
    assert begun == [1, 2, 3]


# Deferred constraints

LATER = MetaData()
OWNER = Table("owner", LATER, Column("id", Integer, primary_key=True))
OWNED = Table(
    "owned",
    LATER,
    Column("id", Integer, primary_key=True),
    Column("owner_id", ForeignKey("owner.id", deferrable=True, initially="DEFERRED")),
)


class TestDeferredConstraints:
    @pytest.fixture
    async def manager(self, manager: DatabaseSessionManager) -> DatabaseSessionManager:
        async with manager.connect() as connection:
            await connection.run_sync(LATER.create_all)
        return manager

    async def test_deferred_constraints_are_checked_at_commits_in_a_sandbox_if_requested(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        async with sandbox(manager, check_deferred=True):
            for _ in range(2):
                with pytest.raises(IntegrityError):
                    async with manager.transaction() as session:
                        await session.execute(insert(OWNED).values(owner_id=1))
                async with manager.transaction() as session:
                    await session.execute(insert(OWNED).values(owner_id=2))
                    await session.execute(insert(OWNER).values(id=2))
                async with manager.transaction() as session:
                    assert (await session.scalars(select(OWNED.c.owner_id))).all() == [2]
                    await session.execute(delete(OWNED))
                    await session.execute(delete(OWNER))

    async def test_deferred_constraints_are_not_checked_in_a_sandbox_by_default(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        async with sandbox(manager):
            async with manager.transaction() as session:
                await session.execute(insert(OWNED).values(owner_id=1))
            async with manager.transaction() as session:
                assert (await session.scalars(select(OWNED.c.owner_id))).all() == [1]


# Tasks


async def test_concurrent_tasks_in_a_sandbox_take_turns_and_lose_nothing(
    inside: DatabaseSessionManager,
) -> None:
    at_work = 0

    async def work(number: int) -> None:
        nonlocal at_work
        async with inside.transaction() as session:
            session.add(Note(text=f"{number} a"))
            await session.flush()
            at_work += 1
            assert at_work == 1, "two are in their transactions at once"
            await asyncio.sleep(0)
            await session.execute(insert(Note).values(text=f"{number} b"))
            await asyncio.sleep(0)
            assert (
                await session.scalar(select(func.count()).where(Note.text.startswith(f"{number} ")))
                == 2
            )
            at_work -= 1
            if number % 3 == 0:
                raise ZeroDivisionError
        assert f"{number} b" in await seen(inside)

    results = await asyncio.gather(*(work(number) for number in range(30)), return_exceptions=True)
    assert sum(isinstance(result, ZeroDivisionError) for result in results) == 10
    kept = [f"{number} {each}" for number in range(30) for each in "ab" if number % 3]
    assert await seen(inside) == sorted([*kept, "before"])


async def test_concurrent_readers_in_a_sandbox_take_turns(inside: DatabaseSessionManager) -> None:
    async with inside.transaction(Propagation.SUPPORTS, read_only=True):
        results = await asyncio.gather(
            *(seen(inside) for _ in range(10)), *(notes(inside) for _ in range(10))
        )
    assert results == [["before"]] * 20


async def test_a_sandbox_waits_for_a_transaction_that_makes_progress(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    async def long() -> None:
        async with manager.transaction() as session:
            for _ in range(20):
                await session.execute(select(Note))
                await asyncio.sleep(0.02)

    async with sandbox(manager, patience=0.2):
        await asyncio.gather(long(), long())


class TestDeadlock:
    @pytest.mark.several_connections("a block waits for the other")
    async def test_a_deadlock_of_a_task_with_itself_is_reported_at_once(
        self, inside: DatabaseSessionManager
    ) -> None:
        async with asyncio.timeout(2), inside.engine.connect() as holder:
            await holder.execute(select(Note))  # of the holder
            with pytest.raises(SandboxError, match="which this very task has left open") as told:
                await write(inside, "a")  # of nobody
            assert line("of the holder") in str(told.value)
            assert "waits for the transaction that was opened at" in str(told.value)
            assert f"{HERE}:" in str(told.value).partition("waits for")[0]
            await holder.commit()
            await write(inside, "b")
        assert await seen(inside) == ["b", "before"]

    @pytest.mark.several_connections("two tasks wait for each other")
    async def test_a_deadlock_of_two_tasks_is_reported_when_progress_stops(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        begun, failed = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with manager.transaction() as session:  # of the one that holds
                await session.execute(select(Note))
                begun.set()
                await failed.wait()

        async with sandbox(manager, patience=0.1), asyncio.timeout(5):
            task = asyncio.create_task(hold(), name="holding")
            await begun.wait()
            with pytest.raises(
                SandboxError, match=r"by task 'holding', at .* nothing has happened for 0\.1 s"
            ) as told:
                async with manager.transaction() as session:  # of the one that waits
                    await session.execute(select(Note))
            assert f"what was opened at {line('of the one that waits')}" in str(told.value)
            assert f"transaction that was opened at {line('of the one that holds')}" in str(
                told.value
            )
            failed.set()
            await task
            await write(manager, "a")

    @pytest.mark.several_connections("two tasks wait for each other")
    @pytest.mark.parametrize("how", ["awaited", "gathered", "by another"])
    async def test_a_deadlock_of_a_task_that_awaits_the_other_is_reported_soon(
        self, inside: DatabaseSessionManager, how: str
    ) -> None:
        async def other() -> None:
            await asyncio.sleep(0)
            await inside.transaction.detached(write(inside, "a"))

        async def another() -> None:
            await asyncio.create_task(other())

        async with asyncio.timeout(2):
            with pytest.raises(SandboxError, match="which waits for this task"):
                async with inside.transaction() as session:
                    await session.execute(select(Note))
                    task = asyncio.create_task(another() if how == "by another" else other())
                    await asyncio.sleep(0.01)
                    await (asyncio.gather(task, asyncio.sleep(0)) if how == "gathered" else task)
        await write(inside, "b")

    @pytest.mark.several_connections("two tasks wait for each other")
    async def test_a_deadlock_of_decorated_functions_names_them(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        @transactional  # the holder
        async def hold(transaction: TransactionManager) -> None:
            await CurrentSession(manager).execute(select(Note))
            await asyncio.sleep(60)  # where it waits

        @transactional  # the waiter
        async def wait(transaction: TransactionManager) -> None:
            CurrentSession(manager).add(Note(text="a"))

        async with sandbox(manager, patience=0.1), asyncio.timeout(5):
            holder = asyncio.create_task(hold(manager.transaction))
            await asyncio.sleep(0.01)
            with pytest.raises(SandboxError) as told:
                await asyncio.gather(wait(manager.transaction))
            holder.cancel()
            await asyncio.wait((holder,))
        for marker in ("the holder", "where it waits", "the waiter"):
            assert line(marker) in str(told.value)

    async def test_a_task_that_waits_for_its_turn_can_be_cancelled(
        self, inside: DatabaseSessionManager
    ) -> None:
        async with inside.transaction() as session:
            await session.execute(insert(Note).values(text="a"))
            waiting = [
                asyncio.create_task(inside.transaction.detached(write(inside, "b")))
                for _ in range(3)
            ]
            await asyncio.sleep(0.01)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting, timeout=2)
            assert all(task.cancelled() for task in waiting)
        assert await seen(inside) == ["a", "before"]


# Cancellation


@pytest.mark.parametrize("again_after", [ONCE, TWICE_LATER])
@pytest.mark.parametrize("work", UNITS_OF_WORK)
async def test_a_cancellation_at_any_await_leaves_all_or_nothing_in_a_usable_sandbox(
    inside: DatabaseSessionManager, work: Work, again_after: int | None
) -> None:
    results = [
        written
        async for written in cancelled_everywhere(inside, partial(work, inside), again_after)
    ]
    assert [] in results
    assert results[-1] == ["a", "b"]
    assert all(written in ([], ["a", "b"]) for written in results)


@pytest.mark.long
@pytest.mark.parametrize("again_after", [ONCE, TWICE_LATER])
async def test_a_cancellation_around_requires_new_leaves_a_usable_sandbox(
    inside: DatabaseSessionManager, again_after: int | None
) -> None:
    async def work() -> None:
        async with inside.transaction(read_only=database_of(inside).is_sqlite) as outer:
            await outer.execute(select(Note))
            async with inside.transaction(Propagation.REQUIRES_NEW) as inner:
                await inner.execute(insert(Note).values(text="a"))
            assert await outer.scalar(select(1)) == 1

    results = [written async for written in cancelled_everywhere(inside, work, again_after)]
    assert [] in results
    assert results[-1] == ["a"]
    assert all(written in ([], ["a"]) for written in results)


async def cancelled_everywhere(
    manager: DatabaseSessionManager,
    work: Callable[[], Coroutine[Any, Any, None]],
    again_after: int | None,
) -> AsyncIterator[list[str]]:
    """Yield the notes after a cancellation at each suspension of the work."""
    for number in range(1, 500):
        steps = Steps(work(), number, *([number + again_after] if again_after else []))
        done = await steps.run()
        assert checked_out(manager) == 0
        written = await seen(manager)
        written.remove("before")
        yield written
        async with manager.transaction() as session:
            await session.execute(delete(Note).where(Note.text != "before"))
        if done and steps.count < number:
            return


async def test_a_cancellation_among_many_tasks_rolls_back_only_its_own_work(
    inside: DatabaseSessionManager,
) -> None:
    tasks = [
        asyncio.create_task(write(inside, f"{number} a", f"{number} b")) for number in range(20)
    ]
    for turn, task in enumerate(tasks[::2]):
        for _ in range(turn):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait(tasks, timeout=10)
    kept = [
        f"{number} {each}"
        for number, task in enumerate(tasks)
        for each in "ab"
        if not task.cancelled()
    ]
    assert len(kept) >= 20
    assert await seen(inside) == sorted([*kept, "before"])


@pytest.mark.long
@pytest.mark.parametrize("is_open", [True, False], ids=["open before", "not open before"])
async def test_a_cancellation_of_a_sandboxs_entry_or_exit_leaves_nothing_behind(
    settings: DatabaseSettings, outside: DatabaseSessionManager, is_open: bool
) -> None:
    manager = DatabaseSessionManager(settings)
    if is_open:
        await manager.open()
    tasks = asyncio.all_tasks()

    async def work() -> None:
        async with sandbox(manager):
            await write(manager, "a")
            assert await seen(manager) == ["a", "before"]

    for again_after in (None, 2):
        for number in range(1, 500):
            steps = Steps(work(), number, *([number + again_after] if again_after else []))
            done = await steps.run()
            async with asyncio.timeout(5):
                while asyncio.all_tasks() != tasks:
                    await asyncio.sleep(0)
            assert manager.is_open is manager.is_initialized is is_open
            assert await seen(outside) == ["before"]
            if is_open:
                assert checked_out(manager) == 0
                await write(manager, "written")
                async with manager.transaction() as session:
                    await session.execute(delete(Note).where(Note.text == "written"))
            if done and steps.count < number:
                break
        else:
            raise AssertionError("it never ends")
    if is_open:
        await manager.close()


# What would end the sandbox


@pytest.mark.parametrize(
    "sql",
    [
        "COMMIT",
        " commit",
        ";COMMIT",
        "-- a\nCOMMIT",
        "/* a; */ /**/ END",
        "ROLLBACK",
        "rollback transaction",
        "ABORT",
        "BEGIN",
        "START TRANSACTION",
        "PREPARE TRANSACTION 'a'",
    ],
)
async def test_sql_that_would_end_the_sandbox_is_refused(
    inside: DatabaseSessionManager, sql: str
) -> None:
    async with inside.session() as session:
        await session.execute(insert(Note).values(text="a"))
        with pytest.raises(SandboxError, match="would end the sandbox itself"):
            await session.execute(text(sql.replace(":", r"\:")))
        await session.rollback()
    async with inside.transaction(Propagation.NOT_SUPPORTED) as session:
        with pytest.raises(SandboxError, match="would end the sandbox itself"):
            await session.execute(text(sql))
    async with inside.connect() as connection:
        await connection.execute(text("/* COMMIT */ SAVEPOINT a"))
        await connection.execute(insert(Note).values(text="never"))
        await connection.execute(text("ROLLBACK TO SAVEPOINT a"))
        await connection.execute(insert(Note).values(text="b"))
    assert await seen(inside) == ["b", "before"]


@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_ending_a_sandbox_through_the_drivers_connection_is_refused(
    inside: DatabaseSessionManager, method: str
) -> None:
    async with inside.connect() as connection:
        await connection.execute(insert(Note).values(text="a"))
        raw: Any = await connection.get_raw_connection()
        with pytest.raises(SandboxError, match="would end the sandbox itself"):
            await connection.run_sync(lambda _: getattr(raw, method)())
    assert await seen(inside) == ["a", "before"]


async def test_work_after_the_sandboxs_transaction_was_ended_is_refused(
    inside: DatabaseSessionManager,
) -> None:
    async with inside.engine.connect() as connection:
        await connection.execute(insert(Note).values(text="never"))
        raw: Any = await connection.get_raw_connection()
        await raw.driver_connection.execute("ROLLBACK")
        for _ in range(2):
            with pytest.raises(SandboxError, match="has ended the sandbox's transaction"):
                await connection.execute(insert(Note).values(text="b"))
    with pytest.raises(SandboxError, match="has ended the sandbox's transaction"):
        await write(inside, "c")
    with pytest.raises(SandboxError, match="has ended the sandbox's transaction"):
        async with inside.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(insert(Note).values(text="d"))


async def test_a_full_rollback_by_sqlite_ends_the_sandbox(
    tmp_path: Path,
) -> None:
    async with DatabaseSessionManager(f"sqlite:///{tmp_path / 'test.db'}") as manager:
        await sample_app.create_tables(manager)
        await write(manager, "before")
        async with sandbox(manager), manager.engine.connect() as connection:
            with pytest.raises(IntegrityError):
                await connection.execute(
                    text("INSERT OR ROLLBACK INTO note (text) VALUES ('before')")
                )
            with pytest.raises(SandboxError, match="has ended the sandbox's transaction"):
                await connection.execute(insert(Note).values(text="a"))
        assert await notes(manager) == ["before"]


@pytest.mark.several_connections("the sandbox holds one")
async def test_an_engine_obtained_before_the_sandbox_is_refused_inside(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    engine = manager.engine
    async with sandbox(manager):
        with pytest.raises(SandboxError, match="this engine is from before the sandbox"):
            async with engine.begin() as connection:
                await connection.execute(insert(Note).values(text="never"))
    async with engine.begin() as connection:
        await connection.execute(select(Note))


async def test_many_sandboxes_leave_no_listeners_on_the_pool(
    manager: DatabaseSessionManager,
) -> None:
    listeners = manager.engine.pool.dispatch.checkout
    before = len(listeners)
    for _ in range(3):
        async with sandbox(manager):
            await write(manager, "a")
    assert len(listeners) == before


async def test_a_connection_obtained_in_a_sandbox_is_refused_afterwards(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    with pytest.raises(SandboxError, match="a connection was left open"):
        async with sandbox(manager):
            engine = manager.engine
            kept = await engine.connect()
    async with manager.connect():
        with pytest.raises(StatementError):
            await kept.execute(insert(Note).values(text="never"))
    with pytest.raises(SandboxError, match="the sandbox has ended"):
        async with engine.begin() as connection:
            await connection.execute(insert(Note).values(text="never"))
    await kept.close()


async def test_a_sandbox_inside_a_session_is_refused(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    async with manager.transaction(read_only=True):
        with pytest.raises(SandboxError, match="a session is open around the sandbox"):
            async with sandbox(manager):
                pass
    async with sandbox(manager):
        await write(manager, "a")


class TestKilledServer(OnPostgres):
    async def test_a_killed_server_process_is_a_clear_error_and_costs_only_the_sandbox(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager, server: Postgres
    ) -> None:
        async with sandbox(manager):
            await write(manager, "a")
            with pytest.raises((DBAPIError, SandboxError)):
                async with manager.transaction() as session:
                    await session.execute(insert(Note).values(text="b"))
                    await kill(server, manager, "INSERT%")
                    await session.execute(insert(Note).values(text="c"))
            for _ in range(2):
                with pytest.raises(
                    SandboxError, match="the database has ended the sandbox's transaction"
                ):
                    await write(manager, "d")
        assert await notes(manager) == ["before"]
        assert checked_out(manager) == 0


# What is left


def assert_one_is_told(told: pytest.ExceptionInfo[SandboxError], place: str) -> None:
    (message,) = str(told.value).splitlines()
    assert f"was left open: {place}" in message


class TestLeft:
    async def test_a_session_left_open_in_a_sandbox_is_reported(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        stack = AsyncExitStack()
        with pytest.raises(SandboxError) as told:
            async with sandbox(manager):
                session = await stack.enter_async_context(manager.session())  # the session
                await session.execute(insert(Note).values(text="a"))
        await self.nothing_is_left(manager)
        assert_one_is_told(told, f"the block that began at {line('the session')}")
        with pytest.warns(UncommittedChangesWarning):
            await stack.aclose()

    async def test_a_transaction_left_open_in_a_sandbox_is_reported(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        stack = AsyncExitStack()
        with pytest.raises(SandboxError) as told:
            async with sandbox(manager):
                await stack.enter_async_context(manager.transaction())  # the transaction
                await CurrentSession(manager).execute(insert(Note).values(text="a"))
        await self.nothing_is_left(manager)
        assert_one_is_told(told, f"the block that began at {line('the transaction')}")
        with pytest.raises(UnexpectedRollbackError):
            await stack.aclose()
        assert await seen(manager) == ["before"]

    async def test_a_connection_left_open_in_a_sandbox_is_reported(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        stack = AsyncExitStack()
        with pytest.raises(SandboxError) as told:
            async with sandbox(manager):
                connection = await stack.enter_async_context(manager.connect())  # the connection
                await connection.execute(insert(Note).values(text="a"))
        await self.nothing_is_left(manager)
        assert_one_is_told(told, f"the block that began at {line('the connection')}")
        with pytest.raises(StatementError):
            await connection.execute(insert(Note).values(text="b"))
        with suppress(Exception):
            await stack.aclose()
        assert await seen(manager) == ["before"]

    @pytest.mark.long
    @pytest.mark.parametrize("begins", [True, False], ids=["in a transaction", "idle"])
    async def test_an_sqlalchemy_connection_left_open_in_a_sandbox_is_reported(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager, begins: bool
    ) -> None:
        async def leak() -> None:
            connection = await manager.engine.connect()  # the raw one
            if begins:
                await connection.execute(insert(Note).values(text="a"))

        with pytest.raises(SandboxError) as told:
            async with sandbox(manager):
                await leak()
                gc.collect()
        assert_one_is_told(told, f"the one that was taken at {line('the raw one')}")
        gc.collect()
        await self.nothing_is_left(manager)

    async def test_a_task_left_running_in_a_sandbox_is_reported_and_cancelled(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        async def go_on() -> None:
            for number in range(1000):
                await write(manager, str(number))
                await asyncio.sleep(0.01)  # here

        with pytest.raises(SandboxError) as told:
            async with sandbox(manager):
                task = asyncio.create_task(go_on(), name="going on")
                await asyncio.sleep(0.05)
        assert "a task was left running: 'going on', at " in str(told.value)
        assert task.done()
        await self.nothing_is_left(manager)

    async def test_a_sandbox_waits_for_a_task_that_ends_soon(
        self, inside: DatabaseSessionManager
    ) -> None:
        task = asyncio.create_task(asyncio.sleep(0.05))
        assert not task.done()

    async def test_a_leftover_task_that_ignores_its_cancellation_cannot_write_to_the_database(
        self, settings: DatabaseSettings, outside: DatabaseSessionManager
    ) -> None:
        stop = asyncio.Event()
        written: list[str | BaseException] = []

        async def go_on() -> None:
            while not stop.is_set():
                try:
                    await write(manager, f"{len(written)}")
                    written.append("written")
                except BaseException as error:
                    written.append(error)
                await asyncio.sleep(0.01)

        async def stubborn() -> None:
            while not stop.is_set():
                with suppress(asyncio.CancelledError):
                    await go_on()

        async with DatabaseSessionManager(
            settings.model_copy(update={"rollback_timeout": 0.2})
        ) as manager:
            with pytest.raises(
                SandboxError, match=r"a task goes on although it was cancelled: 'stubborn'"
            ):
                async with sandbox(manager):
                    task = asyncio.create_task(stubborn(), name="stubborn")
                    await asyncio.sleep(0.05)
            count = len(written)
            try:
                async with asyncio.timeout(5):
                    while len(written) < count + 3:
                        await asyncio.sleep(0.01)
            finally:
                stop.set()
                await task
            assert all(isinstance(each, SandboxError) for each in written[-2:])
            assert await notes(manager) == ["before"]

    async def test_a_task_started_by_a_cancelled_leftover_task_is_cancelled_too(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        later: list[asyncio.Task[None]] = []

        async def write_later() -> None:
            await asyncio.sleep(0.2)
            await write(manager, "later")

        async def go_on() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                later.append(asyncio.create_task(write_later()))

        with pytest.raises(SandboxError, match="a task was left running"):
            async with sandbox(manager):
                going_on = asyncio.create_task(go_on())
                await asyncio.sleep(0)
        assert going_on.done()
        assert later[0].done()

    async def test_a_leftover_is_a_note_on_the_error_of_the_sandboxs_block(
        self, manager: DatabaseSessionManager, outside: DatabaseSessionManager
    ) -> None:
        stack = AsyncExitStack()
        with pytest.raises(ZeroDivisionError) as raised:
            async with sandbox(manager):
                await stack.enter_async_context(manager.session())  # noted
                raise ZeroDivisionError
        (note,) = raised.value.__notes__
        assert line("noted") in note
        await stack.aclose()

    async def test_a_leftover_does_not_prevent_the_manager_from_closing(
        self, settings: DatabaseSettings, outside: DatabaseSessionManager
    ) -> None:
        stack = AsyncExitStack()
        async with asyncio.timeout(5):
            async with DatabaseSessionManager(settings) as manager:
                with pytest.raises(SandboxError):
                    async with sandbox(manager):
                        await stack.enter_async_context(manager.session())
            await stack.aclose()

    async def nothing_is_left(self, manager: DatabaseSessionManager) -> None:
        assert manager.is_open
        assert checked_out(manager) == 0
        assert not database_of(manager).open_units
        assert await seen(manager) == await notes(manager) == ["before"]
        async with manager.transaction() as session:
            session.add(Note(text="written"))
        async with manager.transaction() as session:
            await session.execute(delete(Note).where(Note.text == "written"))


# The manager


async def test_a_sandbox_opens_and_closes_a_manager_that_is_not_open(
    settings: DatabaseSettings, outside: DatabaseSessionManager
) -> None:
    manager = DatabaseSessionManager(settings)
    for _ in range(2):
        async with sandbox(manager):
            await write(manager, "a")
        with pytest.raises(NotInitializedError):
            manager.session()
            await manager.close()


async def test_a_sandbox_leaves_an_initialized_manager_initialized(
    database_url: str, outside: DatabaseSessionManager
) -> None:
    manager = DatabaseSessionManager()
    manager.init(database_url)
    for _ in range(2):
        async with sandbox(manager):
            await write(manager, "a")
        assert manager.is_initialized
        assert not manager.is_open
    assert await notes(manager) == ["before"]
    await manager.close()


async def test_closing_and_opening_the_manager_in_a_sandbox_does_not_reach_the_database(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager, tmp_path: Path
) -> None:
    settings = manager.settings
    async with sandbox(manager):
        await write(manager, "a")
        await manager.close()
        with pytest.raises(NotInitializedError):
            await write(manager, "never")
        await manager.open()
        await write(manager, "b")
        await manager.close()
        manager.init(f"sqlite:///{tmp_path / 'another.db'}")
        await write(manager, "c")
        assert await seen(manager) == ["a", "b", "before", "c"]
    assert manager.is_open
    assert manager.settings is settings
    async with sandbox(manager):
        await manager.close()
    assert await notes(manager) == ["before"]


async def test_work_aborted_by_a_close_in_a_sandbox_is_rolled_back(
    inside: DatabaseSessionManager,
) -> None:
    with pytest.raises(UnexpectedRollbackError, match="the manager was closed"):
        async with inside.transaction() as session:
            await session.execute(insert(Note).values(text="never"))
            await inside.close()
    await inside.open()
    assert await seen(inside) == ["before"]


async def test_a_container_can_be_started_and_stopped_in_a_sandbox(
    settings: DatabaseSettings, outside: DatabaseSessionManager
) -> None:
    container = sample_app.Container(settings=settings)
    async with sandbox(container):
        for number in range(2):
            async with Lifespan(container):
                await container.notebook().write(str(number))
        async with Lifespan(container):
            assert await container.notebook().read() == ["0", "1", "before"]
    assert not container.db.sessionmanager().is_initialized


class Two(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    other_settings = providers.Dependency(instance_of=DatabaseSettings)
    first = providers.Container(DatabaseContainer, settings=settings)
    second = providers.Container(DatabaseContainer, settings=other_settings)


async def test_a_sandbox_of_a_container_includes_all_its_databases(
    settings: DatabaseSettings, outside: DatabaseSessionManager, tmp_path: Path
) -> None:
    other = DatabaseSettings(url=f"sqlite:///{tmp_path / 'second.db'}")
    async with Lifespan(Two(settings=settings, other_settings=other)) as container:
        first, second = container.first.sessionmanager(), container.second.sessionmanager()
        await sample_app.create_tables(second)
        with pytest.raises(SandboxError, match="a session or connection was left open"):
            async with sandbox(container), first.transaction() as session:
                session.add(Note(text="a"))
                await write(second, "b")
                left = second.session()
                await left.__aenter__()
        await left.__aexit__(None, None, None)
        assert (await notes(first), await notes(second)) == (["before"], [])


async def test_sandboxes_can_follow_each_other_and_be_nested(
    manager: DatabaseSessionManager, outside: DatabaseSessionManager
) -> None:
    for _ in range(2):
        async with sandbox(manager):
            await write(manager, "a")
            for _ in range(2):
                async with sandbox(manager, check_deferred=True):
                    await write(manager, "b")
                    with pytest.raises(IntegrityError):
                        await write(manager, "c", "a")
                    assert await seen(manager) == ["a", "b", "before"]
                assert await seen(manager) == ["a", "before"]
            await write(manager, "c")
            assert await seen(manager) == ["a", "before", "c"]


async def test_a_sandbox_raises_the_error_of_its_block(manager: DatabaseSessionManager) -> None:
    with pytest.raises(ZeroDivisionError):
        async with sandbox(manager):
            await write(manager, "a")
            raise ZeroDivisionError
    assert await notes(manager) == []
