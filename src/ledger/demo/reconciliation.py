"""Compare the answers that the callers got with the database afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from ledger.errors import Busy, LedgerError
from ledger.models import Account, Transfer
from ledger.repositories import Audit
from sessionwire import CommitOutcomeUnknownError

from .workload import EXPECTED_ERRORS, Answer


@dataclass(frozen=True)
class LedgerSnapshot:
    """The state of the database after the run.

    It has the accounts that the run opened, by their numbers, and the audit of all
    accounts.
    """

    balances: Mapping[int, Decimal]
    statements: Mapping[int, Sequence[Transfer]]
    audit: Audit

    def entries_by_key(self) -> dict[str, list[tuple[int, Transfer]]]:
        """Return each transfer with the account whose statement lists it.

        Without errors, a key has two entries: the payer's and the payee's.
        """
        entries: dict[str, list[tuple[int, Transfer]]] = {}
        for account, statement in self.statements.items():
            for transfer in statement:
                entries.setdefault(transfer.key, []).append((account, transfer))
        return entries

    def is_balanced(self, account: Account) -> bool:
        """Tell whether the balance is the opening balance plus all transfers."""
        balance = account.opening
        for transfer in self.statements[account.id]:
            balance += transfer.amount if transfer.target_id == account.id else -transfer.amount
        return balance == self.balances[account.id]


@dataclass(frozen=True)
class Check:
    """The result of one comparison."""

    name: str
    passed: bool
    details: str


def reconcile(
    answers: Sequence[Answer], before: Audit, opened: Sequence[Account], after: LedgerSnapshot
) -> list[Check]:
    """Check all answers.

    Args:
        answers: the answer to each order of the run.
        before: the audit before the run.
        opened: the accounts that the run opened.
        after: the state of the database after the run.
    """
    entries = after.entries_by_key()

    def is_booked_once(answer: Answer) -> bool:
        order, transfer = answer.order, answer.transfer
        found = entries.get(order.key, [])
        return sorted(account for account, _ in found) == sorted(
            (order.source, order.target)
        ) and all(
            transfer is not None and booked.id == transfer.id and order.matches(booked)
            for _, booked in found
        )

    def is_absent(answer: Answer) -> bool:
        # If another call with this key was acknowledged, the transfer belongs to that
        # call, and the check of that call covers it.
        return answer.order.key in acknowledged_keys or answer.order.key not in entries

    def is_refused_as_expected(answer: Answer) -> bool:
        return isinstance(answer.error, (EXPECTED_ERRORS[answer.order.kind], Busy))

    acknowledged = [answer for answer in answers if answer.transfer is not None]
    acknowledged_keys = {answer.order.key for answer in acknowledged}
    not_acknowledged = [answer for answer in answers if answer.transfer is None]
    refused = [
        answer
        for answer in not_acknowledged
        if not isinstance(answer.error, CommitOutcomeUnknownError)
    ]
    failed = [answer for answer in not_acknowledged if not isinstance(answer.error, LedgerError)]
    must_fail = [answer for answer in answers if answer.order.kind in EXPECTED_ERRORS]

    booked = sum(map(is_booked_once, acknowledged))
    absent = sum(map(is_absent, refused))
    as_expected = sum(map(is_refused_as_expected, must_fail))
    never_sent = len(entries.keys() - {answer.order.key for answer in answers})
    matching = after.audit.accounts - after.audit.mismatched_accounts

    checks = [
        _check_sum(before, sum((account.opening for account in opened), Decimal(0)), after.audit),
        Check(
            "acknowledged, booked once",
            booked == len(acknowledged),
            f"{booked:,} of {len(acknowledged):,} ({len(acknowledged_keys):,} transfers)",
        ),
        Check("refused, not booked", absent == len(refused), f"{absent:,} of {len(refused):,}"),
        Check("booked, never sent", not never_sent, f"{never_sent:,}"),
        Check(
            "meant to fail, refused as meant",
            as_expected == len(must_fail),
            f"{as_expected:,} of {len(must_fail):,}",
        ),
        Check(
            "balances match their transfers",
            not after.audit.mismatched_accounts and all(map(after.is_balanced, opened)),
            f"{matching:,} of {after.audit.accounts:,} accounts",
        ),
    ]
    if failed:  # the database may be right, but no caller should get such an answer
        error = failed[0].error
        first = str(getattr(error, "orig", None) or error)  # the driver's error, if any
        checks.append(Check("calls met by an error", False, f"{len(failed):,}, the first: {first}"))
    return checks


def _check_sum(before: Audit, opened: Decimal, after: Audit) -> Check:
    # Another demo may run on the same database.
    others = after.opening - before.opening - opened
    details = f"{before.balance:,} + {opened:,} opened" + (
        f" + {others:,} by others" if others else ""
    )
    passed = before.balance + opened + others == after.balance == after.opening and others >= 0
    return Check("sum of all balances", passed, f"{details} = {after.balance:,}")
