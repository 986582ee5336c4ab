"""`Totals`: counters of one manager, since it was made."""

from __future__ import annotations

from collections import Counter, deque

from sessionwire.errors import (
    CommitOutcomeUnknownError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from sessionwire.status import ConnectionTotals, SlowStatement, TransactionTotals

SLOW_STATEMENTS = 20  # that are kept, the latest first


class Totals:
    """The counters behind `manager.status()`, which explains them."""

    def __init__(self) -> None:
        self.committed = self.rolled_back = self.unexpected = self.unknown = 0
        self.timed_out = self.settled = 0
        self.retries: Counter[str] = Counter()
        self.made = self.replaced = self.lost = self.timed_out = 0
        self.waited_for = self.held_for = 0.0  # seconds
        self.slow_statements: deque[SlowStatement] = deque(maxlen=SLOW_STATEMENTS)

    def count_end(self, failure: BaseException | None, *, rolls_back: bool = False) -> None:
        """Count the end of a transaction.

        Args:
            failure: What its end raised. An error that only passed through its block is
                none.
            rolls_back: It was to be rolled back.
        """
        if failure is None:
            self.rolled_back += rolls_back
            self.committed += not rolls_back
        elif isinstance(failure, CommitOutcomeUnknownError):
            self.unknown += 1
        elif isinstance(failure, UnexpectedRollbackError):
            self.unexpected += 1
        elif isinstance(failure, TransactionTimeoutError):
            self.timed_out += 1
        else:
            self.rolled_back += 1

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
            self.timed_out,
            self.waited_for,
            self.held_for,
        )
