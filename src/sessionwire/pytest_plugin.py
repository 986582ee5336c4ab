"""The pytest plugin: a server for the run, a database for each worker, and each test in a sandbox of its own.

A user's conftest.py says what is to be tested, and tests take `container`:

    @pytest.fixture(scope="session")
    def sessionwire_container():
        return Container

All but the last step is synchronous, so that it serves whatever runs the tests: pytest-asyncio or anyio, in any loop. A
test without async code leaves that step out, so that it serves the loop that the test runs, as that of a `TestClient`.
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
from .lifespan import Lifespan, databases
from .manager import DatabaseSessionManager
from .settings import DatabaseSettings
from .testing import DatabaseCopy, DatabaseTemplate, overriding, sandbox
from .testing._interruptible import Interruptible
from .testing._leaks import Watch, WatchedEngines
from .testing._servers import hurry, new_directory, remove_left_by_killed
from .testing.managers import managers_of
from .testing.overriding import by_name
from .testing.templates import Seed

DIRECTORY = pytest.StashKey[Path]()  # of the run's embedded server
TIMEOUT = 5.0  # seconds for a task that is cancelled to end
LOOP_SCOPES = ("function", "class", "module", "package", "session")
NO_CONTAINER = """say in conftest.py which container is to be tested:

@pytest.fixture(scope="session")
def sessionwire_container():
    return Container  # or a function that makes one for each test"""

OPEN_ALREADY = """the container's sessionmanager is initialized before the test: who has it would work past the test's
database, on its own. Close it before, or let sessionwire_container return what makes a container for each test"""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sessionwire", "databases for tests")
    for name, default, what in (
        ("url", "embedded", "where the databases are made: a URL, or 'embedded' for a private PostgreSQL"),
        ("isolation", "sandbox", "'sandbox', or 'database' for a database of its own for each test"),
    ):
        parser.addini(f"sessionwire_{name}", f"{what} (default: {default})", default=default)
        group.addoption(f"--sessionwire-{name}", help=f"{what}, instead of the ini key sessionwire_{name}")
    deferred = "whether commits in a sandbox check deferred constraints (default: false)"
    parser.addini("sessionwire_check_deferred", deferred, type="bool", default=False)
    patience = "seconds that a task waits for its turn in a sandbox while nothing happens (default: 5)"
    parser.addini("sessionwire_patience", patience, type="float", default=5.0)


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {})
    # not among pytest's own, which are closed to the server's user
    config.stash[DIRECTORY] = Path(worker.get("sessionwire_directory") or new_directory())
    if _option(config, "isolation") not in ("sandbox", "database"):
        raise pytest.UsageError("sessionwire_isolation is 'sandbox' or 'database'")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["sessionwire_directory"] = str(node.config.stash[DIRECTORY])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test in a sandbox be ended by an error of a task that it doesn't await."""
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
    if not hasattr(config, "workerinput") and DIRECTORY in config.stash:
        shutil.rmtree(config.stash[DIRECTORY], ignore_errors=True)


def _option(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"sessionwire_{name}") or config.getini(f"sessionwire_{name}"))


# What users may override


@pytest.fixture(scope="session")
def sessionwire_container() -> Any:
    """The container, or what makes one for each test."""
    raise pytest.UsageError(NO_CONTAINER)


@pytest.fixture(scope="session")
def sessionwire_seed() -> Seed | None:
    """An async function of an open manager that makes the tables, and what else is there before each test.

    Default: `create_all()`, which makes the tables of the container's metadata.
    """
    return None


@pytest.fixture(scope="session")
def sessionwire_settings(request: pytest.FixtureRequest, _sessionwire_runner: asyncio.Runner) -> Iterator[Any]:
    """`DatabaseSettings` with a URL beside whose database those of the tests are made."""
    url = _option(request.config, "url")
    if url != "embedded":
        yield DatabaseSettings(url=url)
        return
    remove_left_by_killed()
    with EmbeddedServer(request.config.stash[DIRECTORY] / "data") as server:
        settings = DatabaseSettings(url=server.url)
        _sessionwire_runner.run(hurry(settings))
        yield settings


