"""FastAPI endpoints that are given what a container provides, without a thread hop for each thing given.

Two forms: `Depends(Provide[…])`, as dependency-injector has it, and `@inject` of this module, shorter and faster, which
keeps from FastAPI what it doesn't need to see.
"""

from __future__ import annotations

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
    raise ImportError("sessionwire.fastapi needs FastAPI: pip install 'sessionwire[fastapi]'") from error

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from dependency_injector.wiring import Provide as Provide
else:

    class Provide(wiring.Provide):
        """dependency-injector's marker, which FastAPI calls in the event loop instead of in a thread.

        An endpoint that is given the marker itself gets an `AttributeError` that says why.
        """

        async def __call__(self):
            return self

        def __get_pydantic_core_schema__(self, *_):  # FastAPI takes the parameter for one of the request
            raise TypeError(f"{self!r} is on a parameter of an endpoint without @inject: write it below the route")

        def __getattr__(self, name):
            if name.startswith("__"):  # what inspect, copy and FastAPI look for in everything
                raise AttributeError(name)
            raise AttributeError(
                f"{name!r} was looked for in {self!r} instead of what that provides: decorate the function with "
                "@inject, and wire the container to its module when the function is there"
            )


def inject(function: F) -> F:
    """dependency-injector's, which takes `service: Annotated[Service, Provide[Container.service]]` without `Depends`.

    FastAPI is not shown these parameters: it resolves nothing for them, and OpenAPI doesn't have them. Put it below the
    route's decorator, and wire the container to the module once the function is there; until then a call raises
    `TypeError`, for an argument that is missing.
    """
    signature = _evaluated(function)
    shown = [parameter for parameter in signature.parameters.values() if not _is_injected(parameter)]
    if len(shown) == len(signature.parameters):
        warnings.warn(f"@inject has nothing to inject into {function!r}", wiring.DIWiringWarning, stacklevel=2)
        return function
    function.__signature__ = signature  # type: ignore[attr-defined]  # where dependency-injector looks for markers
    injected: Any = _handing_on(function) if inspect.isasyncgenfunction(function) else wiring.inject(_telling(function))
    injected.__signature__ = signature.replace(parameters=shown)
    return cast(F, injected)


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which tells why an argument is missing, where the container is not wired."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # the call itself failed
                error.add_note(
                    "Nothing was injected: call container.wire(modules=[…]) with the module of this function, once the "
                    "function is there."
                )
            raise

    if not inspect.iscoroutinefunction(function):
        return functools.wraps(function)(call)

    @functools.wraps(function)
    async def called(*args: Any, **kwargs: Any) -> Any:
        return await call(*args, **kwargs)

    return called


def _handing_on(function: Callable[..., AsyncGenerator[Any, Any]]) -> Any:
    """The same for an async generator, which is told of an error at its `yield`: dependency-injector abandons it then.

    `Closing` closes before it begins.
    """

    @functools.wraps(function)
    async def arguments(**given: Any) -> dict[str, Any]:
        return given

    with_injected = wiring.inject(arguments)

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


def _evaluated(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with the annotations that `from __future__ import annotations` has left as strings.

    One that has a name in it which only type checkers know stays a string, as with FastAPI.
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


def _is_injected(parameter: inspect.Parameter) -> bool:
    is_annotated = get_origin(parameter.annotation) is Annotated
    candidates = get_args(parameter.annotation)[1:] if is_annotated else (parameter.default,)
    return any(
        getattr(candidate.dependency if isinstance(candidate, Depends) else candidate, "__IS_MARKER__", False)
        for candidate in candidates
    )
