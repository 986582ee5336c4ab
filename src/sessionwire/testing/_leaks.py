"""Leak detection: end and report what a test leaves running or open."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from sqlalchemy import Pool, PoolProxiedConnection, event
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire._database.call_sites import describe_task, line_of, running_line
from sessionwire._database.runtime import database_of
from sessionwire._shield import shielding_tasks
from sessionwire.manager import DatabaseSessionManager

CANCELLATION_TIMEOUT = 5.0  # seconds for a cancelled task to end
TASK_GRACE = 0.5  # seconds for tasks that are about to end
ANYIO_FIXTURE_RUNNER = "TestRunner._call_in_runner_task"

Task = asyncio.Task[Any]


class LeakDetector:
    """Record the tasks, blocks and connections that begin after its creation."""

    def __init__(self, *managers: DatabaseSessionManager) -> None:
        self._tasks_before = asyncio.all_tasks()
        self._units_before = {
            database: database.open_units for database in map(database_of, managers)
        }
        self._checked_out: dict[ConnectionPoolEntry, tuple[PoolProxiedConnection, str]] = {}

    def watch_pool(self, pool: Pool) -> None:
        """Record the connections of this pool too."""
        event.listen(pool, "checkout", self._on_checkout)
        event.listen(pool, "checkin", self._on_checkin)

    async def end_leftovers(self) -> list[str]:
        """Cancel the tasks and abort the blocks that are left, and report them."""
        caller = asyncio.current_task()
        tasks = await self.cancel_leftover_tasks(caller, set(), CANCELLATION_TIMEOUT)
        return tasks + self.abort_leftover_blocks()

    async def cancel_leftover_tasks(
        self, caller: Task | None, uncancellable: set[Task], timeout: float
    ) -> list[str]:
        """Cancel the tasks that still run, except for the caller's, and report them.

        Args:
            caller: The task that runs the test.
            uncancellable: Tasks to leave alone. Those that ignore their cancellation
                are added to them.
            timeout: Seconds to wait for the cancelled tasks.
        """
        reports: list[str] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + TASK_GRACE
        while (
            tasks := await self._running_tasks(caller, uncancellable, timeout)
        ) and loop.time() < deadline:
            await asyncio.wait(tasks, timeout=deadline - loop.time())
        while tasks := await self._running_tasks(caller, uncancellable, timeout):
            for task in tasks:
                remedy = "await it, or cancel it and then await it"
                reports.append(f"a task was left running: {describe_task(task)}: {remedy}")
                task.cancel()
            uncancellable |= (await asyncio.wait(tasks, timeout=timeout))[1]
        for task in uncancellable:
            reports.append(f"a task goes on although it was cancelled: {describe_task(task)}")
        return reports

    async def _running_tasks(
        self, caller: Task | None, uncancellable: set[Task], timeout: float
    ) -> set[Task]:
        """Wait for the managers' clean-up tasks, and return the others that run."""
        while cleanups := {
            cleanup for database in self._units_before for cleanup in database.cleanup_tasks
        }:
            if not (await asyncio.wait(cleanups, timeout=timeout))[0]:
                break
        callers = {cast(Task, caller), cast(Task, asyncio.current_task())}
        begun = asyncio.all_tasks() - self._tasks_before - uncancellable - callers
        return {task for task in begun if not _is_infrastructure(task)}

    def abort_leftover_blocks(self) -> list[str]:
        """Abort open blocks and invalidate checked-out connections.

        Returns:
            Reports of the blocks, or of the connections if no block is open.
        """
        blocks: list[str] = []
        for database, before in self._units_before.items():
            for unit in database.open_units - before:
                blocks.append(
                    "a session or connection was left open: the block that began at "
                    f"{line_of(unit.call_site)}"
                )
                unit.abort()
                database.release(unit)
        connections: list[str] = []
        for connection, line in list(self._checked_out.values()):
            connections.append(f"a connection was left open: the one that was taken at {line}")
            connection.invalidate()
        return blocks or connections

    def _on_checkout(
        self, _: object, record: ConnectionPoolEntry, connection: PoolProxiedConnection
    ) -> None:
        self._checked_out[record] = connection, running_line()

    def _on_checkin(self, _: object, record: ConnectionPoolEntry) -> None:
        self._checked_out.pop(record, None)


def _is_infrastructure(task: Task) -> bool:
    """Return whether the task finishes work for another one, or runs anyio fixtures."""
    runs_fixtures = getattr(task.get_coro(), "__qualname__", "") == ANYIO_FIXTURE_RUNNER
    return runs_fixtures or task in shielding_tasks
