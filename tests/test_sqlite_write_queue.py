"""Writers of one SQLite file take turns: each way for a turn to end, or not to come."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.exc import IntegrityError, OperationalError

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    PoolSettings,
    Propagation,
    UnexpectedRollbackError,
    is_retryable,
)
from sessionwire.testing import sandbox

from .conftest import notes
from .models import Note
from .postgres import until

WRITERS = 8
SOON = 5.0  # seconds; a wait for pool.timeout would take longer
ENDLESS = text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
)


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def settings(database_url: str) -> DatabaseSettings:
    pool = PoolSettings(size=WRITERS + 4, max_overflow=0, timeout=30)
    return DatabaseSettings(url=database_url, pool=pool)


async def write(manager: DatabaseSessionManager, name: str) -> None:
    async with manager.transaction() as session:
        session.add(Note(text=name))


async def connect_all(manager: DatabaseSessionManager) -> None:
    """Open the connections of the pool, so that a writer comes to the queue at once."""
    opened = asyncio.Barrier(WRITERS + 4)

    async def connect() -> None:
        async with manager.session() as session:
            await session.execute(text("SELECT 1"))
            await opened.wait()

    await asyncio.gather(*(connect() for _ in range(WRITERS + 4)))


async def wait_for_connections(manager: DatabaseSessionManager, number: int) -> None:
    """Wait until so many are in use: the holder's, and those of the writers behind it."""

    async def are_in_use() -> bool:
        return manager.engine.pool.checkedout() == number  # type: ignore[attr-defined]

    await until(are_in_use)


class Begins:
    """What was sent to begin a writing transaction, by all connections."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.count = 0
        event.listen(manager.engine.sync_engine, "connect", self.trace)

    def trace(self, connection: Any, _record: object) -> None:
        connection.run_async(lambda driver: driver.set_trace_callback(self.record))

    def record(self, statement: str) -> None:
        self.count += statement.strip().startswith("BEGIN IMMEDIATE")


class Queue:
    """A writer that holds the lock until `release`, and tasks that wait behind it."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        self.release = asyncio.Event()
        self.done: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def hold(self, holding: asyncio.Event) -> None:
        async with self.manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            holding.set()
            await self.release.wait()

    async def wait_behind(self, name: str) -> None:
        await write(self.manager, name)
        self.done.append(name)


@asynccontextmanager
async def queue_behind_a_writer(manager: DatabaseSessionManager) -> AsyncIterator[Queue]:
    """Yield a queue of `WRITERS` tasks; at the end all that were not cancelled have written."""
    await connect_all(manager)
    queue, holding = Queue(manager), asyncio.Event()
    async with asyncio.timeout(20):
        holder = asyncio.create_task(queue.hold(holding))
        await holding.wait()
        for number in range(WRITERS):
            queue.tasks.append(asyncio.create_task(queue.wait_behind(str(number))))
        await wait_for_connections(manager, WRITERS + 1)
        yield queue
        queue.release.set()
        await asyncio.gather(holder, *queue.tasks, return_exceptions=True)
    assert holder.exception() is None


async def test_writers_are_served_in_the_order_in_which_they_came(
    manager: DatabaseSessionManager,
) -> None:
    async with queue_behind_a_writer(manager) as queue:
        pass
    assert queue.done == [str(number) for number in range(WRITERS)]
    assert await notes(manager) == sorted(["first", *queue.done])


async def test_waiting_writers_do_not_ask_for_the_lock_again_and_again(
    settings: DatabaseSettings,
) -> None:
    async with DatabaseSessionManager(settings) as manager:
        await manager.engine.dispose()
        begins = Begins(manager)
        async with manager.connect() as connection:
            await connection.run_sync(manager.metadata.create_all)
        async with queue_behind_a_writer(manager) as queue:
            before = begins.count
            await asyncio.sleep(0.3)  # many times as long as SQLite would sleep at most
            assert begins.count == before
        assert len(queue.done) == WRITERS
        assert begins.count == before + WRITERS


