"""Who holds the connections: the log and the pool's timeout error say it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    Holder,
    PoolSettings,
    TransactionManager,
    read_only,
    transactional,
)
from sessionwire.testing import sandbox

from .models import Note
from .postgres import until

QUERY = "SELECT 42"


class Service:
    """Each method holds a connection while it waits for something else."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        self.transaction: TransactionManager = manager.transaction
        self.answer = asyncio.Event()  # of another service

    async def ask(self) -> None:
        await self.answer.wait()

    @transactional
    async def decorated(self) -> None:
        await self._query()
        await self.ask()

    @transactional(retries=2)
    async def decorated_with_retries(self) -> None:
        await self._query()
        await self.ask()

    @read_only
    async def reading(self) -> None:
        await self._query()
        await self.ask()

    async def _query(self) -> None:
        async with self.transaction() as session:
            await session.execute(text(QUERY))

    async def in_a_block(self) -> None:
        async with self.transaction() as session:
            await session.execute(text(QUERY))
            await self.ask()

    async def in_session(self) -> None:
        async with self.manager.session() as session:
            await session.execute(text(QUERY))
            await self.ask()

    async def in_connect(self) -> None:
        async with self.manager.connect() as connection:
            await connection.execute(text(QUERY))
            await self.ask()

    async def in_run(self) -> None:
        await self.transaction.run(self._in_run)

    async def _in_run(self) -> None:
        async with self.transaction() as session:
            await session.execute(text(QUERY))
        await self.ask()

    async def by_hand(self) -> None:
        async with self.manager.engine.connect() as connection:
            await connection.execute(text(QUERY))
            await self.ask()


# Each with the function that the call site names, and the line in it.
WAYS = {
    "decorated": ("decorated", "@transactional"),
    "decorated_with_retries": ("decorated_with_retries", "@transactional(retries=2)"),
    "in_a_block": ("in_a_block", "async with self.transaction() as session:"),
    "in_session": ("in_session", "async with self.manager.session() as session:"),
    "in_connect": ("in_connect", "async with self.manager.connect() as connection:"),
    "in_run": ("_in_run", "async def _in_run(self) -> None:"),
}


def line_in(name: str, text: str) -> str:
    """Return how messages write the line with this text in a method of the service."""
    lines, first = inspect.getsourcelines(inspect.unwrap(getattr(Service, name)))
    offset = next(at for at, line in enumerate(lines) if line.strip() == text)
    return f"test_holders.py:{first + offset} in Service.{name}"


@pytest.fixture
def settings(database_url: str) -> DatabaseSettings:
    pool = PoolSettings(size=1, max_overflow=0, timeout=0.2, warn_held_after=0.1)
    return DatabaseSettings(url=database_url, pool=pool)


@pytest.fixture
async def service(manager: DatabaseSessionManager) -> AsyncIterator[Service]:
    service = Service(manager)
    yield service
    service.answer.set()


