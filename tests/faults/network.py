"""The way to a server, on which anything may get lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from random import Random

from tests.proxy import Line, Proxy


class FaultyNetwork(Proxy):
    """Leads to whichever server it is told to, and loses what it is told to."""

    def __init__(self, random: Random, server_directory: str) -> None:
        super().__init__()
        self.leads_to = server_directory
        self.is_black_hole = False  # nothing comes through, and nobody is told
        self.loses = 0.0  # share of the questions whose answers are lost
        self.loses_only = b""  # questions that contain this
        # The share of those connections that fall silent; the others are cut.
        self.loses_silently = 0.5
        self._random = random
        self._losing: set[Line] = set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[int]:
        """Yield the port of 127.0.0.1 that leads to the server."""

        async def connect(
            from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
        ) -> None:
            try:
                from_server, to_server = await asyncio.open_unix_connection(
                    f"{self.leads_to}/.s.PGSQL.5432"
                )
            except OSError:  # the server is away
                to_client.transport.abort()
                return
            line = Line(to_server, to_client)
            self.lines.add(line)
            self._start(self._carry_questions(from_client, line))
            self._start(self._carry_answers(from_server, line))

        async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
            yield proxy.sockets[0].getsockname()[1]
            proxy.close()
            self.cut_all()
            await asyncio.gather(*self._carriers, return_exceptions=True)

    def delays(self, seconds: float) -> None:
        self._delay = seconds

    def cut_one(self) -> None:
        """Cut one of the connections at any point."""
        if self.lines:
            self._cut(self._random.choice(sorted(self.lines, key=lambda line: id(line.to_client))))

    def cut_all(self) -> None:
        for line in list(self.lines):
            self._cut(line)

    def ask(self, data: bytes, line: Line) -> None:
        if self.is_black_hole:
            return
        if self.loses_only in data and self._random.random() < self.loses:
            self._losing.add(line)
        super().ask(data, line)

    def answer(self, data: bytes, line: Line) -> None:
        if line in self._losing:
            if self._random.random() >= self.loses_silently:
                self._cut(line)
        elif not self.is_black_hole:
            super().answer(data, line)

    def _cut(self, line: Line) -> None:
        for end in (line.to_client, line.to_server):
            end.transport.abort()
        self.lines.discard(line)
        self._losing.discard(line)

    def _start(self, carry: Coroutine[None, None, None]) -> None:
        super()._start(_until_cut(carry))


async def _until_cut(carry: Coroutine[None, None, None]) -> None:
    with suppress(OSError):
        await carry
