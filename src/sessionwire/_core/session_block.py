"""`session()`: a session that commits nothing by itself."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from sessionwire._database.options import ConnectionOptions
from sessionwire.errors import UncommittedChangesWarning

from .block import Block
from .context import current_scope
from .generators import early_end_error
from .scope import Scope
from .usage_errors import already_entered_error


class SessionBlock(Block):
    """`async with manager.session()`: a session that commits nothing by itself."""

    async def __aenter__(self) -> Any:  # the session, of the class that the user has chosen
        if self._was_entered:
            raise already_entered_error()
        self._was_entered = True
        enclosing = current_scope(self._database)
        self._scope = Scope.open(self._database, ConnectionOptions(), enclosing, self._call_site)
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
        loses_work = scope.has_uncommitted_writes or scope.has_pending_changes
        failure = early_end_error(error) if loses_work else None
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
