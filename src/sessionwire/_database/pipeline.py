"""Send statements to PostgreSQL ahead of the next message.

Nobody needs to wait for the answer to a BEGIN. So it is held until the driver sends its
next message, and written right before it. See "Message Flow" and "Message Formats" in
PostgreSQL's documentation.

A statement goes ahead as Parse, Bind and Execute, without a Sync, so it belongs to the
message that follows. If it fails, the server skips everything up to the next Sync, and
its error is the answer to the message that follows. No statement runs outside of its
transaction.
"""

from __future__ import annotations

import asyncio
import functools
import struct
from collections import deque
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any

# What the server sends of its own accord. All of it is asyncpg's.
PARAMETER_STATUS, NOTICE, NOTIFICATION = b"SNA"
ERROR, COMMAND_COMPLETE, READY = b"ECZ"
SYNC = b"S\x00\x00\x00\x04"
END = "Sync"  # stands among the statements for a Sync of our own
HEADER = struct.Struct("!cI")


class Pipeline(asyncio.Protocol):
    """What is sent ahead on one connection.

    While answers are outstanding it receives the data in asyncpg's place, and hands on
    what is not theirs. Otherwise asyncpg receives the data itself.

    Args:
        protocol: The protocol of asyncpg.
        transport: The transport.
    """

    def __init__(self, protocol: Any, transport: Any) -> None:
        self._protocol = protocol
        self._transport = transport
        self.held: list[tuple[str, ...]] = []  # statements with their arguments
        self.unanswered: deque[str] = deque()
        # The statement that was answered with an error, and those that were skipped.
        self.failed: tuple[str, ...] = ()
        self.error_fields: dict[str, str] = {}  # of its error, if nobody was waiting for it
        self._received = b""  # from the first message on that is not handled yet
        self._ends_in_sync = True

    def hold(self, sql: str, *arguments: str) -> None:
        """Hold a statement until the next message is sent."""
        self.held.append((sql, *arguments))

    def release(self, *, ends_in_sync: bool = True, at_once: bool = False) -> None:
        """Write what is held, together with the next message.

        Args:
            ends_in_sync: That message ends in a Sync, or asyncpg sends one after an
                error. A simple query does not.
            at_once: Write it now, because that message comes in several pieces.
        """
        self._ends_in_sync = ends_in_sync
        self._expect(*(sql for sql, *_ in self.held))
        data = b"".join(map(_messages_of, self.held))
        self.held.clear()
        if not at_once:
            # One write wakes the server once. uvloop's transport has no attributes to
            # set, and gathers writes itself.
            with suppress(AttributeError):
                self._transport.write = partial(self._write_together, data)
                return
        self._transport.write(data)

    def _write_together(self, ahead: bytes, data: Any) -> None:
        del self._transport.write  # From here on it is the transport's own again.
        self._transport.write(ahead + data)

    def end(self) -> None:
        """End with a Sync what no message of asyncpg follows. Its error is only noted."""
        self._expect(END)
        self._transport.write(SYNC)

    def _expect(self, *answers: str) -> None:
        if not self.unanswered:
            self._transport.set_protocol(self)
        self.unanswered += answers

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        others: list[bytes] = []  # which answer something else, or nothing
        start = 0
        while self.unanswered and len(data) >= start + HEADER.size:
            kind = data[start]
            end = start + 1 + int.from_bytes(data[start + 1 : start + HEADER.size])
            if len(data) < end:
                break
            if kind in (PARAMETER_STATUS, NOTICE, NOTIFICATION):
                others.append(data[start:end])
            elif kind == ERROR:
                has_end = END in self.unanswered
                self.failed = tuple(takewhile(lambda sql: sql != END, self.unanswered))
                for _ in self.failed:
                    self.unanswered.popleft()
                if not has_end:  # It is the answer to what follows.
                    if not self._ends_in_sync:
                        self._transport.write(SYNC)
                    break
                self.error_fields = _error_fields(data[start + HEADER.size : end])
            elif kind in (COMMAND_COMPLETE, READY):
                self.unanswered.popleft()
            start = end
        self._received = data[start:]
        if not self.unanswered:
            others.append(self._received)
            self._received = b""
            self._transport.set_protocol(self._protocol)
        if received := b"".join(others):
            self._protocol.data_received(received)

    def connection_lost(self, exc: Exception | None) -> None:
        self.unanswered.clear()
        received, self._received = self._received, b""
        if received:
            self._protocol.data_received(received)
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


@functools.lru_cache
def _messages_of(statement: tuple[str, ...]) -> bytes:
    """Return Parse, Bind and Execute of an unnamed statement with its arguments."""
    sql, *arguments = (part.encode() for part in statement)
    lengths = b"".join(struct.pack("!I", len(each)) + each for each in arguments)
    parse = b"\x00" + sql + b"\x00\x00\x00"
    bind = b"\x00\x00\x00\x00" + struct.pack("!H", len(arguments)) + lengths + b"\x00\x00"
    execute = b"\x00\x00\x00\x00\x00"
    return _message(b"P", parse) + _message(b"B", bind) + _message(b"E", execute)


def _error_fields(content: bytes) -> dict[str, str]:
    fields = content.rstrip(b"\x00").split(b"\x00")
    return {field[:1].decode(): field[1:].decode(errors="replace") for field in fields}


def _message(kind: bytes, content: bytes) -> bytes:
    return HEADER.pack(kind, len(content) + 4) + content
