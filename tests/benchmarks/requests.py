"""Whole requests: one FastAPI application in several ways, each in a process of its own, under 64 clients."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from uuid import uuid4

import httpx
import psutil
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import create_async_engine

from .applications.parts import POOL, Account, Base
from .load import CLIENTS, WrongAnswersError, check_installed, drive
from .report import Table

BY_HAND = "by_hand"
APPLICATIONS = {  # modules of `applications`, with the distribution that each is about
    BY_HAND: "fastapi",
    "with_sessionwire": "sessionwire",
    "with_dependency_injector": "dependency-injector",
    "with_dishka": "dishka",
    "with_wireup": "wireup",
    "with_that_depends": "that-depends",
    "with_advanced_alchemy": "advanced-alchemy",
    "with_context_async_sqlalchemy": "context-async-sqlalchemy",
}
ROOT = Path(__file__).parents[2]
ACCOUNTS = range(1, 1001)
SECONDS, WARM_UP = 3, 2  # of load, for each measurement, and before the first
PATIENCE = 30.0  # seconds for a server to start and to stop


async def run(server_socket_directory: str, rounds: int, progress: Callable[[str], None]) -> list[Table]:
    """A peer that isn't installed, doesn't start or answers wrongly is named in the table's note.

    Raises `NotInstalledError` where wrk is not installed.
    """
    check_installed()
    table = Table("whole requests", ["requests per second", "p50", "p99", "processor time"], base=label(BY_HAND))
    ratios: dict[str, list[list[float]]] = {}
    missing: dict[str, str] = {}
    async with new_database(server_socket_directory) as database, AsyncExitStack() as servers:
        running: dict[str, Server] = {}
        for name in APPLICATIONS:
            progress(f"starting {label(name)}")
            try:
                running[name] = await servers.enter_async_context(served(name, database))
                await running[name].under_load(WARM_UP)
            except (ChildProcessError, WrongAnswersError) as error:
                refuse(name, error, running, missing)
        for turn in range(rounds):
            found: dict[str, list[float]] = {}
            names = list(running)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                progress(f"round {turn + 1} of {rounds}: {label(name)}")
                try:
                    found[name] = await running[name].under_load(SECONDS)
                except WrongAnswersError as error:
                    refuse(name, error, running, missing)
            for name, one in found.items():
                ratios.setdefault(name, []).append(list(map(float.__truediv__, one, found[BY_HAND])))
    for name in running:
        table.rows[label(name)] = [median(column) for column in zip(*ratios[name], strict=True)]
    table.note = (
        f"{CLIENTS} clients, a pool of {POOL['pool_size']}, one worker of uvicorn {version('uvicorn')}, "
        f"FastAPI {version('fastapi')}, SQLAlchemy {version('sqlalchemy')}; medians of {rounds} rounds, "
        "all answers right; each has called gc.freeze(); processor time is the server's own, for each request."
    )
    for name, reason in missing.items():
        table.note += f" Not measured: {label(name)}: {reason}."
    return [table]


@dataclass(frozen=True)
class Server:
    url: str
    process: psutil.Process

    async def under_load(self, seconds: int) -> list[float]:
        """As the table's columns have it; the last is the server's own time, which the other processes don't take."""
        before = sum(self.process.cpu_times()[:2])
        found = await drive(self.url, seconds)
        taken = sum(self.process.cpu_times()[:2]) - before
        return [found.throughput, found.p50, found.p99, taken / found.answers]


def label(name: str) -> str:
    distribution = APPLICATIONS[name]
    if name == BY_HAND:
        return "written by hand"
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def refuse(name: str, error: Exception, running: dict[str, Server], missing: dict[str, str]) -> None:
    if name in (BY_HAND, "with_sessionwire"):
        raise error
    running.pop(name, None)
    missing[name] = str(error).strip().splitlines()[-1]


@asynccontextmanager
async def new_database(host: str) -> AsyncGenerator[str]:
    """The URL of a database of this run alone, with its accounts."""
    name = f"requests_{uuid4().hex}"
    url = f"postgresql+asyncpg://postgres@/{name}?host={host}"
    administration = create_async_engine(
        f"postgresql+asyncpg://postgres@/postgres?host={host}", isolation_level="AUTOCOMMIT"
    )
    try:
        async with administration.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            database = create_async_engine(url)
            async with database.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
                rows = [{"number": number, "owner": f"owner of {number}"} for number in ACCOUNTS]
                await connection.execute(insert(Account), rows)
            await database.dispose()
            yield url
        finally:
            async with administration.connect() as connection:
                await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        await administration.dispose()


@asynccontextmanager
async def served(name: str, database: str) -> AsyncGenerator[Server]:
    """The application in a process of its own. Raises `ChildProcessError` where it doesn't start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "-m", f"{__package__}.applications", name, str(port)
    with TemporaryFile("w+") as complaints:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=ROOT, env=os.environ | {"DATABASE_URL": database}, stderr=complaints
        )
        try:
            if not await answers(process, f"http://127.0.0.1:{port}/accounts/1"):
                complaints.seek(0)
                raise ChildProcessError(complaints.read() or "it did not start")
            yield Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), PATIENCE)


async def answers(process: Process, url: str) -> bool:
    async with httpx.AsyncClient() as client, asyncio.timeout(PATIENCE):
        while process.returncode is None:
            try:
                await client.get(url)
                return True
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    return False
