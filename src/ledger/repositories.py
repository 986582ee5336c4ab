"""Queries, one repository per table.

Repositories use the injected session and never commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import func, select, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from .models import Account, Transfer


@dataclass(frozen=True)
class Audit:
    """The totals of all tables at one moment."""

    accounts: int
    transfers: int
    opening: Decimal
    balance: Decimal
    mismatched_accounts: int
    """Accounts whose balance is not their opening balance plus all transfers."""

    @property
    def is_balanced(self) -> bool:
        return self.balance == self.opening and not self.mismatched_accounts


class AccountRepository:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, account: Account) -> Account:
        self.session.add(account)
        await self.session.flush()
        return account

    async def find(self, account_id: int) -> Account | None:
        return await self.session.get(Account, account_id)

    async def lock(self, *account_ids: int) -> dict[int, Account]:
        """Return the accounts that exist, locked until this transaction ends.

        The locks are taken in the order of the account numbers, so two transfers in
        opposite directions can't deadlock. It is the lock of an UPDATE, which does not
        block inserts that refer to the account by a foreign key.
        """
        statement = (
            select(Account)
            .where(Account.id.in_(account_ids))
            .order_by(Account.id)
            .with_for_update(key_share=True)
        )
        return {account.id: account for account in await self.session.scalars(statement)}

    async def audit(self) -> Audit:
        """Compute the totals in one statement: at any isolation level it sees one moment."""
        entries = union_all(
            select(Account.id.label("account_id"), Account.opening.label("amount")),
            select(Transfer.target_id, Transfer.amount),
            select(Transfer.source_id, -Transfer.amount),
        ).subquery()
        expected = (
            select(entries.c.account_id, func.sum(entries.c.amount).label("amount"))
            .group_by(entries.c.account_id)
            .subquery()
        )
        statement = select(
            func.count(),
            select(func.count()).select_from(Transfer).scalar_subquery(),
            func.sum(Account.opening),
            func.sum(Account.balance),
            func.count().filter(Account.balance != expected.c.amount),
        ).join_from(Account, expected, expected.c.account_id == Account.id)
        accounts, transfers, opening, balance, mismatched = (
            await self.session.execute(statement)
        ).one()
        return Audit(
            accounts, transfers, opening or Decimal("0.00"), balance or Decimal("0.00"), mismatched
        )


class TransferRepository:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, transfer: Transfer) -> Transfer:
        """Add a transfer. Raises SQLAlchemy's `IntegrityError` if the key is taken."""
        self.session.add(transfer)
        await self.session.flush()
        return transfer

    async def find_by_key(self, key: str) -> Transfer | None:
        return await self.session.scalar(select(Transfer).where(Transfer.key == key))

    async def list_for_account(
        self, account_id: int, *, before: int | None, limit: int
    ) -> Sequence[Transfer]:
        """Return one page, the newest transfer first.

        Args:
            before: the number of the last transfer on the previous page.
        """
        statement = (
            select(Transfer)
            .where((Transfer.source_id == account_id) | (Transfer.target_id == account_id))
            .order_by(Transfer.id.desc())
            .limit(limit)
        )
        if before is not None:
            statement = statement.where(Transfer.id < before)
        return (await self.session.scalars(statement)).all()
