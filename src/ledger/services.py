"""The services of the ledger. Each public method is one transaction."""

from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import TransactionManager, is_retryable, read_only, transactional

from .errors import (
    Busy,
    IdempotencyConflict,
    InsufficientFunds,
    InvalidAmount,
    InvalidTransfer,
    UnknownAccount,
)
from .models import CENT, MAX_AMOUNT, MAX_KEY_LENGTH, Account, Transfer
from .repositories import AccountRepository, Audit, TransferRepository

# How often a transfer is retried after a conflict, each time after a pause. Many
# concurrent callers at one account need that many.
RETRIES = 40


def normalize_amount(amount: Decimal) -> Decimal:
    """Return the amount with two digits after the point. Raises `InvalidAmount`."""
    if not amount.is_finite() or abs(amount) > MAX_AMOUNT:
        raise InvalidAmount(f"{amount} is not an amount between 0 and {MAX_AMOUNT}")
    cents = amount.quantize(CENT)
    if cents != amount:
        raise InvalidAmount(f"{amount} has more than two digits after the point")
    return cents + 0  # turns -0 into 0


class AccountService:
    def __init__(
        self,
        accounts: AccountRepository,
        transfers: TransferRepository,
        transaction: TransactionManager,
    ) -> None:
        self.accounts = accounts
        self.transfers = transfers
        self.transaction = transaction

    @transactional
    async def open(self, owner: str, opening: Decimal) -> Account:
        """Open an account. Raises `InvalidAmount`."""
        opening = normalize_amount(opening)
        if opening < 0:
            raise InvalidAmount(f"an account can't be opened with {opening}")
        return await self.accounts.add(Account(owner=owner, opening=opening, balance=opening))

    @read_only
    async def balance(self, account_id: int) -> Decimal:
        """Return the balance of an account. Raises `UnknownAccount`."""
        return (await self._require_account(account_id)).balance

    @read_only
    async def statement(
        self, account_id: int, *, before: int | None = None, limit: int = 50
    ) -> Sequence[Transfer]:
        """Return one page of transfers, the newest first. Raises `UnknownAccount`.

        Args:
            before: the number of the last transfer on the previous page.
        """
        await self._require_account(account_id)
        return await self.transfers.list_for_account(account_id, before=before, limit=limit)

    @read_only
    async def audit(self) -> Audit:
        """Compare all balances with all transfers."""
        return await self.accounts.audit()

    async def _require_account(self, account_id: int) -> Account:
        account = await self.accounts.find(account_id)
        if account is None:
            raise UnknownAccount(account_id)
        return account


class TransferService:
    def __init__(
        self,
        accounts: AccountRepository,
        transfers: TransferRepository,
        transaction: TransactionManager,
    ) -> None:
        self.accounts = accounts
        self.transfers = transfers
        self.transaction = transaction

    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        """Move money, once per key. A repeated call returns the transfer of the first.

        Raises any `LedgerError`.
        """
        amount = normalize_amount(amount)
        if amount <= 0:
            raise InvalidAmount(f"{amount} is nothing to transfer")
        if source == target:
            raise InvalidTransfer(f"account {source} can't pay itself")
        if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isprintable():
            raise InvalidTransfer(
                f"an idempotency key is 1 to {MAX_KEY_LENGTH} printable characters"
            )

        try:
            return await self._book(source, target, amount, key)
        except DBAPIError as error:
            # Only the caller can retry the caller's transaction, and a lost connection
            # is no conflict.
            if self.transaction.active or error.connection_invalidated or not is_retryable(error):
                raise
            raise Busy(source, target) from error

    @transactional(isolation="SERIALIZABLE", retries=RETRIES)
    async def _book(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        # The lock comes before the query for the key. If a call is repeated while the
        # first one runs, it waits here, fails with a conflict, and its retry finds the
        # booked transfer.
        locked = await self.accounts.lock(source, target)
        booked = await self.transfers.find_by_key(key)
        if booked is not None:
            if (booked.source_id, booked.target_id, booked.amount) != (source, target, amount):
                raise IdempotencyConflict(key)
            return booked

        for number in (source, target):
            if number not in locked:
                raise UnknownAccount(number)
        payer, payee = locked[source], locked[target]
        if payer.balance < amount:
            raise InsufficientFunds(source, payer.balance, amount)

        payer.balance -= amount
        payee.balance += amount
        try:
            return await self.transfers.add(
                Transfer(key=key, source_id=source, target_id=target, amount=amount)
            )
        except IntegrityError as error:
            # Accounts and balances were checked under their locks, so the key is taken.
            # A transfer between two other accounts, which our locks do not block, took
            # it after our query.
            raise IdempotencyConflict(key) from error
