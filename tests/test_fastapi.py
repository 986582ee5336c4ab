"""`sessionwire.fastapi`: endpoints injected by the container, in both forms."""

# ruff: noqa: B008  # `= Depends(…)` is one of them

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from dependency_injector import containers, providers, wiring
from dependency_injector.wiring import (
    Closing,
    Provider,
    as_,
    as_float,
    as_int,
    invariant,
    provided,
    required,
)
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query

import sessionwire
from sessionwire import DatabaseSettings, Lifespan
from sessionwire.fastapi import Provide, inject

from .conftest import notes
from .http_server import served
from .sample_app import Container as NotebookContainer
from .sample_app import Notebook, create_tables

if TYPE_CHECKING:
    from fractions import Fraction


class Greeter:
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def greet(self, name: str) -> str:
        return f"{self.greeting}, {name}"


class Door:
    """A resource that can be opened again."""

    def __init__(self) -> None:
        self.is_open = False

    def open(self) -> Iterator[Door]:
        self.is_open = True
        yield self
        self.is_open = False


class Inner(containers.DeclarativeContainer):
    greeter = providers.Factory(Greeter, "hi")


DOOR = Door()


class Container(containers.DeclarativeContainer):
    config = providers.Configuration()
    greeter = providers.Factory(Greeter, "hello")
    inner = providers.Container(Inner)
    language = providers.Object("fr")
    door = providers.Resource(DOOR.open)


@pytest.fixture
def container() -> Iterator[Container]:
    """Yield a container that is not wired yet."""
    container = Container()
    container.config.from_dict(
        {"limit": "7", "price": "1.50", "greetings": {"fr": "salut", "de": "hallo"}}
    )
    yield container
    container.unwire()


@pytest.fixture
def wired(container: Container) -> Container:
    container.wire(modules=[__name__])
    return container


def app_with(*endpoints: Callable[..., Any]) -> FastAPI:
    """Make an application of endpoints, each under its name."""
    app = FastAPI()
    for endpoint in endpoints:
        app.get(f"/{endpoint.__name__}")(endpoint)
    return app


