"""Storms of cancelled calls, and silent peers: the pool and deadlines keep limits."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, at_port, kill, through, until
from .proxy import ClientConnection, Proxy


class Slow(Proxy):
    """Delay each round trip by 10 ms: cancellations then meet another's clean-up."""

    def __init__(self) -> None:
        super().__init__(0.01)

    async def _carry_requests(self, reader: asyncio.StreamReader, client: ClientConnection) -> None:
        with suppress(ConnectionResetError):
            await super()._carry_requests(reader, client)


class TestStorm(OnPostgres):
    @pytest.mark.long
    @pytest.mark.parametrize("times", [1, 2, 3])
    async def test_the_server_has_no_more_connections_than_the_pool_has_places(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str, times: int
    ) -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(context)
        )
        chance = random.Random(times)

        async def call(stormy: DatabaseSessionManager) -> None:
            async with stormy.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                await session.execute(select(Note))
                await session.execute(text("SELECT pg_sleep(60)"))

        async def client(stormy: DatabaseSessionManager) -> None:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                task = asyncio.create_task(call(stormy))
                await asyncio.sleep(chance.uniform(0, 0.25))
                for _ in range(times):
                    task.cancel()
                    await asyncio.sleep(chance.uniform(0, 0.03))
                with suppress(asyncio.CancelledError):
                    await task

        async with Slow().open(postgres.host) as port:
            settings = DatabaseSettings(
                url=at_port(port, database_url),
                pool=PoolSettings(size=2, max_overflow=2),
                application_name="stormy",
            )
            async with DatabaseSessionManager(settings) as stormy:
                await asyncio.gather(*(client(stormy) for _ in range(12)))
                await asyncio.sleep(1)  # as long as a server process may need to notice
                connected = (
                    "SELECT state, query FROM pg_stat_activity WHERE application_name = 'stormy'"
                )
                assert len(left := await postgres.execute(connected)) <= 4, left
                assert checked_out(stormy) == 0
        assert await notes(manager) == []
        gc.collect()  # it finds what nobody has asked for its exception
        await asyncio.sleep(0)
        assert not complaints


class TestBlackHole(OnPostgres):
    """A network that swallows what is sent."""

    @pytest.fixture
    def network(self) -> FaultyNetwork:
        return FaultyNetwork()

    @pytest.fixture
    async def remote(
        self,
        network: FaultyNetwork,
        database_url: str,
        postgres: Postgres,
        manager: DatabaseSessionManager,
    ) -> AsyncIterator[DatabaseSessionManager]:
        pool = PoolSettings(size=1, max_overflow=1, ping_after=60)
        limits = {"commit_timeout": 0.3, "rollback_timeout": 1.0}
        async with through(network, postgres, database_url, pool=pool, **limits) as remote:
            yield remote
            before = time.monotonic()
        assert (
            time.monotonic() - before < 1.5 + 1.0
        )  # the second for whatever the test has left in use

    @pytest.mark.parametrize("kind", ["statement", "first statement", "flush"])
    async def test_a_deadline_holds_in_a_network_that_swallows_everything(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, kind: str
    ) -> None:
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            async with remote.transaction(timeout=0.3) as session:
                if kind != "first statement":
                    await session.execute(select(1))
                network.swallows = True
                if kind == "flush":
                    session.add(Note(text="lost"))
                else:
                    await session.execute(insert(Note).values(text="lost"))
        assert 0.3 <= time.monotonic() - before < 0.8

    @pytest.mark.parametrize("cancelled", [False, True])
    async def test_the_commit_timeout_holds_in_a_network_that_swallows_everything(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, cancelled: bool
    ) -> None:
        async def work() -> None:
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="who knows"))
                network.swallows = True

        task = asyncio.create_task(work())

        async def sent() -> bool:
            # psycopg asks for the id of the transaction first.
            return b"COMMIT" in network.asked or b"pg_current_xact_id" in network.asked

        await until(sent)
        before = time.monotonic()
        if cancelled:
            task.cancel()
        await asyncio.wait([task])
        # The answer is waited for during half of `commit_timeout`.
        assert 0.1 < time.monotonic() - before < 0.8

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_the_rollback_timeout_holds_in_a_network_that_swallows_everything(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, kind: str
    ) -> None:
        with pytest.raises(ValueError, match="mine"):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                network.swallows = True
                before = time.monotonic()
                raise ValueError("mine")
        assert 0.9 < time.monotonic() - before < 1.5

    async def test_a_cancelled_call_in_a_dead_network_returns_at_once_and_frees_its_place(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), remote.transaction() as session:
                await session.execute(select(1))
                network.swallow_what_is_open()
                await session.execute(select(1))
        assert time.monotonic() - before < 0.6
        assert checked_out(remote) == 1
        async with remote.transaction() as one:  # there is a second place
            await one.execute(select(1))
            async with remote.session() as other:
                await other.execute(select(1))
                assert time.monotonic() - before > 1.0
        assert checked_out(remote) == 0

    async def test_an_overflow_connection_that_cannot_be_closed_delays_only_a_moment(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        async with remote.engine.connect(), remote.engine.connect():
            network.swallows = True
            before = time.monotonic()
        assert time.monotonic() - before < 0.5
        # asyncpg waits until the server hangs up.
        assert checked_out(remote) == (remote.engine.dialect.driver == "asyncpg")
        network.swallows = False

        async def is_free() -> bool:
            return checked_out(remote) == 0

        await until(is_free)


class Unplugged(Proxy):
    """A proxy that can vanish: it no longer reads, and even TCP does not answer."""

    def vanish(self) -> None:
        drop = ctypes.create_string_buffer(
            struct.pack("HBBI", 0x06, 0, 0, 0)
        )  # a filter for packets: keep 0 bytes
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        for client in self.clients:
            client.to_client.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, program
            )


