"""What is asked of the books, one class per table. Each holds the session that it was given, and ends nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import func, select, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from .models import Account, Transfer


@dataclass(frozen=True)
class Audit:
    """The whole books at one moment."""

    accounts: int
    transfers: int
    opening: Decimal
    balance: Decimal
    wrong: int
    """Accounts whose balance is not their opening plus what came in minus what went out."""

    @property
    def agree(self) -> bool:
        return self.balance == self.opening and not self.wrong


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
        """Those that exist, as they are now, and nobody else changes them before this transaction ends.

        Always in the order of their numbers, so that two transfers in opposite directions can't wait for each other.
        The lock is the one that an UPDATE takes: it leaves alone who only refers to the account by a foreign key.
        """
        statement = (
            select(Account).where(Account.id.in_(account_ids)).order_by(Account.id).with_for_update(key_share=True)
        )
        return {account.id: account for account in await self.session.scalars(statement)}

    async def audit(self) -> Audit:
        """One statement, so that it sees one moment of the books whatever the isolation level."""
        entries = union_all(
            select(Account.id.label("account_id"), Account.opening.label("amount")),
            select(Transfer.target_id, Transfer.amount),
            select(Transfer.source_id, -Transfer.amount),
        ).subquery()
        due = (
            select(entries.c.account_id, func.sum(entries.c.amount).label("amount"))
            .group_by(entries.c.account_id)
            .subquery()
        )
        statement = select(
            func.count(),
            select(func.count()).select_from(Transfer).scalar_subquery(),
            func.sum(Account.opening),
            func.sum(Account.balance),
            func.count().filter(Account.balance != due.c.amount),
        ).join_from(Account, due, due.c.account_id == Account.id)
        accounts, transfers, opening, balance, wrong = (await self.session.execute(statement)).one()
        return Audit(accounts, transfers, opening or Decimal("0.00"), balance or Decimal("0.00"), wrong)


class TransferRepository:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, transfer: Transfer) -> Transfer:
        """Raises SQLAlchemy's `IntegrityError` where the key is taken."""
        self.session.add(transfer)
        await self.session.flush()
        return transfer

    async def find(self, key: str) -> Transfer | None:
        return await self.session.scalar(select(Transfer).where(Transfer.key == key))

    async def touching(self, account_id: int, *, before: int | None, limit: int) -> Sequence[Transfer]:
        """The newest first; `before` is the number of the last one on the page before this."""
        statement = (
            select(Transfer)
            .where((Transfer.source_id == account_id) | (Transfer.target_id == account_id))
            .order_by(Transfer.id.desc())
            .limit(limit)
        )
        if before is not None:
            statement = statement.where(Transfer.id < before)
        return (await self.session.scalars(statement)).all()
