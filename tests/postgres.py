"""What only a server can do to a client: helpers for tests on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import make_url, text

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings

from .conftest import Postgres


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
    """Whether a server process of the manager's database is at work on this query (a pattern for LIKE)."""
    busy = "SELECT 1 FROM pg_stat_activity WHERE datname = $1 AND state = 'active' AND query LIKE $2"
    return bool(await server.execute(busy, manager.engine.url.database, query))


async def kill(server: Postgres, manager: DatabaseSessionManager, query: str = "%") -> None:
    """End the server processes of the manager's database whose last query is like this one, and wait for that."""
    strike = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1 AND query LIKE $2"
    assert await server.execute(strike, manager.engine.url.database, query)


async def at_commit(manager: DatabaseSessionManager, statement: str) -> None:
    """Make the server do this whenever the insert of a note is committed: a deferred constraint trigger."""
    async with manager.connect() as connection:
        for sql in (
            "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {statement}; RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION at_commit()",
        ):
            await connection.execute(text(sql))


class Network:
    """A proxy in front of the server: it carries, swallows or cuts."""

    def __init__(self) -> None:
        self.swallows = False
        self.cuts_at: bytes | None = None  # closes the connection on which the client sends this, instead of sending it
        self.cuts_answer_to: bytes | None = None  # sends it on, and closes once the server has answered
        self.asked = b""  # what a client has sent last
        self.questions = 0  # that were sent since it was set to 0, each with an answer to wait for
        self._host = ""
        self._carriers: set[asyncio.Task[None]] = set()
        self._dead: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()

    def swallow_what_is_open(self) -> None:
        """What is sent on the connections that are open now goes nowhere from now on."""
        self._dead |= self._open

    @asynccontextmanager
    async def before(self, server: Postgres) -> AsyncIterator[str]:
        """The host and port to reach the server by."""
        self._host = server.host
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as proxy:
            host, port = proxy.sockets[0].getsockname()
            yield f"{host}:{port}"
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.5432")
        asked = asyncio.Event()
        self._open.add(writer)

        async def carry_questions() -> None:
            try:
                while data := await reader.read(65536):
                    self.asked = data
                    self.questions += questions_in(data)
                    if self.cuts_at is not None and self.cuts_at in data:
                        writer.close()
                        break
                    if self.cuts_answer_to is not None and self.cuts_answer_to in data:
                        asked.set()
                    if not self.swallows and writer not in self._dead:
                        to_server.write(data)
            finally:
                to_server.close()

        async def carry_answers() -> None:
            try:
                while data := await from_server.read(65536):
                    if asked.is_set():
                        break
                    if not self.swallows:
                        writer.write(data)
            finally:
                writer.close()

        for carry in (carry_questions, carry_answers):
            self._carriers.add(asyncio.create_task(carry()))


def questions_in(data: bytes) -> int:
    """How many of its messages end a question: Query, Sync and Flush (PostgreSQL, "Message Formats")."""
    count = 0
    while len(data) >= 5:
        count += data[:1] in (b"Q", b"S", b"H")
        data = data[1 + int.from_bytes(data[1:5]) :]
    return count


@asynccontextmanager
async def through(
    network: Network, server: Postgres, database_url: str, **settings: float | PoolSettings
) -> AsyncIterator[DatabaseSessionManager]:
    """A manager that reaches its database through this network."""
    async with network.before(server) as address, asyncio.timeout(30):
        url = f"postgresql://postgres@{address}/{make_url(database_url).database}?sslmode=disable"
        async with DatabaseSessionManager(DatabaseSettings.model_validate({"url": url, **settings})) as manager:
            yield manager
