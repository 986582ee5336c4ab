"""Transfers move money, and each refusal moves none."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ledger.container import Container
from ledger.errors import (
    InsufficientFunds,
    InvalidAmount,
    InvalidTransfer,
    LedgerError,
    UnknownAccount,
)
from ledger.models import MAX_AMOUNT, Account


async def test_a_transfer_moves_the_amount_and_no_more(
    container: Container, alice: Account, bob: Account
) -> None:
    transfer = await container.transfers().transfer(alice.id, bob.id, Decimal("12.3"), "rent")

    assert (transfer.source_id, transfer.target_id, transfer.key) == (alice.id, bob.id, "rent")
    assert str(transfer.amount) == "12.30"
    assert await container.accounts().balance(alice.id) == Decimal("87.70")
    assert await container.accounts().balance(bob.id) == Decimal("112.30")


async def test_a_transfer_can_spend_the_whole_balance(
    container: Container, alice: Account, bob: Account
) -> None:
    await container.transfers().transfer(alice.id, bob.id, Decimal("100.00"), "all")

    assert await container.accounts().balance(alice.id) == 0


async def test_a_refused_transfer_says_why_and_moves_nothing(
    container: Container, alice: Account, bob: Account, subtests: pytest.Subtests
) -> None:
    cases: list[tuple[int, int, str, str, type[LedgerError], str]] = [
        (
            alice.id,
            bob.id,
            "100.01",
            "k",
            InsufficientFunds,
            "holds 100.00, which does not cover 100.01",
        ),
        (alice.id, bob.id, str(MAX_AMOUNT), "k", InsufficientFunds, "does not cover"),
        (alice.id, 99, "1", "k", UnknownAccount, "there is no account 99"),
        (99, bob.id, "1", "k", UnknownAccount, "there is no account 99"),
        (alice.id, bob.id, "0", "k", InvalidAmount, "nothing to transfer"),
        (alice.id, bob.id, "-1", "k", InvalidAmount, "nothing to transfer"),
        (alice.id, bob.id, "1.001", "k", InvalidAmount, "more than two digits"),
        (alice.id, bob.id, "NaN", "k", InvalidAmount, "not an amount"),
        (alice.id, bob.id, "sNaN", "k", InvalidAmount, "not an amount"),
        (alice.id, bob.id, "Infinity", "k", InvalidAmount, "not an amount"),
        (alice.id, bob.id, "1E+40", "k", InvalidAmount, "not an amount"),
        (alice.id, alice.id, "1", "k", InvalidTransfer, "can't pay itself"),
        (alice.id, bob.id, "1", "", InvalidTransfer, "1 to 200 printable characters"),
        (alice.id, bob.id, "1", "k\0", InvalidTransfer, "1 to 200 printable characters"),
        (alice.id, bob.id, "1", "k" * 201, InvalidTransfer, "1 to 200 printable characters"),
    ]

    for source, target, amount, key, refusal, says in cases:
        with subtests.test(amount=amount, key=key), pytest.raises(refusal, match=says):
            await container.transfers().transfer(source, target, Decimal(amount), key)

    audit = await container.accounts().audit()
    assert audit.is_balanced
    assert audit.transfers == 0
    assert (
        await container.accounts().balance(alice.id)
        == await container.accounts().balance(bob.id)
        == 100
    )


async def test_two_transfers_in_one_transaction_are_booked_together_or_not_at_all(
    container: Container, alice: Account, bob: Account
) -> None:
    async def there_and_back(there: str, back: str) -> None:
        async with container.db.transaction()(isolation="SERIALIZABLE"):
            await container.transfers().transfer(alice.id, bob.id, Decimal(there), f"there {there}")
            await container.transfers().transfer(bob.id, alice.id, Decimal(back), f"back {back}")

    await there_and_back("10.00", "110.00")
    with pytest.raises(InsufficientFunds):
        await there_and_back("1.00", "1000.00")

    assert await container.accounts().balance(alice.id) == Decimal("200.00")
    assert (await container.accounts().audit()).transfers == 2
