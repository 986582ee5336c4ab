"""`@transactional` and `@read_only`: run a coroutine function in one block."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar, Unpack, cast, overload

from ._core.definition import (
    Propagation,
    TransactionDefinition,
    TransactionOptions,
    define,
)
from ._core.retry import RetryOn, RetryRule, define_retries, run_with_retries
from ._core.transaction_block import TransactionBlock
from ._database.call_sites import site_of
from ._database.runtime import database_of
from .transaction import TransactionManager

MISSING = inspect.Parameter.empty
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# The type of the whole function, so that a decorated method overrides and implements
# another as before: pyright distinguishes the CoroutineType, which an `async def`
# returns, from a Coroutine.
F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


class Decorator(Protocol):
    """A decorator that keeps the type of the function."""

    def __call__(self, function: F, /) -> F: ...


@overload
def transactional(function: F, /) -> F: ...


@overload
def transactional(
    propagation: Propagation = ...,
    *,
    retries: int = ...,
    retry_on: RetryOn | None = ...,
    of: str = ...,
    **options: Unpack[TransactionOptions],
) -> Decorator: ...


def transactional(
    propagation: Any = Propagation.REQUIRED,
    *,
    retries: int = 0,
    retry_on: RetryOn | None = None,
    of: str = "transaction",
    **options: Unpack[TransactionOptions],
) -> Any:
    """Run a coroutine function in a `transaction()`.

    Args:
        propagation: What to do if there is a current transaction, or none.
        retries: How often to call the function again after a conflict with another
            transaction, as in `TransactionManager.run()`.
        retry_on: Further errors after which it is called again, as in `run()`.
        of: The parameter that holds the `TransactionManager`, or the attribute of
            `self` if the function has no such parameter.
        **options: The options of `transaction()`: `isolation`, `read_only`, `timeout`
            in seconds, `execution_options`, `settings`, `durable`,
            `no_rollback_for`.

    Raises:
        TypeError: The function is no coroutine function, or an option is unknown or has
            a wrong type. When the function is called: there is no `TransactionManager`.
        ValueError: An option has a wrong value.

    Example:
        ```python
        class Notebook:
            def __init__(self, notes: NoteRepository, transaction: TransactionManager):
                self.notes = notes
                self.transaction = transaction

            @transactional
            async def add(self, text: str) -> None:
                await self.notes.add(text)

            @transactional(isolation="SERIALIZABLE", retries=3)
            async def add_unless_full(self, text: str, limit: int) -> None:
                if await self.notes.count() < limit:
                    await self.notes.add(text)
        ```
    """
    # Without parentheses, the function itself is the first argument.
    is_bare = not isinstance(propagation, Propagation | str)
    definition = define(
        Propagation.REQUIRED if is_bare else cast(Propagation, propagation), **options
    )
    rule = define_retries(retries, retry_on)
    decorate = partial(_decorate, "@transactional", of, definition, rule)
    return decorate(propagation) if is_bare else decorate


@overload
def read_only(function: F, /) -> F: ...


@overload
def read_only(*, of: str = ...) -> Decorator: ...


def read_only(function: Any = None, /, *, of: str = "transaction") -> Any:
    """Run a coroutine function that only reads.

    It runs in the current session if there is one, and otherwise in a new read-only one
    without a transaction.

    Args:
        function: The coroutine function.
        of: The parameter that holds the `TransactionManager`, or the attribute of
            `self` if the function has no such parameter.

    Raises:
        TypeError: The function is no coroutine function. When the function is called:
            there is no `TransactionManager`.

    Example:
        ```python
        class Notebook:
            def __init__(self, notes: NoteRepository, transaction: TransactionManager):
                self.notes = notes
                self.transaction = transaction

            @read_only
            async def count(self) -> int:
                return await self.notes.count()
        ```
    """
    definition = define(Propagation.SUPPORTS, read_only=True)
    decorate = partial(_decorate, "@read_only", of, definition, RetryRule(attempts=1))
    return decorate if function is None else decorate(function)


def _decorate(
    name: str, of: str, definition: TransactionDefinition, rule: RetryRule, function: Any
) -> Any:
    if not inspect.iscoroutinefunction(function):
        hint = _not_a_coroutine_function_hint(name, function)
        raise TypeError(f"{name} takes a coroutine function: {hint}")
    find_manager = _manager_resolver(name, function, of)
    call_site = site_of(function)

    @functools.wraps(function)
    async def run_once(*args: Any, **kwargs: Any) -> Any:
        database = database_of(find_manager(args, kwargs))
        async with TransactionBlock(database, definition, call_site):
            return await function(*args, **kwargs)

    @functools.wraps(function)
    async def run_repeatedly(*args: Any, **kwargs: Any) -> Any:
        database = database_of(find_manager(args, kwargs))
        call = partial(function, *args, **kwargs)
        return await run_with_retries(database, definition, rule, call, call_site)

    return run_once if rule.attempts == 1 else run_repeatedly


def _manager_resolver(
    decorator: str, function: Callable[..., Any], of: str
) -> Callable[[tuple[Any, ...], dict[str, Any]], TransactionManager]:
    """Return a function that finds the manager in the arguments of a call."""
    parameters = inspect.signature(function).parameters
    if not parameters:
        raise TypeError(
            f"{_name(function)}() has neither a parameter {of!r} nor a self with such an attribute"
        )
    is_parameter, first = of in parameters, next(iter(parameters))
    positional = [name for name, parameter in parameters.items() if parameter.kind in POSITIONAL]
    position = positional.index(of) if of in positional else sys.maxsize
    default = parameters[of].default if is_parameter else MISSING

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransactionManager:
        holder = None
        if is_parameter:
            found = kwargs.get(of, args[position] if position < len(args) else default)
        else:
            holder = args[0] if args else kwargs.get(first)
            found = getattr(holder, of, MISSING)
        if isinstance(found, TransactionManager):
            return found  # pyright: ignore[reportUnknownVariableType]  # of any session class
        location = f"argument {of!r}"
        if not is_parameter:
            location = f"attribute {of!r} of {type(holder).__name__}"
        remedy = _remedy(decorator, of, holder, is_parameter=is_parameter)
        raise TypeError(
            f"{_name(function)}() is {decorator}, but the {location} is {_described(found)}: "
            f"{remedy}"
        )

    return find


def _described(found: object) -> str:
    return "missing" if found is MISSING else f"{type(found).__name__}, not a TransactionManager"


def _remedy(decorator: str, of: str, holder: object, *, is_parameter: bool) -> str:
    remedy = "inject one, as db.transaction provides it"
    if is_parameter:
        return f"{remedy}, with @inject above {decorator}, and wire() the container to the module"
    if others := _managers_in(holder):
        return f"there is one in {others[0]!r}, so write {decorator}(of={others[0]!r})"
    return remedy


def _managers_in(holder: object) -> list[str]:
    """List the attributes that hold a `TransactionManager`."""
    names = (*getattr(holder, "__dict__", ()), *_slots(type(holder)))
    return [name for name in names if isinstance(getattr(holder, name, None), TransactionManager)]


def _slots(kind: type) -> list[str]:
    slots = [getattr(base, "__slots__", ()) for base in kind.__mro__]
    return [name for each in slots for name in ((each,) if isinstance(each, str) else each)]


def _not_a_coroutine_function_hint(decorator: str, function: Any) -> str:
    if inspect.isclass(function):
        return (
            f"write {decorator} above each method of {function.__name__} that is to be a block, "
            "not above the class"
        )
    if inspect.isasyncgenfunction(function):
        return (
            f"{_name(function)}() would keep its transaction open between its items; "
            "open transaction() in it"
        )
    if type(function) in (classmethod, staticmethod):
        return f"write {decorator} below @{type(function).__name__}"
    is_provider = hasattr(function, "provided")
    if isinstance(function, TransactionManager) or is_provider or not callable(function):
        return (
            f"write {decorator} without this argument, above 'async def'; the function's "
            "TransactionManager is found when it is called"
        )
    return f"write 'async def {_name(function)}'"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
