"""One run: a scenario and a seed in, a verdict out."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from time import monotonic
from typing import Any, cast

import psutil
from sqlalchemy import func, select

from ledger.container import Container
from ledger.models import Account, Transfer
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSessionManager, DatabaseSettings, Lifespan
from tests.cluster import Cluster, Server, cluster

from .callers import Callers, witness
from .network import FaultyNetwork
from .scenarios import APPLICATION, DATABASE, Place, Scenario, World
from .telemetry import telemetry_of
from .verdict import (
    Living,
    Verdict,
    judge_calls,
    judge_recovery,
    judge_telemetry,
    judge_totals,
)

COMMIT = ROLLBACK = 1.0  # seconds: how long their answers are waited for
LONGEST = 60  # seconds of a whole run
OPENING = Decimal(1000)


@dataclass
class Ground:
    """Where a run takes place."""

    url: str  # for the callers
    network: FaultyNetwork | None = None
    server: Server | None = None
    cluster: Cluster | None = None
    path: str = ""

    async def connections(self, server: Server | None) -> int:
        """Count the callers' connections in the server; for a file, their threads."""
        if server is None:
            return sum(
                thread.name.endswith("(_connection_worker_thread)")
                for thread in threading.enumerate()
            )
        query = "SELECT 1 FROM pg_stat_activity WHERE application_name = $1"
        return len(await server.execute(query, APPLICATION))

    async def connections_left(self, server: Server | None) -> int:
        """Count again after the end, when SQLite itself has closed the file too."""
        holding = sum(file.path == self.path for file in psutil.Process().open_files())
        return max(await self.connections(server), holding)


async def run(
    scenario: Scenario,
    seed: int,
    shared: Server,
    seconds: float,
    *,
    pipeline: bool = True,
    driver: str = "asyncpg",
) -> Verdict:
    """Run a scenario for this long. Runs without their own server use `shared`."""
    loop = asyncio.get_running_loop()
    reports: list[str] = []
    loop.set_exception_handler(
        lambda _, context: reports.append(f"{context.get('exception') or context['message']!r}")
    )
    # pytest keeps each record, and so the session that it is about.
    logging.disable()
    try:
        async with asyncio.timeout(LONGEST):
            verdict = await _run(scenario, seed, shared, seconds, pipeline, driver)
    finally:
        logging.disable(logging.NOTSET)
        loop.set_exception_handler(None)
    verdict.counts.reports = len(reports)
    verdict.details += reports
    return verdict


async def _run(
    scenario: Scenario, seed: int, shared: Server, seconds: float, pipeline: bool, driver: str
) -> Verdict:
    verdict = Verdict(scenario.name, seed)
    counts = verdict.counts
    random = Random(f"{scenario.name}-{seed}")
    tasks = asyncio.all_tasks()
    async with _ground(scenario.place, random, shared) as ground:
        async with _books(ground.server, ground) as books:
            accounts = await _open_accounts(_manager(books), scenario.manner.accounts)
        before = Living()
        settings = DatabaseSettings(
            url=ground.url.replace("postgresql:", f"postgresql+{driver}:"),
            pool=scenario.pool,
            connect_timeout=2,
            drain_timeout=2,
            commit_timeout=COMMIT,
            rollback_timeout=ROLLBACK,
            pipeline=pipeline,
            application_name=APPLICATION,
        )
        container = Container(settings=LedgerSettings(database=settings))
        async with Lifespan(container), AsyncExitStack() as until_counted:
            told = until_counted.enter_context(telemetry_of(_manager(container)))
            callers = Callers(container, scenario.manner, f"{scenario.name}-{seed}", accounts)
            missing = cast(Any, None)  # Scenarios use only what their place has.
            world = World(
                random=random,
                seconds=seconds,
                until_counted=until_counted,
                callers=callers,
                manager=_manager(container),
                path=ground.path,
                server=ground.server or missing,
                cluster=ground.cluster or missing,
                network=ground.network or missing,
            )
            async with callers.at_work():
                await scenario.faults(world)
            if not pipeline:  # Nothing is looked up then.
                for call in callers.calls:
                    call.reason = ""
            totals = world.manager.status().transactions
            judge_totals(verdict, callers.calls, totals, world.holds)
            judge_telemetry(verdict, totals, told.in_spans, told.read_metrics())
            counts.still_open = await _within_a_second(lambda: _still_open(world.manager))
            bound = scenario.pool.size + scenario.pool.max_overflow
            counts.connections_over = await _within_a_second(
                lambda: _more_than(bound, ground.connections(world.server))
            )
            await until_counted.aclose()
            after = Living()
            counts.sessions_left = max(0, after.sessions - before.sessions)
            counts.scopes_left = max(0, after.scopes - before.scopes)
        counts.connections_left = await _within_a_second(
            lambda: ground.connections_left(world.server)
        )
        counts.drivers_left = max(0, Living().drivers - before.drivers)
        async with _books(world.server, ground) as books:
            await _judge(verdict, callers, books)
    counts.tasks_left = await _within_a_second(lambda: _tasks_besides(tasks))
    if world.returned is not None:
        judge_recovery(verdict, callers.calls, world.returned)
    counts.longest = max(call.ended - call.began for call in callers.calls)
    counts.overrun = max(call.ended - call.began - call.limit for call in callers.calls) - max(
        COMMIT, ROLLBACK
    )
    return verdict


