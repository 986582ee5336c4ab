"""`Status`: what a manager has open, who holds its connections, and totals.

`MigrationState` is how far the migrations of its database are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from textwrap import shorten

STATEMENT_WIDTH = 100  # characters of a statement in a message


@dataclass(frozen=True)
class Holder:
    """The code that holds a connection. `str()` describes it in one line.

    Attributes:
        call_site: The decorated function, or the line that opened the block, such as
            `app.py:12 in Accounts.names`. For a connection that was taken from
            `manager.engine`, that name.
        held_for: Seconds since it has got the connection.
        statement: The text of the last statement on the connection, without parameters;
            None if it has sent none, or the driver does not tell.
        task: The name of the task that took the connection; None if it is gone.
        line: The line that this task waits at; None if it is done.
    """

    call_site: str
    held_for: float
    statement: str | None
    task: str | None
    line: str | None

    def __str__(self) -> str:
        return f"{self.held_for:.1f} s by {self.call_site}" + _where(
            self.task, self.line, self.statement
        )


@dataclass(frozen=True)
class OpenBlock:
    """An open session or `connect()` block. `str()` describes it in one line.

    Attributes:
        call_site: The decorated function, or the line that opened the block.
        open_for: Seconds since it was opened.
        is_waiting: Whether it waits for a connection.
        held_for: Seconds since it has got its connection; None if it has none.
        statement: The text of the last statement on its connection, without parameters;
            None if there is none, or the driver does not tell.
        task: The name of the task that opened it; None if it was opened outside of one.
        line: The line that this task waits at; None if it is done.
    """

    call_site: str
    open_for: float
    is_waiting: bool
    held_for: float | None
    statement: str | None
    task: str | None
    line: str | None

    def __str__(self) -> str:
        said = f"open for {self.open_for:.1f} s: {self.call_site}"
        if self.is_waiting:
            said += ", which waits for a connection"
        return said + _where(self.task, self.line, self.statement)


@dataclass(frozen=True)
class SlowStatement:
    """A statement that took longer than the setting `slow_statement`.

    Attributes:
        at: When it ended, in UTC.
        duration: Seconds from sending it to its answer.
        statement: Its text, without parameters.
        parameter_types: The types of its parameters, those of the first row of many.
        call_site: The function or line of the block that sent it.
        line: The line that sent it.
    """

    at: datetime
    duration: float
    statement: str
    parameter_types: tuple[str, ...]
    call_site: str
    line: str


@dataclass(frozen=True)
class PoolStatus:
    """The connections of a pool now.

    Attributes:
        in_use: Connections that are held.
        idle: Open connections that nobody holds.
        waiting: Tasks that wait for a connection.
        limit: The highest number of connections: `pool.size + pool.max_overflow`.
    """

    in_use: int = 0
    idle: int = 0
    waiting: int = 0
    limit: int = 0


@dataclass(frozen=True)
class TransactionTotals:
    """The ends of transactions, each attempt once.

    A `transaction()` that began one counts, a `connect()`, and in `session()` each
    commit and rollback. Savepoints and reads without a transaction don't.

    Attributes:
        committed: They were committed, or had nothing to commit.
        rolled_back: They were rolled back after an error or on demand, or refused.
        unexpected: Their block raised `UnexpectedRollbackError`.
        unknown: Their block raised `CommitOutcomeUnknownError`.
        timed_out: Their own deadline passed: `TransactionTimeoutError`.
        settled: How many of all these were looked up in the server, because the answer
            to their COMMIT was lost.
    """

    committed: int = 0
    rolled_back: int = 0
    unexpected: int = 0
    unknown: int = 0
    timed_out: int = 0
    settled: int = 0


@dataclass(frozen=True)
class ConnectionTotals:
    """The connections of a manager up to now.

    Attributes:
        made: Connections that were opened.
        replaced: Connections that had reached `pool.max_lifetime`.
        lost: Connections that died, or did not answer.
        timed_out: Waits for a connection that ended after `pool.timeout`.
        waited_for: Seconds that tasks have waited for a connection to become free.
        held_for: Seconds that connections were held, without those held now.
    """

    made: int = 0
    replaced: int = 0
    lost: int = 0
    timed_out: int = 0
    waited_for: float = 0.0
    held_for: float = 0.0


@dataclass(frozen=True)
class Status:
    """What a manager has open now, and totals since it was made.

    Attributes:
        name: The URL without its password, `""` if there are no settings.
        is_open: Whether the manager is open.
        is_closing: Whether `close()` waits for open blocks.
        open_scopes: Sessions and `connect()` blocks that are open.
        pool: The connections now.
        transactions: The ends of transactions up to now.
        retries: How often a block was run again, by reason: `serialization_failure`,
            `deadlock`, `busy`, `connection_lost`, `server_unavailable`,
            `too_many_connections`, `read_only` or `outdated_plan`, or `retry_on` for
            errors that only the caller's `retry_on` names.
        connections: The connections up to now.
        holders: Who holds the connections in use, the longest first.
        blocks: The open sessions and `connect()` blocks, the oldest first.
        slow_statements: Those that took longer than the setting `slow_statement`, the
            last 20, the latest first.
    """

    name: str
    is_open: bool
    is_closing: bool
    open_scopes: int
    pool: PoolStatus
    transactions: TransactionTotals
    retries: Mapping[str, int]
    connections: ConnectionTotals
    holders: tuple[Holder, ...]
    blocks: tuple[OpenBlock, ...]
    slow_statements: tuple[SlowStatement, ...]


def _where(task: str | None, line: str | None, statement: str | None) -> str:
    said = "" if task is None else f", task {task!r}"
    if line is not None:
        said += f", now at {line}"
    if statement is not None:
        said += f"; last statement: {shorten(statement, STATEMENT_WIDTH, placeholder=' …')}"
    return said


@dataclass(frozen=True)
class MigrationState:
    """How far the migrations of a database are.

    Attributes:
        current: The revisions that the database is at; none if it has no migration yet.
        heads: The newest revisions that this build of the program has.
        pending: The revisions that the database lacks, in the order in which they run.
        unknown: Those of `current` that this build does not have.
    """

    current: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_behind(self) -> bool:
        """Whether the database lacks migrations of this build."""
        return bool(self.pending)

    @property
    def is_ahead(self) -> bool:
        """Whether the database has migrations of a newer build."""
        return bool(self.unknown)
