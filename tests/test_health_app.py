"""`HealthApp` answers probes over HTTP, wherever it is mounted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import litestar
import pytest
from dependency_injector import containers, providers
from fastapi import FastAPI
from litestar.handlers import asgi
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from sessionwire import (
    ConfigurationError,
    DatabaseContainer,
    DatabaseSessionManager,
    Lifespan,
    nested_container,
)
from sessionwire.asgi import HealthApp, StatusPage

from .http_server import served

LIVE, READY = {"status": "live"}, {"status": "ready"}


def in_fastapi(app: Any) -> Any:
    outer = FastAPI()
    outer.mount("/at", app)
    return outer


def in_starlette(app: Any) -> Any:
    return Starlette(routes=[Mount("/at", app)])


def in_two_mounts(app: Any) -> Any:
    return Starlette(routes=[Mount("/at", Starlette(routes=[Mount("/at", app)]))])


def in_litestar(app: Any) -> Any:
    return litestar.Litestar(
        [asgi("/at", is_mount=True, copy_scope=True)(app)], openapi_config=None
    )


PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "alone": (lambda app: app, ""),
    "FastAPI": (in_fastapi, "/at"),
    "Starlette": (in_starlette, "/at"),
    "two mounts": (in_two_mounts, "/at/at"),
    "Litestar": (in_litestar, "/at"),
}


@pytest.fixture
async def manager() -> AsyncIterator[DatabaseSessionManager]:
    async with DatabaseSessionManager("sqlite://") as manager:
        yield manager


@pytest.fixture
async def client(manager: DatabaseSessionManager) -> AsyncIterator[httpx.AsyncClient]:
    async with served(HealthApp(manager)) as client:
        yield client


@pytest.mark.parametrize("place", PLACES)
async def test_it_answers_wherever_it_is_mounted(
    place: str, manager: DatabaseSessionManager
) -> None:
    mount, path = PLACES[place]
    async with served(mount(HealthApp(manager))) as client:
        for name, expected in (("live", LIVE), ("ready", READY)):
            answer = await client.get(f"{path}/{name}")
            assert (answer.status_code, answer.json()) == (200, expected)
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["content-type"] == "application/json"
        assert (await client.get(f"{path}/")).status_code == 404
        assert (await client.get(f"{path}/live/no")).status_code == 404


@pytest.mark.parametrize("place", PLACES)
async def test_the_status_page_finds_its_json_wherever_it_is_mounted(
    place: str, manager: DatabaseSessionManager
) -> None:
    mount, path = PLACES[place]
    async with served(mount(StatusPage(manager))) as client:
        page = await client.get(f"{path}/", follow_redirects=True)
        (link,) = (part.split('"')[0] for part in page.text.split('href="')[2:3])
        status = await client.get(str(page.url.join(link)))
        assert status.json()["databases"]["database"]["is_open"]


async def test_the_path_below_a_root_path_of_the_server_is_found(
    manager: DatabaseSessionManager,
) -> None:
    # Earlier servers leave the root path out of the path.
    for path in ("/behind/proxy/live", "/live"):
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "/behind/proxy"}
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        await HealthApp(manager)(scope, _receive_nothing, send)
        assert [sent[0]["status"], sent[1]["body"]] == [200, b'{"status": "live"}']


async def _receive_nothing() -> Any:
    raise AssertionError("nothing is to be received")


async def test_a_head_request_is_answered_without_a_body_and_others_are_refused(
    client: httpx.AsyncClient,
) -> None:
    head = await client.head("/ready")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(b'{"status": "ready"}')
    refused = await client.post("/ready")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_a_websocket_is_refused(client: httpx.AsyncClient) -> None:
    with pytest.raises(InvalidStatus) as raised:
        await connect(str(client.base_url).replace("http", "ws") + "/live", proxy=None)
    assert raised.value.response.status_code == 403


async def test_a_scope_of_an_unknown_type_is_an_error_as_asgi_demands(
    manager: DatabaseSessionManager,
) -> None:
    with pytest.raises(ValueError, match="'ftp' is no type"):
        await HealthApp(manager)({"type": "ftp"}, _receive_nothing, _send_nothing)


async def _send_nothing(message: Any) -> None:
    raise AssertionError("nothing is to be sent")


class Shop(containers.DeclarativeContainer):
    db = DatabaseContainer.nested(settings="sqlite://")


class Two(containers.DeclarativeContainer):
    shop = nested_container(Shop)
    archive = DatabaseContainer.nested(settings="sqlite://")
    closed = providers.Object(None)


async def test_each_database_that_is_not_ready_is_named_with_its_reason() -> None:
    container = Two()
    async with Lifespan(container), served(HealthApp(container)) as client:
        assert (await client.get("/ready")).json() == READY
        await container.archive.sessionmanager().close()
        ready, live = await client.get("/ready"), await client.get("/live")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "not ready",
            "reasons": {"archive": "the manager was closed"},
        }
        assert (live.status_code, live.json()) == (200, LIVE)
        await container.shop.db.sessionmanager().close()
        ready = await client.get("/ready")
        assert ready.json()["reasons"].keys() == {"archive", "shop.db"}
        await container.archive.sessionmanager().open()
        await container.shop.db.sessionmanager().open()


async def test_a_manager_of_another_event_loop_is_not_live_and_the_reasons_can_be_left_out(
    manager: DatabaseSessionManager,
) -> None:
    async def ask(**options: Any) -> list[httpx.Response]:
        transport = httpx.ASGITransport(HealthApp(manager, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.get("/live"), await client.get("/ready")]

    for answer in await asyncio.to_thread(asyncio.run, ask()):
        assert answer.status_code == 503
        assert "another event loop" in answer.json()["reasons"]["database"]
    live, ready = await asyncio.to_thread(asyncio.run, ask(reasons=False))
    assert (live.json(), ready.json()) == ({"status": "not live"}, {"status": "not ready"})


def test_a_container_without_a_database_is_refused_at_once() -> None:
    for application in (HealthApp, StatusPage):
        with pytest.raises(ConfigurationError, match="no DatabaseContainer"):
            application(containers.DynamicContainer())


async def test_a_database_container_can_be_given_itself() -> None:
    container = DatabaseContainer(settings="sqlite://")
    async with Lifespan(container), served(HealthApp(container)) as client:
        assert (await client.get("/ready")).json() == READY
