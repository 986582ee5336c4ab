"""What a test has left running or open: it is ended, and told with its place."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from sqlalchemy import Pool, PoolProxiedConnection, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.runtime import database_of
from sessionwire._shield import shielding_tasks
from sessionwire.manager import DatabaseSessionManager

from ._borrowers import PARTY, Party, party_of
from ._call_sites import UNKNOWN, where, where_is

GRACE = 0.5  # seconds for tasks that are about to end
Task = asyncio.Task[Any]


class Watch:
    """What is begun and opened from now on, and where."""

    def __init__(self, *managers: DatabaseSessionManager) -> None:
        self._tasks = asyncio.all_tasks()
        self._units = {database: database.open_units for database in map(database_of, managers)}
        self._held: dict[ConnectionPoolEntry, tuple[PoolProxiedConnection, str]] = {}

    def over(self, pool: Pool) -> None:
        """Over its connections too."""
        event.listen(pool, "checkout", self._taken)
        event.listen(pool, "checkin", self._given_back)

    async def end_tasks(self, caller: Task | None, outlasting: set[Task], timeout: float) -> list[str]:
        """Cancel those that run, but for the caller's. What goes on all the same is added to `outlasting`."""
        left: list[str] = []
        loop = asyncio.get_running_loop()

        async def running() -> set[Task]:
            while endings := {
                ending for database in self._units for ending in database.cleanup_tasks
            }:  # and tasks of theirs
                if not (await asyncio.wait(endings, timeout=timeout))[0]:
                    break
            others = {cast(Task, caller), cast(Task, asyncio.current_task())}
            begun = asyncio.all_tasks() - self._tasks - outlasting - others
            return {task for task in begun if not _is_anothers(task)}

        deadline = loop.time() + GRACE
        while (tasks := await running()) and loop.time() < deadline:
            await asyncio.wait(tasks, timeout=deadline - loop.time())
        while tasks := await running():
            for task in tasks:
                left.append(f"a task was left running: {where_is(task)}: await it, or cancel it and await that")
                task.cancel()
            outlasting |= (await asyncio.wait(tasks, timeout=timeout))[1]
        return left + [f"a task goes on although it was cancelled: {where_is(task)}" for task in outlasting]

    def end_blocks(self) -> list[str]:
        """Cut off those that are open, and end connections that are held; those that no block explains are told."""
        blocks: list[str] = []
        for database, before in self._units.items():
            for unit in database.open_units - before:
                party = party_of(unit)
                place = party.where if party else UNKNOWN
                blocks.append(f"a session or connection was left open: the block that began at {place}")
                unit.abort()
                database.release(unit)
        connections: list[str] = []
        for connection, place in list(self._held.values()):
            connections.append(f"a connection was left open: the one that was taken at {place}")
            connection.invalidate()
        return blocks or connections

    def _taken(self, _: object, record: ConnectionPoolEntry, connection: PoolProxiedConnection) -> None:
        self._held[record] = connection, where()

    def _given_back(self, _: object, record: ConnectionPoolEntry) -> None:
        self._held.pop(record, None)


class WatchedEngines(DatabaseEngines):
    """A manager's own engines, whose scopes and connections tell where they were opened."""

    def __init__(self, watch: Watch, real: DatabaseEngines) -> None:
        self.__dict__ = real.__dict__
        for pool in real.pools:
            watch.over(pool)

    def engine_for(self, options: ConnectionOptions) -> AsyncEngine:
        return super().engine_for(options).execution_options(**{PARTY: Party()})


def _is_anothers(task: Task) -> bool:
    """Whether it does an end for another task, or is the one by which anyio runs a fixture."""
    return task in shielding_tasks or getattr(task.get_coro(), "__qualname__", "") == "TestRunner._call_in_runner_task"
