"""A proxy on the way to the server: it counts the messages that wait for an answer, and can make the way longer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from sqlalchemy import URL

ASK = b"QSH\0"  # Query, Sync, Flush (which asks for a preparation), and what opens a connection ("Message Formats")
STARTUP = 0x30000  # what the first message of protocol 3 says; one without it asks whether TLS is spoken here


class Wire:
    """`delay` seconds are added to each round trip, by holding the question back."""

    def __init__(self, socket_directory: str, delay: float = 0) -> None:
        self.messages = 0  # round trips
        self._socket = f"{socket_directory}/.s.PGSQL.5432"
        self._delay = delay
        self._carriers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """The port to reach the server by."""
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as proxy:
            yield proxy.sockets[0].getsockname()[1]
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    async def _connect(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._socket)
        for carry in (self._carry_questions(from_client, to_server), _carry(from_server, to_client)):
            self._carriers.add(task := asyncio.create_task(carry))
            task.add_done_callback(self._carriers.discard)

    async def _carry_questions(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kinds = _Kinds()
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            self.messages += sum(kind in ASK for kind in kinds.of(data))
            if self._delay:
                loop.call_later(self._delay, writer.write, data)
            else:
                writer.write(data)
        loop.call_later(self._delay, writer.close)


class _Kinds:
    """The first bytes of a client's messages, which come in pieces; 0 for those at the start, which have none."""

    def __init__(self) -> None:
        self._rest = b""
        self._started = False

    def of(self, data: bytes) -> Iterator[int]:
        self._rest += data
        while len(self._rest) >= 8 or (self._started and len(self._rest) >= 5):
            kind = self._rest[:1] if self._started else b""
            length = len(kind) + int.from_bytes(self._rest[len(kind) : len(kind) + 4])
            if len(self._rest) < length:
                return
            yield kind[0] if kind else 0
            if not kind:
                self._started = int.from_bytes(self._rest[4:8]) >> 16 == STARTUP >> 16
            self._rest = self._rest[length:]


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


def url(host: str, port: int = 5432) -> URL:
    """Of the server, for SQLAlchemy; `host` may be the directory of its socket."""
    query = {"host": host} if host.startswith("/") else {}
    return URL.create(
        "postgresql+asyncpg",
        "postgres",
        host=None if query else host,
        port=None if query else port,
        database="postgres",
        query=query,
    )


@asynccontextmanager
async def far_away(socket_directory: str, delay: float) -> AsyncIterator[URL]:
    """The server behind a longer wire, which is a process of its own, so as not to take part in what is measured."""
    arguments = "-m", __name__, socket_directory, str(delay)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield url("127.0.0.1", int(await process.stdout.readline()))
    finally:
        process.terminate()
        await process.wait()


async def main(socket_directory: str, delay: str) -> None:
    async with Wire(socket_directory, float(delay)).open() as port:
        print(port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
