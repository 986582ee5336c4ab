"""`StatusPage`: what the databases of a process do now, as a page and as JSON."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings, TransactionManager
from sessionwire._web.html import element
from sessionwire._web.status_html import duration, render_databases
from sessionwire.asgi import HealthApp, StatusPage
from sessionwire.status import OpenBlock, SlowStatement

from .conftest import Postgres
from .http_server import served
from .postgres import until

QUERY = text("SELECT 42")
SCRIPT = "<script>alert('it is run')</script>"


class Page(HTMLParser):
    """A page, of which all elements are closed.

    Attributes:
        texts: The texts, by the path of their elements.
        elements: The elements with their attributes.
    """

    EMPTY = ("meta", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._path: list[str] = []
        self.feed(page)
        assert not self._path

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((" ".join(self._path), data))

    def cells(self) -> list[str]:
        return [text for path, text in self.texts if " td" in path]

    def figure(self, label: str) -> str:
        texts = [text for _, text in self.texts]
        return texts[texts.index(label) + 1]


@pytest.fixture
async def manager() -> AsyncIterator[DatabaseSessionManager]:
    pool = PoolSettings(size=2, max_overflow=0, timeout=0.1)
    async with DatabaseSessionManager(DatabaseSettings(url="sqlite://", pool=pool)) as manager:
        yield manager


@pytest.fixture
async def client(manager: DatabaseSessionManager) -> AsyncIterator[httpx.AsyncClient]:
    async with served(StatusPage(manager)) as client:
        yield client


async def look_at(client: httpx.AsyncClient) -> Page:
    answer = await client.get("/")
    assert answer.status_code == 200
    return Page(answer.text)


async def test_the_json_is_the_status_of_each_database(
    client: httpx.AsyncClient, manager: DatabaseSessionManager
) -> None:
    answer = await client.get("/status.json")
    shown = answer.json()["databases"]["database"]
    assert shown.keys() == asdict(manager.status()).keys()
    assert shown["pool"] == asdict(manager.status().pool)


async def test_the_page_shows_open_blocks_with_their_lines_and_statements(
    client: httpx.AsyncClient, manager: DatabaseSessionManager
) -> None:
    async with manager.transaction() as session, manager.engine.connect() as by_hand:
        await session.execute(QUERY)
        await by_hand.execute(QUERY)
        page = await look_at(client)
    _, opened, now_at, connection, statement = page.cells()[:5]
    here = "test_the_page_shows_open_blocks_with_their_lines_and_statements"
    assert re.fullmatch(rf"test_status_page.py:\d+ in {here}", opened)
    assert re.fullmatch(r"test_status_page.py:\d+ in look_at", now_at)
    assert re.fullmatch(r"held \d+ ms", connection)
    assert statement in ("SELECT 42", "\N{EN DASH}")  # SQLite's driver does not tell it.
    assert "manager.engine" in page.cells()
    (meter,) = (attributes for name, attributes in page.elements if name == "meter")
    assert (meter["max"], meter["value"]) == ("2", "2")
    page = await look_at(client)
    assert page.cells() == []
    assert page.figure("committed") == "1"


async def test_a_block_that_waits_for_a_connection_and_its_timeout_stand_out(
    client: httpx.AsyncClient, manager: DatabaseSessionManager
) -> None:
    async with AsyncExitStack() as blocks:
        for _ in range(2):
            session = await blocks.enter_async_context(manager.session())
            await session.execute(QUERY)

        async def wait() -> None:
            async with manager.session() as session:
                await session.execute(QUERY)

        waiting = asyncio.create_task(wait())

        async def is_shown() -> bool:
            page = await look_at(client)
            return "waits for one" in page.cells() and "1 task waits" in str(page.texts)

        await until(is_shown)
        with pytest.raises(PoolTimeoutError):
            await waiting
    page = await look_at(client)
    assert page.figure("waits that timed out") == "1"


async def test_what_comes_from_the_program_is_escaped(manager: DatabaseSessionManager) -> None:
    block = OpenBlock(SCRIPT, 1.0, False, 0.5, SCRIPT, SCRIPT, "app.py:1 in <lambda>")
    slow = SlowStatement(datetime.now(UTC), 1.0, SCRIPT, (), SCRIPT, SCRIPT)
    status = replace(
        manager.status(),
        name=SCRIPT,
        blocks=(block,),
        slow_statements=(slow,),
        retries={SCRIPT: 1},
    )
    shown = render_databases({SCRIPT: status}, datetime.now(UTC))
    page = Page(shown)
    assert "script" not in {name for name, _ in page.elements}
    assert page.cells().count(SCRIPT) == 5
    assert "app.py:1 in <lambda>" in page.cells()
    assert element("p", class_='"&<').startswith('<p class="&quot;&amp;&lt;">')


async def test_unknown_and_settled_outcomes_stand_out(manager: DatabaseSessionManager) -> None:
    status = manager.status()
    totals = replace(status.transactions, unknown=2, settled=3, committed=12345)
    shown = replace(status, transactions=totals, is_closing=True)
    page = Page(render_databases({"db": shown}, datetime.now(UTC)))
    alarms = [path for path, text in page.texts if text in ("2", "3") and path.endswith("strong")]
    assert len(alarms) == 2
    assert page.figure("committed") == "12\N{NARROW NO-BREAK SPACE}345"
    assert "closing" in [text for _, text in page.texts]


async def test_slow_statements_are_listed_with_their_age(manager: DatabaseSessionManager) -> None:
    now = datetime.now(UTC)
    slow = SlowStatement(now - timedelta(minutes=3), 0.7312, "SELECT  1\n", (), "f", "app.py:2")
    status = replace(manager.status(), slow_statements=(slow,))
    cells = Page(render_databases({"db": status}, now)).cells()
    assert cells == ["731 ms", "3 min 00 s ago", "app.py:2", "f", "SELECT 1"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0004, "0 ms"),
        (0.25, "250 ms"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7980, "2 h 13 min"),
        (200_000, "2 d 07 h"),
    ],
)
def test_durations_are_short(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


async def test_the_page_allows_nothing_but_what_it_brings(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert answer.headers["cache-control"] == "no-store"
    page = Page(answer.text)
    assert not any("style" in attributes or "src" in attributes for _, attributes in page.elements)
    links = {attributes.get("href") for _, attributes in page.elements} - {None}
    assert links == {"data:,", "status.json"}


async def test_before_open_and_after_close_the_page_is_shown_too() -> None:
    manager = DatabaseSessionManager("sqlite://")
    async with served(StatusPage(manager)) as client:
        assert "not open" in [text for _, text in (await look_at(client)).texts]
        async with manager:
            assert "open" in [text for _, text in (await look_at(client)).texts]
        assert "not open" in [text for _, text in (await look_at(client)).texts]


# A pool that is exhausted by a forgotten call of another service


class Rates:
    """A client of another service, which has become slow."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def fetch(self) -> str:
        return (await self._client.get("/rates")).text


