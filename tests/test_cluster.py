"""The servers that other tests kill and promote are real ones."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from .cluster import cluster
from .postgres import until


async def test_a_standby_follows_and_is_promoted() -> None:
    async with cluster(synchronous=True, tcp=True) as servers:
        primary, standby = servers.primary, servers.standby
        await primary.execute("CREATE TABLE note (text text)")
        await primary.execute("INSERT INTO note VALUES ('kept')")
        await servers.catch_up()
        assert await standby.execute("SELECT text FROM note") == [("kept",)]
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await standby.execute("INSERT INTO note VALUES ('refused')")

        standby.pause()
        waiting = asyncio.create_task(primary.execute("INSERT INTO note VALUES ('waited')"))
        await until(
            lambda: primary.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        )
        standby.resume()
        await waiting

        await primary.kill()
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment
            await primary.execute("SELECT 1")
        await standby.promote()
        connection = await asyncpg.connect(standby.tcp_url("postgres"))
        assert await connection.fetch("INSERT INTO note VALUES ('promoted') RETURNING text") == [
            ("promoted",)
        ]
        await connection.close()
        assert await standby.execute("SELECT text FROM note") == [
            ("kept",),
            ("waited",),
            ("promoted",),
        ]


async def test_a_stopped_primary_comes_back_as_a_standby() -> None:
    async with cluster() as servers:
        primary = servers.primary
        await primary.execute("CREATE TABLE note (text text)")
        await primary.kill()
        await primary.start()
        await primary.execute("INSERT INTO note VALUES ('kept')")
        await primary.stop()
        await primary.start(as_standby=True)
        assert await primary.execute("SELECT text FROM note") == [("kept",)]
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await primary.execute("INSERT INTO note VALUES ('refused')")
