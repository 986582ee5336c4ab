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
import re
import struct
from collections import deque
from functools import partial
from itertools import takewhile
from typing import Any

# The BEGIN of asyncpg. A script of a user may begin like that.
BEGIN = re.compile(r"BEGIN[A-Z ]*;")
Statement = tuple[str, ...]  # its text and its arguments
DATA_ROW = b"D"
ERROR = b"E"
ANSWERED = b"CZ"  # CommandComplete, ReadyForQuery
# ParameterStatus, NoticeResponse and NotificationResponse: the server sends them of its
# own accord, and all of them are asyncpg's.
OF_ASYNCPG = b"SNA"
ENDING = ("FATAL", "PANIC")  # severities of errors that end the connection
SYNC = b"S\x00\x00\x00\x04"
END = ("Sync",)  # stands among the statements for a Sync of our own
HEADER = struct.Struct("!cI")


class Pipeline(asyncio.Protocol):
    """What is sent ahead on one connection.

    It receives all data, swallows the answers to what was sent ahead, and hands on what
    is not theirs.

    Args:
        protocol: The protocol of asyncpg.
        transport: The transport.
    """

    def __init__(self, protocol: Any, transport: Any) -> None:
        self._protocol = protocol
        self._transport = transport
        # uvloop's transport has no attributes to set, and gathers writes itself.
        self._can_join_writes = hasattr(transport, "__dict__")
        self.held: list[Statement] = []
        self.unanswered: deque[Statement] = deque()
        # The statement that was answered with an error, and those that were skipped.
        self.failed: tuple[str, ...] = ()
        # The BEGIN that was answered so, until its transaction ends: what follows would run
        # without one.
        self.refused_begin: str | None = None
        self.error_fields: dict[str, str] = {}  # of its error, if nobody was waiting for it
        self.row: bytes | None = None  # the DataRow that has come last
        self._received = b""  # from the first message on that is not handled yet
        self._ends_in_sync = True
        self._all_answered: asyncio.Future[None] | None = None  # while somebody waits
        transport.set_protocol(self)

    def hold(self, *statement: str) -> None:
        """Hold a statement with its arguments until the next message is sent."""
        self.held.append(statement)

    def ask(self, query: str) -> None:
        """Hold a query for one row. Its failure does not concern the next message."""
        self.row = None
        self.held += (query,), END

    def release(self, *, ends_in_sync: bool = True, at_once: bool = False) -> None:
        """Write what is held, together with the next message.

        Args:
            ends_in_sync: That message ends in a Sync, or asyncpg sends one after an
                error. A simple query does not.
            at_once: Write it now, because that message comes in several pieces.
        """
        self._ends_in_sync = ends_in_sync
        data = b"".join(map(_messages_of, self.held))
        self.unanswered += self.held
        self.held.clear()
        if at_once or not self._can_join_writes:
            self._transport.write(data)
        else:  # One write wakes the server once.
            self._transport.write = partial(self._write_together, data)

    def _write_together(self, ahead: bytes, data: Any) -> None:
        del self._transport.write  # From here on it is the transport's own again.
        self._transport.write(ahead + data)

    def end(self) -> None:
        """End with a Sync what no message of asyncpg follows. Its error is only noted."""
        self.unanswered.append(END)
        self._transport.write(SYNC)

    async def wait(self, timeout: float | None) -> None:
        """Wait until all is answered that was sent ahead, or the connection is lost.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutError: The answers did not come in time.
        """
        self._all_answered = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(timeout):
            await self._all_answered

    def _note_all_answered(self) -> None:
        if self._all_answered is not None and not self._all_answered.done():
            self._all_answered.set_result(None)
        self._all_answered = None

    def data_received(self, data: bytes) -> None:
        if not self.unanswered:
            self._protocol.data_received(data)
            return
        unanswered, data, others, start = self.unanswered, self._received + data, b"", 0
        while unanswered and data.startswith(answer := _usual_answer_to(unanswered[0]), start):
            unanswered.popleft()
            start += len(answer)
        last_header = len(data) - HEADER.size
        while unanswered and start <= last_header:
            kind, length = HEADER.unpack_from(data, start)
            end = start + 1 + length
            if end > len(data):
                break
            if kind in ANSWERED:
                unanswered.popleft()
            elif kind in OF_ASYNCPG:
                others += data[start:end]
            elif kind == DATA_ROW:
                self.row = data[start + HEADER.size : end]
            elif kind == ERROR and not self._has_failed(data[start + HEADER.size : end]):
                break  # It is the answer to what follows.
            start = end
        self._received = data[start:]
        if not unanswered:
            others += self._received
            self._received = b""
            self._note_all_answered()
        if others:
            self._protocol.data_received(others)

    def _has_failed(self, content: bytes) -> bool:
        """Note that a statement has failed. Return whether nobody waits for its error."""
        fields = _error_fields(content)
        if fields.get("V") in ENDING:
            self.unanswered.clear()
            return False
        is_ended = END in self.unanswered
        self.failed = tuple(sql for sql, *_ in takewhile(lambda each: each != END, self.unanswered))
        for _ in self.failed:
            self.unanswered.popleft()
        if self.failed and BEGIN.fullmatch(self.failed[0]):
            self.refused_begin = self.failed[0]
        if is_ended:
            self.error_fields = fields
        elif not self._ends_in_sync:
            self._transport.write(SYNC)
        return is_ended

    def connection_lost(self, exc: Exception | None) -> None:
        self.unanswered.clear()
        self._note_all_answered()
        received, self._received = self._received, b""
        if received:
            self._protocol.data_received(received)
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


@functools.lru_cache
def _messages_of(statement: Statement) -> bytes:
    """Return Parse, Bind and Execute of an unnamed statement with its arguments."""
    if statement == END:
        return SYNC
    sql, *arguments = (part.encode() for part in statement)
    lengths = b"".join(struct.pack("!I", len(each)) + each for each in arguments)
    parse = b"\x00" + sql + b"\x00\x00\x00"
    bind = b"\x00\x00\x00\x00" + struct.pack("!H", len(arguments)) + lengths + b"\x00\x00"
    execute = b"\x00\x00\x00\x00\x00"
    return _message(b"P", parse) + _message(b"B", bind) + _message(b"E", execute)


@functools.lru_cache
def _usual_answer_to(statement: Statement) -> bytes:
    """Return ParseComplete, BindComplete and CommandComplete of a statement without rows.

    Comparing with them is faster than reading each message.
    """
    tag = statement[0].split(maxsplit=1)[0].rstrip(";").encode()
    return _message(b"1", b"") + _message(b"2", b"") + _message(b"C", tag + b"\x00")


def values_in(row: bytes) -> list[str | None]:
    """Return the values of a DataRow, as text."""
    values: list[str | None] = []
    at = 2  # behind their number
    while at < len(row):
        (length,) = struct.unpack_from("!i", row, at)
        at += 4
        values.append(None if length < 0 else row[at : at + length].decode())
        at += max(length, 0)
    return values


def _error_fields(content: bytes) -> dict[str, str]:
    fields = content.rstrip(b"\x00").split(b"\x00")
    return {field[:1].decode(): field[1:].decode(errors="replace") for field in fields}


def _message(kind: bytes, content: bytes) -> bytes:
    return HEADER.pack(kind, len(content) + 4) + content
