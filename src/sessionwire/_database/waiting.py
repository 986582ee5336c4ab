"""`Waiting`: wait in `open()` for a server that starts later."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from time import monotonic

from sessionwire._log_events import WAITING_FOR_DATABASE
from sessionwire.settings import DatabaseSettings

from .driver_errors import CANNOT_CONNECT_NOW, sqlstate

# The SQLSTATEs of a server that starts or stops, and of a connection that ended before
# it was open. The first one is also ours if no server has the role that the URL wants.
TEMPORARY = (CANNOT_CONNECT_NOW, "57P01", "57P02", "08003", "08006")
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds


class Waiting:
    """The patience of one `open()`, as `wait_for_database` says."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._patience = settings.wait_for_database
        self._connect_timeout = settings.connect_timeout
        self._start = monotonic()
        self._pause = FIRST_PAUSE
        self.has_waited = False

    @property
    def waited(self) -> float:
        """The seconds since the start."""
        return monotonic() - self._start

    @property
    def timeout(self) -> float:
        """The seconds that the next attempt may take. The first has all of them."""
        if not self.has_waited:
            return self._connect_timeout
        return min(self._connect_timeout, self._patience - self.waited)

    def goes_on(self, error: Exception) -> bool:
        """Tell whether the server may be there later, and there is time for that."""
        has_time = self.waited + self._pause < self._patience
        return has_time and any(_is_temporary(each) for each in _with_causes(error))

    async def pause(self, reason: str) -> None:
        """Wait for a moment, each time twice as long."""
        if not self.has_waited:
            WAITING_FOR_DATABASE.log(timeout=self._patience, reason=reason)
        self.has_waited = True
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_temporary(error: BaseException) -> bool:
    """Tell whether the server starts, stops, refuses, is silent, or has no address yet."""
    unreachable = ConnectionRefusedError, ConnectionResetError, FileNotFoundError, socket.gaierror
    if isinstance(error, unreachable):
        return True  # A socket's file is not found before its server listens.
    # asyncio's error for several addresses, and that of a network without a way to it.
    is_unreachable = type(error) is OSError or isinstance(error, TimeoutError)
    return is_unreachable or sqlstate(error) in TEMPORARY
