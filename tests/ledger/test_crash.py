"""SIGKILL in the middle of a run: every acknowledged transfer is booked."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ledger.container import Container
from ledger.models import Account
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSettings, Lifespan

from .conftest import Ledger


@pytest.fixture
def container(committed: Container) -> Container:
    return committed


SENDER = """
import asyncio
from decimal import Decimal
from ledger.container import Container
from sessionwire import Lifespan

async def send_all():
    async with Lifespan(Container()) as container:
        async def send(sender):
            for number in range(100_000):
                key = f"{sender}-{number}"
                await container.transfers().transfer(1, 2, Decimal("0.01"), key)
                print(key, flush=True)
        await asyncio.gather(*map(send, range(10)))

asyncio.run(send_all())
"""


@pytest.mark.long
async def test_every_transfer_acknowledged_before_a_sigkill_is_booked_once(
    ledger: Ledger, container: Container, alice: Account, bob: Account, database_url: str
) -> None:
    assert (alice.id, bob.id) == (1, 2)  # the sender's accounts
    sender = ledger.on(database_url).start_python("-c", SENDER)
    assert sender.stdout is not None
    acknowledged = [sender.stdout.readline().strip() for _ in range(50)]
    sender.kill()
    acknowledged += sender.communicate()[0].split()

    booked = [
        transfer.key for transfer in await container.accounts().statement(alice.id, limit=100_000)
    ]

    assert set(acknowledged) <= set(booked)
    # One more of each sender may be booked.
    assert len(set(booked)) == len(booked) <= len(acknowledged) + 10
    assert (await container.accounts().audit()).is_balanced


@pytest.mark.long
async def test_a_demo_after_a_sigkill_finds_the_books_right(
    ledger: Ledger, container: Container, database_url: str
) -> None:
    killed = ledger.on(database_url).start("demo", "--transfers", "5000")
    await kill_in_the_middle(killed, container)

    again = await asyncio.to_thread(ledger.run_here, "demo", "--transfers", "20")

    assert_right_again(again)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory outside of pytest's, which the server's user may not enter."""
    with TemporaryDirectory(prefix="ledger-") as directory:
        yield Path(directory, "postgres")


@pytest.mark.long
async def test_a_demo_on_the_embedded_server_of_a_killed_one_finds_the_books_right(
    ledger: Ledger, directory: Path
) -> None:
    settings = LedgerSettings(database=DatabaseSettings(url=f"embedded:{directory}"))
    killed = ledger.on(str(settings.database.url)).start("demo", "--transfers", "5000")
    assert killed.stdout is not None
    while "Sending" not in await asyncio.to_thread(killed.stdout.readline):
        assert killed.poll() is None
    async with Lifespan(Container(settings=settings)) as container:
        await kill_in_the_middle(killed, container)

    again = await asyncio.to_thread(ledger.run, "demo", "--transfers", "20")

    assert_right_again(again)
    # The server ended with its last user.
    assert not (directory / "postmaster.pid").exists()


async def kill_in_the_middle(demo: subprocess.Popen[str], container: Container) -> None:
    while (await container.accounts().audit()).transfers < 20:
        assert demo.poll() is None
        await asyncio.sleep(0.05)
    demo.kill()
    demo.wait()


def assert_right_again(again: subprocess.CompletedProcess[str]) -> None:
    assert again.returncode == 0, again.stderr
    assert re.search(
        r"Earlier runs left 10 accounts and [\d,]+ transfers: the books are right.", again.stdout
    )
