"""Concurrent transfers on a pool of five: all end, and leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from ledger.container import Container
from ledger.errors import Busy, InsufficientFunds
from ledger.models import Account, Transfer
from ledger.services import RETRIES
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSessionManager, DatabaseSettings, Lifespan, PoolSettings
from tests.conftest import checked_out


async def test_two_hundred_concurrent_transfers_all_end_and_release_their_connections(
    container: Container,
) -> None:
    manager = container.db.sessionmanager()
    numbers = [
        (await container.accounts().open(f"{number}", Decimal("100.00"))).id for number in range(20)
    ]

    transfers = await asyncio.gather(
        *(
            container.transfers().transfer(
                numbers[n % 20], numbers[(n + 1 + n // 20) % 20], Decimal("0.50"), f"{n}"
            )
            for n in range(200)
        )
    )

    assert len({transfer.id for transfer in transfers}) == 200
    assert checked_out(manager) == 0
    audit = await container.accounts().audit()
    assert audit.is_balanced
    assert audit.transfers == 200
    if manager.engine.dialect.name == "postgresql":
        async with manager.connect() as connection:
            idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            assert await connection.scalar(text(f"{idle} AND datname = current_database()")) == 0


async def test_concurrent_transfers_in_opposite_directions_never_deadlock(
    container: Container, alice: Account, bob: Account
) -> None:
    await asyncio.gather(
        *(
            container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), f"there-{n}")
            for n in range(20)
        ),
        *(
            container.transfers().transfer(bob.id, alice.id, Decimal("1.00"), f"back-{n}")
            for n in range(20)
        ),
    )

    assert await container.accounts().balance(alice.id) == Decimal("100.00")
    assert await container.accounts().balance(bob.id) == Decimal("100.00")


async def test_concurrent_transfers_cannot_spend_money_twice(
    container: Container, alice: Account, bob: Account
) -> None:
    answers = await asyncio.gather(
        *(
            container.transfers().transfer(alice.id, bob.id, Decimal("30.00"), f"{n}")
            for n in range(20)
        ),
        return_exceptions=True,
    )

    assert sum(isinstance(answer, Transfer) for answer in answers) == 3
    assert sum(isinstance(answer, InsufficientFunds) for answer in answers) == 17
    assert await container.accounts().balance(alice.id) == Decimal("10.00")


async def test_a_callers_retry_sees_an_account_that_changed_after_it_was_read(
    committed: Container, backend: str
) -> None:
    """On SQLite no other writer can come between."""
    container = committed
    alice, bob = [
        await container.accounts().open(name, Decimal("100.00")) for name in ("Alice", "Bob")
    ]
    attempts: list[Decimal] = []

    async def spend_half() -> None:
        attempts.append(await container.accounts().balance(alice.id))
        if backend == "postgresql" and len(attempts) == 1:
            async with container.db.sessionmanager().connect() as other:
                await other.execute(
                    text("UPDATE account SET opening = 5000, balance = 5000 WHERE owner = 'Alice'")
                )
        await container.transfers().transfer(alice.id, bob.id, attempts[-1] / 2, "half")

    await container.db.transaction().run(spend_half, isolation="SERIALIZABLE", retries=1)

    assert attempts == ([100, 50] if backend == "postgresql" else [100])
    assert await container.accounts().balance(alice.id) == attempts[-1] / 2
    assert (await container.accounts().audit()).is_balanced


TRIGGER = (
    "CREATE FUNCTION raise_conflict() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN RAISE EXCEPTION 'somebody was faster' USING ERRCODE = 'serialization_failure'; END$$",
    "CREATE TRIGGER conflict BEFORE UPDATE ON account "
    "FOR EACH ROW EXECUTE FUNCTION raise_conflict()",
)


@asynccontextmanager
async def conflicting_writer(manager: DatabaseSessionManager) -> AsyncIterator[None]:
    """Make each transfer conflict: a write lock on SQLite, a trigger on PostgreSQL."""
    if manager.engine.dialect.name == "sqlite":
        async with manager.connect():
            yield
        return
    async with manager.connect() as connection:
        for statement in TRIGGER:
            await connection.execute(text(statement))
    yield
    async with manager.connect() as connection:
        await connection.execute(text("DROP TRIGGER conflict ON account"))


@pytest.mark.several_connections("another transaction conflicts")
async def test_a_transfer_that_conflicts_at_every_attempt_is_refused_as_busy(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sessionwire._core.retry.MAX_BACKOFF", 0.001)
    caplog.set_level(logging.INFO, "sessionwire.retry")
    database = DatabaseSettings(url=database_url, pool=PoolSettings(timeout=0.05))
    async with Lifespan(Container(settings=LedgerSettings(database=database))) as container:
        manager = container.db.sessionmanager()
        async with manager.connect() as connection:
            await manager.create_all(connection)
        alice, bob = [
            await container.accounts().open(name, Decimal("100.00")) for name in ("Alice", "Bob")
        ]

        async with conflicting_writer(manager):
            with pytest.raises(
                Busy, match=f"accounts {alice.id} and {bob.id}: nothing was booked"
            ) as refused:
                await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "rent")

        assert isinstance(refused.value.__cause__, DBAPIError)
        assert len(caplog.records) == RETRIES
        audit = await container.accounts().audit()
        assert audit.is_balanced
        assert audit.transfers == 0
        await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "rent")


async def test_a_cancelled_transfer_moves_nothing_and_releases_its_connection(
    container: Container, alice: Account, bob: Account
) -> None:
    manager, transaction = container.db.sessionmanager(), container.db.transaction()
    async with transaction(isolation="SERIALIZABLE"):
        await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "first")
        second = container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "second")
        # It waits for the locks that this transaction holds.
        waiting = asyncio.create_task(transaction.detached(second))
        while checked_out(manager) < 2:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    assert waiting.cancelled()
    assert [transfer.key for transfer in await container.accounts().statement(alice.id)] == [
        "first"
    ]
    assert checked_out(manager) == 0
