"""Inject what a container provides into FastAPI endpoints, without a thread for each.

There are two ways: `Depends(Provide[…])`, as dependency-injector documents it, and
`@inject` of this module, which is shorter and faster: FastAPI does not see the injected
parameters at all.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_origin

from dependency_injector import wiring

try:
    from fastapi.params import Depends
except ImportError as error:
    raise ImportError(
        "sessionwire.fastapi needs FastAPI: pip install 'sessionwire[fastapi]'"
    ) from error

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from dependency_injector.wiring import Provide as Provide
else:

    class Provide(wiring.Provide):
        """dependency-injector's marker, called in the event loop, not in a thread.

        If an endpoint receives the marker itself, because nothing was injected, using
        it raises an `AttributeError` with the remedy.
        """

        async def __call__(self):
            return self

        def __get_pydantic_core_schema__(self, *_):
            # FastAPI asks for it if it takes the parameter for one of the request.
            raise TypeError(
                f"{self!r} is on a parameter of an endpoint without @inject: "
                "write @inject below the route's decorator"
            )

        def __getattr__(self, name):
            # inspect, copy and FastAPI look for such names in every object.
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(
                f"{name!r} was looked for in {self!r} instead of what that provides: decorate the "
                "function with @inject, and wire the container to its module when the function is "
                "there"
            )


def inject(function: F) -> F:
    """Inject the parameters that have a `Provide[…]` marker.

    Such a parameter is written `service: Annotated[Service,
    Provide[Container.service]]`, without `Depends`. FastAPI does not see it: it
    resolves nothing for it, and OpenAPI does not contain it. Write `@inject` below the
    route's decorator, and wire the container to the module when the function is there.

    Args:
        function: A function, coroutine function or async generator function.

    Raises:
        TypeError: When the function is called, an argument is missing, because the
            container is not wired to its module.
    """
    signature = _resolve_annotations(function)
    parameters = signature.parameters.values()
    markers = [_find_marker(parameter) for parameter in parameters]
    visible = [one for one, marker in zip(parameters, markers, strict=True) if marker is None]
    if len(visible) == len(parameters):
        warnings.warn(
            f"@inject has nothing to inject into {function!r}",
            wiring.DIWiringWarning,
            stacklevel=2,
        )
        return function
    # dependency-injector looks for its markers there.
    function.__signature__ = signature  # type: ignore[attr-defined]
    has_closing = any(isinstance(marker, cast(type, wiring.Closing)) for marker in markers)
    injected: Any
    if inspect.isasyncgenfunction(function):
        injected = _inject_async_generator(function)
    elif inspect.iscoroutinefunction(function) and not has_closing:
        injected = _inject_coroutine(function)
    else:
        injected = wiring.inject(_with_wiring_hint(function))
    injected.__signature__ = signature.replace(parameters=visible)
    return cast(F, injected)


def _inject_coroutine(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inject into a coroutine function, with one coroutine around it.

    dependency-injector would put three around it: a `Closing` marker needs them.
    """

    @wiring.inject
    @functools.wraps(function)
    def wired() -> None:
        """Be found by `container.wire()`, as a function of the same module."""

    # Its `injections` are the providers to which the container is wired at the time.
    bound = wiring._patched_registry.get_callable(wired)  # pyright: ignore[reportPrivateUsage]

    @functools.wraps(function)
    async def injected(*args: Any, **values: Any) -> Any:
        pending: list[str] = []
        for name, provider in bound.injections.items():
            if name not in values:
                values[name] = provider()
                if inspect.isawaitable(values[name]):
                    pending.append(name)
        if pending:
            done = await asyncio.gather(*(values[name] for name in pending))
            values.update(zip(pending, done, strict=True))
        try:
            coroutine = function(*args, **values)
        except TypeError as error:
            _add_wiring_hint(error)
            raise
        return await coroutine

    return injected


def _with_wiring_hint(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add a note to the `TypeError` of a missing argument: is the container wired?"""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            _add_wiring_hint(error)
            raise

    if not inspect.iscoroutinefunction(function):
        return functools.wraps(function)(call)

    @functools.wraps(function)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        return await call(*args, **kwargs)

    return call_async


def _add_wiring_hint(error: TypeError) -> None:
    # Only an error of the call itself has no frame below the one that called.
    if error.__traceback__ and error.__traceback__.tb_next is None:
        error.add_note(
            "Nothing was injected: call container.wire(modules=[…]) with the module of "
            "this function, once the function is there."
        )


def _inject_async_generator(function: Callable[..., AsyncGenerator[Any, Any]]) -> Any:
    """Inject into an async generator, and throw errors in at its `yield`.

    dependency-injector would abandon the generator instead. A resource with a `Closing`
    marker is closed before the generator begins.
    """

    @wiring.inject
    @functools.wraps(function)
    async def with_injected(**given: Any) -> dict[str, Any]:
        return given

    @functools.wraps(function)
    async def injected(*args: Any, **given: Any) -> AsyncGenerator[Any]:
        async with aclosing(function(*args, **await with_injected(**given))) as values:
            async for value in values:
                try:
                    yield value
                except GeneratorExit:
                    raise
                except BaseException as error:
                    with suppress(StopAsyncIteration):
                        yield await values.athrow(error)

    return injected


def _resolve_annotations(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature, with annotations that are strings evaluated.

    An annotation with a name that only type checkers know stays a string, as in
    FastAPI.
    """
    signature = inspect.signature(function)
    names: dict[str, Any] = getattr(inspect.unwrap(function), "__globals__", {})
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if isinstance(parameter.annotation, str):
            with suppress(NameError):
                parameter = parameter.replace(annotation=eval(parameter.annotation, names))
        parameters.append(parameter)
    return signature.replace(parameters=parameters)


def _find_marker(parameter: inspect.Parameter) -> Any:
    """Return the marker of dependency-injector on a parameter, or `None`."""
    is_annotated = get_origin(parameter.annotation) is Annotated
    candidates = get_args(parameter.annotation)[1:] if is_annotated else (parameter.default,)
    for candidate in candidates:
        marker = candidate.dependency if isinstance(candidate, Depends) else candidate
        if getattr(marker, "__IS_MARKER__", False):
            return marker
    return None
