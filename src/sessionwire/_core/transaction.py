"""What a transaction is to undo, by its levels: itself and each savepoint; and the hooks that wait for its end."""

from __future__ import annotations

from collections.abc import Callable

from sessionwire.errors import TransactionError

Hook = Callable[[], object]


class Level:
    """What is undone as one: a transaction, or a savepoint within it."""

    def __init__(self, block: object, outer: Level | None = None, failed_before: int = 0) -> None:
        self.block = block  # the one that began it
        self.outer = outer
        self.failed_before = failed_before
        self.doomed_by: BaseException | None = None
        self.rollback_only = False  # as its own block has asked for
        self.has_ended = False
        self._undone = False

    def doom(self, reason: BaseException) -> None:
        """Make it end in a rollback, however its block ends; where it has ended, the one around it. The first stays."""
        if self.has_ended and self.outer is not None:
            self.outer.doom(reason)
        else:
            self.doomed_by = self.doomed_by or reason

    def set_rollback_only(self, block: object) -> None:
        """The same where a block asks for it, quietly if it is the one that began."""
        if block is self.block:
            self.rollback_only = True
        else:
            self.doom(TransactionError("set_rollback_only() was called in a block that had joined"))

    def undo(self) -> None:
        self._undone = True

    @property
    def undone(self) -> bool:
        return self._undone or (self.outer is not None and self.outer.undone)


class Transaction:
    """The transaction that a block owns in a scope, with its savepoints and hooks."""

    def __init__(self, block: object) -> None:
        self.root = self.level = Level(block)
        self.has_begun = False  # in the database
        self.is_ending = False
        self._hooks: list[tuple[Hook, Level, bool]] = []

    def end(self, level: Level) -> None:
        """End a savepoint, and with it those that are still open inside it."""
        while not level.has_ended and self.level.outer is not None:
            self.level.has_ended = True
            self.level = self.level.outer

    def add_hook(self, hook: Hook, *, on_rollback: bool) -> None:
        self._hooks.append((hook, self.level, on_rollback))

    def hooks(self) -> list[Hook]:
        """Those that the end has made due, in the order given."""
        return [hook for hook, level, on_rollback in self._hooks if level.undone is on_rollback]
