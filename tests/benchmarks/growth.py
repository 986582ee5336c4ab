"""Measure a pool of ten under one to two thousand tasks.

The tables show the throughput, the slowest calls, and the memory of a waiting scope.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from math import ceil
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import asyncpg

from sessionwire import PoolSettings

from .report import Table, Times, ratios, rotated
from .variants import BARE, EXPERT, KEY, SERVICE, TEXT, VARIANTS, Work, items
from .wire import url

TASKS = {"1 task": 1, **{f"{tasks:,} tasks": tasks for tasks in (10, 100, 500, 1000, 2000)}}
CALLS = 500  # by all tasks together, and at least one by each
WAITING = 100, 500, 2000
POOL = PoolSettings(size=10, max_overflow=0, timeout=300)
LOCKED_OUT = "SELECT count(*) FROM pg_locks WHERE relation = 'item'::regclass AND NOT granted"


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    """Use a quarter of the rounds, which are long here."""
    rounds = ceil(rounds / 4)
    throughput: Times = defaultdict(lambda: defaultdict(list))
    slowest: Times = defaultdict(lambda: defaultdict(list))
    async with items(server_socket_directory) as database, AsyncExitStack() as stack:
        works: dict[str, Work] = {}
        for name in (BARE, EXPERT, SERVICE):
            works[name] = await stack.enter_async_context(
                VARIANTS[name](url(server_socket_directory), POOL)
            )
            await under_load(works[name], POOL.size)  # warms up
        for turn in range(rounds):
            for column in rotated(list(TASKS), turn):
                progress(f"round {turn + 1} of {rounds}, {column}")
                for name in rotated(list(works), turn):
                    calls, seconds = await under_load(works[name], TASKS[column])
                    throughput[column][name].append(calls)
                    slowest[column][name].append(seconds)
        memory = Table(
            "memory of a scope that waits for a connection, in bytes",
            [f"{waiting:,} waiting" for waiting in WAITING],
            note="With its task, while others hold all connections; "
            "tracemalloc does not see the interpreter's stack.",
        )
        stack.callback(tracemalloc.stop)
        for name, work in works.items():
            progress(f"memory, {name}")
            memory.rows[name] = await bytes_of_waiting(work, database)
    note = (
        f"Reads by primary key, a pool of {POOL.size}; medians of {rounds} rounds. "
        "The first row is 1."
    )
    return [
        ratios("throughput of concurrent tasks", throughput, BARE, note),
        against_best(throughput),
        ratios("99th percentile of a call's time", slowest, BARE, note),
        memory,
    ]


def against_best(throughput: Times) -> Table:
    table = Table(
        "throughput against a variant's own best",
        list(throughput),
        note="The same rounds; each row has its own 1.",
    )
    for name in throughput[table.columns[0]]:
        medians = [median(of[name]) for of in throughput.values()]
        table.rows[name] = [round(value / max(medians), 2) for value in medians]
    return table


async def under_load(work: Work, tasks: int) -> tuple[float, float]:
    """Return the calls per second, and the longest time of 99 calls out of 100."""
    taken: list[float] = []

    async def call() -> None:
        for _ in range(max(CALLS // tasks, 1)):
            called = perf_counter()
            assert await work.read(KEY) == TEXT
            taken.append(perf_counter() - called)

    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(call())
    return len(taken) / (perf_counter() - started), quantiles(taken, n=100)[-1]


async def bytes_of_waiting(work: Work, database: asyncpg.Connection[Any]) -> list[float]:
    """Return the bytes of a scope while `WAITING` of them wait."""
    found: list[float] = []
    async with asyncio.TaskGroup() as group, database.transaction():
        await database.execute(
            "LOCK TABLE item"
        )  # A reader has a connection, and keeps it until this ends.
        tracemalloc.start()
        holding = [group.create_task(work.read(KEY)) for _ in range(POOL.size)]
        while await database.fetchval(LOCKED_OUT) < POOL.size:
            await asyncio.sleep(0.01)
        before = await traced()
        waiting: list[asyncio.Task[str]] = []
        for count in WAITING:
            waiting += [group.create_task(work.read(KEY)) for _ in range(count - len(waiting))]
            found.append(round((await traced() - before) / count))
        tracemalloc.stop()
        assert not any(task.done() for task in holding + waiting)
        assert await database.fetchval(LOCKED_OUT) == POOL.size
    assert {task.result() for task in holding + waiting} == {TEXT}
    return found


async def traced() -> int:
    """Return the traced bytes once all tasks wait."""
    await asyncio.sleep(0.2)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
