"""Many at once, over a pool of five: all end correctly, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextvars
from decimal import Decimal

from sqlalchemy import text

from ledger.container import Container
from ledger.errors import InsufficientFunds
from ledger.models import Account, Transfer
from tests.conftest import checked_out


async def test_two_hundred_at_once_all_end_and_give_their_connection_back(container: Container) -> None:
    manager = container.db.sessionmanager()
    numbers = [(await container.accounts().open(f"{number}", Decimal("100.00"))).id for number in range(6)]

    transfers = await asyncio.gather(
        *(
            container.transfers().transfer(numbers[n % 6], numbers[(n + 1 + n // 6 % 5) % 6], Decimal("0.50"), f"{n}")
            for n in range(200)
        )
    )

    assert len({transfer.id for transfer in transfers}) == 200
    assert checked_out(manager) == 0
    audit = await container.accounts().audit()
    assert audit.agree
    assert audit.transfers == 200
    if manager.engine.dialect.name == "postgresql":
        async with manager.connect() as connection:
            idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            assert await connection.scalar(text(f"{idle} AND datname = current_database()")) == 0


async def test_opposite_directions_wait_for_each_other_and_never_deadlock(
    container: Container, alice: Account, bob: Account
) -> None:
    await asyncio.gather(
        *(container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), f"there-{n}") for n in range(50)),
        *(container.transfers().transfer(bob.id, alice.id, Decimal("1.00"), f"back-{n}") for n in range(50)),
    )

    assert await container.accounts().balance(alice.id) == Decimal("100.00")
    assert await container.accounts().balance(bob.id) == Decimal("100.00")


async def test_money_that_is_there_once_is_spent_once(container: Container, alice: Account, bob: Account) -> None:
    answers = await asyncio.gather(
        *(container.transfers().transfer(alice.id, bob.id, Decimal("30.00"), f"{n}") for n in range(20)),
        return_exceptions=True,
    )

    assert sum(isinstance(answer, Transfer) for answer in answers) == 3
    assert sum(isinstance(answer, InsufficientFunds) for answer in answers) == 17
    assert await container.accounts().balance(alice.id) == Decimal("10.00")


async def test_an_account_read_before_in_the_same_transaction_is_booked_on_as_it_is_now(
    container: Container, alice: Account, bob: Account
) -> None:
    """Where the isolation level lets somebody else come between; on SQLite nobody does."""
    manager = container.db.sessionmanager()
    async with container.db.transaction()():
        assert await container.accounts().balance(alice.id) == Decimal("100.00")
        if manager.engine.dialect.name == "postgresql":
            async with manager.connect() as other:
                await other.execute(text("UPDATE account SET opening = 4000, balance = 4000 WHERE owner = 'Alice'"))
        await container.transfers().transfer(alice.id, bob.id, Decimal("10.00"), "rent")

    assert (await container.accounts().audit()).agree


async def test_a_cancelled_transfer_moves_nothing_and_gives_its_connection_back(
    container: Container, alice: Account, bob: Account
) -> None:
    manager = container.db.sessionmanager()
    async with container.db.transaction()():
        await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "first")
        elsewhere = (
            contextvars.Context()
        )  # where this transaction isn't open; it waits for the locks that are held here
        second = container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "second")
        waiting = asyncio.get_running_loop().create_task(second, context=elsewhere)
        while checked_out(manager) < 2:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    assert waiting.cancelled()
    assert [transfer.key for transfer in await container.accounts().statement(alice.id)] == ["first"]
    assert checked_out(manager) == 0
