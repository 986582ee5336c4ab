"""Where in the user's code something is done, for messages."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from types import FrameType
from typing import Any

from greenlet import getcurrent, greenlet

ON_THE_WAY = {"sqlalchemy", "sessionwire", "asyncio", "greenlet", "contextlib"}  # from the line that does it
UNKNOWN = "a place that is not known"


def where() -> str:
    """The innermost running line outside of what is on the way, as in `app.py:12 in Accounts.names`."""
    running: greenlet | None = getcurrent()
    frame: FrameType | None = inspect.currentframe()
    while running is not None:
        while frame is not None:
            if str(frame.f_globals.get("__name__")).partition(".")[0] not in ON_THE_WAY:
                return _place(frame)
            frame = frame.f_back
        running = running.parent  # where the frames of a greenlet end, its parent's go on
        frame = running.gr_frame if running else None
    return UNKNOWN


def where_is(task: asyncio.Task[Any]) -> str:
    """The line at which a task waits, as it would be on the task's own stack."""
    frames = task.get_stack()
    return f"{task.get_name()!r}, at {_place(frames[0])}" if frames else f"{task.get_name()!r}"


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