async def held(service: Service, way: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Begin a call, and return its task once it waits for the other service."""

    async def call() -> None:
        await way()

    async def is_waiting() -> bool:
        return bool(service.answer._waiters)  # type: ignore[attr-defined]

    task = asyncio.create_task(call(), name="the call")
    await until(is_waiting)
    return task


async def end(service: Service, task: asyncio.Task[None]) -> None:
    service.answer.set()
    await task


@pytest.mark.parametrize("way", WAYS)
async def test_a_forgotten_call_is_explained_by_the_log_and_the_error_alike(
    way: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    task = await held(service, getattr(service, way))
    with pytest.raises(PoolTimeoutError) as caught:
        async with service.manager.connect():
            raise AssertionError
    line = line_in(*WAYS[way])
    waits_at = line_in("ask", "await self.answer.wait()")
    said = f"by {line}, task 'the call', now at {waits_at}; last statement: {QUERY}"
    error = str(caught.value)
    assert said in error
    assert "within 0.2 s (pool.timeout): 1 of 1 (pool.size + pool.max_overflow)" in error
    assert caught.value.code == "3o7r"
    [record] = [each for each in caplog.records if each.name == "sessionwire.pool"]
    assert record.levelno == logging.WARNING
    assert said in record.getMessage()
    await end(service, task)


async def test_a_connection_of_the_engine_is_named_as_such_with_the_line_it_waits_at(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    task = await held(service, service.by_hand)
    with pytest.raises(PoolTimeoutError) as caught:
        async with service.manager.engine.connect():
            raise AssertionError
    said = (
        f"by manager.engine, task 'the call', now at {line_in('ask', 'await self.answer.wait()')}"
    )
    assert said in str(caught.value)
    assert said in caplog.text
    await end(service, task)


@pytest.mark.parametrize("way", ["session", "transaction"])
async def test_the_error_is_the_same_for_each_kind_of_block(way: str, service: Service) -> None:
    task = await held(service, service.in_a_block)
    with pytest.raises(PoolTimeoutError, match=r"Service\.in_a_block"):
        async with getattr(service.manager, way)() as session:
            await session.execute(text(QUERY))
    await end(service, task)


async def test_a_connection_is_logged_once_for_each_use(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        task = await held(service, service.in_session)
        await asyncio.sleep(0.35)  # longer than three times `warn_held_after`
        await end(service, task)
        service.answer.clear()
    assert sum(each.name == "sessionwire.pool" for each in caplog.records) == 2


async def test_without_the_setting_nothing_is_logged(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with DatabaseSessionManager(database_url) as manager, manager.connect() as connection:
        await connection.execute(text(QUERY))
        await asyncio.sleep(0.2)
    assert not [each for each in caplog.records if each.name == "sessionwire.pool"]


async def test_the_error_lists_at_most_ten_holders_the_longest_first(database_url: str) -> None:
    pool = PoolSettings(size=12, max_overflow=0, timeout=0.2)
    async with DatabaseSessionManager(DatabaseSettings(url=database_url, pool=pool)) as manager:
        service = Service(manager)
        tasks = []
        for number in range(12):
            tasks.append(asyncio.create_task(service.in_session(), name=f"call {number}"))

            async def has_come(number: int = number) -> bool:
                return len(manager.status().holders) > number

            await until(has_come)
        with pytest.raises(PoolTimeoutError) as caught:
            async with manager.connect():
                raise AssertionError
        listed = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
        assert len(listed) == 11
        assert "'call 0'" in listed[0]
        assert "'call 9'" in listed[9]
        assert listed[10] == "- and 2 more"
        ages = [holder.held_for for holder in manager.status().holders]
        assert ages == sorted(ages, reverse=True)
        service.answer.set()
        await asyncio.gather(*tasks)


async def test_the_error_says_how_many_others_wait(service: Service) -> None:
    task = await held(service, service.in_session)

    async def fail() -> str:
        with pytest.raises(PoolTimeoutError) as caught:
            async with service.manager.connect():
                raise AssertionError
        return str(caught.value)

    first, *_ = await asyncio.gather(*(fail() for _ in range(4)))
    assert "and 3 more task(s) wait" in first
    await end(service, task)


async def test_messages_show_no_values(service: Service) -> None:
    async with service.manager.session() as session:
        await session.execute(insert(Note).values(text="a secret"))
        await session.execute(select(Note).where(Note.text == "another secret"))
        [holder] = service.manager.status().holders
        await session.rollback()
    assert holder.statement is not None
    assert "SELECT" in holder.statement
    assert "secret" not in str(holder)


async def test_a_long_statement_is_shortened(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(text("SELECT " + " + ".join("1" * 200)))
        [holder] = manager.status().holders
    assert holder.statement is not None
    assert len(holder.statement) > 200
    assert len(str(holder).partition("last statement: ")[2]) <= 100


async def test_begin_and_savepoints_are_no_last_statement(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(text(QUERY))
        async with session.begin_nested():
            pass
        [holder] = manager.status().holders
    assert holder.statement is not None
    assert not holder.statement.startswith("BEGIN")


async def test_the_next_user_does_not_show_the_statement_of_the_one_before(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.connect() as connection:
        await connection.execute(text(QUERY))
    async with manager.engine.connect():
        [holder] = manager.status().holders
        assert holder.statement is None
        assert holder.call_site == "manager.engine"


async def test_a_block_that_has_no_connection_yet_is_no_holder(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.transaction() as session:
        assert manager.status().holders == ()
        await session.execute(text(QUERY))
        assert len(manager.status().holders) == 1
    assert manager.status().holders == ()


async def test_holders_are_known_in_a_sandbox_too(manager: DatabaseSessionManager) -> None:
    async with sandbox(manager), manager.transaction() as session:
        await session.execute(text(QUERY))
        [holder] = manager.status().holders
    assert isinstance(holder, Holder)
    assert holder.call_site.endswith("test_holders_are_known_in_a_sandbox_too")
    assert holder.statement == QUERY


async def test_a_call_site_keeps_no_variable_of_the_caller_alive(
    manager: DatabaseSessionManager,
) -> None:
    class Local:
        pass

    def open_a_block() -> tuple[object, weakref.ref[Local]]:
        local = Local()
        return manager.transaction(), weakref.ref(local)

    block, reference = open_a_block()
    assert reference() is None
    async with block as session:  # type: ignore[attr-defined]
        await session.execute(text(QUERY))
