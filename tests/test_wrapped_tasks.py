"""Commits, rollbacks and cancellations in wrapped and eager tasks, and on uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sentry_sdk
import uvloop
from opentelemetry.instrumentation.asyncio import AsyncioInstrumentor
from sentry_sdk.integrations.asyncio import AsyncioIntegration
from sqlalchemy import delete, insert

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings

from .cancellation import each_cancellation
from .conftest import assert_all_returned, notes
from .models import Note


@contextmanager
def plain() -> Iterator[None]:
    yield


@contextmanager
def sentry() -> Iterator[None]:
    sentry_sdk.init(dsn=None, default_integrations=False, integrations=[AsyncioIntegration()])
    yield
    sentry_sdk.get_global_scope().set_client(None)


@contextmanager
def opentelemetry() -> Iterator[None]:
    AsyncioInstrumentor().instrument()
    yield
    AsyncioInstrumentor().uninstrument()


def task_factory(factory: Any) -> Callable[[], Any]:
    @contextmanager
    def installed() -> Iterator[None]:
        asyncio.get_running_loop().set_task_factory(factory)
        yield

    return installed


def wrapping(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> Any:
    async def wrapper() -> Any:
        return await coroutine

    return asyncio.Task(wrapper(), loop=loop, **options)


TOOLS: dict[str, Callable[[], Any]] = {
    "sentry": sentry,
    "opentelemetry": opentelemetry,
    "a wrapping task factory": task_factory(wrapping),
}
if hasattr(asyncio, "eager_task_factory"):  # from Python 3.12 on
    TOOLS["eager tasks"] = task_factory(asyncio.eager_task_factory)
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
ENVIRONMENTS = [("asyncio", tool) for tool in TOOLS.values()] + [
    ("uvloop", plain),
    ("uvloop", sentry),
]
# A wrapper cancelled before its first step awaits nothing of the driver's own tasks.
UNAWAITED = pytest.mark.filterwarnings(
    "ignore:coroutine 'Connection._cancel' was never awaited:RuntimeWarning"
)
IDS = [*TOOLS, "uvloop", "uvloop with sentry"]


async def write(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="a"))
        await session.flush()
        async with (
            manager.session()
            if manager.engine.dialect.name != "sqlite"
            else manager.transaction() as other
        ):
            await other.connection()
        session.add(Note(text="b"))


async def write_in_each_way(manager: DatabaseSessionManager) -> list[str]:
    done: list[str] = []
    async with manager.connect() as connection:
        await manager.create_all(connection)
        await connection.execute(insert(Note).values(text="connection"))
    async with manager.transaction() as session:
        manager.transaction.on_commit(lambda: done.append("committed"))
        session.add(Note(text="transaction"))
    async with manager.session() as session:
        session.add(Note(text="session"))
        await session.commit()
    with pytest.raises(ValueError, match="no"):
        async with manager.transaction() as session:
            manager.transaction.on_rollback(lambda: done.append("rolled back"))
            session.add(Note(text="never"))
            await session.flush()
            raise ValueError("no")
    return done


@pytest.mark.parametrize(("loop", "tool"), ENVIRONMENTS, ids=IDS)
def test_blocks_end_in_wrapped_tasks_as_in_plain_ones(
    database_url: str, loop: str, tool: Callable[[], Any]
) -> None:
    async def work() -> None:
        settings = DatabaseSettings(
            url=database_url, pool=PoolSettings(size=3, max_overflow=2, timeout=10)
        )
        with ExitStack() as stack:
            stack.enter_context(tool())
            async with DatabaseSessionManager(settings) as manager:
                assert await write_in_each_way(manager) == ["committed", "rolled back"]
                assert await notes(manager) == ["connection", "session", "transaction"]
                await assert_all_returned(manager)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(work())


@UNAWAITED
@pytest.mark.long
@pytest.mark.parametrize(("loop", "tool"), ENVIRONMENTS, ids=IDS)
def test_a_cancellation_at_any_await_of_a_wrapped_task_leaves_all_or_nothing(
    database_url: str, loop: str, tool: Callable[[], Any]
) -> None:
    async def work() -> None:
        settings = DatabaseSettings(
            url=database_url, pool=PoolSettings(size=3, max_overflow=2, timeout=10)
        )
        async with DatabaseSessionManager(settings) as manager:
            async with manager.connect() as connection:
                await manager.create_all(connection)
            with tool():
                results: list[list[str]] = []
                async for _ in each_cancellation(lambda: write(manager)):
                    results.append(await notes(manager))
                    async with manager.transaction() as session:
                        await session.execute(delete(Note))
            await assert_all_returned(manager)
            assert [] in results
            assert results[-1] == ["a", "b"]
            assert all(written in ([], ["a", "b"]) for written in results)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(work())


@UNAWAITED
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_cancelling_all_wrapped_tasks_of_the_loop_leaves_all_or_nothing(
    database_url: str, tool: Callable[[], Any]
) -> None:
    """A shutdown may cancel a task, which ends another's block, before it starts."""

    async def work() -> None:
        async with DatabaseSessionManager(database_url) as manager:
            async with manager.connect() as connection:
                await manager.create_all(connection)
            with tool():
                for turns in range(1, 61, 2):
                    task = asyncio.create_task(write(manager))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    others = asyncio.all_tasks() - {asyncio.current_task()}
                    for other in others:
                        other.cancel()
                    await asyncio.gather(task, *others, return_exceptions=True)
                    assert await notes(manager) in ([], ["a", "b"])
                    async with manager.transaction() as session:
                        await session.execute(delete(Note))
            await assert_all_returned(manager)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(work())
