"""`@transactional` and `@read_only`: a coroutine function as one block."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar, Unpack, cast, overload

from ._core.definition import Propagation, TransactionDefinition, TransactionOptions, attempts, define
from ._core.retry import run_with_retries
from ._database.runtime import database_of
from .transaction import TransactionManager

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# of the function as a whole, so that it still overrides and implements what it did: pyright tells the CoroutineType
# that an `async def` returns from a Coroutine
F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


class Decorator(Protocol):
    """Keeps the type of what it decorates."""

    def __call__(self, function: F, /) -> F: ...


@overload
def transactional(function: F, /) -> F: ...


@overload
def transactional(
    propagation: Propagation = ...,
    *,
    retries: int = ...,
    of: str = ...,
    **options: Unpack[TransactionOptions],
) -> Decorator: ...


def transactional(
    propagation: Any = Propagation.REQUIRED,
    *,
    retries: int = 0,
    of: str = "transaction",
    **options: Unpack[TransactionOptions],
) -> Any:
    """Run a coroutine function in a `transaction()`, with its options, and with `retries` as in `run()`.

    Its `TransactionManager` is the parameter that `of` names, or else that attribute of `self`. Raises `TypeError`
    where there is none.
    """
    is_bare = not isinstance(propagation, Propagation | str)  # without parentheses it is the function
    definition = define(Propagation.REQUIRED if is_bare else cast(Propagation, propagation), **options)
    decorate = partial(_decorate, "@transactional", of, definition, attempts(retries))
    return decorate(propagation) if is_bare else decorate


@overload
def read_only(function: F, /) -> F: ...


@overload
def read_only(*, of: str = ...) -> Decorator: ...


def read_only(function: Any = None, /, *, of: str = "transaction") -> Any:
    """Run a coroutine function that only reads: in what is current, or else in a read scope, without a transaction."""
    decorate = partial(_decorate, "@read_only", of, define(Propagation.SUPPORTS, read_only=True), 1)
    return decorate if function is None else decorate(function)


def _decorate(name: str, of: str, definition: TransactionDefinition, attempts: int, function: Any) -> Any:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} takes a coroutine function: {_remedy(name, function)}")
    find_manager = _finder(name, function, of)

    @functools.wraps(function)
    async def in_block(*args: Any, **kwargs: Any) -> Any:
        database = database_of(find_manager(args, kwargs))
        return await run_with_retries(database, definition, attempts, partial(function, *args, **kwargs))

    return in_block


def _finder(
    decorator: str, function: Callable[..., Any], of: str
) -> Callable[[tuple[Any, ...], dict[str, Any]], TransactionManager]:
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
            found = getattr(holder, of, inspect.Parameter.empty)
            place = f"the attribute {of!r} of {type(holder).__name__}"
        if not isinstance(found, TransactionManager):
            kind = (
                "missing" if found is inspect.Parameter.empty else f"{type(found).__name__}, not a TransactionManager"
            )
            remedy = "inject one, as db.transaction provides it"
            if of in parameters:
                remedy += f", with @inject above {decorator}, and wire() the container to the module"
            elif others := _managers_in(args[0] if args else None):
                remedy = f"there is one in {others[0]!r}, so write {decorator}(of={others[0]!r})"
            raise TypeError(f"{_name(function)}() is {decorator}, but {place} is {kind}: {remedy}")
        return found

    return find


def _managers_in(holder: object) -> list[str]:
    """The attributes that are a `TransactionManager`."""
    names = (*getattr(holder, "__dict__", ()), *_slots(type(holder)))
    return [name for name in names if isinstance(getattr(holder, name, None), TransactionManager)]


def _slots(kind: type) -> list[str]:
    slots = [getattr(base, "__slots__", ()) for base in kind.__mro__]
    return [name for each in slots for name in ((each,) if isinstance(each, str) else each)]


def _remedy(decorator: str, function: Any) -> str:
    if inspect.isclass(function):
        return f"write it above each method of {function.__name__} that is to be a block, not above the class"
    if inspect.isasyncgenfunction(function):
        return f"{_name(function)}() would keep its transaction open between its items; open transaction() in it"
    if type(function) in (classmethod, staticmethod):
        return f"write {decorator} below @{type(function).__name__}"
    if isinstance(function, TransactionManager) or not callable(function) or hasattr(function, "provided"):
        return f"write {decorator} without it, above 'async def'; it finds its TransactionManager when it is called"
    return f"write 'async def {_name(function)}'"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
