"""What a `transaction()` block joins or begins, and how it ends."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType

from sqlalchemy.ext.asyncio import AsyncSession

from .errors import ConcurrentSessionError, UnexpectedRollbackError
from .scope import Owner, Transaction, current_scope


class TransactionManager:
    """Opens transactions of one manager: `async with transaction() as session:`.

    Stateless: one serves any number of tasks, and every service may have its own.
    """

    def __init__(self, manager: Owner) -> None:
        self._owner = manager

    def __call__(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Join the current transaction, or begin one, which commits when the block ends well, and else rolls back.

        In a bare `session()` it is that session's. Nothing is sent before the first statement.
        """
        return TransactionBlock(self._owner)

    @property
    def active(self) -> bool:
        """Whether a transaction is current."""
        scope = current_scope(self._owner)
        return scope is not None and scope.transaction is not None


class TransactionBlock:
    """`async with transaction()`."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def __aenter__(self) -> AsyncSession:
        current = current_scope(self._owner)
        self._opened = current is None
        self._scope = current or self._owner.open_scope(writes=True)
        self._block = self._scope.enter()
        self._begun = self._scope.transaction is None
        self._transaction = self._scope.transaction = self._scope.transaction or Transaction()
        return self._scope.session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._begun:
            await self._end(error)
        else:
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """End of a block that had joined: a failure dooms the transaction, whatever becomes of the error."""
        ended = self._block.scope is None
        self._scope.leave(self._block)
        if error is not None:
            self._transaction.doom(error)
        elif ended:
            raise UnexpectedRollbackError("the transaction ended before this block, which had joined it: rolled back")

    async def _end(self, error: BaseException | None) -> None:
        failure = error
        if failure is None:
            try:
                await self._commit()
            except BaseException as refused:
                failure = refused
        scope = self._scope
        scope.leave(self._block)
        scope.transaction = None
        if self._opened:
            await scope.close(failure)
        elif failure is not None:
            await scope.roll_back(failure)
        if failure is not None and failure is not error:
            raise failure

    async def _commit(self) -> None:
        scope = self._scope
        if scope.blocks and scope.blocks[-1] is not self._block:
            self._transaction.doom(ConcurrentSessionError("a block that joined in another task was still open"))
        elif scope.pending:
            await scope.session.flush()
        if self._transaction.doomed_by is not None:
            reason = self._transaction.doomed_by
            raise UnexpectedRollbackError(
                f"all was rolled back, although this block ended well: {type(reason).__name__}: {reason}; a block that "
                "had joined it failed, and its error was caught"
            ) from reason
        scope.leave(self._block)
        await scope.commit()