async def get(app: FastAPI, path: str) -> Any:
    """Return the answer."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(path)
    return response.json() if response.status_code == 200 else response.status_code


# The forms, in a module whose annotations are strings


@inject
async def short(name: str, greeter: Annotated[Greeter, Provide[Container.greeter]]) -> str:
    return greeter.greet(name)


@inject
async def before_others(greeter: Annotated[Greeter, Provide[Container.greeter]], name: str) -> str:
    return greeter.greet(name)


@inject
async def keyword(*, greeter: Annotated[Greeter, Provide[Container.greeter]], name: str) -> str:
    return greeter.greet(name)


@inject
async def default(name: str, greeter: Greeter = Provide[Container.greeter]) -> str:
    return greeter.greet(name)


@inject
async def string(name: str, greeter: Annotated[Greeter, Provide["greeter"]]) -> str:
    return greeter.greet(name)


@inject
async def annotated_depends(
    name: str, greeter: Annotated[Greeter, Depends(Provide[Container.greeter])]
) -> str:
    return greeter.greet(name)


@inject
async def default_depends(name: str, greeter: Greeter = Depends(Provide[Container.greeter])) -> str:
    return greeter.greet(name)


@wiring.inject
async def with_the_other_inject(
    name: str, greeter: Greeter = Depends(Provide[Container.greeter])
) -> str:
    return greeter.greet(name)


@inject
async def with_the_other_marker(
    name: str, greeter: Annotated[Greeter, wiring.Provide[Container.greeter]]
) -> str:
    return greeter.greet(name)


@inject
def synchronous(name: str, greeter: Annotated[Greeter, Provide[Container.greeter]]) -> str:
    return greeter.greet(name)


@wiring.inject
def synchronous_depends(name: str, greeter: Greeter = Depends(Provide[Container.greeter])) -> str:
    return greeter.greet(name)


@inject
async def beside_what_only_type_checkers_know(
    share: Fraction, greeter: Annotated[Greeter, Provide[Container.greeter]]
) -> Fraction:
    return share * len(greeter.greeting)


FORMS: list[Callable[..., Any]] = [
    short,
    before_others,
    keyword,
    default,
    string,
    annotated_depends,
    default_depends,
    with_the_other_inject,
    with_the_other_marker,
    synchronous,
    synchronous_depends,
]


class TestForms:
    @pytest.mark.parametrize("endpoint", FORMS)
    async def test_each_form_of_an_endpoint_gets_its_service(
        self, endpoint: Callable[..., Any], wired: Container
    ) -> None:
        app = app_with(endpoint)
        assert await get(app, f"/{endpoint.__name__}?name=Ada") == "hello, Ada"
        assert await get(app, f"/{endpoint.__name__}") == 422

    @pytest.mark.parametrize("endpoint", FORMS)
    def test_each_form_of_an_endpoint_hides_its_service_from_openapi(
        self, endpoint: Callable[..., Any]
    ) -> None:
        operation = app_with(endpoint).openapi()["paths"][f"/{endpoint.__name__}"]["get"]
        assert [parameter["name"] for parameter in operation["parameters"]] == ["name"]
        assert "requestBody" not in operation

    @pytest.mark.parametrize("endpoint", FORMS)
    async def test_each_form_of_an_endpoint_follows_an_override(
        self, endpoint: Callable[..., Any], wired: Container
    ) -> None:
        app = app_with(endpoint)
        with wired.greeter.override(Greeter("bye")):
            assert await get(app, f"/{endpoint.__name__}?name=Ada") == "bye, Ada"
        assert await get(app, f"/{endpoint.__name__}?name=Ada") == "hello, Ada"

    async def test_an_argument_passed_to_an_endpoint_takes_precedence_over_injection(
        self, wired: Container
    ) -> None:
        assert await short("Ada", greeter=Greeter("hey")) == "hey, Ada"

    async def test_asynchronous_providers_are_awaited_at_the_same_time(
        self, container: Container
    ) -> None:
        both_have_begun = asyncio.Barrier(2)

        async def build(greeting: str) -> Greeter:
            await both_have_begun.wait()
            return Greeter(greeting)

        @inject
        async def endpoint(
            greeter: Annotated[Greeter, Provide[Container.greeter]],
            inner: Annotated[Greeter, Provide[Container.inner.greeter]],
        ) -> list[str]:
            return [greeter.greeting, inner.greeting]

        container.wire(modules=[__name__])
        app = app_with(endpoint)
        with (
            container.greeter.override(providers.Coroutine(build, "ciao")),
            container.inner.greeter.override(providers.Coroutine(build, "ahoy")),
        ):
            assert await asyncio.wait_for(get(app, "/endpoint"), 10) == ["ciao", "ahoy"]

    async def test_an_awaitable_passed_to_an_endpoint_is_not_awaited(
        self, wired: Container
    ) -> None:
        given: asyncio.Future[Greeter] = asyncio.Future()

        @inject
        async def endpoint(greeter: Annotated[Any, Provide[Container.greeter]]) -> bool:
            return greeter is given

        assert await endpoint(greeter=given)

    async def test_an_annotation_known_only_to_type_checkers_does_not_hide_others(
        self, wired: Container
    ) -> None:
        assert await beside_what_only_type_checkers_know(2) == 10

    def test_inject_without_a_marker_warns_with_its_call_site(self) -> None:
        with pytest.warns(wiring.DIWiringWarning, match="nothing to inject") as caught:

            @inject
            async def endpoint(name: str) -> str:
                return name

        assert caught[0].filename == __file__


MARKERS = {
    "as_int": (Provide["config.limit", as_int()], 7),
    "as_float": (Provide["config.price", as_float()], 1.5),
    "as_": (Provide["config.price", as_(Decimal)], "1.50"),
    "required": (Provide["config.limit", required().as_int()], 7),
    "invariant": (Provide["config.greetings", invariant("language")], "salut"),
    "provided": (Provide["greeter", provided().greeting.upper.call()], "HELLO"),
    "option": (Provide[Container.config.limit.as_int()], 7),
    "invariant option": (Provide[Container.config.greetings[Container.language]], "salut"),
    "provided attribute": (Provide[Container.greeter.provided.greeting], "hello"),
    "nested container": (Provide[Container.inner.greeter.provided.greeting], "hi"),
    "nested string": (Provide["inner.greeter", provided().greeting], "hi"),
}


class TestMarkers:
    @pytest.mark.parametrize("name", MARKERS)
    async def test_each_marker_of_dependency_injector_works_in_an_endpoint(
        self, name: str, container: Container
    ) -> None:
        marker, expected = MARKERS[name]

        @inject
        async def short(value: Any = marker) -> Any:
            return value

        @wiring.inject
        async def depends(value: Any = Depends(marker)) -> Any:
            return value

        container.wire(modules=[__name__])
        app = app_with(short, depends)
        assert [await get(app, "/short"), await get(app, "/depends")] == [expected, expected]

    async def test_an_endpoint_can_get_a_provider_and_the_container(
        self, container: Container
    ) -> None:
        @inject
        async def endpoint(
            build: Any = Provider[Container.greeter],
            factory: Any = Depends(Provide[Container.greeter.provider]),
            whole: Any = Provide[Container],
        ) -> list[str]:
            return [build().greeting, factory().greeting, whole.greeter().greeting]

        container.wire(modules=[__name__])
        assert await get(app_with(endpoint), "/endpoint") == ["hello"] * 3

    async def test_a_closing_marker_shuts_the_resource_down_after_the_request(
        self, container: Container
    ) -> None:
        @inject
        async def short(door: Any = Closing[Provide[Container.door]]) -> bool:
            return bool(door.is_open)

        @wiring.inject
        async def depends(door: Any = Depends(Closing[Provide[Container.door]])) -> bool:
            return bool(door.is_open)

        container.wire(modules=[__name__])
        app = app_with(short, depends)
        for path in ("/short", "/depends"):
            assert await get(app, path) is True
            assert not DOOR.is_open


def workers() -> set[threading.Thread]:
    """Return the threads that FastAPI has used."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("AnyIO")}


