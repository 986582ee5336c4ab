"""psycopg's connection, which tells how commits end, and leaves nothing running."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, LiteralString, Self, TypeVar

import psycopg
from psycopg import IsolationLevel, generators, waiting
from psycopg.abc import PQGen, QueryNoTemplate
from psycopg.pq import ConnStatus, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult

from sessionwire._shield import run_shielded
from sessionwire.errors import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    UnexpectedRollbackError,
)

from .commit_resolver import (
    NOT_COMMITTED,
    QUESTION,
    CommitResolver,
    transaction_id_in,
    unknown_outcome,
    unreplicated_commit,
)
from .driver_errors import is_answer_lost, is_outcome_unknown, is_outdated_plan
from .server_settings import LISTEN_REFUSED

T = TypeVar("T")
STOP_TIMEOUT = 0.3  # seconds for a cancelled statement to be stopped before another one
# The server treats the first two levels alike.
ISOLATION_LEVELS = {
    "READ UNCOMMITTED": IsolationLevel.READ_COMMITTED,
    "READ COMMITTED": IsolationLevel.READ_COMMITTED,
    "REPEATABLE READ": IsolationLevel.REPEATABLE_READ,
    "SERIALIZABLE": IsolationLevel.SERIALIZABLE,
}


class NotCommittedError(psycopg.OperationalError):
    """The connection was lost at COMMIT, and it is certain that nothing was committed."""

    severity = "ERROR"  # so that it counts as a refusal


class Connection(psycopg.AsyncConnection[Any]):
    """A connection of psycopg, without five defects.

    A COMMIT that the server answers with ROLLBACK raises; psycopg reports success. So
    does a COMMIT whose wait for a synchronous standby was cancelled; the server only
    warns of that. A cancelled task does not wait for the server, which may be
    unreachable: what runs is cancelled before the connection is closed or used again.
    A connection is not closed under a task that waits for its socket, whose number the
    next one may get. What a migration has changed is prepared anew in autocommit too.
    """

    NUMBERS_PARAMETERS = False  # of a query: they have names
    resolver: CommitResolver | None = None
    last_statement: str | None = None  # of the user who has the connection
    has_only_read = False  # No statement but reads was sent in this transaction.
    at_begin = b""  # what gives a transaction the server's settings
    shares_sessions = False  # of the server with other clients, by a pooler
    _interrupted = False  # A cancelled task has left a statement running, in no pipeline.
    _is_waited_for = False
    _ends_with_wait = False  # It is closed once no task waits for its socket.
    _is_unreplicated = False  # The server has warned that it did not wait for a standby.

    @classmethod
    async def open(
        cls,
        *arguments: Any,
        timeout: float,
        at_connect: str,
        at_begin: str,
        shares_sessions: bool,
        **options: Any,
    ) -> Self:
        """Connect within `timeout` seconds; psycopg itself waits for two at least."""
        async with asyncio.timeout(timeout):
            try:
                connection = await cls.connect(*arguments, **options)
            except BaseException as error:
                # A frame of the traceback would keep the socket open.
                traceback.clear_frames(error.__traceback__)
                raise
            connection.at_begin, connection.shares_sessions = at_begin.encode(), shares_sessions
            if at_connect:
                try:
                    await connection.run(at_connect.encode())
                except BaseException:
                    connection.terminate()
                    raise
        connection.add_notice_handler(connection._notice_replication)
        return connection

    # The options of transactions

    def set_up(self, *, autocommit: bool, read_only: bool, isolation: str | None) -> None:
        """Set the options of the next transaction. `end_use()` resets them.

        psycopg's own methods wait for its lock, once for each option.
        """
        self._autocommit = autocommit
        if read_only:
            self._read_only = True
        if isolation is not None:
            self._isolation_level = ISOLATION_LEVELS[isolation]
        self._begin_statement = b""

    def end_use(self) -> bool:
        """Reset the options. Return whether no transaction is open."""
        self._autocommit = False
        self._read_only = self._isolation_level = self._deferrable = None
        self._begin_statement = b""
        self.last_statement = None
        return self.pgconn.transaction_status == TransactionStatus.IDLE

    def is_in_transaction(self) -> bool:
        status = self.pgconn.transaction_status
        if status == TransactionStatus.ACTIVE:
            return not self._autocommit
        return status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    # Wait for the server

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Drive a generator that sends and receives.

        psycopg cancels the statement of a cancelled task at once, and waits for it.
        """
        if self._interrupted and not await self.stop(STOP_TIMEOUT):
            self.terminate()
            raise psycopg.OperationalError("the statement before was cancelled, and did not end")
        self._is_waited_for = True
        try:
            result = await waiting.wait_async(
                gen, self.pgconn.socket, interval=interval, timeout=timeout
            )
        except (asyncio.CancelledError, KeyboardInterrupt):
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                if self._pipeline is None:
                    self._interrupted = True
                else:
                    await run_shielded(self._stop_in_pipeline(gen), 3 * STOP_TIMEOUT)
            raise
        except psycopg.errors.FeatureNotSupported as error:
            if is_outdated_plan(error):
                self._prepared.clear()  # By itself it does that at a rollback only.
            raise
        finally:
            self._is_waited_for = False
            if self._ends_with_wait:
                self.pgconn.finish()
        if self._is_unreplicated:
            self._is_unreplicated = False
            raise unreplicated_commit()
        return result

    async def stop(self, timeout: float) -> bool:
        """Cancel a statement that a cancelled task has left, and wait for its end.

        Args:
            timeout: Seconds for each of these.

        Returns:
            Whether the connection can be used again.
        """
        try:
            if self._interrupted:
                await self.cancel_safe(timeout=timeout)
                self._interrupted = False
                await self.wait(generators.execute(self.pgconn), timeout=timeout)
        except psycopg.Error:
            self._interrupted = not self.closed
        return not self.closed and self.pgconn.transaction_status != TransactionStatus.ACTIVE

    async def _stop_in_pipeline(self, gen: PQGen[Any]) -> None:
        """Cancel what runs, and let its generator end, or close the connection.

        psycopg can't leave its pipeline before, which it uses for many rows.
        """
        try:
            await self.cancel_safe(timeout=STOP_TIMEOUT)
            await waiting.wait_async(gen, self.pgconn.socket, interval=0.1, timeout=STOP_TIMEOUT)
        except psycopg.Error:
            pass
        finally:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()

    async def ping(self, timeout: float | None) -> None:
        """Ask the server something, outside of a transaction."""
        await self.run(b"SELECT 1", timeout)

    async def run(self, sql: bytes, timeout: float | None = None) -> None:
        """Run a statement outside of a transaction."""
        async with self.lock:
            await self.wait(self._exec_command(sql), timeout=timeout)

    def get_server_pid(self) -> int:
        return self.info.backend_pid

    async def fetchrow(self, sql: LiteralString) -> Any:
        """Return a row, by a prepared statement if it prepares any."""
        await self.set_autocommit(True)
        prepares = self.prepare_threshold is not None
        return await (await self.execute(sql, prepare=prepares)).fetchone()

    # Sessions that a pooler shares among its clients

    def _start_query(self) -> PQGen[None]:
        is_idle = self.pgconn.transaction_status == TransactionStatus.IDLE
        if not self.at_begin or self._autocommit or not is_idle:
            yield from super()._start_query()
        elif self._pipeline is None:
            # In one message with BEGIN, it costs no round trip.
            self.pgconn.send_query(self._get_tx_start_command() + b"; " + self.at_begin)
            for result in (yield from generators.execute(self.pgconn)):
                if result.status == ExecStatus.FATAL_ERROR:
                    raise psycopg.errors.error_from_result(result, self.info.encoding)
        else:
            yield from super()._start_query()
            yield from self._exec_command(self.at_begin)

    def notifies(
        self, *, timeout: float | None = None, stop_after: int | None = None
    ) -> AsyncGenerator[psycopg.Notify]:
        self._require_session()
        return super().notifies(timeout=timeout, stop_after=stop_after)

    def add_notify_handler(self, callback: Callable[[psycopg.Notify], None]) -> None:
        self._require_session()
        super().add_notify_handler(callback)

    def _require_session(self) -> None:
        if self.shares_sessions:
            raise ConfigurationError(LISTEN_REFUSED)

    # Ends of transactions

    async def commit(self) -> None:
        """Commit. If the answer is lost, look up the outcome."""
        if self.is_closed():
            raise psycopg.InterfaceError("the connection was closed before the COMMIT")
        resolver = self.resolver
        is_open = self.pgconn.transaction_status == TransactionStatus.INTRANS
        if resolver is None or not (resolver.is_on and is_open) or self._read_only:
            await super().commit()
            return
        answer = await self._ask()
        given_up_at = resolver.watch(self)
        try:
            await super().commit()
        except CommitOutcomeUnknownError as error:
            error.transaction_id = transaction_id_in(answer)
            raise
        except psycopg.Error as error:
            if is_outcome_unknown(error):
                raise unknown_outcome("the server doesn't know it", answer) from error
            if not is_answer_lost(error):
                raise
            only_read = self.has_only_read
            if not await resolver.settle(answer, error, given_up_at, only_read=only_read):
                raise NotCommittedError(NOT_COMMITTED) from error
        finally:
            resolver.unwatch(self)

    async def _ask(self) -> list[str | None]:
        """Ask what tells the outcome of the COMMIT, if its answer is lost."""
        try:
            async with self.lock:
                found = await self.wait(self._exec_command(QUESTION))
        except psycopg.OperationalError as error:
            if self.closed:
                raise NotCommittedError("the connection was lost before COMMIT") from error
            raise
        assert found is not None
        values = [found.get_value(0, column) for column in range(found.nfields)]
        return [None if value is None else value.decode() for value in values]

    def _exec_command(
        self, command: QueryNoTemplate, result_format: Format = Format.TEXT
    ) -> PQGen[PGresult | None]:
        result = yield from super()._exec_command(command, result_format)
        if command == b"COMMIT" and result is not None and result.command_status == b"ROLLBACK":
            raise UnexpectedRollbackError(
                "the server answered the COMMIT with ROLLBACK, because a statement had "
                "failed: let errors leave the block, or use Propagation.NESTED"
            )
        return result

    async def rollback(self) -> None:
        # The pool rolls back whatever has happened.
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            await super().rollback()

    def _notice_replication(self, notice: psycopg.errors.Diagnostic) -> None:
        # The name of the server's routine is compared, because the text may be in any
        # language.
        self._is_unreplicated |= notice.source_function == "SyncRepWaitForLSN"

    # Close

    def is_closed(self) -> bool:
        """Tell whether it is closed, after reading what the server said meanwhile."""
        if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):
                while self.pgconn.status == ConnStatus.OK and _is_readable(self.pgconn.socket):
                    self.pgconn.consume_input()
        return self.closed

    async def close(self) -> None:
        """Cancel what runs in the server, and close the connection."""
        self._interrupted = False
        try:
            if self._is_waited_for:
                self._wake()
                await self.cancel_safe()
            # The first cancellation may overtake the statement.
            for timeout in (STOP_TIMEOUT, 1, None):
                if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                    break
                await self.cancel_safe()
                with suppress(psycopg.OperationalError):
                    await self.wait(generators.execute(self.pgconn), timeout=timeout)
        finally:
            self.terminate()

    def terminate(self) -> None:
        """Close the connection at once."""
        self._closed = True
        if self._is_waited_for:
            self._ends_with_wait = True
            self._wake()
        else:
            self.pgconn.finish()

    def _wake(self) -> None:
        """Let the task that waits for the socket find the connection lost."""
        with (
            suppress(OSError, psycopg.Error),
            socket.socket(fileno=os.dup(self.pgconn.socket)) as same,
        ):
            same.shutdown(socket.SHUT_RDWR)

    def abandon(self, *, is_forked: bool) -> None:
        """Close a connection whose event loop is closed, or that a fork has inherited.

        A forked process sends nothing: what libpq says at the end goes nowhere.
        """
        with suppress(OSError, psycopg.Error):
            if is_forked:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, self.pgconn.socket)
                os.close(nowhere)
            self.pgconn.finish()


def _is_readable(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))
