"""What the ledger does for its callers: each public method is one transaction."""

from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import TransactionManager, is_retryable, read_only, transactional

from .errors import Busy, IdempotencyConflict, InsufficientFunds, InvalidAmount, InvalidTransfer, UnknownAccount
from .models import CENT, KEY_LENGTH, LARGEST_AMOUNT, Account, Transfer
from .repositories import AccountRepository, Audit, TransferRepository

RETRIES = 40  # of a transfer that others got in the way of, each after a pause; many callers at one account need them


def check_amount(amount: Decimal) -> Decimal:
    """The amount with its two digits. Raises `InvalidAmount`."""
    if not amount.is_finite() or abs(amount) > LARGEST_AMOUNT:
        raise InvalidAmount(f"{amount} is not an amount between 0 and {LARGEST_AMOUNT}")
    cents = amount.quantize(CENT)
    if cents != amount:
        raise InvalidAmount(f"{amount} has more than two digits after the point")
    return cents + 0  # which makes 0 of -0


class AccountService:
    def __init__(
        self, accounts: AccountRepository, transfers: TransferRepository, transaction: TransactionManager
    ) -> None:
        self.accounts = accounts
        self.transfers = transfers
        self.transaction = transaction

    @transactional
    async def open(self, owner: str, opening: Decimal) -> Account:
        """Raises `InvalidAmount`."""
        opening = check_amount(opening)
        if opening < 0:
            raise InvalidAmount(f"an account can't be opened with {opening}")
        return await self.accounts.add(Account(owner=owner, opening=opening, balance=opening))

    @read_only
    async def balance(self, account_id: int) -> Decimal:
        """Raises `UnknownAccount`."""
        return (await self._find(account_id)).balance

    @read_only
    async def statement(self, account_id: int, *, before: int | None = None, limit: int = 50) -> Sequence[Transfer]:
        """One page, the newest first; the next page is `before` the last of this one. Raises `UnknownAccount`."""
        await self._find(account_id)
        return await self.transfers.touching(account_id, before=before, limit=limit)

    @read_only
    async def audit(self) -> Audit:
        return await self.accounts.audit()

    async def _find(self, account_id: int) -> Account:
        account = await self.accounts.find(account_id)
        if account is None:
            raise UnknownAccount(account_id)
        return account


class TransferService:
    def __init__(
        self, accounts: AccountRepository, transfers: TransferRepository, transaction: TransactionManager
    ) -> None:
        self.accounts = accounts
        self.transfers = transfers
        self.transaction = transaction

    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        """Move money, once per key: sending the same again gives the transfer that was booked the first time.

        Raises `InvalidAmount`, `InvalidTransfer`, `UnknownAccount`, `InsufficientFunds`, `IdempotencyConflict`, `Busy`.
        """
        amount = check_amount(amount)
        if amount <= 0:
            raise InvalidAmount(f"{amount} is nothing to transfer")
        if source == target:
            raise InvalidTransfer(f"account {source} can't pay itself")
        if not 1 <= len(key) <= KEY_LENGTH or not key.isprintable():
            raise InvalidTransfer(f"an idempotency key is 1 to {KEY_LENGTH} printable characters")

        try:
            return await self._book(source, target, amount, key)
        except DBAPIError as error:
            # Inside a caller's transaction it is left as it is, for the caller to try again. So is a lost connection.
            if self.transaction.active or error.connection_invalidated or not is_retryable(error):
                raise
            raise Busy(source, target) from error

    @transactional(isolation="SERIALIZABLE", retries=RETRIES)
    async def _book(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        # The lock comes before the look at the key: of two calls with the same content, the second waits here, is
        # refused for what the first has booked meanwhile, and finds it in its next attempt.
        locked = await self.accounts.lock(source, target)
        booked = await self.transfers.find(key)
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
            return await self.transfers.add(Transfer(key=key, source_id=source, target_id=target, amount=amount))
        except IntegrityError as error:
            # Accounts and balances were checked under their locks, so this is the key: a transfer between two other
            # accounts, which our locks did not hold back, took it after we looked.
            raise IdempotencyConflict(key) from error
