"""What only a server can do to a client: helpers for tests on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import make_url, text

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings

from .conftest import Postgres, assert_all_returned
from .proxy import ClientConnection, Proxy


class OnPostgres:
    """A class of tests that run on PostgreSQL only."""

    @pytest.fixture
    def backend(self) -> str:
        return "postgresql"


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 5) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def running(server: Postgres, manager: DatabaseSessionManager, query: str) -> bool:
    """Return whether a server process of the manager's database runs this query."""
    busy = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = $1 AND state = 'active' AND query LIKE $2"
    )
    return bool(await server.execute(busy, manager.engine.url.database, query))


async def kill(server: Postgres, manager: DatabaseSessionManager, query: str = "%") -> None:
    """End the server processes of the manager's database whose last query is like this.

    Wait until they have ended.
    """
    terminate = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = $1 AND query LIKE $2"
    )
    assert await server.execute(terminate, manager.engine.url.database, query)


async def run_at_commit(manager: DatabaseSessionManager, statement: str) -> None:
    """Let the server do this at each commit of a new note, by a deferred trigger."""
    async with manager.connect() as connection:
        for sql in (
            "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {statement}; RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON note "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()",
        ):
            await connection.execute(text(sql))


class FaultyNetwork(Proxy):
    """The way to the server: it carries, swallows or cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.swallows = False
        # Swallow everything once the server has answered this.
        self.swallows_after: bytes | None = None
        self._is_last = False
        # Close the connection on which the client sends this, instead of sending it.
        self.cuts_at: bytes | None = None
        # Send this on, and close the connection once the server has answered.
        self.cuts_answer_to: bytes | None = None
        self.asked = b""  # the last message of a client
        self._cut: set[ClientConnection] = set()  # once the server answers
        self._dead: set[ClientConnection] = set()

    def swallow_what_is_open(self) -> None:
        """Swallow from now on what is sent on the connections that are open now."""
        self._dead |= self.clients

    def ask(self, data: bytes, client: ClientConnection) -> None:
        self.asked = data
        self._is_last |= self.swallows_after is not None and self.swallows_after in data
        if self.cuts_at is not None and self.cuts_at in data:
            client.to_client.close()
            return
        if self.cuts_answer_to is not None and self.cuts_answer_to in data:
            self._cut.add(client)
        if not self.swallows and client not in self._dead:
            super().ask(data, client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        if client in self._cut:
            client.to_client.close()
        elif not self.swallows:
            super().answer(data, client)
            self.swallows |= self._is_last


def at_port(port: int, database_url: str) -> str:
    """Return the URL of the same database through a network."""
    return (
        f"postgresql://postgres@127.0.0.1:{port}/{make_url(database_url).database}?sslmode=disable"
    )


@asynccontextmanager
async def through(
    network: FaultyNetwork, server: Postgres, database_url: str, **settings: float | PoolSettings
) -> AsyncIterator[DatabaseSessionManager]:
    """Open a manager that reaches its database through this network."""
    async with network.open(server.host) as port, asyncio.timeout(30):
        url = at_port(port, database_url)
        async with DatabaseSessionManager(
            DatabaseSettings.model_validate({"url": url, **settings})
        ) as manager:
            yield manager


class OnFaultyNetwork(OnPostgres):
    """A class of tests whose manager reaches PostgreSQL through a faulty network."""

    timeout = 0.2  # seconds for a commit, and for a rollback

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
        """Open a manager that reaches the database through `network`."""
        async with through(
            network,
            postgres,
            database_url,
            commit_timeout=self.timeout,
            rollback_timeout=self.timeout,
        ) as remote:
            yield remote
            await assert_all_returned(remote)
