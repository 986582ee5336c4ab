"""`Lifespan`: the order of starts and ends, failures in them, and web applications."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers, resources
from dependency_injector.errors import Error as DependencyInjectorError
from dependency_injector.wiring import Provide, inject
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sessionwire import (
    ConnectionFailedError,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    NotInitializedError,
)

from . import asgi_requests
from .conftest import notes
from .sample_app import Container, Notebook, Notes, create_tables


@pytest.fixture
def sqlite(tmp_path: Path) -> DatabaseSettings:
    return DatabaseSettings(url=f"sqlite:///{tmp_path / 'test.db'}")


def is_open(manager: DatabaseSessionManager) -> bool:
    try:
        return manager.engine is not None
    except NotInitializedError:
        return False


class Log:
    """What happened, in order; fails or hangs where it is told to."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.fails_at: set[str] = set()
        self.fails_with: type[BaseException] = RuntimeError
        self.hangs_at: str | None = None
        self.hanging = asyncio.Event()

    def write(self, entry: str) -> None:
        self.entries.append(entry)
        if entry in self.fails_at:
            raise self.fails_with(entry)

    async def wait(self, entry: str) -> None:
        if entry == self.hangs_at:
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.entries.append(f"{entry} cancelled")

    def take(self) -> list[str]:
        entries, self.entries = self.entries, []
        return entries


# What users write as resources


async def async_generator(log: Log, name: str, *needs: object) -> AsyncIterator[str]:
    await log.wait(f"+{name}")
    log.write(f"+{name}")
    yield name
    await log.wait(f"-{name}")
    log.write(f"-{name}")


def generator(log: Log, name: str, *needs: object) -> Iterator[str]:
    log.write(f"+{name}")
    yield name
    log.write(f"-{name}")


class Async:
    def __init__(self, log: Log, name: str, *needs: object) -> None:
        self.log, self.name = log, name

    async def __aenter__(self) -> str:
        await self.log.wait(f"+{self.name}")
        self.log.write(f"+{self.name}")
        return self.name

    async def __aexit__(self, *_: object) -> None:
        await self.log.wait(f"-{self.name}")
        self.log.write(f"-{self.name}")


class Sync:
    def __init__(self, log: Log, name: str, *needs: object) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> str:
        self.log.write(f"+{self.name}")
        return self.name

    def __exit__(self, *_: object) -> None:
        self.log.write(f"-{self.name}")


class OfAsyncResource(resources.AsyncResource[str]):
    async def init(self, log: Log, name: str, *needs: object) -> str:
        log.write(f"+{name}")
        return name

    async def shutdown(self, resource: str | None) -> None:
        self.args[0].write(f"-{resource}")


class OfResource(resources.Resource[str]):
    def init(self, log: Log, name: str, *needs: object) -> str:
        log.write(f"+{name}")
        return name

    def shutdown(self, resource: str | None) -> None:
        self.args[0].write(f"-{resource}")


async def async_function(log: Log, name: str, *needs: object) -> str:
    log.write(f"+{name}")
    return name


def function(log: Log, name: str, *needs: object) -> str:
    log.write(f"+{name}")
    return name


async def async_function_with_an_end(log: Log, name: str, *needs: object) -> Async:
    return Async(log, name, *needs)


ASYNC_KINDS: list[Callable[..., Any]] = [
    async_generator,
    asynccontextmanager(async_generator),
    Async,
    OfAsyncResource,
    async_function_with_an_end,
]
SYNC_KINDS: list[Callable[..., Any]] = [generator, contextmanager(generator), Sync, OfResource]
KINDS_WITHOUT_END: list[Callable[..., Any]] = [async_function, function]


def named(kinds: list[Callable[..., Any]]) -> Any:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__qualname__)


# Order


class Thing:
    """What is built of resources."""

    def __init__(self, *needs: object, **named_needs: object) -> None: ...


