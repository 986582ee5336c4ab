"""A URL of several servers is followed over a failover, without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    is_retryable,
)

from .cluster import Cluster, cluster
from .postgres import FaultyNetwork

pytestmark = pytest.mark.long


@pytest.fixture
async def servers() -> AsyncIterator[Cluster]:
    async with cluster(synchronous=True, tcp=True) as servers:
        yield servers


def of_url(servers: Cluster, attribute: str) -> DatabaseSettings:
    hosts = f"127.0.0.1:{servers.primary.port},127.0.0.1:{servers.standby.port}"
    query = f"target_session_attrs={attribute}&sslmode=disable"
    return DatabaseSettings(url=f"postgresql://postgres@{hosts}/postgres?{query}")


def of_keys(servers: Cluster, attribute: str) -> DatabaseSettings:
    return DatabaseSettings(
        url=f"postgresql:///?target_session_attrs={attribute}&sslmode=disable",
        host=f"127.0.0.1,127.0.0.1:{servers.standby.port}",
        port=servers.primary.port,
        username="postgres",
        database="postgres",
    )


async def port(manager: DatabaseSessionManager) -> int:
    async with manager.transaction() as session:
        return int(str(await session.scalar(text("SHOW port"))))


@pytest.mark.parametrize("settings", [of_url, of_keys])
async def test_a_promoted_standby_is_found_without_a_restart(
    settings: Callable[[Cluster, str], DatabaseSettings], servers: Cluster
) -> None:
    async with DatabaseSessionManager(settings(servers, "primary")) as manager:
        async with manager.transaction() as session:
            await session.execute(text("CREATE TABLE note (text text)"))
        assert await port(manager) == servers.primary.port
        await servers.primary.kill()

        async def write(note: str) -> None:
            async with manager.transaction() as session:
                await session.execute(text(f"INSERT INTO note VALUES ('{note}')"))

        for _ in range(2):  # The first finds its connection lost, the second none.
            with pytest.raises(DBAPIError) as failed:
                await write("while there is no primary")
            assert is_retryable(failed.value)
        assert "TargetServerAttributeNotMatched" in str(failed.value)
        await servers.standby.promote()
        await servers.standby.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await servers.standby.execute("SELECT pg_reload_conf()")
        await manager.transaction.run(write, "after it", retries=2)
        assert await port(manager) == servers.standby.port
        # The former primary comes back, and is not taken for one.
        await servers.primary.start(as_standby=True)
        await write("with both")
        assert await servers.standby.execute("SELECT text FROM note") == [
            ("after it",),
            ("with both",),
        ]


@pytest.mark.parametrize(
    ("attribute", "is_primary"),
    [("any", True), ("primary", True), ("standby", False), ("prefer-standby", False)],
)
async def test_the_wanted_role_decides_between_servers(
    attribute: str, is_primary: bool, servers: Cluster
) -> None:
    async with DatabaseSessionManager(of_url(servers, attribute)) as manager:
        wanted = servers.primary if is_primary else servers.standby
        assert await port(manager) == wanted.port
    if attribute == "prefer-standby":
        await servers.standby.stop()
        async with DatabaseSessionManager(of_url(servers, attribute)) as manager:
            assert await port(manager) == servers.primary.port


async def test_a_server_of_the_wanted_role_is_waited_for(servers: Cluster) -> None:
    await servers.primary.kill()
    with pytest.raises(ConnectionFailedError, match="TargetServerAttributeNotMatched"):
        await DatabaseSessionManager(of_url(servers, "primary")).open()
    settings = of_url(servers, "primary").model_dump() | {"wait_for_database": 60}
    manager = DatabaseSessionManager(DatabaseSettings(**settings))
    opening = asyncio.create_task(manager.open())
    await servers.standby.promote()
    await opening
    assert await port(manager) == servers.standby.port
    await manager.close()


async def test_a_silent_server_leaves_time_for_the_next_one(servers: Cluster) -> None:
    network = FaultyNetwork()
    async with network.open(servers.primary.host) as proxied:
        hosts = f"127.0.0.1:{proxied},127.0.0.1:{servers.standby.port}"
        settings = DatabaseSettings(
            url=f"postgresql://postgres@{hosts}/postgres?sslmode=disable",
            connect_timeout=2,
            pool=PoolSettings(ping_after=0),
        )
        async with DatabaseSessionManager(settings) as manager:
            assert await port(manager) == servers.primary.port
            network.swallows = True  # the machine has vanished without a word
            assert await port(manager) == servers.standby.port


async def test_a_wrong_password_is_not_tried_at_the_next_server(servers: Cluster) -> None:
    rules = servers.primary.data / "pg_hba.conf"
    rules.write_text("local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    await servers.primary.execute("SELECT pg_reload_conf()")
    with pytest.raises(ConnectionFailedError, match="InvalidPasswordError"):
        await DatabaseSessionManager(of_url(servers, "any")).open()
