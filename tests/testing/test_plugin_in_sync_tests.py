"""The pytest plugin in synchronous tests that run an event loop, as TestClient does."""

from __future__ import annotations

import pytest

from .test_plugin import Project, assert_passed, project

__all__ = ["project"]

TESTS = """
from typing import Annotated

import asyncio
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from sessionwire import Lifespan
from sessionwire.fastapi import Provide, inject
from shop import Container, Items

app = FastAPI()


@app.post("/{name}")
@inject
async def add(name: str, items: Annotated[Items, Provide[Container.items]]) -> bool:
    await items.add(name)
    return await items.has(name)


@pytest.fixture
def wired(container):
    container.wire(modules=[__name__])
    return container


@pytest.mark.parametrize("number", range(2))
def test_a_client(wired, number):
    with TestClient(app) as client:
        assert client.post("/pen").json() and client.post("/ink").json()


def test_a_client_with_a_loop_for_each_request(wired):
    client = TestClient(app)
    assert client.post("/pen").json() and client.post("/ink").json()


def test_an_application_with_a_lifespan(wired):
    application = FastAPI(lifespan=Lifespan(wired))
    application.include_router(app.router)
    for name in ("pen", "ink"):
        with TestClient(application) as client:
            assert client.post(f"/{name}").json()


def test_a_loop_of_its_own(container):
    asyncio.run(container.items().add("pen"))
    assert asyncio.run(container.items().has("pen"))
"""
STRICT = "-W", "error::ResourceWarning", "-W", "error::pytest.PytestUnraisableExceptionWarning"


@pytest.mark.long
@pytest.mark.parametrize("isolation", ["sandbox", "database"])
def test_a_test_client_works_with_the_container_of_the_plugin(
    project: Project, isolation: str
) -> None:
    project.write("test_web.py", TESTS)
    assert_passed(project.run(f"--sessionwire-isolation={isolation}", *STRICT), 5)


LEAVES = """
import asyncio
import pytest
from sqlalchemy import select

@pytest.fixture
async def seeded(container):
    await container.items().add("pen")

@pytest.mark.asyncio
async def test_with_a_client(container):
    await asyncio.to_thread(asyncio.run, container.items().has("pen"))

def test_leaves_a_session(container):
    async def leave():
        await (await container.db.sessionmanager().session().__aenter__()).execute(select(1))
    asyncio.run(leave())

def test_leaves_a_loop(container):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(container.items().add("pen"))

def test_with_an_async_fixture(container, seeded):
    assert container.items()
"""


@pytest.mark.long
def test_unsupported_use_in_a_synchronous_test_is_refused_with_the_remedy(project: Project) -> None:
    project.write("test_web.py", LEAVES)
    output = project.run("-o", "asyncio_mode=auto").stdout
    assert (
        "OwnershipError: this manager belongs to another event loop, which is still open" in output
    )
    assert "httpx.AsyncClient(transport=ASGITransport(app))" in output
    assert "sessions or connections that were left open: 1" in output
    assert "an event loop that used the database was left open: close it in the test" in output
    assert "1 failed, 3 passed, 2 errors" in output