@pytest.mark.parametrize("positions", [[0], [3], [WRITERS - 1], [0, 1, 2], range(WRITERS)])
async def test_cancelled_waiters_leave_the_queue_to_the_others(
    manager: DatabaseSessionManager, positions: list[int]
) -> None:
    async with queue_behind_a_writer(manager) as queue:
        cancelled = [queue.tasks[position] for position in positions]
        start = monotonic()
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled)
        assert monotonic() - start < SOON
        assert all(task.cancelled() for task in cancelled)
    left = [str(number) for number in range(WRITERS) if number not in positions]
    assert queue.done == left
    assert await notes(manager) == sorted(["first", *left])


async def test_waiters_cancelled_at_the_moment_of_their_turn_leave_it_to_the_others(
    manager: DatabaseSessionManager,
) -> None:
    for turns in range(12):
        async with queue_behind_a_writer(manager) as queue:
            queue.release.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            queue.tasks[0].cancel()
            queue.tasks[1].cancel()
        assert queue.done[-(WRITERS - 2) :] == [str(number) for number in range(2, WRITERS)]
        async with manager.connect() as connection:
            await connection.execute(text("DELETE FROM note"))


Begun = Callable[[], Awaitable[None]]


async def commit(manager: DatabaseSessionManager, begun: Begun) -> None:
    async with manager.transaction() as session:
        await session.execute(insert(Note).values(text="kept"))
        await begun()


async def commit_a_session(manager: DatabaseSessionManager, begun: Begun) -> None:
    async with manager.session() as session:
        await session.execute(insert(Note).values(text="kept"))
        await begun()
        await session.commit()


async def fail(manager: DatabaseSessionManager, begun: Begun) -> None:
    with suppress(ValueError):
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="lost"))
            await begun()
            raise ValueError


async def be_cancelled_in_a_statement(manager: DatabaseSessionManager, begun: Begun) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as timeout, manager.transaction() as session:
            await session.execute(insert(Note).values(text="lost"))
            await begun()
            timeout.reschedule(asyncio.get_running_loop().time() + 0.05)
            await session.execute(ENDLESS)


async def be_refused_at_the_commit(manager: DatabaseSessionManager, begun: Begun) -> None:
    with suppress(IntegrityError):
        async with manager.connect() as connection:
            await connection.execute(text("PRAGMA defer_foreign_keys=ON"))
            await connection.execute(insert(Note).values(text="lost", parent_id=1_000))
            await begun()


async def invalidate(manager: DatabaseSessionManager, begun: Begun) -> None:
    async with manager.session() as session:
        await session.execute(insert(Note).values(text="lost"))
        await begun()
        await session.invalidate()


async def drop_a_generator(manager: DatabaseSessionManager, begun: Begun) -> None:
    async def generate() -> AsyncIterator[None]:
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="lost"))
            await begun()
            yield

    generator = generate()
    await anext(generator)
    with suppress(UnexpectedRollbackError):
        await generator.aclose()  # type: ignore[attr-defined]


async def switch_foreign_keys(manager: DatabaseSessionManager, begun: Begun) -> None:
    async with manager.connect() as connection:
        await connection.execute(insert(Note).values(text="kept"))
    with suppress(IncompatibleTransactionError):  # The other one has written meanwhile.
        async with manager.connect() as connection:
            await connection.scalar(text("SELECT 1"))
            await begun()
            await connection.execute(text("PRAGMA foreign_keys=OFF"))


ENDS = [
    commit,
    commit_a_session,
    fail,
    be_cancelled_in_a_statement,
    be_refused_at_the_commit,
    invalidate,
    drop_a_generator,
    switch_foreign_keys,
]


@pytest.mark.parametrize("end", ENDS)
async def test_the_next_writer_begins_however_the_one_before_has_ended(
    manager: DatabaseSessionManager, end: Callable[[DatabaseSessionManager, Begun], Awaitable[None]]
) -> None:
    await connect_all(manager)
    next_one: list[asyncio.Task[None]] = []

    async def begun() -> None:
        waiting = manager.transaction.detached(write(manager, "next"))
        next_one.append(asyncio.create_task(waiting))
        await wait_for_connections(manager, 2)
        assert not next_one[0].done()

    async with asyncio.timeout(SOON):
        await end(manager, begun)
        await next_one[0]
    assert "next" in await notes(manager)
    assert "lost" not in await notes(manager)


