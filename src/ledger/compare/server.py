"""Create a database for one run, and run a server on it in another process."""

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

# Seconds that a server has to start, to stop, and to end its transactions.
SERVER_TIMEOUT = 30.0


@asynccontextmanager
async def new_database(server: DatabaseSessionManager) -> AsyncGenerator[AsyncEngine]:
    """Create an empty database on this server, and drop it after the block."""
    name = f"run_{uuid4().hex}"
    administration = server.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with administration.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
        host = await connection.scalar(text("SHOW unix_socket_directories"))
    database = create_async_engine(
        URL.create("postgresql+asyncpg", "postgres", database=name, query={"host": host})
    )
    try:
        yield database
    finally:
        await database.dispose()
        async with administration.connect() as connection:
            await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@asynccontextmanager
async def run_server(*command: str, database: URL) -> AsyncGenerator[tuple[str, Process]]:
    """Run a Python module as a server on a free port, and yield its URL.

    Args:
        command: the module and its arguments; the port is added at the end.
        database: the URL that the server finds in the variable DATABASE_URL.

    Raises:
        ChildProcessError: The server did not start, or the block raised this error.
            The end of the server's stderr is added to the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"DATABASE_URL": database.render_as_string(hide_password=False)}
    with TemporaryFile("w+") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, f"{port}", env=environment, stderr=stderr
        )
        try:
            yield await _wait_until_it_answers(process, f"http://127.0.0.1:{port}"), process
        except ChildProcessError as error:
            stderr.seek(0)
            raise ChildProcessError(
                f"{' '.join(command)}: {error}\n{stderr.read()[-2000:]}"
            ) from None
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), SERVER_TIMEOUT)


async def _wait_until_it_answers(process: Process, url: str) -> str:
    async with httpx.AsyncClient() as client, asyncio.timeout(SERVER_TIMEOUT):
        while process.returncode is None:
            try:
                await client.get(f"{url}/docs")
                return url
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    raise ChildProcessError("it did not start")
