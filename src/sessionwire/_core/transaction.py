"""A transaction and its savepoints: what each rolls back, and the hooks to run at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sessionwire._database.observer import ObservedTransaction
from sessionwire.errors import TransactionError

Hook = Callable[[], object]


class Transaction:
    """What rolls back as one: a transaction, or a savepoint, which has a parent."""

    # The types of errors after which its outer block commits.
    no_rollback_for: tuple[type[Exception], ...] = ()
    observed: ObservedTransaction | None = None
    # Those of before_commit(), each with the savepoint in which it was added. They are
    # kept by the outermost transaction.
    hooks_before_commit: Sequence[tuple[Hook, Transaction]] = ()

    def __init__(
        self, owner: object, parent: Transaction | None = None, failure_mark: int = 0
    ) -> None:
        self.owner = owner  # the frame of the outer block, which began it
        self.parent = parent
        self.failure_mark = failure_mark  # how many statements had failed before it
        self.rollback_cause: BaseException | None = None
        self.rollback_requested = False  # by its outer block
        self.has_begun = False  # in the database
        self.has_ended = False
        self.is_ending = False
        self._rolled_back = False
        self._hooks: list[tuple[Hook, Transaction, bool]] = parent._hooks if parent else []

    def mark_rollback_only(self, cause: BaseException) -> None:
        """Make it roll back even if its block succeeds; once it has ended, its parent.

        The first cause is kept.
        """
        if self.has_ended and self.parent is not None:
            self.parent.mark_rollback_only(cause)
        else:
            self.rollback_cause = self.rollback_cause or cause

    def set_rollback_only(self, frame: object) -> None:
        """Handle the request of a block.

        From the outer block it is silent, otherwise an unexpected rollback.
        """
        if frame is self.owner:
            self.rollback_requested = True
        else:
            self.mark_rollback_only(
                TransactionError("set_rollback_only() was called in a joined block")
            )

    def mark_rolled_back(self) -> None:
        self._rolled_back = True

    @property
    def rolled_back(self) -> bool:
        return self._rolled_back or (self.parent is not None and self.parent.rolled_back)

    def add_hook(self, hook: Hook, *, on_rollback: bool) -> None:
        self._hooks.append((hook, self, on_rollback))

    def add_hook_before_commit(self, hook: Hook) -> None:
        outermost = self
        while outermost.parent is not None:
            outermost = outermost.parent
        outermost.hooks_before_commit = (*outermost.hooks_before_commit, (hook, self))

    def take_hooks_before_commit(self) -> list[Hook]:
        """Return the hooks to call before the commit, in the order added, once."""
        waiting, self.hooks_before_commit = self.hooks_before_commit, ()
        return [hook for hook, added_in in waiting if not added_in.rolled_back]

    def take_due_hooks(self) -> list[Hook]:
        """Return the hooks to run now, in the order added, and forget all hooks."""
        due = [
            hook
            for hook, added_in, on_rollback in self._hooks
            if added_in.rolled_back is on_rollback
        ]
        self.hooks_before_commit = ()
        self._hooks.clear()  # they know this transaction: without them it is freed at once
        return due
