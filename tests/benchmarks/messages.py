"""Count the messages of a unit of work that wait for an answer of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import count, cycle
from typing import Any

import asyncpg

from tests.proxy import Proxy

from .report import Table
from .variants import APPLICATION, KEY, TENANTS, TEXT, VARIANTS, Work, Write, items
from .wire import url

UNITS = 10
IDLE = 1.2  # seconds; longer than sessionwire's `pool.ping_after`

Unit = Callable[[], Awaitable[None]]


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    table = Table(
        "messages to the server",
        [
            "read",
            "read after idling",
            "write",
            "savepoint",
            "snapshot",
            "tenant's read",
            "first read",
            "first write",
        ],
        note="A first one opens a connection and prepares its statement; "
        "asyncpg's pool resets a connection each time. "
        "A savepoint has one write, in a transaction that is open; a snapshot has two reads.",
    )
    proxy = Proxy()
    async with (
        items(server_socket_directory) as database,
        proxy.open(server_socket_directory) as port,
    ):
        address = url("127.0.0.1", port, APPLICATION)

        async def messages(unit: Unit, times: int = 1) -> float:
            before = proxy.round_trips
            for _ in range(times):
                await unit()
            return (proxy.round_trips - before) / times

        async def cold_and_warm(unit: Unit) -> tuple[float, float]:
            first, _ = await messages(unit), await messages(unit)
            return first, await messages(unit, UNITS)

        progress("reading")
        reads: dict[str, list[float]] = {}
        async with AsyncExitStack() as stack:
            readers: dict[str, Unit] = {}
            for name, variant in VARIANTS.items():
                work = await stack.enter_async_context(variant(address))
                readers[name] = partial(read, work)
                reads[name] = [*await cold_and_warm(readers[name])]
            await asyncio.sleep(IDLE)
            for name, reader in readers.items():
                reads[name].append(await messages(reader))
        progress("writing")
        for name, variant in VARIANTS.items():
            async with variant(address) as work:
                first_write, write = await cold_and_warm(partial(insert, work.write, database))
                savepoint = await in_savepoints(work, database, cold_and_warm)
                _, snapshot = await cold_and_warm(partial(read_snapshot, work, database))
                _, tenants_read = await cold_and_warm(partial(read_as, work, cycle(TENANTS)))
            first_read, warm_read, idle_read = reads[name]
            table.rows[name] = [
                warm_read,
                idle_read,
                write,
                savepoint,
                snapshot,
                tenants_read,
                first_read,
                first_write,
            ]
    return [table]


async def read(work: Work) -> None:
    assert await work.read(KEY) == TEXT


numbers = count()


async def insert(write: Write, database: asyncpg.Connection[Any]) -> None:
    text = f"number {next(numbers)}"
    key = await write(text)
    assert await database.fetchval("SELECT text FROM item WHERE id = $1", key) == text


async def in_savepoints(
    work: Work,
    database: asyncpg.Connection[Any],
    cold_and_warm: Callable[[Unit], Awaitable[tuple[float, float]]],
) -> float:
    written: dict[int, str] = {}
    async with work.savepoints() as write:

        async def insert_nested() -> None:
            text = f"number {next(numbers)}"
            written[await write(text)] = text

        _, warm = await cold_and_warm(insert_nested)
        assert await database.fetch("SELECT FROM item WHERE id = ANY($1)", list(written)) == []
    rows = await database.fetch("SELECT id, text FROM item WHERE id = ANY($1)", list(written))
    assert dict(rows) == written
    return warm


async def read_snapshot(work: Work, database: asyncpg.Connection[Any]) -> None:
    async def insert_meanwhile() -> None:
        await database.execute("INSERT INTO item (text) VALUES ('not in the snapshot')")

    before, after = await work.count_twice(insert_meanwhile)
    assert before == after == await database.fetchval("SELECT count(*) FROM item") - 1


async def read_as(work: Work, tenants: Any) -> None:
    tenant = next(tenants)
    assert await work.read_as(tenant) == TENANTS[tenant]
