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
import functools
import inspect
import shutil
import warnings
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers

from ._database.runtime import database_of
from .containers import DatabaseContainer
from .embedded import EmbeddedServer
from .errors import OwnershipError
from .lifespan import Lifespan, database_containers, managers_of
from .manager import DatabaseSessionManager
from .settings import DatabaseSettings
from .testing import DatabaseCopy, DatabaseTemplate, overriding, sandbox
from .testing._interruptible import Interruptible
from .testing._leaks import LeakDetector, WatchedEngines
from .testing._servers import disable_durability, new_directory, remove_stale_servers
from .testing.overriding import providers_by_name
from .testing.templates import Seed

SERVER_DIRECTORY = pytest.StashKey[Path]()  # of the run's embedded server
CANCELLATION_TIMEOUT = 5.0  # seconds for a cancelled task to end
LOOP_SCOPES = ("function", "class", "module", "package", "session")
NO_CONTAINER = """name the container to test in conftest.py:

@pytest.fixture(scope="session")
def sessionwire_container():
    return Container  # or a function that makes one for each test"""

ALREADY_INITIALIZED = """\
the container's sessionmanager was initialized before the test, so code that holds it would bypass
the test database. Close it before the test, or let sessionwire_container return a function that
makes a container for each test"""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sessionwire", "databases for tests")
    for name, default, description in (
        ("url", "embedded", "URL beside whose database the test databases are made, or 'embedded'"),
        ("isolation", "sandbox", "'sandbox', or 'database' for a separate database for each test"),
    ):
        parser.addini(f"sessionwire_{name}", f"{description} (default: {default})", default=default)
        overrides = f"{description}; overrides the ini key sessionwire_{name}"
        group.addoption(f"--sessionwire-{name}", help=overrides)
    deferred = "whether commits in a sandbox check deferred constraints (default: false)"
    parser.addini("sessionwire_check_deferred", deferred, type="bool", default=False)
    patience = "seconds that a task in a sandbox waits for an inactive transaction (default: 5)"
    parser.addini("sessionwire_patience", patience, type="float", default=5.0)


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {})
    # not in pytest's temporary directory, which the server's user may not enter
    config.stash[SERVER_DIRECTORY] = Path(worker.get("sessionwire_directory") or new_directory())
    if _option(config, "isolation") not in ("sandbox", "database"):
        raise pytest.UsageError("sessionwire_isolation must be 'sandbox' or 'database'")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["sessionwire_directory"] = str(node.config.stash[SERVER_DIRECTORY])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """End a test in a sandbox if a task that it does not await raises an error."""
    if not (isinstance(item, pytest.Function) and "container" in item.fixturenames):
        return (yield)
    test = item.obj
    if not inspect.iscoroutinefunction(test):
        return (yield)

    @functools.wraps(test)
    async def interruptible(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        with Interruptible():
            return await test(*args, **options)

    item.obj = interruptible
    try:
        return (yield)
    finally:
        item.obj = test


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and SERVER_DIRECTORY in config.stash:
        shutil.rmtree(config.stash[SERVER_DIRECTORY], ignore_errors=True)


def _option(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"sessionwire_{name}") or config.getini(f"sessionwire_{name}"))


# Fixtures for users to override


@pytest.fixture(scope="session")
def sessionwire_container() -> Any:
    """Return the container to test, or a callable that makes one for each test."""
    raise pytest.UsageError(NO_CONTAINER)


@pytest.fixture(scope="session")
def sessionwire_seed() -> Seed | None:
    """Return an async function that makes the tables, and rows for each test to find.

    It takes an open manager. By default it is `create_all()`, which makes the tables of
    the container's metadata.
    """
    return None


