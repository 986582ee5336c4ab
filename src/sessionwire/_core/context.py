"""Which blocks the running code is in, and which session is current.

A context variable holds the innermost block. It is never reset with a token. Look-ups skip blocks that have ended, so
blocks may end in any order, and in another task than they began in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scope import Owner, Scope


class Block:
    """One `async with`, as the contexts inside it remember it; `scope` is None once it has ended."""

    __slots__ = ("aborted", "outer", "scope")

    def __init__(self, scope: Scope, outer: Block | None) -> None:
        self.scope: Scope | None = scope
        self.outer = outer
        self.aborted: Owner | None = None  # the manager whose close() has aborted it


innermost_block: ContextVar[Block | None] = ContextVar("sessionwire_innermost_block", default=None)


def open_blocks() -> Iterator[tuple[Block, Scope]]:
    """The blocks around the running code that are still open, the innermost first, with their scopes."""
    block = innermost_block.get()
    while block is not None:
        if block.scope is not None:
            yield block, block.scope
        block = block.outer


def innermost_open_frame() -> Block | None:
    return next((block for block, _ in open_blocks()), None)


def current_scope(owner: Owner) -> Scope | None:
    """The innermost open scope of this manager in this context."""
    # by hand, not over open_blocks(): each use of a CurrentSession comes by here
    block = innermost_block.get()
    while block is not None and (block.scope is None or block.scope.owner is not owner):
        block = block.outer
    return block.scope if block is not None else None


def scopes_here(owner: Owner) -> set[Scope]:
    """All open scopes of this manager in this context."""
    return {scope for _, scope in open_blocks() if scope.owner is owner}


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # a coroutine that goes on in a forked process has none
        return None