@asynccontextmanager
async def _ground(place: Place, random: Random, shared: Server) -> AsyncIterator[Ground]:
    if place is Place.FILE:
        with tempfile.TemporaryDirectory(prefix="sessionwire-") as directory:
            path = f"{directory}/books.db"
            yield Ground(f"sqlite:///{path}", path=path)
    elif place in (Place.SERVER, Place.DIRECT):
        await shared.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        await shared.execute(f"CREATE DATABASE {DATABASE}")
        if place is Place.DIRECT:
            yield Ground(shared.tcp_url(DATABASE), server=shared)
        else:
            async with _network(random, shared) as (network, url):
                yield Ground(url, network, shared)
    else:
        async with cluster(tcp=True, synchronous=True) as both:
            await both.primary.execute(f"CREATE DATABASE {DATABASE}")
            async with _network(random, both.primary) as (network, url):
                if place is Place.BOTH:
                    hosts = "&".join(
                        f"host=127.0.0.1:{server.port}" for server in (both.primary, both.standby)
                    )
                    url = f"postgresql://postgres@/{DATABASE}?{hosts}&target_session_attrs=primary&sslmode=disable"
                yield Ground(url, network, both.primary, both)


@asynccontextmanager
async def _network(random: Random, server: Server) -> AsyncIterator[tuple[FaultyNetwork, str]]:
    network = FaultyNetwork(random)
    async with network.open(server.host) as port:
        yield network, f"postgresql://postgres@127.0.0.1:{port}/{DATABASE}?sslmode=disable"


@asynccontextmanager
async def _books(server: Server | None, ground: Ground) -> AsyncIterator[Container]:
    """Yield the ledger as an auditor sees it, past all faults."""
    url = ground.url if server is None else server.url(DATABASE)
    async with Lifespan(
        Container(settings=LedgerSettings(database=DatabaseSettings(url=url)))
    ) as container:
        manager = _manager(container)
        await manager.migrate()
        async with manager.connect() as connection:
            await connection.run_sync(witness.metadata.create_all)
        yield container


async def _open_accounts(manager: DatabaseSessionManager, count: int) -> list[int]:
    async with manager.transaction() as session:
        opened = [Account(owner="", opening=OPENING, balance=OPENING) for _ in range(count)]
        session.add_all(opened)
        await session.flush()
        return [account.id for account in opened]


async def _judge(verdict: Verdict, callers: Callers, books: Container) -> None:
    async with _manager(books).connect() as connection:
        marks = await connection.execute(
            select(witness.c.call, func.count()).group_by(witness.c.call)
        )
        transfers = await connection.execute(select(Transfer.id))
        judge_calls(
            verdict, callers.calls, {call: rows for call, rows in marks}, set(transfers.scalars())
        )
    audit = await books.accounts().audit()
    verdict.counts.wrong_accounts = audit.mismatched_accounts + (audit.balance != audit.opening)


def _manager(container: Container) -> DatabaseSessionManager:
    return cast(DatabaseSessionManager, container.db.sessionmanager())


async def _still_open(manager: DatabaseSessionManager) -> int:
    status = manager.status()
    return status.open_scopes + status.pool.in_use + status.pool.waiting


async def _more_than(bound: int, count: Awaitable[int]) -> int:
    return max(0, await count - bound)


async def _tasks_besides(those: set[asyncio.Task[Any]]) -> int:
    return len(asyncio.all_tasks() - those - {asyncio.current_task()})


async def _within_a_second(count: Callable[[], Awaitable[int]]) -> int:
    """Return the count as soon as it is 0, or otherwise after a second."""
    until = monotonic() + 1
    while (found := await count()) and monotonic() < until:
        await asyncio.sleep(0.02)
    return found
