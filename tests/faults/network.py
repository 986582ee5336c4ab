"""The way to a server, on which anything may get lost."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import suppress
from random import Random

from tests.proxy import ClientConnection, Proxy


class FaultyNetwork(Proxy):
    """Leads to whichever server it is told to, and loses what it is told to."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.is_black_hole = False  # nothing comes through, and nobody is told
        self.loses = 0.0  # share of the requests whose answers are lost
        self.loses_only = b""  # requests that contain this
        # The share of those connections that fall silent; the others are cut.
        self.loses_silently = 0.5
        self._random = random
        self._losing: set[ClientConnection] = set()

    def delays(self, seconds: float) -> None:
        self._delay = seconds

    def cut_one(self) -> None:
        """Cut one of the connections at any point."""
        if self.clients:
            clients = sorted(self.clients, key=lambda client: id(client.to_client))
            self._cut(self._random.choice(clients))

    def cut_all(self) -> None:
        for client in list(self.clients):
            self._cut(client)

    def ask(self, data: bytes, client: ClientConnection) -> None:
        if self.is_black_hole:
            return
        if self.loses_only in data and self._random.random() < self.loses:
            self._losing.add(client)
        super().ask(data, client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        if client in self._losing:
            if self._random.random() >= self.loses_silently:
                self._cut(client)
        elif not self.is_black_hole:
            super().answer(data, client)

    def _cut(self, client: ClientConnection) -> None:
        for end in (client.to_client, client.to_server):
            end.transport.abort()
        self.clients.discard(client)
        self._losing.discard(client)

    def _start(self, carry: Coroutine[None, None, None]) -> None:
        super()._start(_until_cut(carry))


async def _until_cut(carry: Coroutine[None, None, None]) -> None:
    with suppress(OSError):
        await carry
