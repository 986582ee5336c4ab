"""The idempotency key: repeated and concurrent calls with one key book one transfer."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from ledger.container import Container
from ledger.errors import IdempotencyConflict, InsufficientFunds
from ledger.models import Account, Transfer


async def test_a_transfer_sent_twice_is_booked_once(
    container: Container, alice: Account, bob: Account
) -> None:
    first = await container.transfers().transfer(alice.id, bob.id, Decimal("10.00"), "rent")
    again = await container.transfers().transfer(alice.id, bob.id, Decimal("10"), "rent")

    assert again.id == first.id
    assert again.booked_at == first.booked_at
    assert await container.accounts().balance(alice.id) == Decimal("90.00")


async def test_a_repeated_transfer_gets_the_first_answer_even_if_the_money_is_gone(
    container: Container, alice: Account, bob: Account
) -> None:
    first = await container.transfers().transfer(alice.id, bob.id, Decimal("100.00"), "all")
    again = await container.transfers().transfer(alice.id, bob.id, Decimal("100.00"), "all")

    assert again.id == first.id


async def test_an_idempotency_key_used_for_another_transfer_is_a_conflict(
    container: Container, alice: Account, bob: Account
) -> None:
    await container.transfers().transfer(alice.id, bob.id, Decimal("10.00"), "rent")

    for source, target, amount in [(alice, bob, "10.01"), (bob, alice, "10.00")]:
        with pytest.raises(IdempotencyConflict, match="'rent' belongs to another transfer"):
            await container.transfers().transfer(source.id, target.id, Decimal(amount), "rent")

    assert (await container.accounts().audit()).transfers == 1


async def test_a_refused_transfer_leaves_its_idempotency_key_free(
    container: Container, alice: Account, bob: Account
) -> None:
    with pytest.raises(InsufficientFunds):
        await container.transfers().transfer(alice.id, bob.id, Decimal("150.00"), "car")
    await container.transfers().transfer(bob.id, alice.id, Decimal("50.00"), "loan")

    await container.transfers().transfer(alice.id, bob.id, Decimal("150.00"), "car")

    assert await container.accounts().balance(bob.id) == Decimal("200.00")


async def test_twenty_concurrent_transfers_with_one_key_book_one(
    container: Container, alice: Account, bob: Account
) -> None:
    transfers = await asyncio.gather(
        *(
            container.transfers().transfer(alice.id, bob.id, Decimal("10.00"), "rent")
            for _ in range(20)
        )
    )

    assert len({transfer.id for transfer in transfers}) == 1
    assert await container.accounts().balance(alice.id) == Decimal("90.00")
    assert (await container.accounts().audit()).is_balanced


async def test_of_concurrent_transfers_between_different_accounts_one_gets_the_key(
    container: Container,
) -> None:
    accounts = [
        await container.accounts().open(f"{number}", Decimal("10.00")) for number in range(20)
    ]
    pairs = list(zip(accounts[::2], accounts[1::2], strict=True))

    answers = await asyncio.gather(
        *(
            container.transfers().transfer(payer.id, payee.id, Decimal("1.00"), "one key")
            for payer, payee in pairs
        ),
        return_exceptions=True,
    )

    assert sum(isinstance(answer, Transfer) for answer in answers) == 1
    assert sum(isinstance(answer, IdempotencyConflict) for answer in answers) == 9
    audit = await container.accounts().audit()
    assert audit.is_balanced
    assert audit.transfers == 1
