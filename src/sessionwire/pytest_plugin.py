"""The pytest plugin: a server for the run, a sandbox or a database for each test.

A user's conftest.py names the container to test, and tests take the fixture
`container`:

    @pytest.fixture(scope="session")
    def sessionwire_container():
        return Container

Everything but starting the container is synchronous, so it works with pytest-asyncio
and anyio, in any event loop. For a test without async code the container is not
started, so the event loop that the test runs can use it, such as that of a
`TestClient`.
"""

from __future__ import annotations

import asyncio
import inspect
import shutil
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers

from ._database.runtime import database_of
from ._managers import managers_of
from .embedded import EmbeddedServer
from .errors import OwnershipError
from .settings import DatabaseSettings
from .testing import DatabaseTemplate
from .testing._container_databases import (
    build_container,
    managers_by_settings_name,
    open_copies,
    open_migrated,
    open_templates,
    override_databases,
)
from .testing._event_loops import is_sync, loop_scope, run_block, uses_anyio
from .testing._interruptible import interruptible
from .testing._isolation import start_isolated, uses_sandbox
from .testing._plugin_options import add_options, option
from .testing._servers import disable_durability, new_directory, remove_stale_servers
from .testing.migrations import MigratedDatabase
from .testing.templates import Seed

SERVER_DIRECTORY = pytest.StashKey[Path]()  # of the run's embedded server
LOOP_SCOPES: tuple[Any, ...] = ("function", "class", "module", "package", "session")
NO_CONTAINER = """name the container to test in conftest.py:

@pytest.fixture(scope="session")
def sessionwire_container():
    return Container  # or a function that makes one for each test"""

NO_MIGRATIONS = (
    "no database of the container has migrations: write "
    "DatabaseContainer.nested(migrations='shop:migrations')"
)
ALREADY_INITIALIZED = """\
the container's sessionmanager was initialized before the test, so code that holds it would bypass
the test database. Close it before the test, or let sessionwire_container return a function that
makes a container for each test"""


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {})
    # not in pytest's temporary directory, which the server's user may not enter
    config.stash[SERVER_DIRECTORY] = Path(worker.get("sessionwire_directory") or new_directory())
    if option(config, "isolation") not in ("sandbox", "database"):
        raise pytest.UsageError("sessionwire_isolation must be 'sandbox' or 'database'")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["sessionwire_directory"] = str(node.config.stash[SERVER_DIRECTORY])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """End a test in a sandbox if a task that it does not await raises an error."""
    if not (
        isinstance(item, pytest.Function)
        and "container" in item.fixturenames
        and inspect.iscoroutinefunction(item.obj)
    ):
        return (yield)
    test = item.obj
    item.obj = interruptible(test)
    try:
        return (yield)
    finally:
        item.obj = test


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and SERVER_DIRECTORY in config.stash:
        shutil.rmtree(config.stash[SERVER_DIRECTORY], ignore_errors=True)


# Fixtures for users to override


@pytest.fixture(scope="session")
def sessionwire_container() -> Any:
    """Return the container to test, or a callable that makes one for each test."""
    raise pytest.UsageError(NO_CONTAINER)


@pytest.fixture(scope="session")
def sessionwire_seed() -> Seed | None:
    """Return an async function that makes the tables, and rows for each test to find.

    It takes an open manager. By default it is `migrate()`, or for a database without
    migrations `create_all()`, which makes the tables of the container's metadata.
    """
    return None


@pytest.fixture(scope="session")
def sessionwire_settings(
    request: pytest.FixtureRequest, _sessionwire_runner: asyncio.Runner
) -> Iterator[Any]:
    """Yield the settings of a database beside which the test databases are made."""
    url = option(request.config, "url")
    if url != "embedded":
        yield DatabaseSettings(url=url)
        return
    remove_stale_servers()
    with EmbeddedServer(request.config.stash[SERVER_DIRECTORY] / "data") as server:
        settings = DatabaseSettings(url=server.url)
        _sessionwire_runner.run(disable_durability(settings))
        yield settings


# Databases


@pytest.fixture(scope="session")
def _sessionwire_runner() -> Iterator[asyncio.Runner]:
    # with a loop_factory, the runner leaves the current event loop as it is
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="session")
def _sessionwire_templates(
    request: pytest.FixtureRequest,
    sessionwire_container: Any,
    sessionwire_seed: Seed | None,
    sessionwire_settings: DatabaseSettings,
    _sessionwire_runner: asyncio.Runner,
) -> Iterator[list[DatabaseTemplate]]:
    """Yield the templates of the container's databases, which all workers share."""
    opened = open_templates(
        build_container(sessionwire_container),
        sessionwire_settings,
        sessionwire_seed,
        run=request.config.stash[SERVER_DIRECTORY].name,
    )
    with run_block(_sessionwire_runner, opened) as templates:
        yield templates


