"""Isolation of a test: in a sandbox or on databases of its own, watched for leaks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from dependency_injector import containers

from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.runtime import database_of
from sessionwire._managers import managers_of
from sessionwire.lifespan import Lifespan

from ._leaks import LeakDetector
from ._plugin_options import option
from ._substitution import substitute_engines
from .sandbox import sandbox

if TYPE_CHECKING:
    import pytest


def uses_sandbox(config: pytest.Config) -> bool:
    """Return whether async tests run in a sandbox, and not on databases of their own."""
    return option(config, "isolation") == "sandbox"


def start_isolated(
    container: containers.Container, config: pytest.Config
) -> AbstractAsyncContextManager[LeakDetector]:
    """Start a container for a test, isolated as the options say."""
    if not uses_sandbox(config):
        return _start_on_own_databases(container)
    return _start_in_sandbox(
        container,
        check_deferred=config.getini("sessionwire_check_deferred"),
        patience=config.getini("sessionwire_patience"),
    )


@asynccontextmanager
async def _start_in_sandbox(
    container: containers.Container, *, check_deferred: bool, patience: float
) -> AsyncGenerator[LeakDetector]:
    """Start a container in a sandbox, on databases that other tests use too."""
    async with (
        sandbox(container, check_deferred=check_deferred, patience=patience),
        Lifespan(container),
    ):
        managers = managers_of(container)
        detector = LeakDetector(*managers)
        for manager in managers:
            detector.watch_pool(manager.engine.pool)
        yield detector


@asynccontextmanager
async def _start_on_own_databases(
    container: containers.Container,
) -> AsyncGenerator[LeakDetector]:
    """Start a container on databases that only this test uses: its commits are real."""
    async with Lifespan(container):
        managers = managers_of(container)
        detector = LeakDetector(*managers)
        with ExitStack() as stack:
            for manager in managers:
                stack.enter_context(
                    substitute_engines(database_of(manager), partial(_watched, detector))
                )
            yield detector


def _watched(detector: LeakDetector, engines: DatabaseEngines) -> DatabaseEngines:
    detector.watch_pool(engines.pool)
    return engines
