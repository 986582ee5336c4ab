"""The HTTP API: each route, and each error as a problem (RFC 9457)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from typing import Any

import httpx
import pytest
import uvicorn
from asyncpg import CannotConnectNowError
from dependency_injector import providers
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ledger.api import create_app
from ledger.container import Container
from ledger.errors import Busy
from ledger.settings import LedgerSettings
from sessionwire import (
    CommitOutcomeUnknownError,
    DatabaseSettings,
    NotInitializedError,
    PoolSettings,
)
from tests.conftest import DATABASE, Postgres, checked_out
from tests.postgres import FaultyNetwork, OnPostgres, at_port

# These requests are answered before they reach a database.
without_a_database = pytest.mark.parametrize("sessionwire_settings", ["sqlite"], indirect=True)


@asynccontextmanager
async def served(container: Container) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the API with uvicorn on a socket, and yield a client."""
    config = uvicorn.Config(
        create_app(container), port=0, lifespan="on", log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done(), serving.result()
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    async with httpx.AsyncClient(
        base_url=f"http://{host}:{port}", timeout=30, verify=False
    ) as client:
        yield client
    server.should_exit = True
    await serving


def not_open(database_url: str, **pool: float) -> Container:
    """A container with a pool of five. The app opens it."""
    pool_settings = PoolSettings.model_validate({"size": 5, "max_overflow": 0, **pool})
    return Container(
        settings=LedgerSettings(database=DatabaseSettings(url=database_url, pool=pool_settings))
    )


@pytest.fixture
async def api(container: Container) -> AsyncIterator[httpx.AsyncClient]:
    async with served(container) as client:
        yield client


async def opened(api: httpx.AsyncClient, *owners: str) -> list[int]:
    """Open accounts with a hundred each."""
    answers = [
        await api.post("/accounts", json={"owner": owner, "opening": "100.00"}) for owner in owners
    ]
    return [answer.json()["id"] for answer in answers]


async def transfer(
    api: httpx.AsyncClient, source: int, target: int, amount: str, key: str
) -> httpx.Response:
    order = {"source": source, "target": target, "amount": amount}
    return await api.post("/transfers", json=order, headers={"Idempotency-Key": key})


async def balance(api: httpx.AsyncClient, account: int) -> Decimal:
    return Decimal((await api.get(f"/accounts/{account}/balance")).json()["balance"])


def assert_problem(answer: httpx.Response, status: int, type: str, *says: str) -> None:
    problem: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == status, problem
    assert problem.keys() == {"type", "title", "status", "detail", "instance"}
    assert (problem["status"], problem["instance"]) == (status, answer.url.path)
    assert problem["type"] == (type if ":" in type else f"/problems/{type}")
    assert problem["title"]
    for words in says:
        assert words in problem["detail"]
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "secret" not in answer.text


async def test_the_location_of_an_opened_account_returns_its_balance(
    api: httpx.AsyncClient,
) -> None:
    answer = await api.post("/accounts", json={"owner": "Alice", "opening": "1000000.5"})

    assert answer.status_code == 201
    account = answer.json()["id"]
    assert answer.json() == {"id": account, "owner": "Alice", "opening": "1000000.50"}
    read = await api.get(answer.headers["location"])
    assert read.status_code == 200
    assert read.json() == {"account": account, "balance": "1000000.50"}


async def test_the_api_moves_money_once_per_idempotency_key(api: httpx.AsyncClient) -> None:
    alice, bob = await opened(api, "Alice", "Bob")

    first, *others = await asyncio.gather(
        *(transfer(api, alice, bob, "10.00", "rent") for _ in range(5))
    )
    again = await transfer(api, alice, bob, "10", "rent")

    assert first.status_code == 201
    booked = first.json()
    assert booked.pop("booked_at").endswith("Z")
    assert booked == {
        "id": booked["id"], "key": "rent", "source_id": alice, "target_id": bob, "amount": "10.00"
    }  # fmt: skip
    for other in [*others, again]:
        assert (other.status_code, other.json()) == (201, first.json())
    assert [await balance(api, alice), await balance(api, bob)] == [90, 110]


async def test_the_api_returns_a_statement_in_pages_that_link_to_the_next(
    api: httpx.AsyncClient,
) -> None:
    alice, bob, carol = await opened(api, "Alice", "Bob", "Carol")
    for number in range(5):
        await transfer(api, alice, bob, "1.00", f"{number}")
    await transfer(api, bob, carol, "1.00", "none of Alice's")

    async def read(path: str | None) -> list[list[str]]:
        pages: list[list[str]] = []
        while path is not None:
            page = (await api.get(path)).json()
            pages.append([booked["key"] for booked in page["transfers"]])
            path = page["next"]
        return pages

    assert await read(f"/accounts/{alice}/statement") == [["4", "3", "2", "1", "0"]]
    assert await read(f"/accounts/{alice}/statement?limit=2") == [["4", "3"], ["2", "1"], ["0"]]
    assert await read(f"/accounts/{alice}/statement?limit=5") == [["4", "3", "2", "1", "0"]]
    assert await read(f"/accounts/{carol}/statement?before=1") == [[]]


async def test_the_api_answers_each_refusal_with_a_problem(api: httpx.AsyncClient) -> None:
    alice, bob = await opened(api, "Alice", "Bob")
    await transfer(api, alice, bob, "10.00", "rent")

    assert_problem(await api.get("/accounts/999/balance"), 404, "unknown-account", "no account 999")
    assert_problem(
        await api.get("/accounts/999/statement"), 404, "unknown-account", "no account 999"
    )
    assert_problem(
        await transfer(api, alice, 999, "1.00", "a"), 404, "unknown-account", "no account 999"
    )
    assert_problem(
        await transfer(api, alice, bob, "90.01", "b"), 409, "insufficient-funds", "90.00", "90.01"
    )
    for wrong in ("0.00", "-1.00", "1.001", "1000000000000"):
        assert_problem(await transfer(api, alice, bob, wrong, "c"), 422, "invalid-amount", wrong)
    overdrawn = await api.post("/accounts", json={"owner": "Carol", "opening": "-0.01"})
    assert_problem(overdrawn, 422, "invalid-amount", "-0.01")
    assert_problem(
        await transfer(api, alice, alice, "1.00", "d"), 422, "invalid-transfer", "can't pay itself"
    )
    assert_problem(
        await transfer(api, alice, bob, "1.00", "k" * 201),
        422,
        "invalid-transfer",
        "idempotency key",
    )
    assert_problem(
        await transfer(api, alice, bob, "10.01", "rent"), 422, "idempotency-conflict", "'rent'"
    )
    assert [await balance(api, alice), await balance(api, bob)] == [90, 110]


@without_a_database
async def test_the_api_answers_an_invalid_request_with_a_problem_that_names_the_field(
    api: httpx.AsyncClient,
) -> None:
    order: dict[str, Any] = {"source": 1, "target": 2, "amount": "1.00"}
    key = {"Idempotency-Key": "rent"}

    async def send(**changes: Any) -> httpx.Response:
        return await api.post("/transfers", json=order | changes, headers=key)

    assert_problem(
        await api.post("/transfers", json=order), 422, "invalid-request", "header idempotency-key"
    )
    assert_problem(
        await api.post("/transfers", content="{", headers=key), 422, "invalid-request", "body"
    )
    assert_problem(
        await api.post("/transfers", json=[], headers=key), 422, "invalid-request", "body"
    )
    assert_problem(await send(amount=1.1), 422, "invalid-request", "body amount")
    assert_problem(await send(amount="NaN"), 422, "invalid-request", "body amount")
    assert_problem(await send(source=2**63), 422, "invalid-request", "body source")
    assert_problem(await send(ammount="1.00"), 422, "invalid-request", "body ammount")
    assert_problem(await api.get("/accounts/alice/balance"), 422, "invalid-request", "path account")
    assert_problem(
        await api.get(f"/accounts/{2**63}/balance"), 422, "invalid-request", "path account"
    )
    assert_problem(
        await api.get("/accounts/1/statement?limit=0"), 422, "invalid-request", "query limit"
    )
    for owner in ("", r"Al\u0000ice", r"\ud800"):
        content = f'{{"owner": "{owner}", "opening": "1.00"}}'
        answer = await api.post(
            "/accounts", content=content, headers={"content-type": "application/json"}
        )
        assert_problem(answer, 422, "invalid-request", "body owner")


@without_a_database
async def test_the_api_answers_an_unknown_path_or_method_with_a_problem(
    api: httpx.AsyncClient,
) -> None:
    assert_problem(await api.get("/nowhere"), 404, "about:blank")
    wrong_method = await api.get("/transfers")
    assert_problem(wrong_method, 405, "about:blank")
    assert wrong_method.headers["allow"] == "POST"


async def test_the_api_books_two_hundred_concurrent_transfers(
    api: httpx.AsyncClient, container: Container
) -> None:
    numbers = await opened(api, *map(str, range(20)))

    async with AsyncExitStack() as stack:
        clients = [
            httpx.AsyncClient(base_url=api.base_url, timeout=30, verify=False) for _ in range(20)
        ]
        for client in clients:
            await stack.enter_async_context(client)
        answers = await asyncio.gather(
            *(
                transfer(
                    clients[n % 20],
                    numbers[n % 20],
                    numbers[(n + 1 + n // 20) % 20],
                    "0.50",
                    f"{n}",
                )
                for n in range(200)
            )
        )

    assert [answer.status_code for answer in answers] == [201] * 200
    assert len({answer.json()["id"] for answer in answers}) == 200
    assert checked_out(container.db.sessionmanager()) == 0
    audit = await container.accounts().audit()
    assert audit.is_balanced
    assert audit.transfers == 200


async def test_the_health_routes_report_on_the_process_and_the_database(
    api: httpx.AsyncClient,
) -> None:
    live, ready = await api.get("/health/live"), await api.get("/health/ready")

    assert (live.status_code, live.json()) == (200, {"status": "live"})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


async def test_the_page_of_the_databases_is_shown_with_its_json(api: httpx.AsyncClient) -> None:
    page = await api.get("/status", follow_redirects=True)
    status = await api.get("/status/status.json")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "committed" in page.text
    assert status.json()["databases"]["db"]["is_open"]


async def test_a_full_pool_is_answered_with_a_problem_and_the_process_stays_live(
    database_url: str,
) -> None:
    container = not_open(database_url, timeout=0.1)
    async with served(container) as api, AsyncExitStack() as held:
        alice, bob = await opened(api, "Alice", "Bob")
        manager = container.db.sessionmanager()
        for _ in range(5):
            session = await held.enter_async_context(manager.session())
            await session.execute(text("SELECT 1"))

        assert_problem(
            await transfer(api, alice, bob, "1.00", "rent"), 503, "unavailable", "Nothing was done"
        )
        assert (await api.get("/health/live")).status_code == 200
        await held.aclose()
        assert (await transfer(api, alice, bob, "1.00", "rent")).status_code == 201


class Failing:
    """A service that raises this error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def transfer(self, *_order: object) -> None:
        raise self.error


@without_a_database
async def test_the_api_answers_any_error_with_a_problem_without_internals(
    api: httpx.AsyncClient, container: Container, subtests: pytest.Subtests
) -> None:
    driver = Exception("password=secret")
    failures: list[tuple[Exception, int, str, str]] = [
        (Busy(1, 2), 503, "busy", "send it again"),
        (CommitOutcomeUnknownError("secret"), 503, "outcome-unknown", "same Idempotency-Key"),
        (NotInitializedError("secret"), 503, "unavailable", "Nothing was done"),
        (OperationalError("secret", {}, driver), 503, "unavailable", "Nothing was done"),
        (InterfaceError("secret", {}, driver), 503, "unavailable", "Nothing was done"),
        (
            DBAPIError("secret", {}, driver, connection_invalidated=True),
            503,
            "unavailable",
            "Nothing was done",
        ),
        (PoolTimeout("secret"), 503, "unavailable", "Nothing was done"),
        (ConnectionRefusedError("secret"), 503, "unavailable", "Nothing was done"),
        (CannotConnectNowError("secret"), 503, "unavailable", "Nothing was done"),
        (DBAPIError("secret", {}, driver), 500, "about:blank", "fault of the service"),
        (RuntimeError("secret"), 500, "about:blank", "fault of the service"),
    ]
    for error, status, type, says in failures:
        with (
            subtests.test(error=repr(error)),
            container.transfers.override(providers.Object(Failing(error))),
        ):
            assert_problem(await transfer(api, 1, 2, "1.00", "rent"), status, type, says)


@without_a_database
async def test_openapi_describes_the_problems_and_no_service(api: httpx.AsyncClient) -> None:
    description = (await api.get("/openapi.json")).json()

    operations = {
        f"{method} {path}": operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    assert {name: sorted(operation["responses"]) for name, operation in operations.items()} == {
        "post /accounts": ["201", "422", "500", "503"],
        "get /accounts/{account}/balance": ["200", "404", "422", "500", "503"],
        "get /accounts/{account}/statement": ["200", "404", "422", "500", "503"],
        "post /transfers": ["201", "404", "409", "422", "500", "503"],
    }
    for operation in operations.values():
        for status, answer in operation["responses"].items():
            assert list(answer["content"]) == [
                "application/problem+json" if status > "4" else "application/json"
            ]
    parameters = {
        parameter["name"] for op in operations.values() for parameter in op.get("parameters", [])
    }
    assert parameters == {"account", "before", "limit", "idempotency-key"}
    assert description["components"]["schemas"].keys() == {
        "Balance", "BookedTransfer", "NewAccount", "NewTransfer", "OpenedAccount", "Statement",
    }  # fmt: skip


class TestOnAServer(OnPostgres):
    async def test_a_transfer_whose_outcome_is_unknown_is_booked_once_when_sent_again(
        self, postgres: Postgres, database_url: str
    ) -> None:
        network = FaultyNetwork()
        async with (
            network.open(postgres.host) as port,
            served(not_open(at_port(port, database_url))) as api,
        ):
            alice, bob = await opened(api, "Alice", "Bob")
            network.cuts_answer_to = b"COMMIT"
            unknown = await transfer(api, alice, bob, "10.00", "rent")
            network.cuts_answer_to = None
            again = await transfer(api, alice, bob, "10.00", "rent")

            assert_problem(unknown, 503, "outcome-unknown", "same Idempotency-Key", "booked once")
            assert again.status_code == 201
            assert [await balance(api, alice), await balance(api, bob)] == [90, 110]

    async def test_a_database_server_without_free_connections_is_answered_with_a_problem(
        self, postgres: Postgres, database_url: str
    ) -> None:
        for statement in (
            "CREATE ROLE poor LOGIN CONNECTION LIMIT 1",
            "GRANT ALL ON SCHEMA public TO poor",
        ):
            await postgres.execute(statement, database=DATABASE)
        try:
            async with served(not_open(database_url.replace("postgres@", "poor@"))) as api:
                await opened(api, "Alice")
                await postgres.execute("ALTER ROLE poor CONNECTION LIMIT 0")
                await postgres.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE usename = 'poor'"
                )
                assert_problem(
                    await api.get("/accounts/1/balance"), 503, "unavailable", "Nothing was done"
                )
                ready = await api.get("/health/ready")
                assert (ready.status_code, ready.json()) == (503, {"status": "not ready"})
        finally:
            for statement in ("DROP OWNED BY poor CASCADE", "DROP ROLE poor"):
                await postgres.execute(statement, database=DATABASE)