# Databases


@pytest.fixture(scope="session")
def _sessionwire_runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # the current loop stays as it is
        yield runner


@pytest.fixture(scope="session")
def _sessionwire_templates(
    request: pytest.FixtureRequest,
    sessionwire_container: Any,
    sessionwire_seed: Seed | None,
    sessionwire_settings: DatabaseSettings,
    _sessionwire_runner: asyncio.Runner,
) -> Iterator[list[DatabaseTemplate]]:
    """One for each database of the container, shared by the workers of a run."""
    stack = AsyncExitStack()
    run = request.config.stash[DIRECTORY].name
    try:
        yield [
            _sessionwire_runner.run(
                stack.enter_async_context(
                    DatabaseTemplate(
                        sessionwire_settings,
                        partial(_seed, database, sessionwire_seed or _create_all),
                        key=f"{run} {name}",
                    )
                )
            )
            for name, database in _by_settings(_made(sessionwire_container)).items()
        ]
    finally:
        _sessionwire_runner.run(stack.aclose())


def _made(container: Any) -> containers.Container:
    """What `sessionwire_container` gives, or makes."""
    return container if isinstance(container, containers.Container) else container()


def _by_settings(container: containers.Container) -> dict[str, DatabaseContainer]:
    """The databases of a container by the names of their settings, always in one order."""
    names = {provider: name for name, provider in by_name(container).items()}
    found: dict[str, DatabaseContainer] = {names[database.settings]: database for database in databases(container)}
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
    """Of this worker, one for each database of the container."""
    with _copies(_sessionwire_templates, _sessionwire_runner) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        warnings.warn(f"connections that some test has left open: {left}", pytest.PytestWarning, stacklevel=1)


@pytest.fixture
def _sessionwire_own_databases(
    _sessionwire_templates: list[DatabaseTemplate], _sessionwire_runner: asyncio.Runner
) -> Iterator[list[DatabaseSettings]]:
    """The same for one test alone."""
    with _copies(_sessionwire_templates, _sessionwire_runner) as copies:
        yield [copy.settings for copy in copies]
    if left := sum(copy.connections_left for copy in copies):
        pytest.fail(f"connections to the database of the test that were left open: {left}", pytrace=False)


@contextmanager
def _copies(templates: list[DatabaseTemplate], runner: asyncio.Runner) -> Generator[list[DatabaseCopy]]:
    stack = AsyncExitStack()
    copies: list[DatabaseCopy] = []
    try:
        for template in templates:
            copies.append(runner.run(stack.enter_async_context(template.copy())))
        yield copies
    finally:
        runner.run(stack.aclose())


# The container


@pytest.fixture
def _sessionwire_overridden(
    request: pytest.FixtureRequest, sessionwire_container: Any
) -> Iterator[containers.Container]:
    """Not started yet, on the databases that it is to use."""
    is_shared = _option(request.config, "isolation") == "sandbox" and not _is_sync(request)
    settings = request.getfixturevalue("sessionwire_databases" if is_shared else "_sessionwire_own_databases")
    container = _made(sessionwire_container)
    given: dict[str, object] = {}
    with ExitStack() as stack:
        for (name, database), own in zip(_by_settings(container).items(), settings, strict=True):
            given[name] = own
            try:
                manager = database.sessionmanager()
            except Exception:  # it lacks settings of its own, and nobody can have it
                continue
            if manager.is_initialized:
                raise pytest.UsageError(OPEN_ALREADY)
            # code that took the manager at import has it too
            stack.enter_context(database_of(manager).override_settings(own))
            given[f"{name.removesuffix('settings')}sessionmanager"] = manager
        yield stack.enter_context(overriding(container, **given))


