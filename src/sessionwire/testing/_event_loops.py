"""Event loops: the one that a test runs in, and one for the work between tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pytest

T = TypeVar("T")


@contextmanager
def run_block(runner: asyncio.Runner, block: AbstractAsyncContextManager[T]) -> Generator[T]:
    """Enter and leave an async block in the runner's event loop, from synchronous code."""
    stack = AsyncExitStack()
    try:
        yield runner.run(stack.enter_async_context(block))
    finally:
        runner.run(stack.aclose())


def uses_anyio(request: pytest.FixtureRequest) -> bool:
    """Return whether the test runs in an event loop of anyio's plugin."""
    return "anyio_backend" in request.fixturenames


def is_sync(request: pytest.FixtureRequest) -> bool:
    """Return whether the test and the fixtures that it has so far are not async."""
    # the attribute is private, so type checkers accept only getattr()
    info = getattr(request.node, "_fixtureinfo")  # noqa: B009
    definitions: dict[str, Any] = info.name2fixturedefs
    functions = [definitions[name][-1].func for name in request.fixturenames if name in definitions]
    return not uses_anyio(request) and not any(
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        for function in map(inspect.unwrap, (request.function, *functions))
    )


def loop_scope(request: pytest.FixtureRequest) -> str:
    """Return the scope of the event loop in which pytest-asyncio runs the test."""
    marker: Any = request.node.get_closest_marker("asyncio")
    scope = marker and marker.kwargs.get("loop_scope")
    return str(scope or request.config.getini("asyncio_default_test_loop_scope"))
