"""The refusals of the ledger. A call that raises one of these has booked nothing.

LedgerError
├── UnknownAccount       no account has this number
├── InsufficientFunds    the payer's balance does not cover the amount
├── InvalidAmount        it is not positive, has fractions of a cent, or is too large
├── InvalidTransfer      an account pays itself, or the key is malformed
├── IdempotencyConflict  the key belongs to another transfer
└── Busy                 every attempt conflicted with concurrent transfers
"""

from decimal import Decimal


class LedgerError(Exception):
    """The base of all refusals. The caller can understand it and act on it."""


class UnknownAccount(LedgerError):
    """No account has this number."""

    def __init__(self, account: int) -> None:
        super().__init__(f"there is no account {account}")
        self.account = account


class InsufficientFunds(LedgerError):
    """The payer's balance does not cover the amount."""

    def __init__(self, account: int, balance: Decimal, amount: Decimal) -> None:
        super().__init__(f"account {account} holds {balance}, which does not cover {amount}")
        self.account = account
        self.balance = balance
        self.amount = amount


class InvalidAmount(LedgerError):
    """The ledger can't book this amount of money."""


class InvalidTransfer(LedgerError):
    """The transfer makes no sense, whatever its amount."""


class Busy(LedgerError):
    """Every attempt conflicted with concurrent transfers. Send the transfer again later."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(
            f"too many transfers at accounts {source} and {target}: "
            "nothing was booked, send it again"
        )


class IdempotencyConflict(LedgerError):
    """The idempotency key belongs to another transfer."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"the key {key!r} belongs to another transfer: use a new key for a new transfer"
        )
        self.key = key
