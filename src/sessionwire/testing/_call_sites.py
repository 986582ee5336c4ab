"""Where in the user's code something is done, for messages."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from greenlet import getcurrent, greenlet

from sessionwire import decorators

ON_THE_WAY = {"sqlalchemy", "sessionwire", "asyncio", "greenlet", "contextlib"}  # from the line that does it
UNKNOWN = "a place that is not known"
# a coroutine, a generator and an asynchronous one: by what they tell their frame, and what they await
AWAITABLES = ("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")


def where() -> str:
    """The innermost running line outside of what is on the way, as in `app.py:12 in Accounts.names`."""
    return _innermost(_running()) or UNKNOWN


def where_is(task: asyncio.Task[Any]) -> str:
    """The line at which a task waits."""
    frames = list(_waiting(task.get_coro()))
    place = _innermost(reversed(frames)) or (_place(frames[0].f_code, frames[0].f_lineno) if frames else "")
    return f"{task.get_name()!r}, at {place}" if place else f"{task.get_name()!r}"


def _running() -> Iterator[FrameType]:
    """The frames of the running task, the innermost first."""
    running: greenlet | None = getcurrent()
    frame: FrameType | None = inspect.currentframe()
    while running is not None:
        while frame is not None:
            if frame.f_code is asyncio.Handle._run.__code__:
                return  # beyond it is who runs the loop
            yield frame
            frame = frame.f_back
        running = running.parent  # where the frames of a greenlet end, its parent's go on
        frame = running.gr_frame if running else None


def _waiting(awaitable: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine, the outermost first."""
    while kind := next((kind for kind in AWAITABLES if hasattr(awaitable, kind[0])), None):
        frame, awaitable = (getattr(awaitable, name) for name in kind)
        if frame is not None:
            yield frame


def _innermost(frames: Iterable[FrameType]) -> str | None:
    """Where none is the user's, the function that is at its begin or its end, so that nothing of it is running."""
    decorated = None
    for frame in frames:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in ON_THE_WAY:
            return _place(frame.f_code, frame.f_lineno)
        if module == decorators.__name__ and inspect.isroutine(function := frame.f_locals.get("function")):
            decorated = decorated or inspect.unwrap(function).__code__
    return _place(decorated, decorated.co_firstlineno) if decorated else None


def _place(code: CodeType, line: int) -> str:
    return f"{Path(code.co_filename).name}:{line} in {code.co_qualname}"
