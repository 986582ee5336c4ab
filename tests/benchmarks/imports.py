"""What it takes to start: the import, and a container that is built and wired."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from types import ModuleType

from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sessionwire import DatabaseContainer

from .report import Table, Times, ratios

GROUND = "what it stands on"
IMPORTS = {GROUND: "sqlalchemy.ext.asyncio, pydantic_settings", "sessionwire": "sessionwire"}
TIMED = "from time import perf_counter as now; started = now(); import {}; print(now() - started)"
URL = "postgresql+asyncpg://localhost/shop"
BUILT, FUNCTIONS = 50, 100


class Repository:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session


class ByHand(containers.DeclarativeContainer):
    engine = providers.Singleton(create_async_engine, URL)
    sessions = providers.Singleton(async_sessionmaker, engine, expire_on_commit=False)
    repository = providers.Factory(Repository, sessions.provided.call())


class Ours(containers.DeclarativeContainer):
    config = providers.Configuration(default={"url": URL})
    db = providers.Container(DatabaseContainer, config=config)
    repository = providers.Factory(Repository, db.session)


HAND = "dependency-injector, by hand"
CONTAINERS: dict[str, Callable[[], containers.DeclarativeContainer]] = {
    HAND: ByHand,
    "sessionwire": Ours,
}


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    imports: Times = defaultdict(lambda: defaultdict(list))
    starts: Times = defaultdict(lambda: defaultdict(list))
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}")
        if turn == 1:  # the one before it warmed up
            imports.clear()
            starts.clear()
        for name, what in IMPORTS.items():
            imports["import"][name].append(await seconds_to_import(what))
        for name, container in CONTAINERS.items():
            starts["build a container"][name].append(seconds_to_build(container))
            starts[f"wire {FUNCTIONS} functions"][name].append(await seconds_to_wire(container))
    return [
        ratios(
            "time to import", imports, GROUND, f"{IMPORTS[GROUND]}; each in a fresh interpreter."
        ),
        ratios(
            "time to start",
            starts,
            HAND,
            "By hand, the container holds an engine and a session factory.",
        ),
    ]


async def seconds_to_import(what: str) -> float:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", TIMED.format(what), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    return float(printed)


def seconds_to_build(container: Callable[[], containers.DeclarativeContainer]) -> float:
    gc.collect()
    started = perf_counter()
    for _ in range(BUILT):
        container()
    return perf_counter() - started


async def seconds_to_wire(container: Callable[[], containers.DeclarativeContainer]) -> float:
    built, module = container(), ModuleType("wired")
    for number in range(FUNCTIONS):
        setattr(module, f"function_{number}", a_function())
    gc.collect()
    started = perf_counter()
    built.wire(modules=[module])
    taken = perf_counter() - started
    assert all(
        [isinstance((await function()).session, AsyncSession) for function in functions(module)]
    )
    built.unwire()
    return taken


def a_function() -> Callable[..., object]:
    @inject
    async def function(repository: Repository = Provide["repository"]) -> Repository:
        return repository

    return function


def functions(module: ModuleType) -> list[Callable[..., object]]:
    return [value for name, value in vars(module).items() if name.startswith("function_")]