@wiring.inject
async def three_depends(
    first: Greeter = Depends(Provide[Container.greeter]),
    second: Greeter = Depends(Provide[Container.inner.greeter]),
    third: int = Depends(Provide["config.limit", as_int()]),
) -> int:
    return third


@inject
async def three_short(
    first: Annotated[Greeter, Provide[Container.greeter]],
    second: Annotated[Greeter, wiring.Provide[Container.inner.greeter]],
    third: Annotated[int, Depends(wiring.Provide["config.limit", as_int()])],
) -> int:
    return third


@wiring.inject
async def original(third: int = Depends(wiring.Provide["config.limit", as_int()])) -> int:
    return third


class TestThreads:
    @pytest.mark.parametrize(
        ("endpoint", "takes_a_thread"),
        [(three_depends, False), (three_short, False), (original, True)],
    )
    async def test_only_the_marker_of_dependency_injector_uses_a_thread(
        self, endpoint: Callable[..., Any], takes_a_thread: bool, wired: Container
    ) -> None:
        before = workers()
        assert await get(app_with(endpoint), f"/{endpoint.__name__}") == 7
        assert bool(workers() - before) is takes_a_thread


# Dependencies of all kinds


class Page:
    @inject
    def __init__(
        self, greeter: Annotated[Greeter, Provide[Container.greeter]], size: int = 10
    ) -> None:
        self.text = f"{greeter.greeting} {size}"


class Check:
    @inject
    async def __call__(
        self, name: str, greeter: Annotated[Greeter, Provide[Container.greeter]]
    ) -> str:
        return greeter.greet(name)


