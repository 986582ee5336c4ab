"""Hooks of a transaction: what may be one, and how they are called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from sessionwire._error_reports import chain_errors
from sessionwire._log_events import HOOK_FAILED
from sessionwire.errors import TransactionError, TransactionRequiredError

F = TypeVar("F", bound=Callable[..., Any])
H = TypeVar("H", bound=Callable[[], object])
MAX_ROUNDS = 100  # of hooks that add hooks


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
    named = getattr(function, "func", function)  # of a partial
    return str(getattr(named, "__name__", type(function).__name__))


def log_failures(hook: Callable[[], object]) -> Callable[[], object]:
    """Return a hook whose failure is logged and not raised."""

    def call() -> object:
        try:
            result = hook()
        except Exception:
            _log_failure(hook)
            return None
        return log_failure_of(result) if inspect.isawaitable(result) else result

    async def log_failure_of(result: Awaitable[object]) -> None:
        try:
            await result
        except Exception:
            _log_failure(hook)

    return call


def call_at_once(hook: Callable[[], object], *, robust: bool) -> None:
    """Call a hook that has no transaction to wait for.

    Raises:
        TransactionRequiredError: It is async.
    """
    try:
        result = hook()
    except Exception:
        if not robust:
            raise
        _log_failure(hook)
        return
    if inspect.isawaitable(result):  # of which nothing has run yet
        if inspect.iscoroutine(result):
            result.close()
        raise TransactionRequiredError(
            "no transaction is current, so there is nothing to wait for: await it"
        )


def _log_failure(hook: Callable[[], object]) -> None:
    HOOK_FAILED.log(failure=sys.exception(), hook=_name(hook))


def in_rounds(take: Callable[[], Sequence[H]]) -> Iterator[H]:
    """Yield hooks, then those that these have added, and so on.

    Raises:
        TransactionError: They do not come to an end.
    """
    for _ in range(MAX_ROUNDS):
        hooks = take()
        if not hooks:
            return
        yield from hooks
    raise TransactionError(
        f"before_commit hooks have added further ones {MAX_ROUNDS} times in a row, and it does not "
        "end: let a hook add none of its own kind, or use on_commit()"
    )


async def call_hook(hook: Callable[[], object]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result


async def run_hooks(
    hooks: Sequence[Callable[[], object]], failure: BaseException | None
) -> BaseException | None:
    """Call them all; the first error is what the block raises, the others are notes on it."""
    for hook in hooks:
        try:
            await call_hook(hook)
        except BaseException as error:
            failure = chain_errors(failure, error, "a hook")
    return failure
