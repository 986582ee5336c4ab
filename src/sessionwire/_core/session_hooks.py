"""The hooks of a bare session, whose commits are the caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy import event
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.util import await_only

from sessionwire._error_reports import unexpected_rollback

from .hooks import call_hook, in_rounds
from .transaction import Hook, Transaction

if TYPE_CHECKING:
    from .guarded_session import GuardedSession
    from .scope import Scope


# A hook, with the savepoint that encloses it.
Waiting = tuple[Hook, SessionTransaction | None]


class CommitHooks:
    """Hooks that wait for a commit of the session.

    A rollback of the enclosing savepoint drops them.
    """

    def __init__(self, session: GuardedSession) -> None:
        self._waiting: list[Waiting] = []
        self._waiting_before_commit: list[Waiting] = []
        event.listen(session, "after_commit", self._on_commit)
        event.listen(session, "after_soft_rollback", self._on_rollback)
        event.listen(session, "after_transaction_end", self._on_transaction_end)

    def add(self, hook: Hook, savepoint: SessionTransaction | None) -> None:
        self._waiting.append((hook, savepoint))

    def add_before_commit(self, hook: Hook, savepoint: SessionTransaction | None) -> None:
        self._waiting_before_commit.append((hook, savepoint))

    @property
    def has_any_before_commit(self) -> bool:
        return bool(self._waiting_before_commit)

    def take_before_commit(self) -> list[Hook]:
        """Return the hooks to call before the commit, once."""
        hooks = [hook for hook, _ in self._waiting_before_commit]
        self._waiting_before_commit.clear()
        return hooks

    async def call_before_commit(self, scope: Scope) -> None:
        """Call the hooks of a commit that is about to begin.

        Blocks inside them join, as if a `transaction()` was around them.

        Raises:
            UnexpectedRollbackError: A joined block has failed, or asked for a rollback.
        """
        transaction = scope.transaction = Transaction(self)
        try:
            for hook in in_rounds(
                lambda: [*self.take_before_commit(), *transaction.take_hooks_before_commit()]
            ):
                await call_hook(hook)
        finally:
            scope.transaction = None
        if transaction.rollback_cause is not None:
            raise unexpected_rollback(transaction.rollback_cause)
        for hook in transaction.take_due_hooks():
            self.add(hook, None)

    def finish(self, scope: Scope) -> None:
        """Drop the waiting hooks, and call the due ones.

        Within an operation, its end calls them.
        """
        self._waiting.clear()
        self._waiting_before_commit.clear()
        if scope.due_hooks and scope.operation is None:
            await_only(scope.run_due_hooks())

    def _on_commit(self, session: GuardedSession) -> None:
        if not session.in_nested_transaction():
            session.scope.due_hooks += tuple(hook for hook, _ in self._waiting)
            self._waiting.clear()

    def _on_rollback(self, _session: GuardedSession, rolled_back: SessionTransaction) -> None:
        for waiting in (self._waiting, self._waiting_before_commit):
            waiting[:] = [each for each in waiting if not _is_within(each[1], rolled_back)]

    def _on_transaction_end(self, session: GuardedSession, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self.finish(session.scope)


def call_after_commit(scope: Scope, hook: Hook) -> None:
    """Let a hook wait for the next commit of this bare session."""
    hooks, savepoint = _hooks_of(scope)
    hooks.add(hook, savepoint)


def call_before_commit(scope: Scope, hook: Hook) -> None:
    """Let a hook precede the next commit of this bare session."""
    hooks, savepoint = _hooks_of(scope)
    hooks.add_before_commit(hook, savepoint)


def take_hooks_before_commit(scope: Scope) -> list[Hook]:
    """Return the hooks that precede the next commit of this bare session, once."""
    session = cast("GuardedSession", scope.session.sync_session)
    return [] if session.commit_hooks is None else session.commit_hooks.take_before_commit()


def _hooks_of(scope: Scope) -> tuple[CommitHooks, SessionTransaction | None]:
    session = cast("GuardedSession", scope.session.sync_session)
    session.commit_hooks = session.commit_hooks or CommitHooks(session)
    return session.commit_hooks, session.get_nested_transaction()


def _is_within(savepoint: SessionTransaction | None, transaction: SessionTransaction) -> bool:
    while savepoint is not None and savepoint is not transaction:
        savepoint = savepoint.parent
    return savepoint is transaction
