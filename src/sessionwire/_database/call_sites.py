"""Call sites: the lines of the user's code that messages name."""

from __future__ import annotations

import asyncio
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from greenlet import getcurrent, greenlet

# The code of the user, and the position of an instruction in it: what is cheap to note.
# A frame would keep its variables alive.
CallSite = tuple[CodeType, int]

# The packages between the user's line and the code that asks for it.
SKIPPED_PACKAGES = {"sqlalchemy", "sessionwire", "asyncio", "greenlet", "contextlib"}
DECORATORS = "sessionwire.decorators"
BY_HAND = "manager.engine"  # the place of a connection that no block has taken
UNKNOWN_LINE = "an unknown line"
BEGIN_OF_FUNCTION = -1  # the position of no instruction
# Below it, the frames run the event loop.
RUN_CALLBACK = asyncio.Handle._run.__code__
# The attributes that hold the frame of a coroutine, a generator or an async generator,
# and the object that it awaits.
AWAITABLES = ("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")


def calling_site() -> CallSite | None:
    """Return where the user's code calls the function that calls this one."""
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code is not RUN_CALLBACK:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in SKIPPED_PACKAGES:
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def site_of(function: Any) -> CallSite | None:
    """Return the begin of a function, or None if it is not written in Python."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code and (code, BEGIN_OF_FUNCTION)


def line_of(site: CallSite | None) -> str:
    """Return the line of a call site: `app.py:12 in Accounts.names`."""
    if site is None:
        return UNKNOWN_LINE
    code, position = site
    lines = (line for start, end, line in code.co_lines() if start <= position < end and line)
    return _format_line(code, next(lines, code.co_firstlineno))


def running_line() -> str:
    """Return the running line of the user's code."""
    return _innermost_line(_running_frames()) or UNKNOWN_LINE


def current_line(task: asyncio.Task[Any]) -> str | None:
    """Return the line at which a task is suspended, or runs. None: it is done."""
    if task is asyncio.current_task():
        return running_line()
    frames = list(_suspended_frames(task.get_coro()))
    line = _innermost_line(reversed(frames))
    if line is None and frames:
        line = _format_line(frames[0].f_code, frames[0].f_lineno)
    return line


def describe_task(task: asyncio.Task[Any]) -> str:
    """Return the name of a task, and the line at which it is suspended."""
    line = current_line(task)
    return f"{task.get_name()!r}, at {line}" if line else f"{task.get_name()!r}"


def _running_frames() -> Iterator[FrameType]:
    """Yield the frames of the running task, the innermost first."""
    running: greenlet | None = getcurrent()
    frame: FrameType | None = inspect.currentframe()
    while running is not None:
        while frame is not None:
            if frame.f_code is RUN_CALLBACK:
                return
            yield frame
            frame = frame.f_back
        # The frames of a greenlet continue in its parent
        running = running.parent
        frame = running.gr_frame if running else None


def _suspended_frames(awaitable: Any) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine, the outermost first."""
    while names := next((names for names in AWAITABLES if hasattr(awaitable, names[0])), None):
        frame, awaitable = (getattr(awaitable, name) for name in names)
        if frame is not None:
            yield frame


def _innermost_line(frames: Iterable[FrameType]) -> str | None:
    """Return the first line of the user's code.

    That is one of no installed package, such as the client of another service, if there
    is any. If no frame is the user's, return the decorated function, which has not
    started yet or has just returned.
    """
    decorated: CodeType | None = None
    installed: str | None = None
    for frame in frames:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in SKIPPED_PACKAGES:
            line = _format_line(frame.f_code, frame.f_lineno)
            if not frame.f_code.co_filename.startswith(_installed_under()):
                return line
            installed = installed or line
        function = frame.f_locals.get("function") if module == DECORATORS else None
        if decorated is None and inspect.isroutine(function):
            decorated = inspect.unwrap(function).__code__
    if installed is not None:
        return installed
    return _format_line(decorated, decorated.co_firstlineno) if decorated else None


@cache
def _installed_under() -> tuple[str, ...]:
    """Return the directories of Python's own modules and of installed packages."""
    paths = sysconfig.get_paths()
    return tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _format_line(code: CodeType, line: int) -> str:
    return f"{Path(code.co_filename).name}:{line} in {code.co_qualname}"
