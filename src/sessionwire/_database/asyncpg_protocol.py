"""asyncpg's protocol, with what goes ahead of its messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import asyncpg
from asyncpg.protocol import NO_TIMEOUT

from .pipeline import BEGIN, Pipeline
from .sql_text import surely_reads

ENDS = ("COMMIT;", "ROLLBACK;")


class Protocol:
    """All that asyncpg sends passes here, and is preceded by what is held.

    Args:
        protocol: The protocol of asyncpg.
        pipeline: What is sent ahead.
    """

    def __init__(self, protocol: Any, pipeline: Pipeline) -> None:
        self._protocol = protocol
        self._pipeline = pipeline
        # The statements to send ahead of each one that is not in a transaction.
        self.ahead_of_each: tuple[tuple[str, ...], ...] = ()
        self._has_begun = False  # a transaction, and asyncpg does not know of it yet
        # In this transaction: it is not READ ONLY; and no statement but reads was sent.
        self.may_have_written = self.has_only_read = False
        self.last_statement: str | None = None  # of the user who has the connection
        # A statement was prepared in an implicit transaction, which ends at a Sync.
        self._is_set_up = False
        self._is_ending = False  # That Sync is sent, and may not be answered yet.
        self._is_busy = False  # The answer to a message is outstanding.
        # What asyncpg asks for each statement is found without __getattr__().
        self.is_connected = protocol.is_connected
        self._is_cancelling = protocol._is_cancelling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)

    def begin(self, sql: str) -> None:
        """Hold a BEGIN, and what the statements in the transaction need."""
        self.end_implicit_transaction()
        self._has_begun, self._pipeline.failed = True, ()
        self.may_have_written, self.has_only_read = "READ ONLY" not in sql, True
        self._pipeline.hold(sql)
        self.hold_ahead_of_each()

    def hold_ahead_of_each(self) -> None:
        self._pipeline.held += self.ahead_of_each

    def end_implicit_transaction(self) -> None:
        """End that of a statement which was prepared, and did not run.

        A preparation has no Sync of its own: a pooler might give the connection to
        another client then.
        """
        if self._is_set_up and not self._is_busy:
            self._is_set_up = False
            self._end()

    def _end(self) -> None:
        self._pipeline.end()
        self._is_ending = True

    async def _wait_for_end(self, timeout: Any) -> None:
        """Wait until the server is ready after such an end.

        PgBouncer before 1.21 gives the server's session back then, and would lose what
        was sent meanwhile.
        """
        if self._pipeline.unanswered:
            await self._pipeline.wait(self._limit(timeout))
        self._is_ending = False
        if not self.is_in_transaction():  # What has failed is over.
            self._pipeline.failed = ()

    def forget_begin(self) -> bool:
        """End a transaction of which nothing was sent. Return False if it is none."""
        held = self._pipeline.held
        is_unsent = bool(held) and BEGIN.fullmatch(held[0][0]) is not None
        held.clear()  # The end of a transaction ends its savepoints too.
        if is_unsent:
            self._has_begun = False
        return is_unsent

    def is_in_transaction(self) -> bool:
        return bool(
            self._has_begun or self._pipeline.refused_begin or self._protocol.is_in_transaction()
        )

    async def settle(self, timeout: float | None = None) -> None:
        """Send what is held, and wait until asyncpg knows that a transaction has begun.

        Raises:
            PostgresError: A statement that was held has failed.
        """
        pipeline = self._pipeline
        pipeline.failed = ()
        if not (pipeline.held or self._has_begun):
            return
        try:
            await self._send(self._protocol.query, "SELECT", timeout, settles=True)
        except asyncpg.PostgresError:
            if not pipeline.failed:
                raise
        if pipeline.failed:
            raise asyncpg.PostgresError.new(pipeline.error_fields)

    # What asyncpg sends

    def query(self, query: str, timeout: float | None) -> Awaitable[Any]:
        if query in ENDS:
            return self._send(self._protocol.query, query, timeout, needs_begin=False)
        return self._send_simple(self._protocol.query, query, timeout)

    def copy_in(self, *args: Any) -> Awaitable[Any]:
        return self._send_simple(self._protocol.copy_in, *args)

    def copy_out(self, *args: Any) -> Awaitable[Any]:
        return self._send_simple(self._protocol.copy_out, *args)

    async def prepare(self, *args: Any, **options: Any) -> Any:
        self.last_statement = args[1]
        self._set_up()  # It may need the search_path.
        prepare = partial(self._protocol.prepare, **options)
        state = await self._send(prepare, *args, tells_asyncpg=False)
        self._is_set_up = bool(self.ahead_of_each) and not self.is_in_transaction()
        return state

    def bind_execute(
        self,
        state: Any,
        args: Any,
        portal_name: str,
        limit: int,
        return_extra: bool,
        timeout: float | None,
    ) -> Awaitable[Any]:
        self.last_statement = state.query
        if self.ahead_of_each:
            self._set_up(state)
        if self.has_only_read:
            self.has_only_read = surely_reads(state.query)
        send = self._protocol.bind_execute
        return self._send(send, state, args, portal_name, limit, return_extra, timeout)

    async def bind_execute_many(
        self, state: Any, args: Any, *, timeout: float | None, **options: Any
    ) -> Any:
        self.last_statement = state.query
        # After a client's error asyncpg sends a ROLLBACK, unless it knows of a
        # transaction.
        await self.settle(timeout)
        self._set_up(state)
        self.has_only_read = False

        def bind_execute_many(timeout: float | None) -> Awaitable[Any]:
            many: Awaitable[Any] = self._protocol.bind_execute_many(
                state, args, timeout=timeout, **options
            )
            return many

        return await self._send(bind_execute_many, timeout, at_once=True)

    def bind(self, *args: Any) -> Awaitable[Any]:
        self.has_only_read = False
        self.last_statement = args[0].query
        return self._send(self._protocol.bind, *args)

    def execute(self, *args: Any) -> Awaitable[Any]:
        return self._send(self._protocol.execute, *args)

    def close_portal(self, *args: Any) -> Awaitable[Any]:
        return self._send(self._protocol.close_portal, *args)

    def close_statement(self, *args: Any) -> Awaitable[Any]:
        return self._send(self._protocol.close_statement, *args)

    # What they have in common

    def _set_up(self, statement: Any = None) -> None:
        """Hold what a statement needs, unless its transaction has it already."""
        if self._is_set_up or not self.ahead_of_each or self.is_in_transaction():
            return
        self.hold_ahead_of_each()
        if statement is not None and not statement.name:
            # The server keeps one statement without a name, and will replace it.
            statement.mark_unprepared()

    async def _send_simple(self, send: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Send a simple query, which the server skips after an error ahead of it.

        Nothing tells PgBouncer that it was skipped. So what is held is settled before.
        """
        if not BEGIN.fullmatch(args[0]):
            self.last_statement = args[0]
        if self._pipeline.held:
            await self.settle(args[-1])
        self._set_up()
        self.has_only_read = False
        return await self._send(send, *args, ends_in_sync=False)

    async def _send(
        self,
        send: Callable[..., Awaitable[Any]],
        *args: Any,
        ends_in_sync: bool = True,
        tells_asyncpg: bool = True,
        needs_begin: bool = True,
        at_once: bool = False,
        settles: bool = False,
    ) -> Any:
        """Send a message of asyncpg, and right before it what is held.

        Args:
            send: The method of asyncpg's protocol.
            args: Its arguments, of which the last is a timeout in seconds.
            ends_in_sync: See `Pipeline.release()`.
            tells_asyncpg: Its answer tells asyncpg that a transaction has begun.
            needs_begin: It may not be sent in a transaction whose BEGIN has failed.
            at_once: It is sent in several pieces.
            settles: What is held ends in a Sync of its own.
        """
        protocol, pipeline = self._protocol, self._pipeline
        if self._is_busy:
            raise asyncpg.InterfaceError("cannot perform operation: another one is in progress")
        self._is_busy, was_set_up, self._is_set_up = True, self._is_set_up, False
        try:
            if self._is_cancelling():
                *rest, timeout = args
                args = (*rest, await protocol._wait_for_cancellation(self._limit(timeout)))
            elif self._is_ending:
                await self._wait_for_end(args[-1])
            elif not pipeline.unanswered:
                pipeline.failed = ()
            if (refused := pipeline.refused_begin) and needs_begin:
                raise asyncpg.InFailedSQLTransactionError(
                    f"nothing may run in a transaction whose {refused!r} failed: roll it back"
                )
            if pipeline.held:
                pipeline.release(ends_in_sync=ends_in_sync, at_once=at_once)
                if settles:
                    pipeline.end()
            result = await send(*args)
            if tells_asyncpg:
                self._has_begun = False
            return result
        except BaseException as error:
            is_idle = self.is_connected() and not self._is_cancelling()
            is_outstanding = pipeline.unanswered or (was_set_up and not _is_answer(error))
            if is_idle and is_outstanding and not self._is_ending:
                self._end()  # It was never sent, as if an argument has the wrong type.
            raise
        finally:
            self._is_busy = False

    def _limit(self, timeout: Any) -> Any:
        """Return the seconds that asyncpg's argument stands for, or None."""
        return None if timeout is NO_TIMEOUT else self._protocol._get_timeout(timeout)


def _is_answer(error: BaseException) -> bool:
    """Tell whether the server has sent it; asyncpg raises some of its own of that class."""
    return isinstance(error, asyncpg.PostgresError) and error.severity is not None
