"""`open()` waits for a server that starts later, and for nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import text

from sessionwire import ConnectionFailedError, DatabaseSessionManager, DatabaseSettings

from .cluster import Server, server
from .postgres import FaultyNetwork, OnPostgres, at_port, until
from .test_settings import fake_server

PATIENT = 60.0


@pytest.fixture
async def stopped() -> AsyncIterator[Server]:
    """Yield a server that is stopped."""
    async with server(tcp=True) as running:
        await running.stop()
        yield running


def waiting_for(url: str, seconds: float = PATIENT, **keys: Any) -> DatabaseSessionManager:
    return DatabaseSessionManager(DatabaseSettings(url=url, wait_for_database=seconds, **keys))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "sessionwire.open"]


async def begins_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    async def has_said_so() -> bool:
        return bool(warnings(caplog))

    await until(has_said_so)


async def answers(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        assert await session.scalar(text("SELECT 5")) == 5
    await manager.close()


@pytest.mark.parametrize("way", ["tcp", "localhost", "socket"])
async def test_a_server_that_starts_later_is_waited_for(
    way: str, stopped: Server, caplog: pytest.LogCaptureFixture
) -> None:
    urls = {
        "tcp": stopped.tcp_url("postgres"),
        "localhost": stopped.tcp_url("postgres").replace("127.0.0.1", "localhost"),
        "socket": stopped.url("postgres"),
    }
    manager = waiting_for(urls[way])
    opening = asyncio.create_task(manager.open())
    await begins_to_wait(caplog)
    assert not opening.done()
    stopped.begin_to_start()
    await opening
    (said,) = warnings(caplog)
    assert said.startswith("waiting up to 60 s for the database: database 'postgres' on host ")
    await answers(manager)


async def test_a_server_that_recovers_is_waited_for(
    stopped: Server, caplog: pytest.LogCaptureFixture
) -> None:
    # A standby without a primary starts, and refuses until it has recovered.
    with (stopped.data / "postgresql.auto.conf").open("a") as file:
        file.write("recovery_target_action = shutdown\nhot_standby = off\n")
    (stopped.data / "standby.signal").touch()
    stopped.begin_to_start()
    manager = waiting_for(stopped.tcp_url("postgres"))
    opening = asyncio.create_task(manager.open())
    await begins_to_wait(caplog)

    async def is_starting() -> bool:
        with pytest.raises(ConnectionFailedError) as failed:
            await DatabaseSessionManager(stopped.tcp_url("postgres")).open()
        return "CannotConnectNowError" in str(failed.value)

    await until(is_starting, seconds=PATIENT)
    assert not opening.done()
    await stopped.stop()
    (stopped.data / "standby.signal").unlink()
    await stopped.start()
    await opening
    await answers(manager)


async def test_a_name_without_an_address_is_waited_for(
    stopped: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped.begin_to_start()
    url = stopped.tcp_url("postgres").replace("127.0.0.1", "shop.invalid")
    manager = waiting_for(url)
    opening = asyncio.create_task(manager.open())
    await begins_to_wait(caplog)
    assert "gaierror" in warnings(caplog)[0]
    real = socket.getaddrinfo

    def resolve(host: Any, *others: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host == "shop.invalid" else host, *others, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)  # the name is there now
    await opening
    await answers(manager)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://shop@127.0.0.1:1/shop", "ConnectionRefusedError"),
        ("postgresql://shop@shop.invalid/shop", "gaierror"),
        ("postgresql://shop@/shop?host=/nowhere", "FileNotFoundError"),
    ],
)
async def test_the_error_says_how_long_it_has_waited(url: str, reason: str) -> None:
    before = monotonic()
    with pytest.raises(ConnectionFailedError, match=rf"{reason}: .*; waited \d\.\d s for it$"):
        await waiting_for(url, 0.5).open()
    assert 0.2 < monotonic() - before < 5


async def test_without_the_setting_nothing_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectionFailedError) as failed:
        await DatabaseSessionManager("postgresql://shop@127.0.0.1:1/shop").open()
    assert "waited" not in str(failed.value)
    assert not warnings(caplog)


async def test_a_server_that_is_silent_is_asked_again(
    stopped: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await stopped.start()
    network = FaultyNetwork()
    network.swallows = True
    async with network.open(stopped.host) as port:
        manager = waiting_for(at_port(port, stopped.url("postgres")), connect_timeout=0.2)
        opening = asyncio.create_task(manager.open())
        await begins_to_wait(caplog)
        assert "no answer within 0.2 s" in warnings(caplog)[0]
        network.swallows = False
        await opening
        await answers(manager)


async def test_a_connection_that_ends_before_it_is_open_is_tried_again(
    stopped: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await stopped.start()
    network = FaultyNetwork()
    network.cuts_at = b"user\0"  # at the first message, as a server that stops does
    async with network.open(stopped.host) as port:
        manager = waiting_for(at_port(port, stopped.url("postgres")))
        opening = asyncio.create_task(manager.open())
        await begins_to_wait(caplog)
        network.cuts_at = None
        await opening
        await answers(manager)


async def test_an_attempt_takes_no_longer_than_what_is_left() -> None:
    class Silent(asyncio.Protocol):
        pass

    loop = asyncio.get_running_loop()
    async with await loop.create_server(Silent, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        url = f"postgresql://shop@127.0.0.1:{port}/shop?sslmode=disable"
        before = monotonic()
        with pytest.raises(ConnectionFailedError, match="no answer within 0"):
            await waiting_for(url, 0.8, connect_timeout=0.5).open()
        assert monotonic() - before < 0.8 + 0.2


class TestAtOnce(OnPostgres):
    @pytest.mark.parametrize(
        ("user", "database", "query", "reason"),
        [
            ("postgres", "nowhere", "", "InvalidCatalogNameError"),
            ("nobody", "tests", "", "InvalidAuthorizationSpecificationError"),
            ("postgres", "tests", "&options=-cnonsense%3D1", "UndefinedObjectError"),
        ],
    )
    async def test_what_time_does_not_mend_fails_at_once(
        self, database_url: str, user: str, database: str, query: str, reason: str
    ) -> None:
        url = database_url.replace("postgres@", f"{user}@").replace("/tests", f"/{database}")
        with pytest.raises(ConnectionFailedError, match=reason) as failed:
            await waiting_for(f"{url}{query}").open()
        assert "waited" not in str(failed.value)


async def test_a_server_without_tls_fails_at_once() -> None:
    async with fake_server() as refusing:
        with pytest.raises(ConnectionFailedError, match="rejected SSL") as failed:
            await waiting_for(refusing.url("sslmode=require")).open()
        assert "waited" not in str(failed.value)


async def test_a_cancelled_open_leaves_nothing_open_and_can_be_called_again(
    stopped: Server, caplog: pytest.LogCaptureFixture
) -> None:
    manager = waiting_for(stopped.tcp_url("postgres"))
    opening = asyncio.create_task(manager.open())
    await begins_to_wait(caplog)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not manager.is_open
    assert not manager.is_initialized
    await stopped.start()
    await manager.open()
    await answers(manager)