class Orders:
    """A service whose block keeps its connection while it waits for something else."""

    def __init__(self, transaction: TransactionManager, rates: Rates) -> None:
        self.transaction, self._rates = transaction, rates

    async def pay(self) -> None:
        async with self.transaction() as session:
            await session.execute(QUERY)
            await self._rates.fetch()


async def printed_by(*arguments: str) -> str:
    """Return what the command line prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sessionwire", *arguments, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


async def test_an_exhausted_pool_is_explained_by_log_error_page_command_and_probe(
    postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    is_slow = asyncio.Event()

    async def slow_service(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await is_slow.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1.08"})

    pool = PoolSettings(size=2, max_overflow=0, timeout=0.3, warn_held_after=0.05)
    settings = DatabaseSettings(url=postgres.url("postgres"), pool=pool)
    async with (
        DatabaseSessionManager(settings) as manager,
        served(slow_service) as rates,
        served(StatusPage(manager)) as page,
        served(HealthApp(manager, timeout=0.1)) as probe,
    ):
        orders = Orders(manager.transaction, Rates(rates))
        paying = [asyncio.create_task(orders.pay()) for _ in range(2)]

        async def are_warned_of() -> bool:
            return len([r for r in caplog.records if r.name == "sessionwire.pool"]) == 2

        with caplog.at_level(logging.WARNING, "sessionwire"):
            await until(are_warned_of)
        health = await probe.get("/ready")
        cells = (await look_at(page)).cells()
        command = await printed_by("status", str(page.base_url))
        with pytest.raises(PoolTimeoutError) as raised:
            await orders.pay()
        is_slow.set()
        await asyncio.gather(*paying)
        assert (await probe.get("/ready")).status_code == 200

    explained = {
        "the log": caplog.text,
        "the error": str(raised.value),
        "the page": "\n".join(cells),
        "the command": command,
        "the probe": health.json()["reasons"]["database"],
    }
    for place, said in explained.items():
        for line in (r"test_status_page.py:\d+ in Orders.pay", r"test_status_page.py:\d+ in Rates"):
            assert re.search(line, said), (place, said)
