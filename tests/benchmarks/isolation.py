"""Measure how long a clean database takes: sandbox, template copy, or new tables."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import perf_counter

from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, insert, select
from sqlalchemy import Table as Schema

from sessionwire import DatabaseSessionManager, DatabaseSettings
from sessionwire.embedded import EmbeddedServer
from sessionwire.testing import DatabaseTemplate, sandbox
from sessionwire.testing._servers import disable_durability, temporary_directory

from .report import Table, Times, ratios, rotated

ANEW, SANDBOX, COPY = "drop and create", "sessionwire, sandbox", "sessionwire, template"
METADATA = MetaData()
TABLES = [
    Schema(
        f"part_{number}",
        METADATA,
        Column("id", Integer, primary_key=True),
        Column("name", String, nullable=False, unique=True),
        *([Column("of", ForeignKey(f"part_{number - 1}.id"), index=True)] if number else []),
    )
    for number in range(20)
]
Ready = Callable[[], AbstractAsyncContextManager[DatabaseSessionManager]]


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    """Measure on a server for tests, as the pytest plugin uses it."""
    times: Times = defaultdict(lambda: defaultdict(list))
    with (
        tempfile.TemporaryDirectory(dir=temporary_directory()) as directory,
        EmbeddedServer(Path(directory, "data")) as server,
    ):
        await disable_durability(DatabaseSettings(url=server.url))
        for kind, address in (
            ("PostgreSQL", server.url),
            ("SQLite", f"sqlite:///{Path(directory, 'tests.db')}"),
        ):
            async with (
                DatabaseSessionManager(address, metadata=METADATA) as manager,
                DatabaseTemplate(address, create_tables) as template,
            ):
                await create_tables(manager)
                ways: dict[str, Ready] = {
                    ANEW: lambda manager=manager: anew(manager),
                    SANDBOX: lambda manager=manager: sandbox(manager),
                    COPY: lambda template=template: copied(template),
                }
                for turn in range(rounds + 1):
                    progress(f"{kind}, round {turn} of {rounds}")
                    for way in rotated(list(ways), turn):
                        taken = await seconds_around_a_test(ways[way])
                        if turn:  # the first one warms up
                            times[kind][way].append(taken)
                async with manager.connect() as connection:
                    await manager.drop_all(connection)
    return [
        ratios(
            "time to isolate a test",
            times,
            ANEW,
            f"{len(TABLES)} tables; medians of {rounds} rounds.",
        )
    ]


async def create_tables(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.run_sync(METADATA.create_all)


@asynccontextmanager
async def anew(manager: DatabaseSessionManager) -> AsyncIterator[DatabaseSessionManager]:
    yield manager
    async with manager.connect() as connection:
        await manager.drop_all(connection)
        await manager.create_all(connection)


@asynccontextmanager
async def copied(template: DatabaseTemplate) -> AsyncIterator[DatabaseSessionManager]:
    async with template.copy() as copy, DatabaseSessionManager(copy.settings) as manager:
        yield manager


async def seconds_around_a_test(ready: Ready) -> float:
    """Measure before and after a test that finds the tables empty, and writes."""
    started = perf_counter()
    async with ready() as manager:
        began = perf_counter()
        async with manager.transaction() as session:
            assert (await session.execute(select(TABLES[0]))).all() == []
            await session.execute(insert(TABLES[0]).values(name="left"))
        ended = perf_counter()
    return perf_counter() - started - (ended - began)
