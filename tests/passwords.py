"""A PostgreSQL server that asks for passwords."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .cluster import Server, server


@asynccontextmanager
async def asking_for_passwords() -> AsyncIterator[Server]:
    """Run a server that asks for the password of each role but its administrator's."""
    async with server(tcp=True) as running:
        rules = running.data / "pg_hba.conf"
        rules.write_text(
            "local all postgres trust\n"
            "local all all scram-sha-256\n"
            "host all all 127.0.0.1/32 scram-sha-256\n"
        )
        await running.execute("SELECT pg_reload_conf()")
        await running.execute("CREATE ROLE shop LOGIN PASSWORD 'first'")
        yield running