SO_ATTACH_FILTER = 26


class TestVanishedPeer(OnPostgres):
    @pytest.fixture
    def network(self) -> Unplugged:
        return Unplugged()

    @pytest.fixture
    async def remote(
        self,
        network: Unplugged,
        database_url: str,
        postgres: Postgres,
        manager: DatabaseSessionManager,
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with network.open(postgres.host) as port:
            url = at_port(port, database_url)
            settings = DatabaseSettings(url=url, tcp_timeout=1, rollback_timeout=0.2)
            async with DatabaseSessionManager(settings) as remote:
                yield remote
                assert checked_out(remote) == 0

    @pytest.mark.parametrize("sent", ["before", "after"])
    async def test_a_statement_without_a_deadline_fails_if_its_server_vanishes(
        self, remote: DatabaseSessionManager, network: Unplugged, postgres: Postgres, sent: str
    ) -> None:
        async with asyncio.timeout(10):
            with pytest.raises(DBAPIError) as raised:
                async with remote.transaction() as session:
                    await session.execute(select(1))
                    if sent == "before":
                        asyncio.get_running_loop().call_later(0.1, network.vanish)
                        await session.execute(text("SELECT pg_sleep(60)"))
                    else:
                        network.vanish()
                        await session.execute(insert(Note).values(text="lost"))
        assert raised.value.connection_invalidated
        if sent == "before":
            await kill(postgres, remote, "%pg_sleep(60)")  # it hasn't noticed

    async def test_a_slow_statement_is_not_taken_for_a_vanished_server(
        self, remote: DatabaseSessionManager
    ) -> None:
        async with remote.transaction() as session:
            assert await session.scalar(text("SELECT 1 FROM pg_sleep(2.5)")) == 1

    @pytest.mark.parametrize(
        ("tcp_timeout", "expected"),
        [
            (30.0, (1, 15, 5, 3, 30000)),
            pytest.param(
                0.0, (0,), marks=pytest.mark.asyncpg_only("libpq turns SO_KEEPALIVE on by itself")
            ),
        ],
    )
    async def test_tcp_timeout_sets_the_keepalive_options_of_the_socket(
        self,
        manager: DatabaseSessionManager,
        network: Unplugged,
        postgres: Postgres,
        database_url: str,
        tcp_timeout: float,
        expected: tuple[int, ...],
    ) -> None:
        async with network.open(postgres.host) as port:
            url = at_port(port, database_url)
            async with (
                DatabaseSessionManager(
                    DatabaseSettings(url=url, tcp_timeout=tcp_timeout)
                ) as remote,
                remote.connect() as connection,
            ):
                driver: Any = (await connection.get_raw_connection()).driver_connection
                number = (
                    driver._transport.get_extra_info("socket").fileno()
                    if remote.engine.dialect.driver == "asyncpg"
                    else driver.fileno()
                )
                with socket.socket(fileno=os.dup(number)) as options:
                    found = [options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
                    for name in (
                        "TCP_KEEPIDLE",
                        "TCP_KEEPINTVL",
                        "TCP_KEEPCNT",
                        "TCP_USER_TIMEOUT",
                    ):
                        found.append(options.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)))
        assert tuple(found[: len(expected)]) == expected
