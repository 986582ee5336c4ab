"""`session()`: a session that commits nothing by itself."""

from __future__ import annotations

import warnings
from types import TracebackType

from sqlalchemy.ext.asyncio import (
    AsyncSession,
)

from sessionwire._database.options import ConnectionOptions
from sessionwire.errors import (
    UncommittedChangesWarning,
)

from .block import Block
from .generators import is_left_early, is_told_otherwise, left_early
from .scope import Scope


class SessionBlock(Block):
    """`async with manager.session()`: a session that commits nothing by itself."""

    async def __aenter__(self) -> AsyncSession:
        self._enter_once()
        self._scope = Scope.open(self._database, ConnectionOptions())
        self._scope.is_bare = True
        self._frame = self._scope.push_frame()
        return self._scope.session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = self._scope
        if scope.ends_elsewhere(error):
            return
        loses_work = (error is None or is_left_early(error)) and (
            scope.has_uncommitted_writes or scope.has_pending_changes
        )
        failure = left_early() if loses_work and error is not None else None
        if failure is not None and is_told_otherwise(failure):
            failure = None
        scope.pop_frame(self._frame)
        await scope.close(failure or error)
        if failure is not None:
            raise failure
        if loses_work and error is None:
            warnings.warn(
                "a session() block ended with changes that are now lost: call commit() or "
                "rollback() in it, or use transaction(), which commits at its end",
                UncommittedChangesWarning,
                stacklevel=2,
            )
