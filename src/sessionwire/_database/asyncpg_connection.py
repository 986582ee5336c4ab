"""asyncpg's connection, which sends ahead what nobody needs to wait for."""

from __future__ import annotations

import functools
import socket as socket_options
from typing import Any

import asyncpg

from sessionwire.errors import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    UnexpectedRollbackError,
)

from .asyncpg_protocol import Protocol
from .commit_resolver import (
    NOT_COMMITTED,
    QUESTION,
    CommitResolver,
    transaction_id_in,
    unknown_outcome,
    unreplicated_commit,
)
from .driver_errors import is_answer_lost, is_outcome_unknown
from .pipeline import BEGIN, Pipeline, Statement, values_in
from .server_settings import LISTEN_REFUSED
from .transaction_settings import SENT_AHEAD

# The beginnings of statements whose answers nobody reads.
UNREAD = ("SAVEPOINT ", "RELEASE SAVEPOINT ", SENT_AHEAD)


# What asyncpg says before it sends anything, if the server has said goodbye and the
# connection is not closed yet.
UNSENT = "cannot switch to state"


class NotCommittedError(asyncpg.PostgresConnectionError):
    """The connection was lost at COMMIT, and it is certain that nothing was committed."""

    severity = "ERROR"  # so that it counts as a refusal


class Connection(asyncpg.Connection):
    """A connection of asyncpg with a pipeline, and without three defects.

    If the answer to a COMMIT is lost, its outcome is looked up.

    A COMMIT that the server answers with ROLLBACK raises; asyncpg reports success. So
    does a COMMIT whose wait for a synchronous standby was cancelled; the server only
    warns of that. A failed BEGIN is forgotten; asyncpg notes the transaction before
    BEGIN is answered, and would take every later one for a savepoint in it.
    """

    _protocol: Any
    _listeners: Any
    _time_and_log: Any
    _server_caps: Any
    tcp_timeout = 0.0  # seconds
    has_pipeline = True
    NUMBERS_PARAMETERS = True  # of a query, as $1
    # What gives the server's settings, ahead of each statement that is in no transaction
    # and of the first one in a transaction, or with BEGIN.
    ahead_of_all: tuple[Statement, ...] = ()
    at_begin = ""
    shares_sessions = False  # of the server with other clients, by a pooler
    resolver: CommitResolver | None = None

    def __init__(self, protocol: Any, transport: Any, *others: Any) -> None:
        self.pipeline = Pipeline(protocol, transport)
        wrapped: Any = Protocol(protocol, self.pipeline)
        super().__init__(wrapped, transport, *others)
        wrapped.ahead_of_each = self.ahead_of_all
        if self.shares_sessions:
            # asyncpg turns it off for the session while it asks for types.
            self._server_caps = self._server_caps._replace(jit=False)
        if self.tcp_timeout:
            _enable_keepalive(transport.get_extra_info("socket"), self.tcp_timeout)

    # Sending ahead

    @property
    def can_send_ahead(self) -> bool:
        # asyncpg may have half of a notification, whose rest it must get itself.
        return self.has_pipeline and not self._listeners and not self.is_closed()

    def send_ahead_of_each(self, statements: tuple[Statement, ...]) -> None:
        """Let these precede each statement that is in no transaction."""
        if self._protocol is not None:  # The connection is not aborted.
            self._protocol.end_implicit_transaction()
            self._protocol.ahead_of_each = statements

    def end_use(self) -> bool:
        """Send ahead what all users need. Return whether no transaction is open."""
        self.send_ahead_of_each(self.ahead_of_all)
        self._protocol.last_statement = None
        return not self._protocol.is_in_transaction()

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if not args and BEGIN.fullmatch(query):
            return await self._begin(query, timeout)
        if query == "COMMIT;":
            return await self._commit(timeout)
        if query == "ROLLBACK;" and self._protocol.forget_begin():
            return "ROLLBACK"
        status = str(await super().execute(query, *args, timeout=timeout))
        if query == "ROLLBACK;":
            self.pipeline.refused_begin = None
        return status

    async def _begin(self, query: str, timeout: float | None) -> str:
        if self.can_send_ahead:
            with self._time_and_log(query, (), timeout):
                self._protocol.begin(query)
            return "BEGIN"
        self._protocol.end_implicit_transaction()
        self._protocol.may_have_written = False  # Nothing can be asked at its COMMIT.
        try:
            status = str(await super().execute(query + self.at_begin, timeout=timeout))
        except BaseException as error:
            if not self.is_closed():
                self._forget_transaction(error)
            raise
        self._protocol.hold_ahead_of_each()
        return status

    async def _commit(self, timeout: float | None) -> str:
        protocol = self._protocol
        if protocol.forget_begin():
            return "COMMIT"
        try:
            status = await self._send_commit(timeout)
        except asyncpg.InternalClientError as error:
            if not str(error).startswith(UNSENT):
                raise
            self.terminate()
            raise NotCommittedError("the server ended the connection before COMMIT") from error
        refused, self.pipeline.refused_begin = self.pipeline.refused_begin, None
        if refused:
            raise UnexpectedRollbackError(f"nothing was committed, because {refused!r} had failed")
        if status == "ROLLBACK":
            raise UnexpectedRollbackError(
                "the server answered the COMMIT with ROLLBACK, because a statement had "
                "failed: let errors leave the block, or use Propagation.NESTED"
            )
        return status

    async def _send_commit(self, timeout: float | None) -> str:
        """Send the COMMIT. If its answer is lost, look up its outcome."""
        resolver, protocol = self.resolver, self._protocol
        may_ask = protocol.may_have_written and self.can_send_ahead
        if resolver is None or not (resolver.is_on and may_ask):
            return str(await super().execute("COMMIT;", timeout=timeout))
        self.pipeline.ask(QUESTION)
        given_up_at = resolver.watch(self)
        try:
            return str(await super().execute("COMMIT;", timeout=timeout))
        except CommitOutcomeUnknownError as error:
            error.transaction_id = transaction_id_in(self._answer)
            raise
        except asyncpg.PostgresError as error:
            if is_outcome_unknown(error):
                raise unknown_outcome("the server doesn't know it", self._answer) from error
            if not is_answer_lost(error):
                raise
            if not await resolver.settle(
                self._answer, error, given_up_at, only_read=protocol.has_only_read
            ):
                raise NotCommittedError(NOT_COMMITTED) from error
            return "COMMIT"
        finally:
            resolver.unwatch(self)

    async def ping(self, timeout: float | None) -> None:
        """Ask the server something, outside of a transaction."""
        await self.execute("SELECT 1", timeout=timeout)

    @property
    def _answer(self) -> list[str | None] | None:
        """The answer to `QUESTION`, if it has arrived."""
        row = self.pipeline.row
        return None if row is None else values_in(row)

    async def run(self, sql: str, timeout: float) -> None:
        """Run a statement on a new connection, or close that."""
        try:
            await self.execute(sql, timeout=timeout)
        except BaseException:
            self.terminate()
            raise

    async def add_listener(self, channel: str, callback: Any) -> None:
        if self.shares_sessions:
            raise ConfigurationError(LISTEN_REFUSED)
        await super().add_listener(channel, callback)

    async def prepare(self, query: str, **options: Any) -> Any:
        if query.startswith(UNREAD) and self.can_send_ahead and self.is_in_transaction():
            return StatementSentAhead(self, query)
        return await super().prepare(query, **options)

    # Defects

    def _forget_transaction(self, error: BaseException) -> None:
        if not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
            # The answer is still to come, and the transaction may have begun.
            self.terminate()
        elif not self.is_in_transaction():
            self._top_xact = None

    def _process_log_message(self, fields: dict[str, str], last_query: str | None) -> None:
        parent: Any = super()
        parent._process_log_message(fields, last_query)
        # The name of the server's routine is compared, because the text may be in any
        # language. The error becomes that of the command being answered.
        if fields.get("R") == "SyncRepWaitForLSN":
            raise unreplicated_commit()


