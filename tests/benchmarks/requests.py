"""Measure whole requests to one FastAPI application, built in several ways.

Each variant runs in a separate process, under 64 clients.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import psutil
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from ledger.compare.server import new_database, run_server
from sessionwire import DatabaseSessionManager, DatabaseSettings

from .applications.parts import POOL, Account, Base
from .load import CLIENTS, WrongAnswersError, check_installed, drive
from .report import Table, rotated
from .wire import url

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
ACCOUNTS = range(1, 1001)
SECONDS, WARM_UP = 3, 2  # seconds of load per measurement, and before the first


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    """Measure each variant. The table's note names peers that are missing or fail.

    Raises `NotInstalledError` where wrk is not installed.
    """
    check_installed()
    table = Table(
        "whole requests",
        ["requests per second", "p50", "p99", "processor time"],
        base=label(BY_HAND),
    )
    ratios: dict[str, list[list[float]]] = {}
    missing: dict[str, str] = {}
    settings = DatabaseSettings(url=url(server_socket_directory))
    async with (
        DatabaseSessionManager(settings) as manager,
        new_database(manager) as database,
        AsyncExitStack() as servers,
    ):
        await fill(database)
        running: dict[str, Server] = {}
        for name in APPLICATIONS:
            progress(f"starting {label(name)}")
            try:
                application = run_server(f"{__package__}.applications", name, database=database.url)
                address, process = await servers.enter_async_context(application)
                running[name] = Server(address, psutil.Process(process.pid))
                await running[name].under_load(WARM_UP)
            except (ChildProcessError, WrongAnswersError) as error:
                refuse(name, error, running, missing)
        for turn in range(rounds):
            found: dict[str, list[float]] = {}
            for name in rotated(list(running), turn):
                progress(f"round {turn + 1} of {rounds}: {label(name)}")
                try:
                    found[name] = await running[name].under_load(SECONDS)
                except (ChildProcessError, WrongAnswersError) as error:
                    refuse(name, error, running, missing)
            for name, one in found.items():
                ratios.setdefault(name, []).append(
                    list(map(float.__truediv__, one, found[BY_HAND]))
                )
    for name in running:
        columns = list(zip(*ratios[name], strict=True))
        table.rows[label(name)] = [median(column) for column in columns]
        table.spread[label(name)] = [(min(column), max(column)) for column in columns]
    table.note = (
        f"{CLIENTS} clients, a pool of {POOL['pool_size']}, one worker of "
        f"uvicorn {version('uvicorn')}, FastAPI {version('fastapi')}, "
        f"SQLAlchemy {version('sqlalchemy')}; medians of {rounds} rounds (lowest to highest), "
        "all answers right; the clients are connected before the load; each has called "
        "gc.freeze(); processor time is the server's own, for each request."
    )
    for name, reason in missing.items():
        table.note += f" Not measured: {label(name)}: {reason}."
    return [table]


@dataclass(frozen=True)
class Server:
    url: str
    process: psutil.Process

    async def under_load(self, seconds: int) -> list[float]:
        """Return the values of the table's columns.

        The last is the server's processor time, without that of the other processes.
        """
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


def refuse(
    name: str, error: Exception, running: dict[str, Server], missing: dict[str, str]
) -> None:
    if name in (BY_HAND, "with_sessionwire"):
        raise error
    running.pop(name, None)
    missing[name] = str(error).strip().splitlines()[-1]


async def fill(database: AsyncEngine) -> None:
    async with database.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        rows = [{"number": number, "owner": f"owner of {number}"} for number in ACCOUNTS]
        await connection.execute(insert(Account), rows)
