"""Why the ledger refuses; nothing is booked by a call that raises one of these.

LedgerError
├── UnknownAccount       no account has this number
├── InsufficientFunds    it would be an overdraft
├── InvalidAmount        not a positive amount of whole cents, or a larger one than is booked here
├── InvalidTransfer      an account that pays itself, or a key that cannot be one
├── IdempotencyConflict  the key belongs to another transfer already
└── Busy                 too many others at the same accounts, for now
"""

from decimal import Decimal


class LedgerError(Exception):
    """The root of the tree: a refusal that the caller can understand and act on."""


class UnknownAccount(LedgerError):
    """No account has this number."""

    def __init__(self, account: int) -> None:
        super().__init__(f"there is no account {account}")
        self.account = account


class InsufficientFunds(LedgerError):
    """The payer holds less than the amount."""

    def __init__(self, account: int, balance: Decimal, amount: Decimal) -> None:
        super().__init__(f"account {account} holds {balance}, which does not cover {amount}")
        self.account = account
        self.balance = balance
        self.amount = amount


class InvalidAmount(LedgerError):
    """Not an amount of money that can be booked."""


class InvalidTransfer(LedgerError):
    """Not a transfer, whatever the amount."""


class Busy(LedgerError):
    """Others got in the way of each attempt. The same transfer, with the same key, may be sent again later."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(f"too many transfers at accounts {source} and {target}: nothing was booked, send it again")


class IdempotencyConflict(LedgerError):
    """The idempotency key was used for another transfer: a new transfer needs a new key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} belongs to another transfer: use a new key for a new transfer")
        self.key = key
