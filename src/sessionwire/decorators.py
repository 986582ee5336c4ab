"""`@transactional`: a coroutine function as one transaction."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from .transaction import TransactionManager

P = ParamSpec("P")
R = TypeVar("R")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def transactional(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Run a coroutine function in a transaction, joining the one that is current.

    Its `TransactionManager` is the parameter `transaction`, or else the attribute `transaction` of `self`. Raises
    `TypeError` where there is none.
    """
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@transactional takes a coroutine function: write 'async def {_name(function)}'")
    find_manager = _finder(function, "transaction")

    @functools.wraps(function)
    async def in_transaction(*args: P.args, **kwargs: P.kwargs) -> R:
        async with find_manager(args, kwargs)():
            return await function(*args, **kwargs)

    return in_transaction


def _finder(function: Callable[..., Any], of: str) -> Callable[[tuple[Any, ...], dict[str, Any]], TransactionManager]:
    """How to find the manager in the arguments of a call."""
    parameters = inspect.signature(function).parameters
    if not parameters:
        raise TypeError(f"{_name(function)}() has neither a parameter {of!r} nor a self with such an attribute")
    positional = [name for name, parameter in parameters.items() if parameter.kind in POSITIONAL]
    position = positional.index(of) if of in positional else sys.maxsize
    default = parameters[of].default if of in parameters else None

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransactionManager:
        if of in parameters:
            found = kwargs.get(of, args[position] if position < len(args) else default)
            place = f"the argument {of!r}"
        else:
            holder = args[0] if args else kwargs.get(next(iter(parameters)))
            found = getattr(holder, of, None)
            place = f"the attribute {of!r} of {type(holder).__name__}"
        if not isinstance(found, TransactionManager):
            raise TypeError(
                f"{_name(function)}() runs in a transaction, but {place} is {type(found).__name__}, not a "
                "TransactionManager: inject one, as db.transaction provides it, with @inject above @transactional"
            )
        return found

    return find


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
