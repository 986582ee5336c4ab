"""`python -m ledger serve`: start, end, and a database that goes away."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, text

from ledger.container import Container
from ledger.models import Account, Transfer
from sessionwire.embedded import EmbeddedServer
from tests.postgres import until

from .conftest import Finished, Ledger, assert_explained


@pytest.fixture
def container(committed: Container) -> Container:
    return committed


class Service:
    """The running process with a client."""

    def __init__(self, process: subprocess.Popen[str], client: httpx.AsyncClient) -> None:
        self.process = process
        self.client = client

    async def refuses_connections(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(
                self.client.base_url.host, self.client.base_url.port
            )
        except ConnectionRefusedError:
            return True
        except OSError:  # the server ended while the connection waited for it
            return False
        writer.close()
        return False

    async def stop(self, number: int = signal.SIGTERM) -> Finished:
        self.process.send_signal(number)
        return await self.finish()

    async def finish(self) -> Finished:
        return await asyncio.to_thread(Ledger.finish, self.process)


async def transfer(
    client: httpx.AsyncClient, source: Account, target: Account, key: str
) -> httpx.Response:
    order = {"source": source.id, "target": target.id, "amount": "0.01"}
    return await client.post("/transfers", json=order, headers={"Idempotency-Key": key})


@asynccontextmanager
async def serving(
    ledger: Ledger, *python: str, options: tuple[str, ...] = ()
) -> AsyncIterator[Service]:
    process = ledger.start("serve", "--port", "0", *options, python=python)
    assert process.stdout is not None
    said = await asyncio.to_thread(process.stdout.readline)
    address = re.fullmatch(r"ledger: (http://127\.0\.0\.1:\d+)\n", said)
    assert address, said or process.communicate()
    async with httpx.AsyncClient(base_url=address[1], timeout=30, verify=False) as client:
        yield Service(process, client)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_server_answers_until_an_interrupt_ends_it_quietly(
    ledger: Ledger, database_url: str
) -> None:
    async with serving(ledger.on(database_url), "-W", "error") as service:
        assert (await service.client.get("/health/live")).status_code == 200
        assert (await service.client.get("/health/ready")).status_code == 200
        # The client keeps its connection open, which must not delay the end.
        finished = await asyncio.wait_for(service.stop(signal.SIGINT), 5)

    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_server_that_is_stopped_while_it_starts_ends_at_once(
    ledger: Ledger, number: signal.Signals
) -> None:
    asked = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        process = ledger.on(f"postgresql://nobody@127.0.0.1:{port}/nothing?sslmode=disable").start(
            "serve", "--port", "0"
        )
        await asyncio.wait_for(asked.wait(), 30)
        process.send_signal(number)
        # The end must not wait for the connect_timeout of 10 seconds.
        finished = await asyncio.wait_for(asyncio.to_thread(ledger.finish, process), 5)

    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.long
async def test_a_server_stopped_under_load_has_booked_exactly_the_acknowledged_transfers(
    ledger: Ledger, container: Container, database_url: str
) -> None:
    accounts = [
        await container.accounts().open(f"{number}", Decimal("100.00")) for number in range(20)
    ]
    answers: dict[str, int | httpx.TransportError] = {}

    async def send(number: int, address: httpx.URL) -> None:
        """Send each transfer once; every second client opens a connection per call."""
        headers = {"Connection": "close"} if number % 2 else {}
        async with httpx.AsyncClient(
            base_url=address, timeout=30, verify=False, headers=headers
        ) as client:
            for call in count():
                key = f"{number}-{call}"
                try:
                    answer = await transfer(client, accounts[number], accounts[number - 1], key)
                    answers[key] = answer.status_code
                except httpx.ConnectError:
                    return  # the server has stopped listening
                except httpx.TransportError as closed:
                    answers[key] = closed

    async with serving(ledger.on(database_url)) as service:
        clients = [
            asyncio.create_task(send(number, service.client.base_url)) for number in range(20)
        ]
        while len(answers) < 60:
            await asyncio.sleep(0.01)
        finished = await service.stop()
        await asyncio.gather(*clients)

    assert finished.returncode == 0
    assert re.fullmatch(
        r"(stopping: waiting up to 10 s for \d+ open block\(s\)\n)?", finished.stderr
    )
    async with container.db.sessionmanager().session() as session:
        booked = list(await session.scalars(select(Transfer.key)))
    assert sorted(booked) == sorted(key for key, answer in answers.items() if answer == 201)
    assert len(booked) >= 60
    # A transfer that is not booked was not accepted: its connection was closed without
    # an answer.
    assert all(
        isinstance(answer, httpx.TransportError)
        for key, answer in answers.items()
        if key not in booked
    )
    assert (await container.accounts().audit()).is_balanced


@asynccontextmanager
async def all_accounts_locked(container: Container) -> AsyncIterator[None]:
    """Make all transfers wait: for the accounts, or on SQLite for the write lock."""
    async with container.db.sessionmanager().connect() as connection:
        await connection.execute(text("UPDATE account SET owner = owner"))
        yield


async def until_accepted(service: Service) -> None:
    """Wait until the earlier requests are accepted: the process has one thread."""
    for _ in range(3):
        await service.client.get("/health/live")


@pytest.mark.long
async def test_a_transfer_accepted_before_the_stop_signal_is_answered_after_it(
    ledger: Ledger, container: Container, alice: Account, bob: Account, database_url: str
) -> None:
    async with serving(ledger.on(database_url)) as service:
        async with all_accounts_locked(container):
            sent = asyncio.create_task(transfer(service.client, alice, bob, "rent"))
            await asyncio.sleep(0)
            await until_accepted(service)
            service.process.send_signal(signal.SIGTERM)
            await until(service.refuses_connections)
            assert not sent.done()
        answer = await sent
        finished = await service.finish()

    assert answer.status_code == 201
    assert answer.headers["connection"] == "close"
    assert finished.returncode == 0
    (waits,) = finished.stderr.splitlines()  # It waits for the transfer, and cuts off nothing.
    assert re.match(r"stopping: waiting up to \d+ s for 1 open block", waits)
    assert [booked.key for booked in await container.accounts().statement(alice.id)] == ["rent"]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["postgresql"])
async def test_a_request_longer_than_the_drain_timeout_is_cancelled_and_answered_with_a_problem(
    ledger: Ledger, container: Container, alice: Account, bob: Account, database_url: str
) -> None:
    ledger.environment["LEDGER_DATABASE__DRAIN_TIMEOUT"] = "0.2"
    async with serving(ledger.on(database_url)) as service, all_accounts_locked(container):
        sent = asyncio.create_task(transfer(service.client, alice, bob, "rent"))
        await asyncio.sleep(0)
        await until_accepted(service)
        finished = await service.stop()
        answer = await sent

    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
    waits, cuts_off, *_ = finished.stderr.splitlines()
    assert waits == "stopping: waiting up to 1 s for 1 open block(s)"
    assert re.match(r"stopping: cutting off a block, open for .*TransferService\._book,", cuts_off)
    assert re.search(r"now at repositories\.py:\d+ in AccountRepository\.lock", cuts_off)
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/outcome-unknown")
    assert "same Idempotency-Key" in answer.json()["detail"]
    assert await container.accounts().statement(alice.id) == []


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    # The server's user may not enter pytest's directories.
    directory = tempfile.mkdtemp(prefix="ledger-")
    with EmbeddedServer(Path(directory) / "data") as server:
        yield server
    shutil.rmtree(directory)


@pytest.mark.long
async def test_a_server_without_its_database_is_live_but_not_ready_and_recovers_by_itself(
    ledger: Ledger, own_server: EmbeddedServer
) -> None:
    host = own_server.socket_directory
    async with serving(ledger.on(f"postgresql://postgres:secret@/postgres?host={host}")) as service:
        account = {"owner": "Alice", "opening": "100.00"}
        opened = await service.client.post("/accounts", json=account)
        assert (await service.client.get("/health/ready")).status_code == 200

        await asyncio.to_thread(own_server.stop)
        ready = await service.client.get("/health/ready")
        away = [
            await service.client.get(opened.headers["location"]),
            await service.client.post("/accounts", json=account),
        ]
        live = await service.client.get("/health/live")
        await asyncio.to_thread(own_server.start)

        async def is_ready() -> bool:
            return (await service.client.get("/health/ready")).status_code == 200

        await until(is_ready)
        balance = await service.client.get(opened.headers["location"])
        finished = await service.stop()

    for answer in away:
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["content-type"] == "application/problem+json"
        assert host not in answer.text
    assert (ready.status_code, ready.json()) == (503, {"status": "not ready"})
    assert live.status_code == 200
    assert own_server.socket_directory == host
    assert balance.json()["balance"] == "100.00"
    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
    assert "secret" not in finished.stderr


def test_serve_explains_settings_that_cannot_work(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("database:\n  url: sqlite://\n  pol:\n    size: 5\n")

    assert_explained(
        ledger.run_here("serve", "--config", "my.yaml"),
        "database.pol (my.yaml)",
        "did you mean 'pool'?",
    )
    assert_explained(ledger.run_here("serve", "--secrets-dir", "nowhere"), "secrets_dir", "nowhere")
    assert_explained(
        ledger.run_here("serve", "--port", "70000"), "argument --port", "more than 65535"
    )


def test_serve_explains_an_unreachable_database_without_its_password(ledger: Ledger) -> None:
    finished = ledger.on("postgresql://someone:secret@127.0.0.1:9/ledger").run_here(
        "serve", "--port", "0"
    )

    assert_explained(finished, "'ledger'", "127.0.0.1:9", "user someone")
    assert "secret" not in finished.stderr


def test_serve_explains_an_address_that_it_cannot_listen_on(ledger: Ledger, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        finished = ledger.on(f"sqlite:///{tmp_path}/test.db").run_here("serve", "--port", port)

    assert_explained(finished, f"can't listen on 127.0.0.1:{port}: Address already in use")
    assert not (tmp_path / "test.db").exists()
    assert_explained(
        ledger.run_here("serve", "--host", "nowhere.invalid"),
        "can't listen on nowhere.invalid:8000",
    )
