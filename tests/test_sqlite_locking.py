"""SQLite's write lock: a writer waits for its turn, or learns how to avoid the wait."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings

from .conftest import notes
from .models import Note
from .units_of_work import in_a_connection, in_a_transaction


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def settings(database_url: str) -> DatabaseSettings:
    return DatabaseSettings(url=database_url, pool=PoolSettings(size=5, max_overflow=5, timeout=30))


@pytest.mark.parametrize("how", ["flush", "insert", "text"])
async def test_sessions_that_only_write_wait_for_each_other(
    manager: DatabaseSessionManager, how: str
) -> None:
    async def add(number: int) -> None:
        async with manager.session() as session:
            if how == "flush":
                session.add(Note(text=f"{number}"))
                await session.flush()
            elif how == "insert":
                await session.execute(Note.__table__.insert().values(text=f"{number}"))  # type: ignore[attr-defined]
            else:
                await session.execute(text(f"INSERT INTO note (text) VALUES ('{number}')"))
            await asyncio.sleep(0.01)
            assert await session.scalar(select(func.count()).select_from(Note)) == len(seen) + 1
            await session.commit()
            seen.append(number)

    seen: list[int] = []
    await asyncio.gather(*(add(number) for number in range(8)))
    assert await notes(manager) == sorted(map(str, seen))


async def test_a_session_waits_for_the_lock_until_the_pool_timeout_and_can_be_cancelled(
    settings: DatabaseSettings,
) -> None:
    pool = PoolSettings(size=2, max_overflow=0, timeout=0.3)
    async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager:
        async with manager.connect() as connection:
            await connection.run_sync(manager.metadata.create_all)

        async def add() -> None:
            async with manager.session() as session:
                session.add(Note(text="lost"))
                await session.flush()

        async with manager.transaction() as holder:
            holder.add(Note(text="kept"))
            await holder.flush()
            start = monotonic()
            with pytest.raises(OperationalError, match="locked"):
                await asyncio.create_task(manager.transaction.detached(add()))
            assert 0.2 < monotonic() - start < 3
            waiting = asyncio.create_task(manager.transaction.detached(add()))
            await asyncio.sleep(0.02)
            waiting.cancel()
            start = monotonic()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert monotonic() - start < 1
        assert await notes(manager) == ["kept"]


@pytest.mark.parametrize("other", ["has committed", "is writing"])
async def test_a_session_that_has_read_is_refused_at_once_and_told_to_use_a_transaction(
    manager: DatabaseSessionManager, other: str
) -> None:
    async def write(done: asyncio.Event) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            await session.flush()
            if other == "is writing":
                written.set()
                await done.wait()

    done, written = asyncio.Event(), asyncio.Event()
    async with manager.session() as session:
        assert await session.scalar(select(func.count()).select_from(Note)) == 0
        writer = asyncio.create_task(manager.transaction.detached(write(done)))
        await (written.wait() if other == "is writing" else writer)
        start = monotonic()
        with pytest.raises(OperationalError, match="locked") as refused:
            await session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        assert monotonic() - start < 1
        assert (
            "use transaction(), which waits before it reads, or roll back"
            in refused.value.__notes__[0]
        )
        done.set()
        await writer
        await session.rollback()  # as it is told to
        assert await session.scalar(select(func.count()).select_from(Note)) == 1
        session.add(Note(text="too"))
        await session.commit()
    assert await notes(manager) == ["kept", "too"]


async def test_a_session_can_read_while_a_transaction_writes(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.transaction() as writer:
        writer.add(Note(text="kept"))
        await writer.flush()
        async with manager.session() as session:
            note = Note(text="never sent")
            session.add(note)
            session.expunge(note)
            assert list(await session.scalars(select(Note.text))) == []
    assert await notes(manager) == ["kept"]


class TestSQLiteLock:
    """One writer excludes another."""

    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    async def test_a_writer_waits_for_the_previous_writer(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def write(name: str) -> None:
            async with manager.transaction() as session:
                await session.execute(select(Note))
                await asyncio.sleep(0.01)
                session.add(Note(text=name))

        await asyncio.gather(*(write(str(number)) for number in range(5)))
        assert len(await notes(manager)) == 5

    async def test_a_cancelled_wait_for_the_lock_ends_at_once(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            waiting = asyncio.create_task(manager.transaction.detached(in_a_connection(manager)))
            await asyncio.sleep(0.05)
            waiting.cancel()
            async with asyncio.timeout(1):
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        assert await notes(manager) == ["first"]

    async def test_a_wait_for_the_lock_beyond_the_pool_timeout_is_an_error(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        impatient = settings.model_copy(update={"pool": PoolSettings(timeout=0.05)})
        async with DatabaseSessionManager(impatient) as other, manager.transaction() as session:
            session.add(Note(text="first"))
            await session.flush()
            with pytest.raises(OperationalError, match="locked"):
                await in_a_transaction(other)
            async with other.session() as reader:  # No writer excludes it.
                assert (await reader.scalars(select(Note))).all() == []

    async def test_a_cancelled_statement_releases_the_lock(
        self, manager: DatabaseSessionManager
    ) -> None:
        count = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        )

        async def run() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                await session.execute(text(count))

        task = asyncio.create_task(run())
        await asyncio.sleep(0.1)
        task.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError) as kept:
                await task
            await in_a_transaction(manager)
        assert (
            kept.value.__traceback__ is not None
        )  # Objects that it refers to must not hold the lock either.
        assert await notes(manager) == ["a", "b"]