class Layers(containers.DeclarativeContainer):
    """Resources that need others through providers, and are declared before them."""

    log = providers.Singleton(Log)
    third = providers.Resource(async_generator, log, "third")
    second = providers.Resource(async_generator, log, "second")
    first = providers.Resource(async_generator, log, "first")
    of_first = providers.Factory(Thing, providers.Singleton(Thing, first))
    of_second = providers.List(providers.Callable(Thing, need=second))
    second.add_args(of_first)
    third.add_args(of_second)


ALL_UP, ALL_DOWN = ["+first", "+second", "+third"], ["-third", "-second", "-first"]


async def test_resources_start_after_their_dependencies_and_end_before_them() -> None:
    async with Lifespan(Layers()) as layers:
        assert layers.log().take() == ALL_UP
    assert layers.log().take() == ALL_DOWN


def layers_of(kind: Callable[..., Any]) -> Layers:
    layers = Layers()
    for resource in (layers.first, layers.second, layers.third):
        resource.set_provides(kind)
    return layers


@named(ASYNC_KINDS + SYNC_KINDS)
async def test_all_kinds_of_resources_start_and_end_in_order_and_start_again(
    kind: Callable[..., Any],
) -> None:
    layers = layers_of(kind)
    for _ in range(3):
        async with Lifespan(layers):
            assert layers.log().take() == ALL_UP
            value = layers.third()
            assert (await value if asyncio.isfuture(value) else value) == "third"
        assert layers.log().take() == ALL_DOWN
        assert not layers.third.initialized


@named(KINDS_WITHOUT_END)
async def test_resources_without_an_end_are_built_again_at_each_start(
    kind: Callable[..., Any],
) -> None:
    layers = layers_of(kind)
    for _ in range(3):
        async with Lifespan(layers):
            assert layers.log().take() == ALL_UP
        assert layers.log().take() == []
        assert not layers.third.initialized


async def test_kinds_of_resources_can_be_mixed() -> None:
    layers = Layers()
    layers.first.set_provides(generator)
    layers.second.set_provides(async_generator)
    layers.third.set_provides(generator)
    async with Lifespan(layers):
        assert layers.log().take() == ALL_UP
    assert layers.log().take() == ALL_DOWN


class Infrastructure(containers.DeclarativeContainer):
    log = providers.Dependency(instance_of=Log)
    broker = providers.Resource(async_generator, log, "broker")


class Workers(containers.DeclarativeContainer):
    infrastructure = providers.DependenciesContainer()
    log = providers.Dependency(instance_of=Log)
    consumer = providers.Factory(Thing, infrastructure.broker)
    worker = providers.Resource(async_generator, log, "worker", consumer)


class Nested(containers.DeclarativeContainer):
    log = providers.Singleton(Log)
    infrastructure = providers.Container(Infrastructure, log=log)
    workers = providers.Container(Workers, infrastructure=infrastructure, log=log)
    announcement = providers.Resource(generator, log, "announcement", workers.worker)


async def test_the_order_of_resources_holds_across_nested_containers() -> None:
    async with Lifespan(Nested()) as nested:
        assert nested.log().take() == ["+broker", "+worker", "+announcement"]
    assert nested.log().take() == ["-announcement", "-worker", "-broker"]


async def diary(notebook: Notebook, name: str) -> AsyncIterator[str]:
    await notebook.write(f"+{name}")
    yield name
    await notebook.write(f"-{name}")


class Application(containers.DeclarativeContainer):
    """The user's resources use the database while they start and while they end."""

    settings = providers.Dependency(instance_of=DatabaseSettings)
    diary = providers.Resource(diary)
    tables = providers.Resource(create_tables)
    db = providers.Container(DatabaseContainer, settings=settings)
    tables.add_args(db.sessionmanager)
    notebook = providers.Factory(
        Notebook, notes=providers.Singleton(Notes, session=db.session), transaction=db.transaction
    )
    diary.add_args(notebook)
    diary.add_kwargs(name=providers.Callable(lambda _: "diary", tables))


async def test_the_database_is_open_while_resources_that_use_it_start_and_end(
    settings: DatabaseSettings,
) -> None:
    async with Lifespan(Application(settings=settings)) as application:
        assert await application.notebook().read() == ["+diary"]
    assert not is_open(application.db.sessionmanager())
    async with DatabaseSessionManager(settings) as manager:
        assert await notes(manager) == ["+diary", "-diary"]


