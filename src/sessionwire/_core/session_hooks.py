"""The `on_commit` hooks of a bare session, whose commits are the caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy import event
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.util import await_only

from .transaction import Hook

if TYPE_CHECKING:
    from .guarded_session import GuardedSession
    from .scope import Scope


class CommitHooks:
    """Hooks that wait for a commit of the session.

    A rollback of the enclosing savepoint drops them.
    """

    def __init__(self, session: GuardedSession) -> None:
        # Each with the savepoint that encloses it.
        self._waiting: list[tuple[Hook, SessionTransaction | None]] = []
        event.listen(session, "after_commit", self._on_commit)
        event.listen(session, "after_soft_rollback", self._on_rollback)
        event.listen(session, "after_transaction_end", self._on_transaction_end)

    def add(self, hook: Hook, savepoint: SessionTransaction | None) -> None:
        self._waiting.append((hook, savepoint))

    def finish(self, scope: Scope) -> None:
        """Drop the waiting hooks, and call the due ones.

        Within an operation, its end calls them.
        """
        self._waiting.clear()
        if scope.due_hooks and scope.operation is None:
            await_only(scope.run_due_hooks())

    def _on_commit(self, session: GuardedSession) -> None:
        if not session.in_nested_transaction():
            session.scope.due_hooks += tuple(hook for hook, _ in self._waiting)
            self._waiting.clear()

    def _on_rollback(self, _session: GuardedSession, rolled_back: SessionTransaction) -> None:
        self._waiting = [
            (hook, savepoint)
            for hook, savepoint in self._waiting
            if not _is_within(savepoint, rolled_back)
        ]

    def _on_transaction_end(self, session: GuardedSession, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self.finish(session.scope)


def call_after_commit(scope: Scope, hook: Hook) -> None:
    """Let a hook wait for the next commit of this bare session."""
    session = cast("GuardedSession", scope.session.sync_session)
    session.commit_hooks = session.commit_hooks or CommitHooks(session)
    session.commit_hooks.add(hook, session.get_nested_transaction())


def _is_within(savepoint: SessionTransaction | None, transaction: SessionTransaction) -> bool:
    while savepoint is not None and savepoint is not transaction:
        savepoint = savepoint.parent
    return savepoint is transaction