CHECK = Check()
LOG: list[str] = []


@inject
async def generator(
    greeter: Annotated[Greeter, Provide[Container.greeter]],
) -> AsyncIterator[Greeter]:
    LOG.append("begin")
    try:
        yield greeter
    except HTTPException as error:
        LOG.append(type(error).__name__)
        raise
    LOG.append("end")


async def fails_beside_generator(greeter: Annotated[Greeter, Depends(generator)]) -> str:
    raise HTTPException(409)


@inject
async def letters(
    greeter: Annotated[Greeter, Provide[Container.greeter]] = Greeter(""),
) -> AsyncGenerator[str]:
    try:
        for letter in greeter.greeting:
            yield letter
    finally:
        LOG.append("closed")


@inject
def synchronous_generator(
    greeter: Annotated[Greeter, Provide[Container.greeter]],
) -> Iterator[Greeter]:
    LOG.append("begin")
    yield greeter
    LOG.append("end")


async def of_class(page: Annotated[Page, Depends(Page)]) -> str:
    return page.text


async def of_callable_object(greeting: Annotated[str, Depends(CHECK)]) -> str:
    return greeting


async def of_generator(greeter: Annotated[Greeter, Depends(generator)]) -> str:
    return greeter.greeting


async def of_synchronous_generator(
    greeter: Annotated[Greeter, Depends(synchronous_generator)],
) -> str:
    return greeter.greeting


async def of_function(greeting: Annotated[str, Depends(short)]) -> str:
    return greeting


class TestDependencies:
    @pytest.mark.parametrize(
        ("endpoint", "query", "expected"),
        [
            (of_class, "?size=3", "hello 3"),
            (of_class, "", "hello 10"),
            (of_callable_object, "?name=Ada", "hello, Ada"),
            (of_function, "?name=Ada", "hello, Ada"),
        ],
    )
    async def test_a_fastapi_dependency_is_injected(
        self, endpoint: Callable[..., Any], query: str, expected: str, wired: Container
    ) -> None:
        assert await get(app_with(endpoint), f"/{endpoint.__name__}{query}") == expected

    @pytest.mark.parametrize("endpoint", [of_generator, of_synchronous_generator])
    async def test_a_generator_dependency_continues_after_the_endpoint(
        self, endpoint: Callable[..., Any], wired: Container
    ) -> None:
        LOG.clear()
        assert await get(app_with(endpoint), f"/{endpoint.__name__}") == "hello"
        assert LOG == ["begin", "end"]

    async def test_an_async_generator_dependency_sees_the_error_of_the_endpoint(
        self, wired: Container
    ) -> None:
        LOG.clear()
        app = app_with(fails_beside_generator)
        assert await get(app, "/fails_beside_generator") == 409
        assert LOG == ["begin", "HTTPException"]

    async def test_an_injected_async_generator_can_be_iterated_and_closed(
        self, wired: Container
    ) -> None:
        assert [letter async for letter in letters()] == ["h", "e", "l", "l", "o"]
        LOG.clear()
        some = letters()
        assert await anext(some) == "h"
        await some.aclose()
        assert LOG == ["closed"]

    async def test_a_dependency_of_a_router_is_injected(self, wired: Container) -> None:
        @inject
        async def refuse(
            limit: int = Provide["config.limit", as_int()], page: Annotated[int, Query()] = 1
        ) -> None:
            if page > limit:
                raise HTTPException(403)

        wired.wire(modules=[__name__])
        router = APIRouter(prefix="/pages", dependencies=[Depends(refuse)])
        router.get("/short")(short)
        app = FastAPI()
        app.include_router(router)
        assert await get(app, "/pages/short?name=Ada&page=7") == "hello, Ada"
        assert await get(app, "/pages/short?name=Ada&page=8") == 403


# Wiring


