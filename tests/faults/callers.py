"""The load: callers of the ledger that record each answer, and a witness of commits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from random import Random
from time import monotonic

from dependency_injector import providers
from sqlalchemy import Column, Integer, MetaData, Table, insert
from sqlalchemy.ext.asyncio import AsyncSession

from ledger.container import Container
from ledger.errors import Busy, LedgerError
from ledger.models import Account
from ledger.repositories import AccountRepository
from sessionwire import CommitOutcomeUnknownError, TransactionManager, TransactionTimeoutError

# Each attempt at a transfer writes the number of its call here. So the effect of a
# commit can be assigned to a call, even if its key was booked before. A second row is
# possible.
witness = Table("witness", MetaData(), Column("call", Integer, nullable=False))
calling: ContextVar[Call] = ContextVar("calling")


CONFLICTS = (
    "40001",
    "40P01",
)  # SQLSTATEs: on a busy machine they outlast the retries, with or without a fault


class Answer(StrEnum):
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    UNKNOWN = "unknown"  # the library says that it doesn't know
    CANCELLED = "cancelled"  # the caller itself has not waited for the answer


@dataclass(eq=False)
class Call:
    """One call of the ledger: the request, the answer, and the reports of its hooks."""

    number: int
    key: str
    limit: float  # seconds after which it is told to end, one way or another
    # The deadline of its transaction. None: no block of the caller encloses it.
    deadline: float | None
    is_plain: bool = False  # no transfer, but a mark on default terms
    began: float = 0.0
    ended: float = 0.0
    # It stays so if the call was cancelled before its first step.
    answer: Answer = Answer.CANCELLED
    # The error as text: the error itself would keep objects alive.
    said: str = ""
    reason: str = ""  # of an unknown outcome
    # The ledger refused it, because of its own deadline or a conflict: without a fault.
    is_fair: bool = False
    transfer: int | None = None
    attempts: int = 0  # that had hooks
    commits: int = 0  # that a hook was told of
    rollbacks: int = 0

    def saw_commit(self) -> None:
        self.commits += 1

    def saw_rollback(self) -> None:
        self.rollbacks += 1


@dataclass(frozen=True)
class Manner:
    """How the callers call."""

    callers: int = 12
    accounts: int = 40
    # The share of calls that only leave a mark, with default options. Transfers are
    # SERIALIZABLE.
    plain: float = 0.3
    patience: float = 3.0  # seconds after which a caller gives up
    cancelled: float = (
        0.0  # share of the calls that are cancelled within `cancelled_within` seconds
    )
    # At most: a second cancellation may strike the clean-up after the first one.
    times: int = 2
    cancelled_within: float = 0.05
    # The share of calls in a transaction with a deadline of up to `deadline` seconds.
    deadlines: float = 0.0
    deadline: float = 0.05


class WatchedAccounts(AccountRepository):
    """Begin each attempt at a transfer: write down the call, and register hooks."""

    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        super().__init__(session)
        self.transaction = transaction

    async def lock(self, *account_ids: int) -> dict[int, Account]:
        await self.leave_mark()
        return await super().lock(*account_ids)

    async def leave_mark(self) -> None:
        call = calling.get()
        call.attempts += 1
        self.transaction.on_commit(call.saw_commit)
        self.transaction.on_rollback(call.saw_rollback)
        await self.session.execute(insert(witness).values(call=call.number))


@dataclass
class Callers:
    container: Container
    manner: Manner
    seed: str
    accounts: list[int]
    calls: list[Call] = field(default_factory=list)
    _stopped: bool = False

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Let them call inside the block, and finish their calls at its end."""
        watched = providers.Factory(
            WatchedAccounts,
            session=self.container.db.session,
            transaction=self.container.db.transaction,
        )
        with self.container.account_repository.override(watched):
            async with asyncio.TaskGroup() as group:
                for number in range(self.manner.callers):
                    group.create_task(self._work(number))
                try:
                    yield
                finally:
                    self._stopped = True

    def seconds_without_failure(self, since: float) -> float:
        """Return for how long each ended call has succeeded; 0 before the first one."""
        recent = [call for call in self.calls if call.ended > since and not call.is_fair]
        if not any(call.answer is Answer.ACKNOWLEDGED and call.began > since for call in recent):
            return 0.0
        failures = [
            call.ended for call in recent if call.answer in (Answer.REFUSED, Answer.UNKNOWN)
        ]
        return monotonic() - max(failures, default=since)

    async def _work(self, number: int) -> None:
        random, manner = Random(f"{self.seed}-{number}"), self.manner
        key = ""
        while not self._stopped:
            if (
                not key or random.random() < 0.7
            ):  # Otherwise the transfer is sent again, as after an error.
                key = f"{number}-{random.randrange(10**12)}"
                source, target = random.sample(self.accounts, 2)
                amount = Decimal(random.randint(1, 500)).scaleb(-2)
            deadline = (
                random.uniform(0, manner.deadline) if random.random() < manner.deadlines else None
            )
            limit = min(manner.patience, deadline or manner.patience)
            is_cancelled = random.random() < manner.cancelled
            if is_cancelled:
                limit = min(limit, random.uniform(0, manner.cancelled_within))
            call = Call(len(self.calls), key, limit, deadline, random.random() < manner.plain)
            self.calls.append(call)
            ask = self._ask(call, source, target, amount)
            if is_cancelled and random.random() < 0.5:
                again = [random.uniform(0, 0.03) for _ in range(random.randrange(manner.times))]
                await _cancelled(asyncio.create_task(ask), [limit, *again])
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(ask, limit if is_cancelled else manner.patience)

    async def _ask(self, call: Call, source: int, target: int, amount: Decimal) -> None:
        calling.set(call)
        call.began = monotonic()
        try:
            await self._call(call, source, target, amount)
            call.answer = Answer.ACKNOWLEDGED
        except asyncio.CancelledError as error:
            is_unknown = isinstance(error.__cause__, CommitOutcomeUnknownError)
            call.answer = Answer.UNKNOWN if is_unknown else Answer.CANCELLED
            raise
        except Exception as error:
            call.answer = Answer.REFUSED
            if isinstance(error, CommitOutcomeUnknownError):
                call.answer, call.reason = Answer.UNKNOWN, error.reason
            call.said = (
                f"{type(error).__name__}: {getattr(error, 'orig', None) or error}".partition("\n")[
                    0
                ]
            )
            is_conflict = getattr(getattr(error, "orig", None), "sqlstate", None) in CONFLICTS
            is_refused = isinstance(
                error, (LedgerError, TransactionTimeoutError)
            ) and not isinstance(error, Busy)
            call.is_fair = is_conflict or is_refused
        finally:
            call.ended = monotonic()

    async def _call(self, call: Call, source: int, target: int, amount: Decimal) -> None:
        transfers = self.container.transfers()
        if call.is_plain:
            retries = 0 if call.deadline else 40
            mark = self.container.account_repository().leave_mark
            await transfers.transaction.run(mark, retries=retries, timeout=call.deadline)
        elif call.deadline is None:
            call.transfer = (await transfers.transfer(source, target, amount, call.key)).id
        else:
            async with transfers.transaction(isolation="SERIALIZABLE", timeout=call.deadline):
                booked = await transfers.transfer(source, target, amount, call.key)
            call.transfer = booked.id


async def _cancelled(task: asyncio.Task[None], pauses: list[float]) -> None:
    """Cancel it after each of these pauses, and wait for its end."""
    for pause in pauses:
        if (await asyncio.wait((task,), timeout=pause))[0]:
            break
        task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()
