"""Credentials that change: asked for, kept, expired, refused, and never shown."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    Credentials,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    PoolSettings,
)

from .cluster import Server
from .conftest import assert_all_returned, checked_out
from .passwords import asking_for_passwords
from .postgres import at_port, until
from .test_commit_resolver import LosingNetwork

SECRET = "hunter2"


@pytest.fixture(scope="module")
def server_of_module() -> Any:
    """Run one server for all tests. It needs no event loop once it runs."""
    with asyncio.Runner() as runner:
        context = asking_for_passwords()
        yield runner.run(context.__aenter__())
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture
async def asking(server_of_module: Server) -> Server:
    await server_of_module.execute("ALTER ROLE shop PASSWORD 'first'")
    return server_of_module


def settings(server: Server, **keys: Any) -> DatabaseSettings:
    pool = {"size": 5, "max_lifetime": 600, **keys.pop("pool", {})}
    url = server.tcp_url("postgres").replace("postgres@", "shop@")
    return DatabaseSettings(url=url, pool=PoolSettings(**pool), **keys)


class Vault:
    """Hand out what a test puts in, and count how often it is asked."""

    def __init__(self, answer: Any = "first") -> None:
        self.answer = answer
        self.asked = 0
        self.cancelled = 0
        self.gate: asyncio.Event | None = None  # an answer waits for it

    def sync(self) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def asynchronous(self) -> Any:
        answer = self.sync()
        try:
            await (asyncio.sleep(0) if self.gate is None else self.gate.wait())
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return answer


@pytest.fixture(params=["sync", "asynchronous"])
def of(request: pytest.FixtureRequest) -> Callable[[Vault], Callable[[], Any]]:
    """Return the function of a vault that is tested."""
    return lambda vault: getattr(vault, str(request.param))


Of = Callable[[Vault], Callable[[], Any]]


async def connections(manager: DatabaseSessionManager, number: int) -> None:
    """Use so many connections at once."""
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(manager.session()) for _ in range(number)]
        for session in sessions:
            await session.execute(text("SELECT 1"))


# When it is asked


async def test_a_function_is_asked_for_each_new_connection(asking: Server, of: Of) -> None:
    vault = Vault()
    async with DatabaseSessionManager(settings(asking), credentials=of(vault)) as manager:
        assert vault.asked == 1
        await connections(manager, 1)  # The one of open() is used again.
        assert vault.asked == 1
        vault.answer = "second"
        await asking.execute("ALTER ROLE shop PASSWORD 'second'")
        await connections(manager, 3)
        assert vault.asked == 3


async def test_credentials_are_kept_as_long_as_they_say(asking: Server, of: Of) -> None:
    vault = Vault(Credentials(password="first", expires_in=60))
    async with DatabaseSessionManager(settings(asking), credentials=of(vault)) as manager:
        await connections(manager, 3)
        assert vault.asked == 1


async def test_credentials_that_have_expired_are_asked_for_again(asking: Server, of: Of) -> None:
    vault = Vault(Credentials(password="first", expires_in=0.2))
    async with DatabaseSessionManager(settings(asking), credentials=of(vault)) as manager:
        vault.answer = Credentials(password="second", expires_in=60)
        await asking.execute("ALTER ROLE shop PASSWORD 'second'")
        await asyncio.sleep(0.2)  # exactly as long as they may be kept
        await connections(manager, 4)
        assert vault.asked == 2


async def test_credentials_may_name_another_user_each_time(asking: Server, of: Of) -> None:
    await asking.execute("DROP ROLE IF EXISTS leased")
    await asking.execute("CREATE ROLE leased LOGIN PASSWORD 'of lease'")
    vault = Vault()
    async with DatabaseSessionManager(settings(asking), credentials=of(vault)) as manager:
        vault.answer = Credentials(username="leased", password="of lease")
        async with manager.session() as first, manager.session() as second:
            users = [await each.scalar(text("SELECT current_user")) for each in (first, second)]
        assert users == ["shop", "leased"]


async def test_connections_that_open_at_once_ask_once(asking: Server) -> None:
    vault = Vault()
    async with DatabaseSessionManager(settings(asking), credentials=vault.asynchronous) as manager:
        before = vault.asked
        vault.gate = asyncio.Event()
        tasks = [asyncio.create_task(hold(manager)) for _ in range(5)]

        async def all_wait() -> bool:
            return checked_out(manager) == 5

        await until(all_wait)
        vault.gate.set()
        await asyncio.gather(*tasks)
        assert vault.asked == before + 1


async def hold(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(text("SELECT pg_sleep(0.2)"))


async def test_a_refused_password_is_not_kept(asking: Server, of: Of) -> None:
    vault = Vault(Credentials(password="first", expires_in=600))
    async with DatabaseSessionManager(settings(asking), credentials=of(vault)) as manager:
        await asking.execute("ALTER ROLE shop PASSWORD 'second'")
        vault.answer = Credentials(password="second", expires_in=600)
        async with manager.session() as first, manager.session() as second:
            await first.execute(text("SELECT 1"))
            with pytest.raises(DBAPIError, match="password authentication failed"):
                await second.execute(text("SELECT 1"))
        await connections(manager, 3)
        assert vault.asked == 2


async def test_two_databases_with_functions_of_both_kinds_work_at_once(asking: Server) -> None:
    vaults = Vault(), Vault(Credentials(password="first", expires_in=60))
    async with (
        DatabaseSessionManager(settings(asking), credentials=vaults[0].sync) as one,
        DatabaseSessionManager(settings(asking), credentials=vaults[1].asynchronous) as two,
    ):
        await asyncio.gather(*(connections(manager, 3) for manager in (one, two) * 2))
        assert vaults[0].asked > 1
        assert vaults[1].asked == 1


async def test_a_former_password_is_not_used_beyond_the_lifetime(asking: Server, of: Of) -> None:
    vault = Vault()
    short = settings(asking, pool={"max_lifetime": 1})
    async with DatabaseSessionManager(short, credentials=of(vault)) as manager:

        async def pid() -> Any:
            async with manager.session() as session:
                return await session.scalar(text("SELECT pg_backend_pid()"))

        former = await pid()
        vault.answer = "second"
        await asking.execute("ALTER ROLE shop PASSWORD 'second'")

        async def is_replaced() -> bool:
            return await pid() != former

        await until(is_replaced)
        assert vault.asked == 2


def test_a_manager_asks_anew_in_another_event_loop(server_of_module: Server) -> None:
    vault = Vault(Credentials(password="first", expires_in=60))
    manager = DatabaseSessionManager(settings(server_of_module), credentials=vault.asynchronous)

    async def use() -> None:
        await server_of_module.execute("ALTER ROLE shop PASSWORD 'first'")
        async with manager:
            await connections(manager, 2)

    for _ in range(2):
        asyncio.run(use())
    assert vault.asked == 2


async def test_a_commit_is_looked_up_on_a_connection_with_credentials(
    asking: Server, of: Of
) -> None:
    await asking.execute("DROP TABLE IF EXISTS sold")
    await asking.execute("CREATE TABLE sold (item text)")
    await asking.execute("GRANT ALL ON sold TO shop")
    vault, network = Vault(), LosingNetwork()
    async with network.open(asking.host) as port:
        url = at_port(port, asking.url("postgres")).replace("postgres@", "shop@")
        given = DatabaseSettings(url=url, pool=PoolSettings(max_lifetime=600))
        async with DatabaseSessionManager(given, credentials=of(vault)) as manager:
            async with manager.transaction() as session:
                await session.execute(text("INSERT INTO sold VALUES ('tea')"))
                network.loses = "the answer to the COMMIT"
            assert vault.asked == 2
    assert await asking.execute("SELECT item FROM sold") == [("tea",)]


# When it fails


class VaultIsSealed(Exception):
    pass


async def test_a_function_that_fails_is_named_in_the_error(asking: Server, of: Of) -> None:
    vault = Vault(VaultIsSealed("come back later"))
    manager = DatabaseSessionManager(settings(asking), credentials=of(vault))
    with pytest.raises(
        ConnectionFailedError, match=r"credentials=Vault\.\w+ failed: VaultIsSealed: come back"
    ) as failed:
        await manager.open()
    assert "VaultIsSealed" in "".join(traceback.format_exception(failed.value))
    vault.answer = "first"
    async with manager:
        vault.answer = VaultIsSealed("come back later")
        async with manager.session() as first, manager.session() as second:
            await first.execute(text("SELECT 1"))
            with pytest.raises(DBAPIError, match=r"credentials=Vault\.\w+ failed: VaultIsSealed"):
                await second.execute(text("SELECT 1"))
        vault.answer = "first"
        await connections(manager, 3)
        await assert_all_returned(manager)


@pytest.mark.parametrize(
    "answer", [None, "", 5, {"password": SECRET}, SECRET.encode(), Credentials(password="")]
)
async def test_what_is_no_password_is_refused_and_not_shown(
    answer: Any, asking: Server, of: Of
) -> None:
    manager = DatabaseSessionManager(settings(asking), credentials=of(Vault(answer)))
    with pytest.raises(ConnectionFailedError, match="it must return a password") as failed:
        await manager.open()
    assert SECRET not in "".join(traceback.format_exception(failed.value))


async def test_a_wrong_password_is_not_shown(asking: Server, of: Of) -> None:
    vault = Vault(Credentials(password=SECRET, username="shop", expires_in=60))
    manager = DatabaseSessionManager(settings(asking), credentials=of(vault))
    with pytest.raises(ConnectionFailedError, match="password authentication failed") as failed:
        await manager.open()
    shown = "".join(traceback.format_exception(failed.value))
    assert SECRET not in f"{shown} {vault.answer!r} {manager!r} {vault.answer}"


async def test_a_function_that_takes_too_long_is_cancelled(asking: Server) -> None:
    vault = Vault()
    vault.gate = asyncio.Event()
    manager = DatabaseSessionManager(
        settings(asking, connect_timeout=0.4), credentials=vault.asynchronous
    )
    with pytest.raises(
        ConnectionFailedError, match=r"credentials=Vault\.\w+ failed: .*no answer within 0\.2 s"
    ):
        await manager.open()
    assert vault.cancelled == 1


# Cancellations


@pytest.fixture
async def gated(asking: Server) -> AsyncIterator[tuple[Vault, DatabaseSessionManager]]:
    """Yield an open manager whose next connection waits for its password."""
    vault = Vault()
    manager = DatabaseSessionManager(settings(asking), credentials=vault.asynchronous)
    async with manager, manager.session() as session:
        await session.execute(text("SELECT 1"))
        vault.gate = asyncio.Event()
        yield vault, manager


def has_asked(vault: Vault, times: int) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return vault.asked == times

    return condition


async def test_a_cancelled_connection_cancels_its_question(
    gated: tuple[Vault, DatabaseSessionManager],
) -> None:
    vault, manager = gated
    task = asyncio.create_task(connections(manager, 1))
    await until(has_asked(vault, 2))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert vault.gate is not None
    vault.gate.set()
    await connections(manager, 1)
    assert (vault.asked, vault.cancelled) == (3, 1)


async def test_a_cancelled_connection_does_not_disturb_others_that_wait(
    gated: tuple[Vault, DatabaseSessionManager],
) -> None:
    vault, manager = gated
    tasks = [asyncio.create_task(connections(manager, 1)) for _ in range(3)]

    async def all_wait() -> bool:
        return checked_out(manager) == 4

    await until(all_wait)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert vault.gate is not None
    vault.gate.set()
    await asyncio.gather(*tasks[1:])
    assert (vault.asked, vault.cancelled) == (2, 0)


async def test_open_that_is_cancelled_while_it_asks_leaves_nothing(asking: Server) -> None:
    vault = Vault()
    vault.gate = asyncio.Event()
    manager = DatabaseSessionManager(settings(asking), credentials=vault.asynchronous)
    opening = asyncio.create_task(manager.open())
    await until(has_asked(vault, 1))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not manager.is_initialized
    vault.gate.set()
    async with manager:
        await connections(manager, 2)
    assert vault.cancelled == 1


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no lifetime": ({"url": "postgresql://db/shop"}, "set pool.max_lifetime too"),
    "a password": (
        {"host": "db", "password": SECRET, "pool": {"max_lifetime": 1}},
        "password is set too: leave out one of them",
    ),
    "a file": (
        {"host": "db", "password_file": __file__, "pool": {"max_lifetime": 1}},
        "password_file is set too",
    ),
    "SQLite": ({"url": "sqlite://"}, "only a server has any"),
    "an embedded server": ({"url": "embedded:./var"}, "only a server has any"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
async def test_credentials_that_can_not_work_are_refused_with_the_reason(
    keys: dict[str, Any], message: str
) -> None:
    given = DatabaseSettings(**keys)
    manager = DatabaseSessionManager(given, credentials=Vault().sync)
    with pytest.raises(ConfigurationError, match=f"^credentials: .*{message}"):
        manager.init(given)
    with pytest.raises(ConfigurationError, match=f"^credentials: .*{message}"):
        await manager.open()


def test_what_can_not_be_called_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="credentials"):
        DatabaseSessionManager("postgresql://db", credentials="hunter2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="credentials calls"):
        DatabaseSessionManager("postgresql://db", credentials=lambda key: key)  # type: ignore


# Containers


async def test_a_container_takes_a_function_and_lets_it_be_overridden(asking: Server) -> None:
    injected, overriding = Vault(), Vault()

    class Container(containers.DeclarativeContainer):
        vault = providers.Object(injected)
        db = providers.Container(
            DatabaseContainer,
            settings=settings(asking),
            credentials=vault.provided.asynchronous,
        )

    async with Lifespan(Container()) as container:
        await connections(container.db.sessionmanager(), 1)
    assert injected.asked == 1

    container = Container()
    with container.db.credentials.override(overriding.sync):
        async with Lifespan(container):
            await connections(container.db.sessionmanager(), 1)
    assert (injected.asked, overriding.asked) == (1, 1)

    for given in (overriding.sync, providers.Object(overriding.sync)):
        async with Lifespan(DatabaseContainer(settings=settings(asking), credentials=given)):
            pass
    assert overriding.asked == 3


async def test_a_database_of_tests_has_no_credentials() -> None:
    class Container(containers.DeclarativeContainer):
        db = providers.Container(DatabaseContainer, settings="sqlite://", credentials=Vault().sync)

    container = Container()
    with container.db.credentials.override(None):
        async with Lifespan(container):
            await connections(container.db.sessionmanager(), 1)