class StatementSentAhead:
    """Stands for a prepared statement whose answer nobody reads."""

    def __init__(self, connection: Connection, query: str) -> None:
        self._connection = connection
        self._query = query

    async def fetch(self, *args: str) -> list[Any]:
        if self._connection.can_send_ahead and self._connection.is_in_transaction():
            self._connection.pipeline.hold(self._query, *args)
        elif args:
            await self._connection.fetch(self._query, *args)
        else:
            await self._connection.execute(self._query)
        return []

    def get_attributes(self) -> tuple[()]:
        return ()

    def get_statusmsg(self) -> str:
        return ""


@functools.cache
def connection_class(
    *, tcp_timeout: float, pipeline: bool, at_begin: str = "", shares_sessions: bool = False
) -> type[Connection]:
    """Return a class of connections that have these settings."""
    settings = {
        "tcp_timeout": tcp_timeout,
        "has_pipeline": pipeline,
        "ahead_of_all": ((at_begin,),) if at_begin and pipeline else (),
        "at_begin": "" if pipeline else at_begin,
        "shares_sessions": shares_sessions,
    }
    return type("Connection", (Connection,), settings)


def _enable_keepalive(socket: Any, timeout: float) -> None:
    """Let a TCP connection fail if its peer acknowledges nothing for `timeout` seconds.

    Each platform has some of the options for it.
    """
    if socket is None or socket.family not in (socket_options.AF_INET, socket_options.AF_INET6):
        return
    socket.setsockopt(socket_options.SOL_SOCKET, socket_options.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", timeout / 2),
        ("TCP_KEEPALIVE", timeout / 2),  # the name on macOS
        ("TCP_KEEPINTVL", timeout / 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", timeout * 1000),
    ):
        if hasattr(socket_options, name):
            option = getattr(socket_options, name)
            socket.setsockopt(socket_options.IPPROTO_TCP, option, max(1, round(value)))
