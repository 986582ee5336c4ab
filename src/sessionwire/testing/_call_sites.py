"""Call sites: the lines of the user's code that messages name."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from greenlet import getcurrent, greenlet

from sessionwire import decorators

from ._cpython import runs_a_callback

# the packages between the user's line and the code that asks for it
SKIPPED_PACKAGES = {"sqlalchemy", "sessionwire", "asyncio", "greenlet", "contextlib"}
UNKNOWN_CALL_SITE = "an unknown line"
# the attributes that hold the frame of a coroutine, a generator or an async generator,
# and the object that it awaits
AWAITABLES = ("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")


def call_site() -> str:
    """Return the running line of the user's code: `app.py:12 in Accounts.names`."""
    return _innermost_call_site(_running_frames()) or UNKNOWN_CALL_SITE


def describe_task(task: asyncio.Task[Any]) -> str:
    """Return the name of a task, and the line at which it is suspended."""
    frames = list(_suspended_frames(task.get_coro()))
    line = _innermost_call_site(reversed(frames))
    if line is None and frames:
        line = _format_call_site(frames[0].f_code, frames[0].f_lineno)
    return f"{task.get_name()!r}, at {line}" if line else f"{task.get_name()!r}"


def _running_frames() -> Iterator[FrameType]:
    """Yield the frames of the running task, the innermost first."""
    running: greenlet | None = getcurrent()
    frame: FrameType | None = inspect.currentframe()
    while running is not None:
        while frame is not None:
            if runs_a_callback(frame):
                return  # the frames beyond it run the event loop
            yield frame
            frame = frame.f_back
        # the frames of a greenlet continue in its parent
        running = running.parent
        frame = running.gr_frame if running else None


def _suspended_frames(awaitable: Any) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine, the outermost first."""
    while names := next((names for names in AWAITABLES if hasattr(awaitable, names[0])), None):
        frame, awaitable = (getattr(awaitable, name) for name in names)
        if frame is not None:
            yield frame


def _innermost_call_site(frames: Iterable[FrameType]) -> str | None:
    """Return the first line of the user's code.

    If no frame is the user's, return the decorated function, which has not started yet
    or has just returned.
    """
    decorated: CodeType | None = None
    for frame in frames:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in SKIPPED_PACKAGES:
            return _format_call_site(frame.f_code, frame.f_lineno)
        function = frame.f_locals.get("function") if module == decorators.__name__ else None
        if decorated is None and inspect.isroutine(function):
            decorated = inspect.unwrap(function).__code__
    return _format_call_site(decorated, decorated.co_firstlineno) if decorated else None


def _format_call_site(code: CodeType, line: int) -> str:
    return f"{Path(code.co_filename).name}:{line} in {code.co_qualname}"