@asynccontextmanager
async def _started(config: pytest.Config, container: containers.Container) -> AsyncGenerator[containers.Container]:
    is_sandbox = _option(config, "isolation") == "sandbox"
    async with AsyncExitStack() as stack:
        if is_sandbox:
            check_deferred, patience = map(config.getini, ("sessionwire_check_deferred", "sessionwire_patience"))
            await stack.enter_async_context(sandbox(container, check_deferred=check_deferred, patience=patience))
        await stack.enter_async_context(Lifespan(container))
        watch = Watch(*managers_of(container))
        for manager in managers_of(container):
            if is_sandbox:
                watch.over(manager.engine.pool)
            else:
                stack.enter_context(database_of(manager).substitute_engines(partial(WatchedEngines, watch)))
        yield container
        left = await watch.end_tasks(asyncio.current_task(), set(), TIMEOUT) + watch.end_blocks()
        if left:
            pytest.fail("\n".join(left), pytrace=False)


@pytest.fixture
def container(request: pytest.FixtureRequest, sessionwire_settings: DatabaseSettings) -> Any:
    """The container of `sessionwire_container`, started, in a sandbox or on a database of the test's own.

    For a test without async code, as one with a `TestClient`, it is on a database of the test's own, and ready for the
    event loop that the test runs.
    """
    if "anyio_backend" in request.fixturenames:
        return request.getfixturevalue("_sessionwire_anyio")
    if _is_sync(request):
        return request.getfixturevalue("_sessionwire_ready")
    if not request.config.pluginmanager.has_plugin("asyncio"):
        raise pytest.UsageError(
            "this test or one of its fixtures is async: install pytest-asyncio, or use anyio's plugin"
        )
    marker: Any = request.node.get_closest_marker("asyncio")
    loop_scope = marker and marker.kwargs.get("loop_scope")
    loop_scope = loop_scope or request.config.getini("asyncio_default_test_loop_scope")
    return request.getfixturevalue(f"_sessionwire_asyncio_{loop_scope}")


def _is_sync(request: pytest.FixtureRequest) -> bool:
    """Whether neither the test nor a fixture of it, but for those of this module, runs in an event loop of pytest's."""
    definitions: dict[str, Any] = getattr(request.node, "_fixtureinfo").name2fixturedefs  # noqa: B009  # it is private
    functions = [definitions[name][-1].func for name in request.fixturenames if name in definitions]
    return "anyio_backend" not in request.fixturenames and not any(
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        for function in map(inspect.unwrap, (request.function, *functions))
        if function.__module__ != __name__
    )


@pytest.fixture
def _sessionwire_ready(
    _sessionwire_overridden: containers.Container, _sessionwire_runner: asyncio.Runner
) -> Iterator[containers.Container]:
    """Not started, so that no event loop of pytest's has it."""
    managers = managers_of(_sessionwire_overridden)
    for manager in managers:
        manager.init(manager.settings)
    yield _sessionwire_overridden
    left = sum(len(database_of(manager).open_units) for manager in managers)
    for manager in managers:
        if manager.is_initialized:
            try:
                _sessionwire_runner.run(manager.close())
            except OwnershipError:
                pytest.fail("an event loop that used the database was left open: close it in the test", pytrace=False)
    if left:
        pytest.fail(f"sessions or connections that were left open: {left}", pytrace=False)


@pytest.fixture
async def _sessionwire_anyio(
    pytestconfig: pytest.Config, _sessionwire_overridden: containers.Container
) -> AsyncGenerator[containers.Container]:
    async with _started(pytestconfig, _sessionwire_overridden) as container:
        yield container


try:
    import pytest_asyncio
except ImportError:
    pass
else:

    def _in_loop_of(scope: Any) -> Any:
        """The same for pytest-asyncio, which is told by the fixture in which loop it runs."""

        @pytest_asyncio.fixture(name=f"_sessionwire_asyncio_{scope}", loop_scope=scope)
        async def started(
            pytestconfig: pytest.Config, _sessionwire_overridden: containers.Container
        ) -> AsyncGenerator[containers.Container]:
            async with _started(pytestconfig, _sessionwire_overridden) as container:
                yield container

        return started

    globals().update({f"_started_in_{scope}": _in_loop_of(scope) for scope in LOOP_SCOPES})  # where pytest finds them
