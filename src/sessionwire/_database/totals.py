"""`Totals`: counters of one manager, since it was made."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from sessionwire.errors import (
    CommitOutcomeUnknownError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from sessionwire.status import ConnectionTotals, SlowStatement, TransactionTotals

SLOW_STATEMENTS = 20  # that are kept, the latest first

if TYPE_CHECKING:
    from .observer import Observer


class Totals:
    """The counters behind `manager.status()`, which explains them."""

    # It is told of looked-up commits here, and by the pool of its connections.
    observer: Observer | None = None

    def __init__(self) -> None:
        self.committed = self.rolled_back = self.unexpected = self.unknown = 0
        self.timed_out = self.settled = 0
        self.retries: Counter[str] = Counter()
        self.made = self.replaced = self.lost = 0
        self.waited_for = self.held_for = 0.0  # seconds
        self.waits_timed_out = 0
        self.slow_statements: deque[SlowStatement] = deque(maxlen=SLOW_STATEMENTS)

    def count_end(self, failure: BaseException | None, *, rolls_back: bool = False) -> str:
        """Count the end of a transaction, and return the name of its counter.

        Args:
            failure: What its end raised. An error that only passed through its block is
                none.
            rolls_back: It was to be rolled back.
        """
        if failure is None and not rolls_back:
            self.committed += 1
            return "committed"
        if isinstance(failure, CommitOutcomeUnknownError):
            self.unknown += 1
            return "unknown"
        if isinstance(failure, UnexpectedRollbackError):
            self.unexpected += 1
            return "unexpected"
        if isinstance(failure, TransactionTimeoutError):
            self.timed_out += 1
            return "timed_out"
        self.rolled_back += 1
        return "rolled_back"

    def count_settled(self) -> None:
        """Count a commit whose outcome was looked up, in the task of that commit."""
        self.settled += 1
        if self.observer is not None:
            self.observer.settle()

    @property
    def transactions(self) -> TransactionTotals:
        return TransactionTotals(
            self.committed,
            self.rolled_back,
            self.unexpected,
            self.unknown,
            self.timed_out,
            self.settled,
        )

    @property
    def connections(self) -> ConnectionTotals:
        return ConnectionTotals(
            self.made,
            self.replaced,
            self.lost,
            self.waits_timed_out,
            self.waited_for,
            self.held_for,
        )
