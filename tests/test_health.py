"""`manager.health()`: whether it can serve, and why not, in one sentence."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from contextvars import Context
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import text

from sessionwire import (
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    Health,
    PoolSettings,
)
from sessionwire.testing import sandbox

from .conftest import Postgres, checked_out
from .postgres import FaultyNetwork, OnPostgres, at_port, kill, through, until
from .test_ownership import run

READY = Health(is_live=True, is_ready=True)
QUERY = text("SELECT 1")
SHORT = 0.2  # seconds
GRACE = 0.2  # seconds that a busy machine may take in addition


def not_ready(reason: str) -> Health:
    return Health(is_live=True, is_ready=False, reason=reason)


async def find_health(manager: DatabaseSessionManager, timeout: float = SHORT) -> Health:
    """Return the health, which takes no longer than that and leaves nothing behind."""
    tasks, begin = asyncio.all_tasks(), monotonic()
    health = await manager.health(timeout)
    assert monotonic() - begin < timeout + GRACE
    await asyncio.sleep(0)  # A task that is cancelled needs a turn of the loop to end.
    left = [task for task in asyncio.all_tasks() - tasks if "Proxy." not in repr(task)]
    assert not left
    return health


async def test_an_open_manager_is_ready(manager: DatabaseSessionManager) -> None:
    assert await manager.health() == READY
    assert checked_out(manager) == 0


async def test_a_probe_is_neither_a_transaction_nor_an_open_block_nor_a_line_of_the_log(
    manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    before = manager.status()
    with caplog.at_level(logging.INFO):
        assert await manager.health() == READY
    assert manager.status().transactions == before.transactions
    assert manager.status().open_scopes == 0
    assert not caplog.records


async def test_a_probe_sees_no_error_of_session_settings_or_hooks(
    settings: DatabaseSettings,
) -> None:
    def fail() -> dict[str, object]:
        raise LookupError("there is no tenant")

    manager = DatabaseSessionManager(settings, session_settings=fail)
    manager.transaction.on_begin(lambda connection: fail())
    async with manager:
        assert await manager.health() == READY


async def test_it_says_why_a_manager_is_not_open(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings)
    not_opened = "the manager was not opened: call open(), or start the container with Lifespan"
    assert await find_health(DatabaseSessionManager()) == not_ready(not_opened)
    assert await find_health(manager) == not_ready(not_opened)
    manager.init(settings)
    assert await find_health(manager) == not_ready(not_opened)
    await manager.open()
    assert await manager.health() == READY
    await manager.close()
    assert await find_health(manager) == not_ready("the manager was closed")
    async with manager:
        assert await manager.health() == READY


async def test_during_the_drain_it_is_not_ready_at_once(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings)
    await manager.open()
    async with manager.session() as session:
        await session.execute(QUERY)
        closing = asyncio.create_task(manager.close(), context=Context())
        await asyncio.sleep(0)
        assert await find_health(manager) == not_ready(
            "the manager is closing, and waits for 1 open block(s)"
        )
    await closing


async def test_a_probe_that_waits_when_the_close_begins_is_not_ready(
    settings: DatabaseSettings,
) -> None:
    one = settings.model_copy(update={"pool": PoolSettings(size=1, max_overflow=0)})
    manager = DatabaseSessionManager(one)
    await manager.open()
    async with manager.session() as session:
        await session.execute(QUERY)
        probe = asyncio.create_task(manager.health(5))
        await _waits_for_a_connection(manager)
        closing = asyncio.create_task(manager.close(), context=Context())
        await asyncio.sleep(0)
    health = await probe
    assert not health.is_ready
    assert "clos" in str(health.reason)
    await closing


async def test_a_full_pool_is_explained_by_the_line_that_has_held_a_connection_longest(
    manager: DatabaseSessionManager,
) -> None:
    limit = manager.status().pool.limit
    async with AsyncExitStack() as blocks:
        for _ in range(limit):
            session = await blocks.enter_async_context(manager.session())
            await session.execute(QUERY)
        health = await find_health(manager)
        assert health.is_live
        assert not health.is_ready
        here = "test_a_full_pool_is_explained_by_the_line_that_has_held_a_connection_longest"
        assert str(health.reason).startswith(
            f"no connection became free within 0.2 s: {limit} of {limit} are in use, the longest "
        )
        assert f" s by test_health.py:{_line_of('enter_async_context')} in {here}" in str(
            health.reason
        )
        assert manager.status().pool.waiting == 0
    assert await manager.health() == READY


async def test_a_connection_that_becomes_free_in_time_is_enough(
    settings: DatabaseSettings,
) -> None:
    one = settings.model_copy(update={"pool": PoolSettings(size=1, max_overflow=0)})
    async with DatabaseSessionManager(one) as manager:
        async with manager.session() as session:
            await session.execute(QUERY)
            probe = asyncio.create_task(manager.health(5))
            await _waits_for_a_connection(manager)
        assert await probe == READY


async def test_a_cancelled_probe_raises_that_and_leaves_nothing(
    settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
) -> None:
    one = settings.model_copy(update={"pool": PoolSettings(size=1, max_overflow=0)})
    async with DatabaseSessionManager(one) as manager:
        async with manager.session() as session:
            await session.execute(QUERY)
            probe = asyncio.create_task(manager.health(5))
            await _waits_for_a_connection(manager)
            probe.cancel()
            with pytest.raises(asyncio.CancelledError):
                await probe
            assert manager.status().pool.waiting == 0
        for steps in range(20):
            probe = asyncio.create_task(manager.health(5))
            for _ in range(steps):
                await asyncio.sleep(0)
            probe.cancel()
            await asyncio.wait([probe])
        assert not caplog.records
        assert await manager.health() == READY
        assert checked_out(manager) == 0


async def test_the_manager_of_another_event_loop_is_not_live_here(
    manager: DatabaseSessionManager,
) -> None:
    found: list[Health] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(manager.health())))
    thread.start()
    await asyncio.to_thread(thread.join)
    reason = "the manager belongs to another event loop, which is still open"
    assert found == [Health(is_live=False, is_ready=False, reason=reason)]
    assert await manager.health() == READY


@pytest.mark.long
def test_a_closed_event_loop_and_a_fork_have_sentences_of_their_own(database_url: str) -> None:
    program = """
    async def health():
        return await manager.health()

    async def opened():
        await manager.open()
        in_child(lambda: print(asyncio.run(health()).reason))
        print((await manager.health()).is_ready)

    manager.init(sys.argv[1])
    asyncio.run(opened())
    print(asyncio.run(health()).reason)

    async def anew():
        async with manager:
            print(await manager.health())

    asyncio.run(anew())
    """
    assert run(program, database_url) == [
        "the manager was opened in the process that this one was forked from: "
        "call open() in this one",
        "True",
        "the manager was opened in an event loop that is closed: call open() in this one",
        "Health(is_live=True, is_ready=True, reason=None)",
    ]


async def test_in_a_sandbox_a_manager_is_ready_even_inside_a_transaction(
    manager: DatabaseSessionManager,
) -> None:
    async with sandbox(manager), manager.transaction() as session:
        await session.execute(QUERY)
        assert await manager.health() == READY
        await session.execute(QUERY)


async def _waits_for_a_connection(manager: DatabaseSessionManager) -> None:
    async def waits() -> bool:
        return manager.status().pool.waiting == 1

    await until(waits)


def _line_of(code: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if f".{code}(" in line)


class TestOnAServer(OnPostgres):
    @pytest.fixture
    def network(self) -> FaultyNetwork:
        return FaultyNetwork()

    @pytest.fixture
    async def remote(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with through(network, postgres, database_url, rollback_timeout=SHORT) as manager:
            yield manager
            network.swallows = False

    async def test_a_probe_is_one_message(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        assert await remote.health() == READY
        network.round_trips = 0
        assert await remote.health() == READY
        assert network.round_trips == 1

    async def test_a_server_that_falls_silent_costs_no_more_than_the_timeout(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        silent = not_ready("the server did not answer within 0.2 s")
        network.swallows = True
        for _ in range(3):  # with the connection that was open, and with new ones
            assert await find_health(remote) == silent
            assert checked_out(remote) == 0
        network.swallows = False
        assert await remote.health() == READY

    async def test_a_silent_server_is_noticed_while_a_connection_is_checked_for_its_user(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        pool = PoolSettings(ping_after=0)
        async with through(network, postgres, database_url, pool=pool) as manager:
            network.swallows = True
            assert not (await find_health(manager)).is_ready
            network.swallows = False

    async def test_a_probe_of_a_silent_server_can_be_cancelled(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        network.swallows = True
        probe = asyncio.create_task(remote.health(5))

        async def is_asking() -> bool:
            return b"SELECT 1" in network.asked

        await until(is_asking)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert checked_out(remote) == 0

    async def test_a_killed_connection_is_replaced_for_the_probe(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        await kill(postgres, manager)
        assert await manager.health() == READY

    async def test_a_server_that_refuses_connections_is_named_with_its_reason(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        async with through(network, postgres, database_url) as manager:
            network.leads_to = "/nowhere"
            for client in list(network.clients):
                client.to_client.transport.abort()
                client.to_server.transport.abort()
            health = await find_health(manager, 2)
            assert health.is_live
            assert str(health.reason).startswith("the server can't be reached: ")

    async def test_while_open_waits_for_the_server_it_says_for_which(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        async with network.open(postgres.host) as port:
            url = at_port(port, database_url)
        manager = DatabaseSessionManager(DatabaseSettings(url=url, wait_for_database=60))
        opening = asyncio.create_task(manager.open())

        async def waits() -> bool:
            return "waits" in str((await manager.health()).reason)

        await until(waits)
        reason = str((await manager.health()).reason)
        assert reason.startswith("the manager waits for the database: database 'tests' on")
        assert "refused" in reason.lower()
        assert "\n" not in reason
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    async def test_while_the_server_is_silent_the_manager_is_being_opened(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        network.swallows = True
        async with network.open(postgres.host) as port:
            manager = DatabaseSessionManager(at_port(port, database_url))
            opening = asyncio.create_task(manager.open())
            await asyncio.sleep(0)
            assert await find_health(manager) == not_ready("the manager is being opened")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        assert await find_health(manager) == not_ready("open() has failed: CancelledError")

    async def test_after_an_open_that_failed_it_repeats_why(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        async with network.open(postgres.host) as port:
            url = at_port(port, database_url)
        manager = DatabaseSessionManager(url)
        with pytest.raises(ConnectionFailedError) as raised:
            await manager.open()
        assert await find_health(manager) == not_ready(f"open() has failed: {raised.value}")
