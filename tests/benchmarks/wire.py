"""The way to the server: its address, and one that is longer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import URL

from tests.proxy import Proxy


def url(host: str, port: int = 5432, user: str = "postgres") -> URL:
    """Return the server's URL for SQLAlchemy; `host` may be its socket's directory."""
    query = {"host": host} if host.startswith("/") else {}
    return URL.create(
        "postgresql+asyncpg",
        user,
        host=None if query else host,
        port=None if query else port,
        database="postgres",
        query=query,
    )


@asynccontextmanager
async def far_away(socket_directory: str, delay: float) -> AsyncIterator[URL]:
    """Put the server behind a longer wire, in a process that is not measured."""
    arguments = "-m", __name__, socket_directory, str(delay)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield url("127.0.0.1", int(await process.stdout.readline()))
    finally:
        process.terminate()
        await process.wait()


async def main(socket_directory: str, delay: str) -> None:
    async with Proxy(float(delay)).open(socket_directory) as port:
        print(port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
