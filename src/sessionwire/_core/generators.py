"""Find the async generator that runs a block, and tell how it was left.

Async generators share their context with the code that iterates over them. A block that
is open in one is found by that code between two items. Fixtures and
`@asynccontextmanager` rely on it.
"""

from __future__ import annotations

import asyncio
import dis
from contextlib import aclosing
from inspect import CO_ASYNC_GENERATOR, currentframe
from traceback import walk_stack, walk_tb
from types import FrameType
from typing import Any, cast

from sessionwire.errors import UnexpectedRollbackError

RESUME, GET_ANEXT, GET_AWAITABLE = (
    dis.opmap[name] for name in ("RESUME", "GET_ANEXT", "GET_AWAITABLE")
)
AT_AEXIT = cast(Any, aclosing).__aexit__.__code__
AFTER_YIELD = 1  # in the low bits of RESUME's argument: what the code is resumed after


def iterated_generator() -> FrameType | None:
    """Find the frame of the innermost async generator that an `async for` steps.

    One that something else steps, as `@asynccontextmanager` and fixtures do, opens its
    blocks for the code inside.
    """
    for frame, _ in walk_stack(currentframe()):
        stepper = frame.f_back
        if frame.f_code.co_flags & CO_ASYNC_GENERATOR and stepper and _iterates(stepper):
            return frame
    return None


def _iterates(frame: FrameType) -> bool:
    """Tell whether a waiting frame waits for the next item of an `async for`."""
    before = frame.f_code.co_code[: frame.f_lasti : 2]  # the operations, without their arguments
    return before.rfind(bytes((GET_ANEXT,))) > before.rfind(bytes((GET_AWAITABLE,)))


def is_at_yield(frame: FrameType) -> bool:
    """Tell whether the generator has yielded to the code that iterates over it."""
    code, position = frame.f_code.co_code, frame.f_lasti
    if code[position] != RESUME:  # up to Python 3.12 it is the next one
        position += 2
    return (
        frame.f_back is None and code[position] == RESUME and code[position + 1] & 3 == AFTER_YIELD
    )


def is_left_early(error: BaseException | None) -> bool:
    """Tell whether this error closes an async generator, and was not raised by hand."""
    if not isinstance(error, GeneratorExit):
        return False
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames and frames[-1].f_code.co_flags & CO_ASYNC_GENERATOR)


def early_end_error(
    end: BaseException | None, cause: BaseException | None = None
) -> UnexpectedRollbackError | None:
    """Make the error of a block that loses work because its generator is left early.

    Args:
        end: What ends the block.
        cause: Why its transaction would have been rolled back in any case.

    Returns:
        None if the generator is not left early, or the caller hears of another error.
    """
    if not is_left_early(end):
        return None
    error = UnexpectedRollbackError(
        "the async generator that opened this block was left before its end, so all that was done "
        "in the block was rolled back, also by the code that iterated over the generator: let the "
        "generator run to its end, or write in a transaction() around the loop and let the "
        "generator only read"
    )
    error.__cause__ = cause
    return None if _is_told_otherwise(error) else error


def _is_told_otherwise(error: UnexpectedRollbackError) -> bool:
    """Tell whether an error or a cancellation closes the generator, and goes on.

    The error gets a note then. It is known if `aclosing()` closes the generator;
    otherwise Python hides it.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return True
    for frame, _ in walk_stack(currentframe()):
        raised = frame.f_locals["exc_info"][1] if frame.f_code is AT_AEXIT else None
        # A GeneratorExit closes another generator.
        if raised is not None and not isinstance(raised, GeneratorExit):
            raised.add_note(str(error))
            return True
    return False
