"""What a test has left running or open: it is ended, and told with its place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sessionwire.ending import Rest
from sessionwire.manager import DatabaseSessionManager
from sessionwire.scope import Scope

from .turns import Party
from .where import where_is

PARTY = "sessionwire_party"  # the execution option that tells a connection whose it is
GRACE = 0.5  # seconds for tasks that are about to end
Tasks = set[asyncio.Task[Any]]


async def end_tasks(before: Tasks, others: Callable[[], Tasks], outlasting: Tasks, timeout: float) -> list[str]:
    """Cancel those that began since; `others` are not meant. What goes on all the same is added to `outlasting`."""
    left: list[str] = []

    def running() -> Tasks:
        begun = asyncio.all_tasks() - before - others() - outlasting - {cast(Any, asyncio.current_task())}
        return {task for task in begun if not _is_anothers(task)}

    if about_to_end := running():
        await asyncio.wait(about_to_end, timeout=GRACE)
    while tasks := running():
        for task in tasks:
            left.append(f"a task was left running: {where_is(task)}: await it, or cancel it and await that")
            task.cancel()
        outlasting |= (await asyncio.wait(tasks, timeout=timeout))[1]
    return left + [f"a task goes on although it was cancelled: {where_is(task)}" for task in outlasting]


def end_units(manager: DatabaseSessionManager, before: frozenset[Scope | AsyncConnection]) -> dict[Party | None, str]:
    """Cut off the scopes and connections that were opened since."""
    left: dict[Party | None, str] = {}
    for unit in manager.left_open - before:
        party = party_of(unit)
        place = f"the block that began at {party.where}" if party else "in the sandbox it would be known where"
        left[party] = f"a session or connection was left open: {place}"
        if isinstance(unit, Scope):
            unit.cut()
        manager.forget(unit)
    return left


def party_of(unit: Scope | AsyncConnection) -> Party | None:
    """None of one that is not of a sandbox."""
    engine = cast(AsyncEngine, unit.session.bind if isinstance(unit, Scope) else unit.engine)
    return cast("Party | None", engine.sync_engine.get_execution_options().get(PARTY))


def _is_anothers(task: asyncio.Task[Any]) -> bool:
    """Whether it does an end for another task, or is the one by which anyio runs a fixture."""
    work = task.get_coro()
    return isinstance(work, Rest) or getattr(work, "__qualname__", "") == "TestRunner._call_in_runner_task"
