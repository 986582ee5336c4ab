"""Measure writes of one row on SQLite: one caller, and fifty that take turns."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import aiosqlite
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from sessionwire import CurrentSession, DatabaseSessionManager, DatabaseSettings

from .report import Table, Times, ratios, rotated
from .variants import BARE, EXPERT, SERVICE, Base, Item, Items, Write, add

AIOSQLITE = "aiosqlite"
# By name: how many callers, and how often each of them writes in a round.
CALLERS = {"1 caller": (1, 100), "50 callers": (50, 8)}
LOCK_TIMEOUT = 30  # seconds, as pool.timeout of sessionwire
# As sessionwire sets them. SQLite's default is synchronous=FULL: a commit waits for the disk.
PRAGMAS = f"""
    PRAGMA foreign_keys=ON; PRAGMA journal_mode=WAL; PRAGMA busy_timeout={LOCK_TIMEOUT * 1000};
"""


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    """Give each variant a file of its own, in one directory on a disk."""
    times: Times = defaultdict(lambda: defaultdict(list))
    processor_times: Times = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as directory:
        async with AsyncExitStack() as stack:
            writes: dict[str, Write] = {}
            files: dict[str, Path] = {}
            for number, (name, variant) in enumerate(VARIANTS.items()):
                files[name] = Path(directory, f"{number}.db")
                await create_table(files[name])
                writes[name] = await stack.enter_async_context(variant(files[name]))
            for turn in range(rounds + 1):  # the first one warms up
                for column in rotated(list(CALLERS), turn):
                    progress(f"{column}, round {turn} of {rounds}")
                    for name in rotated(list(writes), turn):
                        started = perf_counter(), process_time()
                        await write_by(*CALLERS[column], writes[name])
                        if turn:
                            times[column][name].append(perf_counter() - started[0])
                            processor_times[column][name].append(process_time() - started[1])
            done = (rounds + 1) * sum(callers * calls for callers, calls in CALLERS.values())
            for name, file in files.items():
                assert await count(file) == done, name
    note = (
        f"Medians of {rounds} rounds, in turns. Each write is a transaction of its own, which "
        "is on the disk when it ends. The first row is 1."
    )
    return [
        ratios("time per write on SQLite", times, EXPERT, note),
        ratios("processor time per write on SQLite", processor_times, EXPERT, "The same rounds."),
    ]


async def write_by(callers: int, calls: int, write: Write) -> None:
    async def call() -> None:
        for number in range(calls):
            await write(f"number {number}")

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(call())


async def create_table(file: Path) -> None:
    engine = new_engine(file)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.tables[Item.__tablename__].create)
    await engine.dispose()


async def count(file: Path) -> int:
    async with aiosqlite.connect(file) as connection:
        ((rows,),) = await connection.execute_fetchall("SELECT count(*) FROM item")
    return int(rows)


def new_engine(file: Path, isolation_level: str | None = None, **options: Any) -> AsyncEngine:
    url = URL.create("sqlite+aiosqlite", database=str(file))
    engine = create_async_engine(url, connect_args={"isolation_level": isolation_level}, **options)

    @event.listens_for(engine.sync_engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        connection.run_async(lambda driver: driver.executescript(PRAGMAS))

    return engine


@asynccontextmanager
async def sessions_of(engine: AsyncEngine) -> AsyncIterator[Write]:
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def write(text: str) -> int:
        async with sessions.begin() as session:
            item = add(session, text)
        return item.id

    yield write
    await engine.dispose()


def bare(file: Path) -> AbstractAsyncContextManager[Write]:
    """Begin as SQLAlchemy's documentation tells, and wait in SQLite."""
    engine = new_engine(file)

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return sessions_of(engine)


def by_an_expert(file: Path) -> AbstractAsyncContextManager[Write]:
    """Wait in the event loop for one connection, which begins without a call of its own.

    A query ahead of the first write is outside of the transaction then.
    """
    return sessions_of(
        new_engine(
            file,
            isolation_level="IMMEDIATE",
            pool_size=1,
            max_overflow=0,
            pool_timeout=LOCK_TIMEOUT,
            pool_reset_on_return=None,
        )
    )


@asynccontextmanager
async def by_the_driver(file: Path) -> AsyncIterator[Write]:
    lock = asyncio.Lock()
    async with aiosqlite.connect(file, isolation_level="IMMEDIATE") as connection:
        await connection.executescript(PRAGMAS)

        async def write(text: str) -> int:
            async with lock:
                cursor = await connection.execute("INSERT INTO item (text) VALUES (?)", (text,))
                await connection.commit()
            assert cursor.lastrowid is not None
            return cursor.lastrowid

        yield write


@asynccontextmanager
async def service(file: Path) -> AsyncIterator[Write]:
    manager = DatabaseSessionManager()
    manager.init(DatabaseSettings(url=URL.create("sqlite", database=str(file))))
    items = Items(CurrentSession(manager), manager.transaction)

    async def write(text: str) -> int:
        return (await items.add(text)).id

    yield write
    await manager.close()


VARIANTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Write]]] = {
    EXPERT: by_an_expert,
    BARE: bare,
    AIOSQLITE: by_the_driver,
    SERVICE: service,
}