@pytest.fixture(scope="session")
def sessionwire_settings(
    request: pytest.FixtureRequest, _sessionwire_runner: asyncio.Runner
) -> Iterator[Any]:
    """Yield the settings of a database beside which the test databases are made."""
    url = _option(request.config, "url")
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
    stack = AsyncExitStack()
    run = request.config.stash[SERVER_DIRECTORY].name
    seed = sessionwire_seed or _create_all
    templates: list[DatabaseTemplate] = []
    try:
        for name, database in _databases_by_settings_name(
            _build_container(sessionwire_container)
        ).items():
            seed_database = partial(_seed, database, seed)
            template = DatabaseTemplate(sessionwire_settings, seed_database, key=f"{run} {name}")
            templates.append(_sessionwire_runner.run(stack.enter_async_context(template)))
        yield templates
    finally:
        _sessionwire_runner.run(stack.aclose())


def _build_container(container: Any) -> containers.Container:
    """Return the value of `sessionwire_container`, or the container that it makes."""
    return container if isinstance(container, containers.Container) else container()


def _databases_by_settings_name(container: containers.Container) -> dict[str, DatabaseContainer]:
    """Return the databases of a container, sorted by the names of their settings."""
    names = {provider: name for name, provider in providers_by_name(container).items()}
    found: dict[str, DatabaseContainer] = {
        names[database.settings]: database for database in database_containers(container)
    }
    return {name: found[name] for name in sorted(found)}


async def _seed(database: DatabaseContainer, seed: Seed, manager: DatabaseSessionManager) -> None:
    manager.metadata = database.metadata()
    await seed(manager)