async def test_the_end_of_a_lifespan_waits_for_an_open_transaction(
    sqlite: DatabaseSettings,
) -> None:
    async def work() -> None:
        async with container.db.transaction()():
            is_inside.set()
            await closing.wait()
            await container.notes().add("a")

    is_inside, closing = asyncio.Event(), asyncio.Event()
    async with Lifespan(Container(settings=sqlite)) as container:
        await create_tables(container.db.sessionmanager())
        worker = asyncio.create_task(work())
        await is_inside.wait()
        asyncio.get_running_loop().call_soon(closing.set)
    await worker
    async with DatabaseSessionManager(sqlite) as manager:
        assert await notes(manager) == ["a"]


async def test_a_resource_started_by_hand_is_not_started_again_and_ends_with_the_rest() -> None:
    layers = Layers()
    await layers.first.init()  # type: ignore[misc]
    async with Lifespan(layers):
        assert layers.log().take() == ALL_UP
    assert layers.log().take() == ALL_DOWN


async def test_a_nested_lifespan_starts_and_ends_only_what_the_outer_one_has_not_started() -> None:
    async with Lifespan(Layers()) as layers:
        await layers.third.shutdown()  # type: ignore[misc]
        assert layers.log().take() == [*ALL_UP, "-third"]
        async with Lifespan(layers):
            assert layers.log().take() == ["+third"]
        assert layers.log().take() == ["-third"]
    assert layers.log().take() == ["-second", "-first"]


async def test_a_resource_ended_by_hand_is_not_ended_again() -> None:
    async with Lifespan(Layers()) as layers:
        await layers.third.shutdown()  # type: ignore[misc]
        await layers.first.shutdown()  # type: ignore[misc]
    assert layers.log().take() == [*ALL_UP, "-third", "-first", "-second"]


async def test_a_lifespan_accepts_a_manager_that_was_closed_by_hand(
    sqlite: DatabaseSettings,
) -> None:
    async with Lifespan(Container(settings=sqlite)) as container:
        await container.db.sessionmanager().close()


# Overridden resources


async def test_an_overridden_resource_is_not_started() -> None:
    layers = Layers()
    with layers.second.override("fake"):
        async with Lifespan(layers):
            pass
    assert layers.log().take() == ["+first", "+third", "-third", "-first"]


async def test_an_overriding_resource_starts_and_ends_instead_of_the_overridden_one() -> None:
    layers = Layers()
    with layers.second.override(providers.Resource(async_generator, layers.log, "instead")):
        async with Lifespan(layers):
            assert layers.log().take() == ["+first", "+instead", "+third"]
    assert layers.log().take() == ["-third", "-instead", "-first"]


async def test_a_resource_whose_override_is_reset_before_the_end_ends_with_the_rest() -> None:
    layers = Layers()
    layers.third.override(providers.Resource(async_generator, layers.log, "instead"))
    async with Lifespan(layers):
        layers.third.reset_override()
        layers.log().take()
    assert layers.log().take() == ["-instead", *ALL_DOWN[1:]]


async def test_a_resource_that_overrides_after_the_start_ends_with_the_rest() -> None:
    layers = Layers()
    async with Lifespan(layers):
        layers.third.override(providers.Resource(async_generator, layers.log, "instead"))
        await layers.third()  # type: ignore[misc]
        layers.log().take()
    assert layers.log().take() == ["-instead", *ALL_DOWN]


# Failing


@pytest.mark.parametrize("failing", [0, 1, 2])
@named(ASYNC_KINDS + SYNC_KINDS)
async def test_a_resource_that_fails_to_start_ends_those_already_started(
    kind: Callable[..., Any], failing: int
) -> None:
    layers = layers_of(kind)
    layers.log().fails_at = {ALL_UP[failing]}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=ALL_UP[failing][1:]):
            await Lifespan(layers).__aenter__()
        assert layers.log().take() == ALL_UP[: failing + 1] + ALL_DOWN[len(ALL_DOWN) - failing :]
    layers.log().fails_at.clear()
    async with Lifespan(layers):
        assert layers.log().take() == ALL_UP


