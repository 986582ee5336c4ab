"""Hooks of a transaction: what may be one, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from sessionwire._error_reports import chain_errors

F = TypeVar("F", bound=Callable[..., Any])


def to_call(function: F, taken_by: str, *arguments: object) -> F:
    """Return the function if it can be called later with so many arguments.

    Raises:
        TypeError: It can't be called so. A coroutine that was passed instead of a
            function is closed.
    """
    if callable(function):
        try:
            inspect.signature(function, follow_wrapped=False).bind(*arguments)
        except ValueError:  # some of those written in C have no signature
            pass
        except TypeError as error:
            raise TypeError(
                f"{taken_by} calls {_name(function)}() with {len(arguments) or 'no'} "
                f"argument{'s' * (len(arguments) != 1)}, which it doesn't take: {error}. Write "
                f"functools.partial({_name(function)}, …) or a lambda"
            ) from None
        return function
    if isinstance(function, Coroutine):
        function.close()
        raise TypeError(
            f"{taken_by} takes a function, to call it later, and was given the coroutine that "
            f"{_name(function)}() returned; it was closed. Write "
            f"functools.partial({_name(function)}, …) or lambda: {_name(function)}(…)"
        )
    given = "None" if function is None else f"an object of type {type(function).__name__}"
    raise TypeError(
        f"{taken_by} takes a function, to call it later, and was given {given}. If a call returned "
        "that, don't call the function here: write functools.partial(function, …) or lambda: "
        "function(…)"
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


async def run_hooks(
    hooks: Sequence[Callable[[], object]], failure: BaseException | None
) -> BaseException | None:
    """Call them all; the first error is what the block raises, the others are notes on it."""
    for hook in hooks:
        try:
            result = hook()
            if inspect.isawaitable(result):
                await result
        except BaseException as error:
            failure = chain_errors(failure, error, "a hook")
    return failure