MODULE = """
from typing import Annotated

from fastapi import APIRouter, Depends

from dependency_injector import wiring
from sessionwire.fastapi import Provide, inject
from tests.test_fastapi import Container, Greeter

router = APIRouter()


@router.get("/short")
@inject
async def short(greeter: Annotated[Greeter, Provide[Container.greeter]]) -> str:
    return greeter.greeting


@router.get("/depends")
@wiring.inject
async def depends(greeter: Annotated[Greeter, Depends(Provide[Container.greeter])]) -> str:
    return greeter.greeting


@router.get("/bare")
async def bare(greeter: Annotated[Greeter, Depends(Provide[Container.greeter])]) -> str:
    return greeter.greeting
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write endpoints, as users do, in a module that nobody has imported."""
    name = f"endpoints_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def app_of(module: str) -> FastAPI:
    app = FastAPI()
    app.include_router(importlib.import_module(module).router)
    return app


class TestWiring:
    async def test_wiring_works_before_the_routes_are_in_the_application(
        self, module: str, container: Container
    ) -> None:
        container.wire(modules=[module])
        app = app_of(module)
        assert [await get(app, path) for path in ("/short", "/depends")] == ["hello", "hello"]

    async def test_wiring_works_after_the_routes_are_in_the_application(
        self, module: str, container: Container
    ) -> None:
        app = app_of(module)
        container.wire(modules=[module])
        assert [await get(app, path) for path in ("/short", "/depends")] == ["hello", "hello"]

    async def test_wiring_can_move_to_another_container(
        self, module: str, container: Container
    ) -> None:
        app = app_of(module)
        container.wire(modules=[module])
        container.unwire()
        other = Container(greeter=providers.Factory(Greeter, "good day"))
        other.wire(modules=[module])
        assert [await get(app, path) for path in ("/short", "/depends")] == ["good day", "good day"]
        other.unwire()

    async def test_an_endpoint_that_is_not_wired_says_so(self, module: str) -> None:
        app = app_of(module)
        with pytest.raises(
            AttributeError,
            match=r"'greeting' .* instead of what that provides: .* wire the container",
        ):
            await get(app, "/depends")
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'greeter'"):
            await get(app, "/short")

    async def test_an_endpoint_without_inject_says_so(
        self, module: str, container: Container
    ) -> None:
        app = app_of(module)
        with pytest.raises(AttributeError, match="decorate the function with @inject"):
            await get(app, "/bare")


# With a database


@inject
async def write(
    text: str, notebook: Annotated[Notebook, Provide[NotebookContainer.notebook]]
) -> list[str]:
    await notebook.write(text)
    return await notebook.read()


@wiring.inject
async def write_depends(
    text: str, notebook: Notebook = Depends(Provide[NotebookContainer.notebook])
) -> list[str]:
    await notebook.write(text, "wrong", "wrong")
    return await notebook.read()


async def test_an_injected_service_writes_in_its_own_transactions(database_url: str) -> None:
    container = NotebookContainer(settings=DatabaseSettings(url=database_url))
    container.wire(modules=[__name__])
    app = FastAPI(lifespan=Lifespan(container))
    app.get("/write")(write)
    app.get("/write_depends")(write_depends)
    async with served(app) as client:
        await create_tables(container.db.sessionmanager())
        answers = await asyncio.gather(*(client.get(f"/write?text={n}") for n in range(5)))
        assert {answer.status_code for answer in answers} == {200}
        assert (await client.get("/write_depends?text=a")).status_code == 500
        assert await notes(container.db.sessionmanager()) == ["0", "1", "2", "3", "4"]
    container.unwire()


# Without what it needs


def run(code: str) -> str:
    source = Path(sessionwire.__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False).stderr


@pytest.mark.long
def test_importing_sessionwire_fastapi_without_fastapi_says_what_to_install() -> None:
    said = run("import sys; sys.modules['fastapi'] = None; import sessionwire.fastapi")
    assert (
        said.splitlines()[-1]
        == "ImportError: sessionwire.fastapi needs FastAPI: pip install 'sessionwire[fastapi]'"
    )
