"""The verdict finds what is wrong, where something is."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from sessionwire.status import TransactionTotals

from .callers import Answer, Call
from .verdict import (
    Counts,
    Holds,
    Living,
    Verdict,
    judge_calls,
    judge_recovery,
    judge_telemetry,
    judge_totals,
)


def call(
    answer: Answer,
    *,
    commits: int = 0,
    rollbacks: int = 0,
    transfer: int | None = None,
    reason: str = "",
) -> Call:
    asked = Call(0, "key", limit=1, deadline=None, answer=answer, transfer=transfer, attempts=1)
    asked.commits, asked.rollbacks, asked.reason = commits, rollbacks, reason
    return asked


@pytest.mark.parametrize(
    ("asked", "rows", "transfers", "wrong"),
    [
        (call(Answer.ACKNOWLEDGED, commits=1, transfer=7), 1, {7}, {}),
        (call(Answer.ACKNOWLEDGED, commits=1, transfer=7), 1, set(), {"lost": 1}),
        (call(Answer.ACKNOWLEDGED, transfer=7), 0, {7}, {"lost": 1, "wrong_hooks": 1}),
        (call(Answer.ACKNOWLEDGED, commits=1, transfer=7), 2, {7}, {"doubled": 1}),
        (call(Answer.ACKNOWLEDGED, commits=2, transfer=7), 1, {7}, {"wrong_hooks": 1}),
        (call(Answer.REFUSED, rollbacks=1), 0, set(), {}),
        (call(Answer.REFUSED, rollbacks=1), 1, {7}, {"ghosts": 1, "wrong_hooks": 1}),
        (call(Answer.REFUSED), 0, set(), {"wrong_hooks": 1}),
        (call(Answer.CANCELLED, commits=1), 1, {7}, {}),
        (call(Answer.CANCELLED, commits=1), 0, set(), {"wrong_hooks": 1}),
        (call(Answer.UNKNOWN), 1, {7}, {}),
        (call(Answer.UNKNOWN), 0, set(), {}),
        (call(Answer.UNKNOWN, rollbacks=1), 0, set(), {"wrong_hooks": 1}),
        (call(Answer.UNKNOWN, reason="another server has taken over"), 0, set(), {}),
        (call(Answer.UNKNOWN, reason="it is still in progress"), 0, set(), {"untold": 1}),
    ],
)
def test_the_verdict_compares_each_call_with_the_books(
    asked: Call, rows: int, transfers: set[int], wrong: dict[str, int]
) -> None:
    verdict = Verdict("", 0)
    judge_calls(verdict, [asked], {0: rows}, transfers)
    assert verdict.counts == Counts(**{str(asked.answer): 1, "attempts": 1, **wrong})
    verdict.counts.acknowledged += 1  # for one that has proved something
    assert verdict.violations == [f"{name}: {number}" for name, number in wrong.items()]


@pytest.mark.parametrize(
    ("totals", "miscounted"),
    [
        (TransactionTotals(committed=2, rolled_back=1, unknown=1, settled=1), 0),
        (TransactionTotals(committed=2, timed_out=1, unknown=1), 0),
        (TransactionTotals(committed=2, unknown=1), 1),  # an attempt is missing
        (TransactionTotals(committed=3, unknown=1), 1),
        (TransactionTotals(committed=3, rolled_back=1), 2),  # one passed for committed
    ],
)
def test_the_verdict_compares_the_totals_with_the_calls(
    totals: TransactionTotals, miscounted: int
) -> None:
    calls = [
        call(Answer.ACKNOWLEDGED, commits=1),
        call(Answer.REFUSED, rollbacks=1),
        call(Answer.UNKNOWN),
    ]
    verdict = Verdict("", 0)
    judge_totals(verdict, calls, totals, Holds(begun=1, ended=1))
    assert verdict.counts == Counts(miscounted=miscounted)


@pytest.mark.parametrize(
    ("in_spans", "in_metrics", "mistold"),
    [
        ({"committed": 2, "unknown": 1}, {"committed": 2, "unknown": 1}, 0),
        ({"committed": 3, "unknown": 1}, {"committed": 2, "unknown": 1}, 1),
        ({"committed": 2, "unknown": 1}, {"committed": 2}, 1),
        ({}, {"committed": 2, "unknown": 1}, 3),
    ],
)
def test_the_verdict_compares_what_opentelemetry_is_told_with_the_totals(
    in_spans: dict[str, int], in_metrics: dict[str, int], mistold: int
) -> None:
    verdict = Verdict("", 0)
    totals = TransactionTotals(committed=2, unknown=1)
    judge_telemetry(verdict, totals, in_spans, in_metrics)
    assert verdict.counts == Counts(mistold=mistold)


def test_the_verdict_compares_times_with_their_limits() -> None:
    assert not Verdict("", 0, Counts(acknowledged=1, overrun=0.4, recovery=1.9)).violations
    assert (
        len(Verdict("", 0, Counts(overrun=0.6, recovery=2.1)).violations) == 3
    )  # and nothing was acknowledged


def test_the_recovery_time_ends_with_the_last_failure() -> None:
    def at(ended: float, answer: Answer, began: float) -> Call:
        return Call(0, "", 1, None, began=began, ended=ended, answer=answer)

    def recovery(*calls: Call) -> float | None:
        verdict = Verdict("", 0)
        judge_recovery(verdict, calls, returned=10.0)
        return verdict.counts.recovery

    before, first = at(9.0, Answer.REFUSED, 8.0), at(10.5, Answer.ACKNOWLEDGED, 10.1)
    assert recovery(before) == float("inf")
    assert recovery(before, first) == 0.5
    assert recovery(before, first, at(11.0, Answer.UNKNOWN, 9.0)) == 1.0


def test_the_verdict_counts_open_sessions() -> None:
    before = Living()
    left = Session()
    assert Living().sessions == before.sessions + 1
    del left
    assert Living().sessions == before.sessions