async def test_errors_in_the_cleanup_of_a_failed_start_are_notes_on_its_error() -> None:
    layers = Layers()
    layers.log().fails_at = {"+third", "-second", "-first"}
    with pytest.raises(RuntimeError, match="third") as failed:
        await Lifespan(layers).__aenter__()
    assert layers.log().take() == [*ALL_UP, "-second", "-first"]
    noted = [note.partition(":")[2].strip() for note in failed.value.__notes__]
    assert noted == ["RuntimeError: -second", "RuntimeError: -first"]


async def test_a_database_that_does_not_answer_ends_the_resources_already_started() -> None:
    class WithDatabase(Layers):
        db = providers.Container(DatabaseContainer)
        last = providers.Resource(
            Layers.third.provides, Layers.log, "last", Layers.third, db.sessionmanager
        )

    container = WithDatabase()
    container.db.config.from_dict({"url": "postgresql://nobody@127.0.0.1:1/nowhere"})
    with pytest.raises(ConnectionFailedError):
        await Lifespan(container).__aenter__()
    entries = container.log().take()
    up = [entry for entry in entries if entry.startswith("+")]
    assert "+last" not in up
    assert entries == up + [f"-{entry[1:]}" for entry in reversed(up)]


async def test_a_database_is_closed_if_a_later_resource_fails_to_start(
    sqlite: DatabaseSettings,
) -> None:
    async def failing(notebook: Notebook) -> None:
        await create_tables(container.db.sessionmanager())
        await notebook.write("started")
        raise RuntimeError("later")

    container = Application(settings=sqlite)
    container.diary.override(providers.Resource(failing, container.notebook))
    with pytest.raises(RuntimeError, match="later"):
        await Lifespan(container).__aenter__()
    assert not is_open(container.db.sessionmanager())


@named(ASYNC_KINDS + SYNC_KINDS)
async def test_resources_that_fail_to_end_do_not_stop_the_rest(
    kind: Callable[..., Any],
) -> None:
    layers = layers_of(kind)
    layers.log().fails_at = {"-third", "-second"}
    with pytest.raises(RuntimeError, match="-third") as failed:
        async with Lifespan(layers):
            layers.log().take()
    assert layers.log().take() == ALL_DOWN
    (note,) = failed.value.__notes__
    assert "RuntimeError: -second" in note
    layers.log().fails_at.clear()
    # Before 4.49 dependency-injector takes a synchronous resource whose end failed for
    # one that still runs.
    ended = not (kind in SYNC_KINDS and version("dependency-injector").startswith("4.48"))
    async with Lifespan(layers):
        assert layers.log().take() == (ALL_UP if ended else ["+first"])


async def test_the_error_of_the_block_is_raised_before_errors_of_the_end() -> None:
    layers = Layers()
    layers.log().fails_at = {"-third", "-first"}
    with pytest.raises(ZeroDivisionError) as failed:
        async with Lifespan(layers):
            raise ZeroDivisionError
    assert layers.log().take() == ALL_UP + ALL_DOWN
    assert ["-third" in note for note in failed.value.__notes__] == [True, False]
    assert "-first" in failed.value.__notes__[1]


@pytest.mark.parametrize("way_out", [KeyboardInterrupt, SystemExit])
async def test_a_resource_that_exits_the_program_lets_the_others_end_first(
    way_out: type[BaseException],
) -> None:
    layers = layers_of(generator)
    layers.log().fails_with, layers.log().fails_at = way_out, {"-second"}
    with pytest.raises(way_out):
        async with Lifespan(layers):
            layers.log().take()
    assert layers.log().take() == ALL_DOWN


async def test_a_database_is_closed_if_a_resource_that_uses_it_fails_to_end(
    sqlite: DatabaseSettings,
) -> None:
    async def failing(notebook: Notebook) -> AsyncIterator[None]:
        yield
        raise RuntimeError("at the end")

    container = Application(settings=sqlite)
    container.diary.override(providers.Resource(failing, container.notebook))
    with pytest.raises(RuntimeError, match="at the end"):
        async with Lifespan(container):
            pass
    assert not is_open(container.db.sessionmanager())