async def _create_all(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await manager.create_all(connection)


@pytest.fixture(scope="session")
def sessionwire_databases(
    _sessionwire_templates: list[DatabaseTemplate], _sessionwire_runner: asyncio.Runner
) -> Iterator[list[DatabaseSettings]]:
    """Yield the settings of this worker's databases, one for each of the container."""
    with _copies(_sessionwire_templates, _sessionwire_runner) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        message = f"connections that some test has left open: {left}"
        warnings.warn(message, pytest.PytestWarning, stacklevel=1)


@pytest.fixture
def _sessionwire_own_databases(
    _sessionwire_templates: list[DatabaseTemplate], _sessionwire_runner: asyncio.Runner
) -> Iterator[list[DatabaseSettings]]:
    """Yield the settings of databases that only this test uses."""
    with _copies(_sessionwire_templates, _sessionwire_runner) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        message = f"connections to the database of the test that were left open: {left}"
        pytest.fail(message, pytrace=False)


@contextmanager
def _copies(
    templates: list[DatabaseTemplate], runner: asyncio.Runner
) -> Generator[list[DatabaseCopy]]:
    stack = AsyncExitStack()
    try:
        yield [runner.run(stack.enter_async_context(template.copy())) for template in templates]
    finally:
        runner.run(stack.aclose())


# The container


@pytest.fixture
def _sessionwire_configured_container(
    request: pytest.FixtureRequest, sessionwire_container: Any
) -> Iterator[containers.Container]:
    """Yield the container, on the databases of the test, and not started yet."""
    is_shared = _option(request.config, "isolation") == "sandbox" and not _is_sync(request)
    databases_fixture = "sessionwire_databases" if is_shared else "_sessionwire_own_databases"
    settings = request.getfixturevalue(databases_fixture)
    container = _build_container(sessionwire_container)
    overrides: dict[str, object] = {}
    with ExitStack() as stack:
        for (name, database), own in zip(
            _databases_by_settings_name(container).items(), settings, strict=True
        ):
            overrides[name] = own
            try:
                manager = database.sessionmanager()
            except Exception:  # without settings of its own, it cannot have been built before
                continue
            if manager.is_initialized:
                raise pytest.UsageError(ALREADY_INITIALIZED)
            # keep the manager itself: modules may have taken it when they were imported
            stack.enter_context(database_of(manager).override_settings(own))
            overrides[f"{name.removesuffix('settings')}sessionmanager"] = manager
        yield stack.enter_context(overriding(container, **overrides))


@asynccontextmanager
async def _started(
    config: pytest.Config, container: containers.Container
) -> AsyncGenerator[containers.Container]:
    is_sandbox = _option(config, "isolation") == "sandbox"
    async with AsyncExitStack() as stack:
        if is_sandbox:
            check_deferred = config.getini("sessionwire_check_deferred")
            patience = config.getini("sessionwire_patience")
            await stack.enter_async_context(
                sandbox(container, check_deferred=check_deferred, patience=patience)
            )
        await stack.enter_async_context(Lifespan(container))
        detector = LeakDetector(*managers_of(container))
        for manager in managers_of(container):
            if is_sandbox:
                detector.watch_pool(manager.engine.pool)
            else:
                stack.enter_context(
                    database_of(manager).substitute_engines(partial(WatchedEngines, detector))
                )
        yield container
        leaks = await detector.cancel_leftover_tasks(
            asyncio.current_task(), set(), CANCELLATION_TIMEOUT
        )
        leaks += detector.abort_leftover_blocks()
        if leaks:
            pytest.fail("\n".join(leaks), pytrace=False)


@pytest.fixture
def container(request: pytest.FixtureRequest, sessionwire_settings: DatabaseSettings) -> Any:
    """Return the started container, in a sandbox or on a database of its own.

    For a test without async code, such as one with a `TestClient`, it is always on a
    database that only this test uses, and not started: the event loop that the test
    runs can use it.
    """
    if "anyio_backend" in request.fixturenames:
        return request.getfixturevalue("_sessionwire_anyio")
    if _is_sync(request):
        return request.getfixturevalue("_sessionwire_ready")
    if not request.config.pluginmanager.has_plugin("asyncio"):
        raise pytest.UsageError(
            "this test or one of its fixtures is async: install pytest-asyncio, or use anyio's "
            "plugin"
        )
    marker: Any = request.node.get_closest_marker("asyncio")
    loop_scope = marker and marker.kwargs.get("loop_scope")
    loop_scope = loop_scope or request.config.getini("asyncio_default_test_loop_scope")
    return request.getfixturevalue(f"_sessionwire_asyncio_{loop_scope}")


def _is_sync(request: pytest.FixtureRequest) -> bool:
    """Return whether the test and its fixtures are not async, ignoring the plugin's."""
    # the attribute is private, so type checkers accept only getattr()
    info = getattr(request.node, "_fixtureinfo")  # noqa: B009
    definitions: dict[str, Any] = info.name2fixturedefs
    functions = [definitions[name][-1].func for name in request.fixturenames if name in definitions]
    return "anyio_backend" not in request.fixturenames and not any(
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        for function in map(inspect.unwrap, (request.function, *functions))
        if function.__module__ != __name__
    )


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
    for manager in managers:
        if manager.is_initialized:
            try:
                _sessionwire_runner.run(manager.close())
            except OwnershipError:
                pytest.fail(
                    "an event loop that used the database was left open: close it in the test",
                    pytrace=False,
                )
    if left:
        pytest.fail(f"sessions or connections that were left open: {left}", pytrace=False)


@pytest.fixture
async def _sessionwire_anyio(
    pytestconfig: pytest.Config, _sessionwire_configured_container: containers.Container
) -> AsyncGenerator[containers.Container]:
    async with _started(pytestconfig, _sessionwire_configured_container) as container:
        yield container


try:
    import pytest_asyncio
except ImportError:
    pass
else:

    def _make_started_fixture(scope: Any) -> Any:
        """Make the fixture for one loop scope: pytest-asyncio fixes it per fixture."""

        @pytest_asyncio.fixture(name=f"_sessionwire_asyncio_{scope}", loop_scope=scope)
        async def started(
            pytestconfig: pytest.Config, _sessionwire_configured_container: containers.Container
        ) -> AsyncGenerator[containers.Container]:
            async with _started(pytestconfig, _sessionwire_configured_container) as container:
                yield container

        return started

    # pytest finds fixtures among the globals of the module
    for loop_scope in LOOP_SCOPES:
        globals()[f"_started_in_{loop_scope}"] = _make_started_fixture(loop_scope)
