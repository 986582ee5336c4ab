"""A deadlock in a task that nobody awaits ends the test, which would wait forever."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from sessionwire import DatabaseSessionManager, SandboxError
from sessionwire.testing import sandbox
from tests.conftest import notes
from tests.models import Note

from .test_plugin import Project, assert_passed

PATIENCE = 0.05


@pytest.fixture
async def holding(manager: DatabaseSessionManager) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Yield a function whose task opens a transaction and never ends it."""
    tasks: list[asyncio.Task[None]] = []

    async def hold() -> None:
        begun = asyncio.Event()

        async def keep() -> None:
            async with manager.transaction() as session:
                await session.execute(select(Note))
                begun.set()
                await asyncio.Event().wait()

        tasks.append(asyncio.create_task(keep()))
        await begun.wait()

    yield hold
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    tasks.clear()
    gc.collect()  # greenlets that died with their tasks


async def write(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="written"))


@pytest.mark.several_connections("two tasks wait for each other")
@pytest.mark.parametrize(
    "by", ["itself", "one that awaits it", "one that gathers it", "another error"]
)
async def test_a_deadlock_in_a_task_that_nobody_awaits_ends_the_sandbox(
    manager: DatabaseSessionManager, holding: Callable[[], Awaitable[None]], by: str
) -> None:
    done = asyncio.Event()

    async def work() -> None:
        if by == "itself":
            await write(manager)
        elif by == "one that awaits it":
            await asyncio.create_task(write(manager))
        elif by == "one that gathers it":
            await asyncio.gather(write(manager), asyncio.sleep(0))
        else:
            try:
                await write(manager)
            except SandboxError as error:
                raise RuntimeError("the worker failed") from error
        done.set()

    async with asyncio.timeout(10):
        with pytest.raises(SandboxError, match="in a task that nobody awaits: a deadlock") as told:
            async with sandbox(manager, patience=PATIENCE):
                await holding()
                worker = asyncio.create_task(work())
                await done.wait()
    assert isinstance(told.value.__cause__, SandboxError)
    assert worker.done()
    this = asyncio.current_task()
    assert this is not None
    assert this.cancelling() == 0
    assert await notes(manager) == []


@pytest.mark.several_connections("two tasks wait for each other")
async def test_a_test_that_awaits_the_task_or_handles_the_error_is_not_interrupted(
    manager: DatabaseSessionManager, holding: Callable[[], Awaitable[None]]
) -> None:
    async def handle() -> None:
        with pytest.raises(SandboxError):
            await write(manager)

    # The task that holds the connection is the one left running.
    with pytest.raises(SandboxError, match="a task was left running"):
        async with asyncio.timeout(10), sandbox(manager, patience=PATIENCE):
            await holding()
            handling = asyncio.create_task(handle())
            with pytest.raises(SandboxError, match="a deadlock"):
                await asyncio.create_task(write(manager))
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(write(manager))
                    group.create_task(asyncio.Event().wait())
            (done,), _ = await asyncio.wait((asyncio.create_task(write(manager)),))
            assert isinstance(done.exception(), SandboxError)
            await handling
            # The sandbox waits less for somebody to retrieve an error.
            await asyncio.sleep(0.7)


@pytest.mark.several_connections("two tasks wait for each other")
async def test_an_interruption_is_a_note_on_another_error_of_the_sandbox(
    manager: DatabaseSessionManager, holding: Callable[[], Awaitable[None]]
) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(ZeroDivisionError) as told:
            async with sandbox(manager, patience=PATIENCE):
                await holding()
                worker = asyncio.create_task(write(manager))
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise ZeroDivisionError from None
    assert worker.done()
    assert any(
        "a task that nobody awaits has raised: a deadlock" in note for note in told.value.__notes__
    )


HANGS = """
import asyncio
import pytest
from sqlalchemy import text

{mark}
async def test_hangs(container):
    holds, done = asyncio.Event(), asyncio.Event()

    async def hold():
        async with container.db.transaction()() as session:
            await session.execute(text("SELECT 1"))
            holds.set()
            await asyncio.Event().wait()

    async def work():
        await holds.wait()
        await container.items().add("pen")
        done.set()

    tasks = [asyncio.create_task(hold()), asyncio.create_task(work())]
    await done.wait()

{mark}
async def test_goes_on(container):
    await container.items().add("pen")
    await asyncio.sleep(0.7)
    assert await container.items().has("pen")
"""
BACKEND = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"


@pytest.mark.long
@pytest.mark.parametrize("by", ["asyncio", "asyncio(loop_scope='session')", "anyio"])
def test_a_deadlock_in_a_task_that_nobody_awaits_ends_a_test_of_the_plugin(
    tmp_path: Path, by: str
) -> None:
    project = Project(tmp_path, "sqlite://")
    mark = f"@pytest.mark.{by}"
    project.write("test_hangs.py", HANGS.format(mark=mark) + BACKEND)
    finished = project.run("-o", "asyncio_mode=strict", "-o", f"sessionwire_patience={PATIENCE}")
    assert "1 failed, 1 passed" in finished.stdout, finished.stdout + finished.stderr
    assert (
        "SandboxError: in a task that nobody awaits: a deadlock on the sandbox's one connection"
        in finished.stdout
    )
    assert_passed(project.run("-o", "asyncio_mode=strict", "-k", "goes_on"), 1)