async def test_an_undefined_dependency_is_an_error_before_anything_starts() -> None:
    class Undefined(Layers):
        settings = providers.Dependency(instance_of=DatabaseSettings)
        db = providers.Container(DatabaseContainer, settings=settings)

    undefined = Undefined()
    with pytest.raises(
        DependencyInjectorError, match=r'undefined dependencies: "Undefined\.settings"'
    ):
        await Lifespan(undefined).__aenter__()
    assert undefined.log().take() == []


# Cancellation


async def cancelled_at(
    entry: str, layers: Layers, block: Callable[[], None] = lambda: None
) -> BaseException:
    """Cancel a task that lives through the layers while it hangs there."""

    async def live() -> None:
        async with Lifespan(layers):
            block()

    layers.log().hangs_at = entry
    task = asyncio.create_task(live())
    await asyncio.wait_for(layers.log().hanging.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    layers.log().hangs_at = None
    return cancelled.value


@pytest.mark.parametrize("starting", [0, 1, 2])
@named([async_generator, Async])
async def test_a_cancelled_start_ends_the_resources_already_started(
    kind: Callable[..., Any], starting: int
) -> None:
    layers = layers_of(kind)
    await cancelled_at(ALL_UP[starting], layers)
    begun, ended = ALL_UP[:starting], ALL_DOWN[len(ALL_DOWN) - starting :]
    assert layers.log().take() == [*begun, f"{ALL_UP[starting]} cancelled", *ended]
    async with Lifespan(layers):
        assert layers.log().take() == ALL_UP


@pytest.mark.parametrize("ending", [0, 1, 2])
@named([async_generator, Async])
async def test_a_cancelled_end_still_ends_the_remaining_resources(
    kind: Callable[..., Any], ending: int
) -> None:
    layers = layers_of(kind)
    await cancelled_at(ALL_DOWN[ending], layers)
    expected = [*ALL_DOWN[:ending], f"{ALL_DOWN[ending]} cancelled", *ALL_DOWN[ending + 1 :]]
    assert layers.log().take() == ALL_UP + expected
    async with Lifespan(layers):
        assert layers.log().take() == ALL_UP


async def test_an_error_after_a_cancellation_is_a_note_on_it() -> None:
    layers = Layers()
    layers.log().fails_at = {"-first"}
    cancellation = await cancelled_at("-second", layers)
    assert "RuntimeError: -first" in "".join(cancellation.__notes__)


async def test_an_error_before_a_cancellation_is_its_cause() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    cancellation = await cancelled_at("-second", Layers(), fail)
    assert isinstance(cancellation.__cause__, ZeroDivisionError)


async def test_a_database_is_closed_if_its_opening_is_cancelled() -> None:
    connected = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()  # until the client hangs up
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        container = DatabaseContainer(
            config={"url": f"postgresql://nobody@127.0.0.1:{port}/x?sslmode=disable"}
        )
        starting = asyncio.create_task(Lifespan(container).__aenter__())
        await asyncio.wait_for(connected.wait(), 5)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not is_open(container.sessionmanager())


# Again


async def test_a_service_works_again_when_its_container_is_started_again(
    settings: DatabaseSettings,
) -> None:
    container = Container(settings=settings)
    notebook = container.notebook()
    for text in ("a", "b"):
        async with Lifespan(container):
            await create_tables(container.db.sessionmanager())
            await notebook.write(text)
        with pytest.raises(NotInitializedError):
            await notebook.write("c")
    async with Lifespan(container):
        assert await notebook.read() == ["a", "b"]


def test_a_container_can_be_started_again_in_another_event_loop(sqlite: DatabaseSettings) -> None:
    async def live(text: str) -> list[str]:
        async with lifespan:
            await create_tables(container.db.sessionmanager())
            await container.notebook().write(text)
            return await container.notebook().read()

    container = Container(settings=sqlite)
    lifespan = Lifespan(container)
    assert asyncio.run(live("a")) == ["a"]
    assert asyncio.run(live("b")) == ["a", "b"]


# Web applications, driven as a server drives them


class StartupFailed(Exception):
    pass


class ShutdownFailed(Exception):
    pass


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[Callable[[str], Any]]:
    """Start and stop the application by the ASGI protocol; yield a function to GET."""
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def say(event: str, failure: type[Exception]) -> None:
        await to_app.put({"type": f"lifespan.{event}"})
        answer = await asyncio.wait_for(from_app.get(), 10)
        if answer["type"] != f"lifespan.{event}.complete":
            await asyncio.gather(life, return_exceptions=True)
            raise failure(answer["message"])

    async def get(path: str) -> Any:
        status, body = await asgi_requests.get(app, path)
        assert status == 200
        return json.loads(body)

    life = asyncio.create_task(
        app({"type": "lifespan", "asgi": {"version": "3.0"}}, to_app.get, from_app.put)
    )
    await say("startup", StartupFailed)
    try:
        yield get
    except BaseException:
        life.cancel()
        raise
    await say("shutdown", ShutdownFailed)
    await life


class Web(containers.DeclarativeContainer):
    """A web application's container, with a resource beside the database."""

    settings = providers.Dependency(instance_of=DatabaseSettings)
    log = providers.Singleton(Log)
    db = providers.Container(DatabaseContainer, settings=settings)
    tables = providers.Resource(create_tables, db.sessionmanager)
    notebook = providers.Factory(
        Notebook, notes=providers.Singleton(Notes, session=db.session), transaction=db.transaction
    )
    cache = providers.Resource(async_generator, log, "cache", tables, notebook)


@inject
async def starlette_endpoint(
    request: Request, notebook: Notebook = Provide[Web.notebook]
) -> JSONResponse:
    await notebook.write(request.path_params["text"])
    return JSONResponse(await notebook.read())


def starlette_app(container: Web) -> Starlette:
    return Starlette(routes=[Route("/{text}", starlette_endpoint)], lifespan=Lifespan(container))


@inject
async def fastapi_endpoint(
    text: str,
    notebook: Notebook = Depends(Provide[Web.notebook]),  # noqa: B008
) -> list[str]:
    await notebook.write(text)
    return await notebook.read()


def fastapi_app(container: Web) -> FastAPI:
    app = FastAPI(lifespan=Lifespan(container))
    app.get("/{text}")(fastapi_endpoint)
    return app


@pytest.fixture
def web(settings: DatabaseSettings) -> Iterator[Web]:
    web = Web(settings=settings)
    web.wire(modules=[__name__])
    yield web
    web.unwire()


web_frameworks = pytest.mark.parametrize("framework", [starlette_app, fastapi_app])


@web_frameworks
async def test_a_web_application_starts_and_stops_its_container(
    framework: Callable[[Web], Any], web: Web
) -> None:
    app = framework(web)
    for round_ in ("1", "2"):
        async with served(app) as get:
            assert is_open(web.db.sessionmanager())
            assert f"a{round_}" in await get(f"/a{round_}")
            answers = await asyncio.gather(*(get(f"/{letter}{round_}") for letter in "bcdef"))
            assert max(map(len, answers)) == 6 * int(round_)
        assert not is_open(web.db.sessionmanager())
        assert web.log().take() == ["+cache", "-cache"]


@web_frameworks
async def test_a_web_application_does_not_start_if_its_container_fails_to(
    framework: Callable[[Web], Any], sqlite: DatabaseSettings
) -> None:
    web = Web(settings=sqlite)
    web.log().fails_at = {"+cache"}
    with pytest.raises(StartupFailed, match=r"RuntimeError: \+cache"):
        async with served(framework(web)):
            pass
    assert not is_open(web.db.sessionmanager())


@web_frameworks
async def test_a_web_application_whose_container_fails_to_end_closes_the_database(
    framework: Callable[[Web], Any], sqlite: DatabaseSettings
) -> None:
    web = Web(settings=sqlite)
    web.log().fails_at = {"-cache"}
    with pytest.raises(ShutdownFailed, match="RuntimeError: -cache"):
        async with served(framework(web)):
            assert is_open(web.db.sessionmanager())
    assert not is_open(web.db.sessionmanager())
