"""Count the messages of a unit of work that wait for an answer of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from tests.proxy import Proxy

from .report import Table
from .variants import KEY, TEXT, VARIANTS, items
from .wire import url

UNITS = 10
IDLE = 1.2  # seconds; longer than sessionwire's `pool.ping_after`


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    table = Table(
        "messages to the server",
        ["read", "read after idling", "write", "first read", "first write"],
        note="A first one opens a connection and prepares its statement; "
        "asyncpg's pool resets a connection each time.",
    )
    proxy = Proxy()
    async with (
        items(server_socket_directory) as database,
        proxy.open(server_socket_directory) as port,
    ):

        async def count(unit: Callable[[], Awaitable[object]], times: int = 1) -> float:
            before = proxy.round_trips
            for _ in range(times):
                await unit()
            return (proxy.round_trips - before) / times

        progress("reading")
        reads: dict[str, list[float]] = {}
        async with AsyncExitStack() as stack:
            readers: dict[str, Callable[[], Awaitable[object]]] = {}
            for name, variant in VARIANTS.items():
                work = await stack.enter_async_context(variant(url("127.0.0.1", port)))

                async def read(work=work) -> None:
                    assert await work.read(KEY) == TEXT

                readers[name] = read
                first, _ = await count(read), await count(read)
                reads[name] = [first, await count(read, UNITS)]
            await asyncio.sleep(IDLE)
            for name, read in readers.items():
                reads[name].append(await count(read))
        progress("writing")
        for name, variant in VARIANTS.items():
            async with variant(url("127.0.0.1", port)) as work:

                async def write(work=work, text=name) -> None:
                    key = await work.write(text)
                    assert (
                        await database.fetchval("SELECT text FROM item WHERE id = $1", key) == text
                    )

                first_write, _ = await count(write), await count(write)
                warm_write = await count(write, UNITS)
            first_read, warm_read, idle_read = reads[name]
            table.rows[name] = [warm_read, idle_read, warm_write, first_read, first_write]
    return [table]