async def test_the_next_writer_begins_if_sqlite_itself_has_rolled_back(
    manager: DatabaseSessionManager,
) -> None:
    await write(manager, "taken")
    async with asyncio.timeout(SOON), manager.session() as session:
        await session.execute(insert(Note).values(text="lost"))
        waiting = asyncio.create_task(manager.transaction.detached(write(manager, "next")))
        await wait_for_connections(manager, 2)
        with pytest.raises(IntegrityError):
            await session.execute(text("INSERT OR ROLLBACK INTO note (text) VALUES ('taken')"))
        await waiting  # while the session still has its connection
        await session.rollback()
    assert await notes(manager) == ["next", "taken"]


async def test_a_waiter_past_the_pool_timeout_is_told_so_and_the_others_go_on_waiting(
    settings: DatabaseSettings, manager: DatabaseSessionManager
) -> None:
    pool = PoolSettings(size=WRITERS + 4, max_overflow=0, timeout=0.3)
    async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as impatient:
        async with queue_behind_a_writer(impatient) as queue:
            start = monotonic()
            await asyncio.wait(queue.tasks)
            assert 0.2 < monotonic() - start < SOON
            for task in queue.tasks:
                assert isinstance(error := task.exception(), OperationalError)
                assert "database is locked" in str(error)
                assert is_retryable(error)
        await write(impatient, "later")
    assert await notes(manager) == ["first", "later"]


async def test_a_retry_waits_anew_behind_the_others(
    settings: DatabaseSettings, manager: DatabaseSessionManager
) -> None:
    pool = PoolSettings(size=WRITERS + 4, max_overflow=0, timeout=0.1)
    attempts = 0

    async def add() -> None:
        nonlocal attempts
        attempts += 1
        async with impatient.transaction() as session:
            session.add(Note(text="retried"))

    async def has_failed_once() -> bool:
        return attempts > 1

    impatient = DatabaseSessionManager(settings.model_copy(update={"pool": pool}))
    async with impatient, queue_behind_a_writer(impatient) as queue:
        retried = asyncio.create_task(impatient.transaction.run(add, retries=20))
        await until(has_failed_once)
        queue.release.set()
        await retried
    assert "retried" in await notes(manager)


async def test_close_ends_the_wait_of_all(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings.model_copy(update={"drain_timeout": 0.05}))
    await manager.open()
    async with manager.connect() as connection:
        await connection.run_sync(manager.metadata.create_all)
    await connect_all(manager)
    queue, holding = Queue(manager), asyncio.Event()
    tasks = [asyncio.create_task(queue.hold(holding))]
    await holding.wait()
    tasks += [asyncio.create_task(queue.wait_behind(str(number))) for number in range(WRITERS)]
    await wait_for_connections(manager, WRITERS + 1)
    async with asyncio.timeout(SOON):
        await manager.close()
        queue.release.set()
        await asyncio.wait(tasks)
    assert all(task.exception() is not None for task in tasks)
    async with manager:
        await write(manager, "anew")
        assert await notes(manager) == ["anew"]


async def test_readers_and_autocommit_blocks_do_not_wait_in_the_queue(
    manager: DatabaseSessionManager,
) -> None:
    async with queue_behind_a_writer(manager) as queue, asyncio.timeout(SOON):
        async with manager.transaction(read_only=True) as session:
            assert list(await session.scalars(text("SELECT text FROM note"))) == []
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            assert list(await session.scalars(text("SELECT text FROM note"))) == []
        async with manager.session() as session:
            assert list(await session.scalars(text("SELECT text FROM note"))) == []
        assert queue.done == []