@pytest.fixture(scope="session")
def sessionwire_databases(
    _sessionwire_templates: list[DatabaseTemplate], _sessionwire_runner: asyncio.Runner
) -> Iterator[list[DatabaseSettings]]:
    """Yield the settings of this worker's databases, one for each of the container."""
    with run_block(_sessionwire_runner, open_copies(_sessionwire_templates)) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        message = f"connections that some test has left open: {left}"
        warnings.warn(message, pytest.PytestWarning, stacklevel=1)


@pytest.fixture
def _sessionwire_own_databases(
    _sessionwire_templates: list[DatabaseTemplate], _sessionwire_runner: asyncio.Runner
) -> Iterator[list[DatabaseSettings]]:
    """Yield the settings of databases that only this test uses."""
    with run_block(_sessionwire_runner, open_copies(_sessionwire_templates)) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        message = f"connections to the database of the test that were left open: {left}"
        pytest.fail(message, pytrace=False)


@pytest.fixture
def sessionwire_migrations(
    sessionwire_container: Any,
    sessionwire_settings: DatabaseSettings,
    _sessionwire_runner: asyncio.Runner,
) -> Iterator[list[MigratedDatabase]]:
    """Yield an empty database for each of the container that has migrations."""
    container = build_container(sessionwire_container)
    opened = open_migrated(container, sessionwire_settings, _sessionwire_runner)
    with run_block(_sessionwire_runner, opened) as databases:
        if not databases:
            raise pytest.UsageError(NO_MIGRATIONS)
        yield databases


# The container


@pytest.fixture
def _sessionwire_is_sync(request: pytest.FixtureRequest) -> bool:
    """Return whether the test has no event loop for a container to start in."""
    return is_sync(request)


@pytest.fixture
def _sessionwire_configured_container(
    request: pytest.FixtureRequest, sessionwire_container: Any, _sessionwire_is_sync: bool
) -> Iterator[containers.Container]:
    """Yield the container, on the databases of the test, and not started yet."""
    is_shared = uses_sandbox(request.config) and not _sessionwire_is_sync
    databases_fixture = "sessionwire_databases" if is_shared else "_sessionwire_own_databases"
    settings = request.getfixturevalue(databases_fixture)
    container = build_container(sessionwire_container)
    if any(manager.is_initialized for manager in managers_by_settings_name(container).values()):
        raise pytest.UsageError(ALREADY_INITIALIZED)
    with override_databases(container, settings):
        yield container


@pytest.fixture
def container(
    request: pytest.FixtureRequest,
    sessionwire_settings: DatabaseSettings,
    _sessionwire_is_sync: bool,
) -> Any:
    """Return the started container, in a sandbox or on a database of its own.

    For a test without async code, such as one with a `TestClient`, it is always on a
    database that only this test uses, and not started: the event loop that the test
    runs can use it.
    """
    if uses_anyio(request):
        return request.getfixturevalue("_sessionwire_anyio")
    if _sessionwire_is_sync:
        return request.getfixturevalue("_sessionwire_ready")
    if not request.config.pluginmanager.has_plugin("asyncio"):
        raise pytest.UsageError(
            "this test or one of its fixtures is async: install pytest-asyncio, or use anyio's "
            "plugin"
        )
    return request.getfixturevalue(f"_sessionwire_asyncio_{loop_scope(request)}")


@pytest.fixture
def _sessionwire_ready(
    _sessionwire_configured_container: containers.Container, _sessionwire_runner: asyncio.Runner
) -> Iterator[containers.Container]:
    """Yield the container initialized but not started: it has no event loop yet."""
    managers = managers_of(_sessionwire_configured_container)
    for manager in managers:
        manager.init(manager.settings)
    yield _sessionwire_configured_container
    left = sum(len(database_of(manager).open_units) for manager in managers)
    try:
        for manager in managers:
            if manager.is_initialized:
                _sessionwire_runner.run(manager.close())
    except OwnershipError:
        message = "an event loop that used the database was left open: close it in the test"
        pytest.fail(message, pytrace=False)
    if left:
        pytest.fail(f"sessions or connections that were left open: {left}", pytrace=False)


def _make_started_fixture() -> Callable[..., AsyncGenerator[containers.Container]]:
    """Make the function of a fixture that starts the container in the test's event loop.

    Each fixture needs a function of its own: pytest-asyncio writes the loop scope on it.
    """

    async def started(
        pytestconfig: pytest.Config, _sessionwire_configured_container: containers.Container
    ) -> AsyncGenerator[containers.Container]:
        container = _sessionwire_configured_container
        async with start_isolated(container, pytestconfig) as detector:
            yield container
            if leaks := await detector.end_leftovers():
                pytest.fail("\n".join(leaks), pytrace=False)

    return started


_started_by_anyio = pytest.fixture(name="_sessionwire_anyio")(_make_started_fixture())
try:
    import pytest_asyncio
except ImportError:
    pass
else:
    # pytest finds fixtures among the globals of the module
    for scope in LOOP_SCOPES:
        name = f"_sessionwire_asyncio_{scope}"
        globals()[name] = pytest_asyncio.fixture(name=name, loop_scope=scope)(
            _make_started_fixture()
        )
