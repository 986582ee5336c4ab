"""Starts a database and two servers, sends both the same, and holds what they answered against their books."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

import httpx
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sessionwire import DatabaseSessionManager

from .books import ACCOUNTS, Account, Base, Payer, Payment
from .traffic import FAULTLESS, REGULARS, Kind, Request, plan, send

IMPLEMENTATIONS = ("usual", "ours")  # modules of this package
PATIENCE = 30.0  # seconds for a server to start, to stop, and to come to rest


@dataclass(frozen=True)
class Findings:
    """What the books of one implementation say of its answers."""

    lost: int  # answered 2xx, row missing
    kept: int  # answered an error, row written
    failed: int  # answered an error or not at all, though nothing was wrong
    held: int  # connections not given back


async def compare(directory: Path, requests: int, workers: int, answered: Callable[[], None]) -> list[Findings]:
    """Of the usual recipe, and of sessionwire."""
    async with DatabaseSessionManager(f"embedded:{directory}") as server:
        return [await try_out(server, name, plan(requests), workers, answered) for name in IMPLEMENTATIONS]


async def try_out(
    server: DatabaseSessionManager, name: str, requests: list[Request], workers: int, answered: Callable[[], None]
) -> Findings:
    async with new_database(server) as books, served(name, books) as url:
        await send(url, requests, workers, answered)
        held = await at_rest(server, books)
        async with books.connect() as connection:
            rows = set(await connection.scalars(select(Payment.key)))
    return Findings(
        lost=sum(is_good(request) and writes(request) and request.order.key not in rows for request in requests),
        kept=sum(is_bad(request) and request.order.key in rows for request in requests),
        failed=sum(not is_good(request) and request.kind in FAULTLESS for request in requests),
        held=held,
    )


def is_good(request: Request) -> bool:
    return request.status is not None and request.status < 300


def is_bad(request: Request) -> bool:
    return request.status is not None and request.status >= 400


def writes(request: Request) -> bool:
    return request.kind is not Kind.REPORT


@asynccontextmanager
async def new_database(server: DatabaseSessionManager) -> AsyncGenerator[AsyncEngine]:
    """Of this run alone: another one may be under way."""
    name = f"trial_{uuid4().hex}"
    administration = server.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with administration.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
        host = await connection.scalar(text("SHOW unix_socket_directories"))
    books = create_async_engine(f"postgresql+asyncpg://postgres@/{name}?host={host}")
    try:
        async with books.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Account), [{"id": number} for number in ACCOUNTS])
            await connection.execute(insert(Payer), [{"name": payer} for payer in REGULARS])
        yield books
    finally:
        await books.dispose()
        async with administration.connect() as connection:
            await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@asynccontextmanager
async def served(name: str, books: AsyncEngine) -> AsyncGenerator[str]:
    """The implementation in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "-m", "uvicorn", f"ledger.compare.{name}:app", "--port", f"{port}", "--log-level", "critical"
    url = books.url.render_as_string(hide_password=False)
    with TemporaryFile("w+") as complaints:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, env=os.environ | {"DATABASE_URL": url}, stderr=complaints
        )
        try:
            yield await answering(process, f"http://127.0.0.1:{port}")
            if process.returncode is not None:
                raise ChildProcessError("it ended under the traffic")
        except ChildProcessError as error:
            complaints.seek(0)
            raise ChildProcessError(f"the server of {name}.py: {error}\n{complaints.read()[-2000:]}") from None
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), PATIENCE)


async def answering(process: Process, url: str) -> str:
    async with httpx.AsyncClient() as client, asyncio.timeout(PATIENCE):
        while process.returncode is None:
            try:
                await client.get(f"{url}/docs")
                return url
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    raise ChildProcessError("it did not start")


async def at_rest(server: DatabaseSessionManager, books: AsyncEngine) -> int:
    """How many connections are in a transaction when nobody asks for anything any more."""
    count = text("SELECT state, count(*) FROM pg_stat_activity WHERE datname = :name AND state <> 'idle' GROUP BY 1")
    seen: dict[str, int] | None = None
    async with asyncio.timeout(PATIENCE), server.engine.connect() as connection:
        while True:
            last, seen = seen, dict((await connection.execute(count, {"name": books.url.database})).all())
            await connection.rollback()
            if seen == last and "active" not in seen:
                return sum(seen.values())
            await asyncio.sleep(0.5)
