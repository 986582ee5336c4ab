"""The proof: what the callers were told, held against the books as they are read afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from sessionwire import CommitOutcomeUnknownError

from .errors import Busy, LedgerError
from .models import Account, Transfer
from .repositories import Audit
from .traffic import MEANT_TO_FAIL, Answer


@dataclass(frozen=True)
class Books:
    """What was read afterwards: each account that the run opened, by its number, and the audit of all there are."""

    balances: Mapping[int, Decimal]
    statements: Mapping[int, Sequence[Transfer]]
    audit: Audit

    def entries(self) -> dict[str, list[tuple[int, Transfer]]]:
        """By key, in which account's statement the transfer stands: the payer's and the payee's, if all is well."""
        entries: dict[str, list[tuple[int, Transfer]]] = {}
        for account, statement in self.statements.items():
            for transfer in statement:
                entries.setdefault(transfer.key, []).append((account, transfer))
        return entries

    def agree_on(self, account: Account) -> bool:
        balance = account.opening
        for transfer in self.statements[account.id]:
            balance += transfer.amount if transfer.target_id == account.id else -transfer.amount
        return balance == self.balances[account.id]


@dataclass(frozen=True)
class Check:
    claim: str
    holds: bool
    finding: str


def prove(answers: Sequence[Answer], before: Audit, opened: Sequence[Account], books: Books) -> list[Check]:
    """Each claim with what was found. It takes nothing from the service but its answers and the books."""
    entries = books.entries()

    def is_booked_once(answer: Answer) -> bool:
        order, transfer = answer.order, answer.transfer
        found = entries.get(order.key, [])
        return sorted(account for account, _ in found) == sorted((order.source, order.target)) and all(
            transfer is not None and booked.id == transfer.id and order.is_booked_as(booked) for _, booked in found
        )

    def is_absent(answer: Answer) -> bool:
        # A key refused to one call and acknowledged to another stands for what was acknowledged: the check of that
        # one sees to it.
        return answer.order.key in acknowledged_keys or answer.order.key not in entries

    def is_as_meant(answer: Answer) -> bool:
        return isinstance(answer.error, (MEANT_TO_FAIL[answer.order.kind], Busy))

    acknowledged = [answer for answer in answers if answer.transfer is not None]
    acknowledged_keys = {answer.order.key for answer in acknowledged}
    not_acknowledged = [answer for answer in answers if answer.transfer is None]
    refused = [answer for answer in not_acknowledged if not isinstance(answer.error, CommitOutcomeUnknownError)]
    failed = [answer for answer in not_acknowledged if not isinstance(answer.error, LedgerError)]
    meant_to_fail = [answer for answer in answers if answer.order.kind in MEANT_TO_FAIL]

    booked = sum(map(is_booked_once, acknowledged))
    absent = sum(map(is_absent, refused))
    as_meant = sum(map(is_as_meant, meant_to_fail))
    never_sent = len(entries.keys() - {answer.order.key for answer in answers})
    matching = books.audit.accounts - books.audit.wrong

    checks = [
        _sum_is_unchanged(before, sum((account.opening for account in opened), Decimal(0)), books.audit),
        Check(
            "acknowledged, booked once",
            booked == len(acknowledged),
            f"{booked:,} of {len(acknowledged):,} ({len(acknowledged_keys):,} transfers)",
        ),
        Check("refused, not booked", absent == len(refused), f"{absent:,} of {len(refused):,}"),
        Check("booked, never sent", not never_sent, f"{never_sent:,}"),
        Check(
            "meant to fail, refused as meant", as_meant == len(meant_to_fail), f"{as_meant:,} of {len(meant_to_fail):,}"
        ),
        Check(
            "balances match their transfers",
            not books.audit.wrong and all(map(books.agree_on, opened)),
            f"{matching:,} of {books.audit.accounts:,} accounts",
        ),
    ]
    if failed:  # nothing that the books could be blamed for, but no answer that a caller should get either
        error = failed[0].error
        first = str(getattr(error, "orig", None) or error)  # what the driver said, where SQLAlchemy says it too
        checks.append(Check("calls met by an error", False, f"{len(failed):,}, the first: {first}"))
    return checks


def _sum_is_unchanged(before: Audit, opened: Decimal, after: Audit) -> Check:
    others = after.opening - before.opening - opened  # another demo may be at work in the same books
    finding = f"{before.balance:,} + {opened:,} opened" + (f" + {others:,} by others" if others else "")
    holds = before.balance + opened + others == after.balance == after.opening and others >= 0
    return Check("sum of all balances", holds, f"{finding} = {after.balance:,}")
