"""Accounts: open and read them; and the constraints of the database."""

from __future__ import annotations

from decimal import Decimal

import pytest
from dependency_injector import providers
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from ledger.container import Container
from ledger.errors import InvalidAmount, UnknownAccount
from ledger.models import MAX_AMOUNT, Account
from ledger.repositories import AccountRepository, Audit
from sessionwire import IncompatibleTransactionError


async def test_an_account_starts_with_its_opening_balance(
    container: Container, alice: Account
) -> None:
    assert (alice.owner, alice.opening, alice.balance) == (
        "Alice",
        Decimal("100.00"),
        Decimal("100.00"),
    )
    assert await container.accounts().balance(alice.id) == Decimal("100.00")


async def test_an_amount_is_stored_exactly_and_returned_with_two_digits(
    container: Container,
) -> None:
    for amount in ["0", "0.01", "0.1", "100", "1E+3", "123456789.99", str(MAX_AMOUNT)]:
        account = await container.accounts().open("Alice", Decimal(amount))
        assert str(await container.accounts().balance(account.id)) == f"{Decimal(amount):.2f}"


async def test_an_invalid_opening_balance_is_refused(
    container: Container, subtests: pytest.Subtests
) -> None:
    for amount in [
        "-0.01",
        "0.001",
        "NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "1E+30",
        "1000000000000",
    ]:
        with subtests.test(amount), pytest.raises(InvalidAmount):
            await container.accounts().open("Alice", Decimal(amount))

    assert (await container.accounts().audit()).accounts == 0


async def test_an_unknown_account_has_neither_balance_nor_statement(container: Container) -> None:
    with pytest.raises(UnknownAccount, match="there is no account 7"):
        await container.accounts().balance(7)
    with pytest.raises(UnknownAccount, match="there is no account 7"):
        await container.accounts().statement(7)


async def test_a_statement_comes_in_pages_the_newest_first(
    container: Container, alice: Account, bob: Account
) -> None:
    carol = await container.accounts().open("Carol", Decimal("100.00"))
    for number in range(3):
        await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), f"out-{number}")
        await container.transfers().transfer(carol.id, alice.id, Decimal("2.00"), f"in-{number}")
        await container.transfers().transfer(
            bob.id, carol.id, Decimal("3.00"), f"elsewhere-{number}"
        )

    first = await container.accounts().statement(alice.id, limit=4)
    second = await container.accounts().statement(alice.id, before=first[-1].id, limit=4)

    assert [transfer.key for transfer in first] == ["in-2", "out-2", "in-1", "out-1"]
    assert [transfer.key for transfer in second] == ["in-0", "out-0"]
    assert all(transfer.booked_at.utcoffset() is not None for transfer in first)


async def test_the_audit_of_an_empty_ledger_is_balanced(container: Container) -> None:
    audit = await container.accounts().audit()

    assert audit.is_balanced
    assert (audit.accounts, audit.transfers) == (0, 0)
    assert audit.opening == audit.balance == 0


async def test_the_audit_finds_money_that_no_transfer_accounts_for(
    container: Container, alice: Account, bob: Account
) -> None:
    await container.transfers().transfer(alice.id, bob.id, Decimal("30.00"), "rent")
    assert (await container.accounts().audit()).is_balanced

    # The sum of all balances stays the same.
    async with container.db.sessionmanager().connect() as connection:
        await connection.execute(
            text("UPDATE account SET balance = balance + 500 WHERE owner = 'Alice'")
        )
        await connection.execute(
            text("UPDATE account SET balance = balance - 500 WHERE owner = 'Bob'")
        )

    audit = await container.accounts().audit()
    assert not audit.is_balanced
    assert audit.mismatched_accounts == 2
    assert audit.balance == audit.opening == Decimal("200.00")


async def test_database_constraints_refuse_inconsistent_rows(
    container: Container, alice: Account, bob: Account, subtests: pytest.Subtests
) -> None:
    await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "rent")
    book = "INSERT INTO transfer (key, source_id, target_id, amount, booked_at) VALUES"

    for statement in [
        f"UPDATE account SET balance = -1 WHERE id = {alice.id}",
        f"UPDATE account SET opening = -1 WHERE id = {alice.id}",
        f"DELETE FROM account WHERE id = {alice.id}",
        f"{book} ('nothing', {alice.id}, {bob.id}, 0, CURRENT_TIMESTAMP)",
        f"{book} ('to itself', {alice.id}, {alice.id}, 5, CURRENT_TIMESTAMP)",
        f"{book} ('to nobody', {alice.id}, 99, 5, CURRENT_TIMESTAMP)",
        f"{book} ('rent', {alice.id}, {bob.id}, 5, CURRENT_TIMESTAMP)",
    ]:
        with subtests.test(statement), pytest.raises(IntegrityError):
            async with container.db.sessionmanager().connect() as connection:
                await connection.execute(text(statement))


class WritesWhereItReads(AccountRepository):
    async def find(self, account_id: int) -> Account | None:
        await self.session.execute(update(Account).values(balance=Decimal(0)))
        return await super().find(account_id)

    async def audit(self) -> Audit:
        await self.session.execute(update(Account).values(balance=Decimal(0)))
        return await super().audit()


async def test_a_read_only_service_method_cannot_write(
    container: Container, alice: Account, subtests: pytest.Subtests
) -> None:
    writing = providers.Factory(WritesWhereItReads, session=container.db.session)
    with container.account_repository.override(writing):
        accounts = container.accounts()
    calls = {
        "balance": lambda: accounts.balance(alice.id),
        "statement": lambda: accounts.statement(alice.id),
        "audit": accounts.audit,
    }

    for name, call in calls.items():
        with subtests.test(name), pytest.raises(DBAPIError, match=r"read-?only"):
            await call()

    assert await container.accounts().balance(alice.id) == Decimal("100.00")


async def test_a_transfer_inside_a_read_only_transaction_is_refused(
    container: Container, alice: Account, bob: Account
) -> None:
    async with container.db.transaction()(read_only=True):
        with pytest.raises(IncompatibleTransactionError, match="make the outer call transactional"):
            await container.transfers().transfer(alice.id, bob.id, Decimal("1.00"), "rent")

    assert (await container.accounts().audit()).transfers == 0