async def test_code_inside_a_writing_transaction_is_refused_and_does_not_wait_for_itself(
    manager: DatabaseSessionManager,
) -> None:
    async with queue_behind_a_writer(manager) as queue:
        queue.release.set()
        async with asyncio.timeout(SOON), manager.transaction() as session:
            session.add(Note(text="outer"))
            await session.flush()
            with pytest.raises(IncompatibleTransactionError):
                async with manager.transaction(Propagation.REQUIRES_NEW):
                    pass
            with pytest.raises(IncompatibleTransactionError):
                async with manager.connect():
                    pass
            async with manager.transaction(Propagation.NESTED) as nested:
                nested.add(Note(text="inner"))
    assert {"outer", "inner"} < set(await notes(manager))


class TestOthers:
    """Writers that do not wait in the same queue."""

    async def test_a_writer_of_another_process_is_waited_for(
        self, manager: DatabaseSessionManager
    ) -> None:
        path = str(manager.engine.url.database)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = [asyncio.create_task(write(manager, str(number))) for number in range(3)]
            await wait_for_connections(manager, 3)
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in writing)
            writing[0].cancel()
            await asyncio.wait(writing[:1], timeout=SOON)
            assert writing[0].cancelled()
            other.execute("COMMIT")
            async with asyncio.timeout(SOON):
                await asyncio.gather(*writing[1:])
        assert await notes(manager) == ["1", "2"]

    async def test_two_managers_in_one_event_loop_both_get_their_turns(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async with DatabaseSessionManager(settings) as other, asyncio.timeout(20):
            await asyncio.gather(
                *(write(manager, f"a{number}") for number in range(30)),
                *(write(other, f"b{number}") for number in range(30)),
            )
        assert len(await notes(manager)) == 60

    async def test_managers_in_other_threads_get_their_turns_too(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async def write_all(name: str) -> None:
            async with DatabaseSessionManager(settings) as other, asyncio.timeout(20):
                await asyncio.gather(*(write(other, f"{name}{number}") for number in range(20)))

        async with asyncio.timeout(30):
            await asyncio.gather(
                asyncio.to_thread(asyncio.run, write_all("a")),
                asyncio.to_thread(asyncio.run, write_all("b")),
                *(write(manager, f"c{number}") for number in range(20)),
            )
        assert len(await notes(manager)) == 60

    async def test_a_sandbox_holds_the_lock_until_its_end(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        begun = asyncio.Event()

        async def write_outside() -> None:
            await begun.wait()
            await write(manager, "outside")

        waiting = asyncio.create_task(write_outside())
        async with DatabaseSessionManager(settings) as other:
            async with sandbox(other):
                await asyncio.gather(*(write(other, str(number)) for number in range(5)))
                begun.set()
                await wait_for_connections(manager, 1)
                await asyncio.sleep(0.1)
                assert not waiting.done()
            async with asyncio.timeout(SOON):
                await waiting
            await write(other, "after")
        assert await notes(manager) == ["after", "outside"]


def test_a_loop_that_was_closed_with_a_queue_leaves_none_to_the_next(
    tmp_path: Path,
) -> None:
    pool = PoolSettings(size=WRITERS + 4, max_overflow=0, timeout=30)
    manager = DatabaseSessionManager(
        DatabaseSettings(url=f"sqlite:///{tmp_path / 'loops.db'}", pool=pool)
    )

    async def leave_a_queue() -> None:
        await manager.open()
        async with manager.connect() as connection:
            await connection.run_sync(manager.metadata.create_all)
        await connect_all(manager)
        queue, holding = Queue(manager), asyncio.Event()
        tasks.append(asyncio.create_task(queue.hold(holding)))
        await holding.wait()
        tasks.extend(asyncio.create_task(queue.wait_behind(f"{n}")) for n in range(WRITERS))
        await wait_for_connections(manager, WRITERS + 1)

    async def go_on() -> list[str]:
        async with manager, asyncio.timeout(20):
            async with queue_behind_a_writer(manager) as queue:
                pass
            assert len(queue.done) == WRITERS
            return await notes(manager)

    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_a_queue())
    loop.close()  # without a word to the tasks, as asyncio.run() would say it
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    found = asyncio.run(go_on())
    assert found == sorted(["first", *map(str, range(WRITERS))])
