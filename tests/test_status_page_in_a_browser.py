"""The status page in a real browser: Debian's Chromium, which `.ci/programs` installs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright
from sqlalchemy import text

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings
from sessionwire.asgi import StatusPage

from .http_server import served
from .postgres import until

pytestmark = pytest.mark.long

CHROMIUM = "/usr/bin/chromium"
OPTIONS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG_QUERY = text("SELECT 1 AS " + "a_name_that_does_not_fit_on_a_telephone_" * 3)

# The colours and sizes of all texts, with the background that each stands on.
TEXTS = """
() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    const isHidden = !element.checkVisibility() || element.matches("script, meter");
    if (isHidden || !node.data.trim()) continue;
    let behind = element, back;
    while ((back = getComputedStyle(behind).backgroundColor) === "rgba(0, 0, 0, 0)") {
      behind = behind.parentElement;
    }
    found.push([node.data.trim(), getComputedStyle(element).color, back]);
  }
  return found;
}
"""


@pytest.fixture
async def manager() -> AsyncIterator[DatabaseSessionManager]:
    pool = PoolSettings(size=2, max_overflow=0)
    settings = DatabaseSettings(url="sqlite://", pool=pool, slow_statement=1e-6)
    async with DatabaseSessionManager(settings) as manager:
        yield manager


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    # Chromium's sandbox does not work for root.
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=OPTIONS
        )
        yield browser
        await browser.close()


class Visit:
    """A look at the page.

    Attributes:
        page: The page.
        requests: The addresses that the browser has asked for.
        complaints: What the browser has written to its console.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def shows(self, text: str) -> bool:
        return text in await self.page.inner_text("body")

    async def until_it_shows(self, text: str) -> None:
        await until(lambda: self.shows(text), 15)


def _to_async(condition: Callable[[], object]) -> Callable[[], Awaitable[object]]:
    async def check() -> object:
        return condition()

    return check


@asynccontextmanager
async def visit(
    browser: Browser, manager: DatabaseSessionManager, width: int = 1280, **options: Any
) -> AsyncIterator[Visit]:
    async with served(StatusPage(manager)) as client:
        viewport: Any = {"width": width, "height": 700}
        page = await browser.new_page(viewport=viewport, **options)
        visit = Visit(page)
        await page.goto(str(client.base_url))
        yield visit
        await page.close()
    assert not visit.complaints
    assert {address.split("/")[2] for address in visit.requests} == {
        client.base_url.netloc.decode()
    }


async def test_it_refreshes_itself_and_keeps_the_scroll_position_the_focus_and_the_selection(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with visit(browser, manager, 360) as look:
        assert await look.shows("Open blocks 0")
        await look.page.focus("a")
        await look.page.evaluate("getSelection().selectAllChildren(document.querySelector('h2'))")
        await look.page.evaluate("scrollTo(0, 200)")
        async with manager.session() as session:
            await session.execute(LONG_QUERY)
            await look.until_it_shows("Open blocks 1")
            assert await look.page.title() == "database 1 of 2"
        await look.until_it_shows("Open blocks 0")
        assert await look.page.evaluate("scrollY") == 200
        assert await look.page.evaluate("document.activeElement.textContent") == "JSON"
        assert await look.page.evaluate("getSelection().toString()") == "database"
        # One page, of which only parts have changed.
        assert await look.page.evaluate("performance.getEntriesByType('navigation').length") == 1


async def test_it_can_be_paused_and_stops_while_it_is_hidden(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with visit(browser, manager) as look:
        await look.page.click("text=Pause")
        async with manager.session() as session:
            await session.execute(LONG_QUERY)
            asked = len(look.requests)
            await asyncio.sleep(2.5)  # longer than its interval
            assert len(look.requests) == asked
            await look.page.click("text=Go on")
            await look.until_it_shows("Open blocks 1")
        hide = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s})"
        await look.page.evaluate(hide % "true")
        asked = len(look.requests)
        await asyncio.sleep(2.5)
        assert len(look.requests) <= asked + 1  # one may have been on its way
        await look.page.evaluate(hide % "false")
        await look.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        await look.until_it_shows("Open blocks 0")


async def test_without_javascript_it_is_loaded_anew(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with (
        visit(browser, manager, java_script_enabled=False) as look,
        manager.session() as session,
    ):
        await session.execute(LONG_QUERY)
        await until(_to_async(lambda: len(look.requests) > 1), 15)
        assert not await look.page.is_visible("button")


async def test_it_tells_that_the_server_does_not_answer(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with served(StatusPage(manager)) as client:
        page = await browser.new_page()
        await page.goto(str(client.base_url))
        await page.route("**", lambda route: route.abort())
        look = Visit(page)
        await look.until_it_shows("No answer: what is shown is old.")
        await page.unroute("**")
        async with asyncio.timeout(15):
            while await look.shows("No answer"):
                await asyncio.sleep(0.05)
        await page.close()


@pytest.mark.parametrize("width", [320, 360, 700, 1280, 2560])
async def test_nothing_is_wider_than_the_screen(
    width: int, browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with manager.session() as session:
        await session.execute(LONG_QUERY)
        async with visit(browser, manager, width) as look:
            assert await look.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 1280])
async def test_in_light_and_in_dark_each_text_stands_out_from_its_background(
    width: int, browser: Browser, manager: DatabaseSessionManager
) -> None:
    backgrounds: set[str] = set()
    async with manager.session() as session, manager.session() as other:
        for each in (session, other):
            await each.execute(LONG_QUERY)
        for scheme in ("light", "dark"):
            async with visit(browser, manager, width, color_scheme=scheme) as look:
                texts = await look.page.evaluate(TEXTS)
            assert "2 of 2 connections in use" in [text for text, *_ in texts]
            for said, color, back in texts:
                assert contrast(color, back) >= 4.5, (scheme, said, color, back)
            backgrounds |= {back for *_, back in texts}
    assert len(backgrounds) >= 4


def contrast(one: str, other: str) -> float:
    """Return the ratio of two colours as WCAG defines it: `rgb(1, 2, 3)`."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    channels = [int(part) / 255 for part in color[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


async def test_a_screen_reader_finds_tables_on_a_telephone_too(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with manager.session() as session:
        await session.execute(LONG_QUERY)
        async with visit(browser, manager, 360) as look:
            tree = await look.page.locator("main").aria_snapshot()
    for part in (
        'heading "database" [level=2]',
        'table "Open blocks"',
        'columnheader "Open for"',
        'meter "Connections in use"',
    ):
        assert part in tree, tree


async def test_the_keyboard_reaches_what_can_be_done(
    browser: Browser, manager: DatabaseSessionManager
) -> None:
    async with visit(browser, manager) as look:
        reached: list[str] = []
        for _ in range(2):
            await look.page.keyboard.press("Tab")
            reached.append(await look.page.evaluate("document.activeElement.textContent"))
        assert reached == ["JSON", "Pause"]
        await look.page.keyboard.press("Enter")
        assert await look.shows("Go on")
