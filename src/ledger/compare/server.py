"""A database of a run alone, since another run may be under way, and a server on it in a process of its own."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from tempfile import TemporaryFile
from uuid import uuid4

import httpx
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sessionwire import DatabaseSessionManager

PATIENCE = 30.0  # seconds for a server to start, to stop, and to come to rest


@asynccontextmanager
async def new_database(server: DatabaseSessionManager) -> AsyncGenerator[AsyncEngine]:
    """An empty one on this PostgreSQL, for as long as the block lasts."""
    name = f"trial_{uuid4().hex}"
    administration = server.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with administration.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
        host = await connection.scalar(text("SHOW unix_socket_directories"))
    database = create_async_engine(URL.create("postgresql+asyncpg", "postgres", database=name, query={"host": host}))
    try:
        yield database
    finally:
        await database.dispose()
        async with administration.connect() as connection:
            await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@asynccontextmanager
async def served(*command: str, database: URL) -> AsyncGenerator[tuple[str, Process]]:
    """Run a module of Python's with these arguments and a free port. Yields its URL as soon as it answers there.

    Raises `ChildProcessError` where it doesn't. To that, and to one of the block, what it has complained of is added.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"DATABASE_URL": database.render_as_string(hide_password=False)}
    with TemporaryFile("w+") as complaints:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, f"{port}", env=environment, stderr=complaints
        )
        try:
            yield await _answering(process, f"http://127.0.0.1:{port}"), process
        except ChildProcessError as error:
            complaints.seek(0)
            raise ChildProcessError(f"{' '.join(command)}: {error}\n{complaints.read()[-2000:]}") from None
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), PATIENCE)


async def _answering(process: Process, url: str) -> str:
    async with httpx.AsyncClient() as client, asyncio.timeout(PATIENCE):
        while process.returncode is None:
            try:
                await client.get(f"{url}/docs")
                return url
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    raise ChildProcessError("it did not start")
