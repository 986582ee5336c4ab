"""A proxy before a PostgreSQL server, which counts round trips."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Query, Sync, Flush (which asks for a preparation), and the messages that open a
# connection: see "Message Formats" in PostgreSQL's documentation.
ASK = b"QSH\0"
# The version in the first message of protocol 3. A first message without it asks for
# TLS.
STARTUP = 0x30000


@dataclass(eq=False)
class ClientConnection:
    """One client's way to the server."""

    to_server: asyncio.StreamWriter
    to_client: asyncio.StreamWriter
    is_waiting: bool = False  # for an answer


class Proxy:
    """A proxy that delays each request by `delay` seconds, and counts round trips."""

    def __init__(self, delay: float = 0) -> None:
        # The messages, since this was set to 0, that wait for an answer: round trips.
        self.round_trips = 0
        self.clients: set[ClientConnection] = set()
        self.leads_to = ""  # the directory of the server's socket; may change meanwhile
        self._delay = delay
        self._carriers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self, socket_directory: str) -> AsyncIterator[int]:
        """Yield the port of 127.0.0.1 that leads to this server."""
        self.leads_to = socket_directory
        accepted: set[asyncio.StreamWriter] = set()

        def connect(from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
            if proxy.is_serving():
                accepted.add(to_client)
                self._start(self._connect(from_client, to_client))
            else:  # It was accepted before the end.
                to_client.transport.abort()

        async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
            try:
                yield proxy.sockets[0].getsockname()[1]
            finally:
                proxy.close()
                # From Python 3.12 on the server waits for its connections, even for one
                # whose client has vanished. Those that connect start other carriers.
                for to_client in accepted:
                    to_client.transport.abort()
                while running := [each for each in self._carriers if not each.done()]:
                    for carrier in running:
                        carrier.cancel()
                    await asyncio.gather(*running, return_exceptions=True)

    async def _connect(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        try:
            from_server, to_server = await asyncio.open_unix_connection(
                f"{self.leads_to}/.s.PGSQL.5432"
            )
        except OSError:  # The server is away.
            to_client.transport.abort()
            return
        client = ClientConnection(to_server, to_client)
        self.clients.add(client)
        self._start(self._carry_requests(from_client, client))
        self._start(self._carry_answers(from_server, client))

    def ask(self, data: bytes, client: ClientConnection) -> None:
        client.to_server.write(data)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        client.to_client.write(data)

    def _start(self, carry: Coroutine[None, None, None]) -> None:
        self._carriers.add(task := asyncio.create_task(carry))
        task.add_done_callback(self._carriers.discard)

    async def _carry_requests(self, reader: asyncio.StreamReader, client: ClientConnection) -> None:
        kinds, loop = _Kinds(), asyncio.get_running_loop()
        try:
            while data := await reader.read(65536):
                if any([kind in ASK for kind in kinds.of(data)]):
                    # What is asked before an answer has come costs no further wait.
                    self.round_trips += not client.is_waiting
                    client.is_waiting = True
                if self._delay:
                    loop.call_later(self._delay, self.ask, data, client)
                else:
                    self.ask(data, client)
        finally:
            loop.call_later(self._delay, client.to_server.close)

    async def _carry_answers(self, reader: asyncio.StreamReader, client: ClientConnection) -> None:
        try:
            while data := await reader.read(65536):
                client.is_waiting = False
                self.answer(data, client)
        finally:
            self.clients.discard(client)
            client.to_client.close()


class _Kinds:
    """Yield the types of a client's messages, which come in pieces; 0 at the start."""

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
