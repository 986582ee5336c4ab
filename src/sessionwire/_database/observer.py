"""`Observer`: whom a database tells what happens in it, such as OpenTelemetry's side.

Without an observer nothing is told, and nothing is measured for it. It is called in the
midst of blocks and statements: it is quick, waits for nothing, and raises nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire.settings import DatabaseSettings

from .call_sites import CallSite
from .options import ConnectionOptions


class ObservedTransaction(Protocol):
    """A transaction or a savepoint, which an observer has seen begin."""

    def join(self, call_site: CallSite | None, propagation: str) -> None:
        """Hear that a block has joined it."""

    def end(
        self,
        outcome: str | None,
        error: BaseException | None = None,
        retry_reason: str | None = None,
    ) -> None:
        """Hear that it has ended. Only the first call counts.

        Args:
            outcome: The name of the counter in `TransactionTotals`, for a savepoint
                `released` or `rolled_back`. None: it is not counted.
            error: Why it was not committed.
            retry_reason: Why its block is run again.
        """


class Observer(Protocol):
    """Is told of blocks, of connections, and of the engines whose statements to watch."""

    # Blocks

    def begin(
        self,
        call_site: CallSite | None,
        options: ConnectionOptions,
        propagation: str | None = None,
        *,
        attempt: int = 1,
        is_block: bool = True,
        is_savepoint: bool = False,
    ) -> ObservedTransaction:
        """Hear that a transaction or a savepoint begins.

        Args:
            call_site: That of its block.
            options: Those of its connection.
            propagation: That of its block. None: the block has none.
            attempt: Which attempt of the block it is, from 1 on.
            is_block: The running code is inside a block that ends with it.
            is_savepoint: It is a savepoint.
        """
        ...

    def connect(self, connection: Connection, transaction: Any, call_site: CallSite | None) -> None:
        """Hear that statements of this transaction, or of none, use this connection."""

    def settle(self) -> None:
        """Hear that the outcome of the commit that runs here was looked up."""

    # The pool; times are in seconds

    def take(self, place: ConnectionPoolEntry, waited: float) -> None:
        """Hear that a place of the pool was handed out."""

    def give_back(self, held: float) -> None:
        """Hear that a place came back."""

    def make_connection(self, took: float) -> None:
        """Hear that a connection was opened."""

    # Statements

    def watch(self, engine: Engine, settings: DatabaseSettings) -> None:
        """Listen to the statements of an engine, which may be watched already."""


# In the `__dict__` of a connection: the transaction that it serves, as observed.
OBSERVED = "sessionwire_observed"


def observed_on(connection: Connection | None) -> Any:
    """Return the observed transaction of a connection, or None."""
    return None if connection is None else connection.__dict__.get(OBSERVED)
