"""The result of a run: its counts, and the promises of the library that they break."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

import aiosqlite
import asyncpg
import psycopg
from sqlalchemy.orm import Session

from sessionwire._core.scope import Scope
from sessionwire.status import TransactionTotals

from .callers import Answer, Call

GRACE = 0.5  # seconds by which a limit may be exceeded
# Seconds after the server's return until nobody notices its absence any more.
RECOVERY = 2.0
# The reasons for which no server can tell the outcome of a commit.
UNTELLABLE = (
    "the id of the transaction had not arrived",
    "the server could not be asked",
    "the server is in recovery",
    "another server has taken over",
    "the server does not have all",
    "the server was restarted",
    "it waits for a synchronous standby",
    "its wait for a synchronous standby was cancelled",
)


@dataclass
class Counts:
    """The counts of a run. Those below `attempts` must be 0, or within their limits."""

    # calls, by what they were answered
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    cancelled: int = 0
    attempts: int = 0  # the attempts of all calls
    # calls, by what the books say to that
    lost: int = 0  # acknowledged, and not in the books
    ghosts: int = 0  # refused, and in the books
    untold: int = 0  # unknown, though the server could have told
    doubled: int = 0  # in the books more than once
    wrong_hooks: int = 0  # whose hooks ran otherwise than they ended
    wrong_accounts: int = 0  # whose balance is not what its transfers make
    # By how much the totals of `status()` differ from the calls: each attempt is one
    # transaction, each hook of a commit one commit, each unknown answer one unknown end.
    miscounted: int = 0
    # By how much the spans and the metrics of OpenTelemetry differ from `status()`.
    mistold: int = 0
    # Leftovers.
    # Scopes, connections in use and waiting tasks by `status()`, after the last call.
    still_open: int = 0
    # Connections in the server beyond the pool's limit, a second after the last call.
    connections_over: int = 0
    # Connections in the server a second after the manager was closed.
    connections_left: int = 0
    tasks_left: int = 0
    sessions_left: int = 0  # objects, and the next two: alive though nobody uses them
    scopes_left: int = 0
    drivers_left: int = 0
    reports: int = 0  # to the event loop's exception handler
    # seconds
    longest: float = 0.0  # that a caller was stuck
    # The longest time over the limits of a call: patience, deadline, and the timeout of
    # the commit or rollback.
    overrun: float = 0.0
    recovery: float | None = (
        None  # from the server's return to the last failure; none: it was not away
    )


ZERO = tuple(one.name for one in fields(Counts))[5:-3]  # the counts that are to be 0


@dataclass
class Holds:
    """The `connect()` blocks of a scenario on the callers' manager."""

    begun: int = 0
    ended: int = 0  # well


@dataclass
class Verdict:
    scenario: str
    seed: int
    counts: Counts = field(default_factory=Counts)
    details: list[str] = field(default_factory=list)  # explanations for the reader

    @property
    def violations(self) -> list[str]:
        counts = self.counts
        found = [f"{name}: {getattr(counts, name)}" for name in ZERO if getattr(counts, name)]
        if counts.overrun > GRACE:
            found.append(f"a caller was stuck {counts.overrun:.2f} s longer than the settings say")
        if counts.recovery is not None and counts.recovery > RECOVERY:
            found.append(f"failures until {counts.recovery:.2f} s after the server's return")
        if not counts.acknowledged:
            found.append("nothing was acknowledged, so nothing is proved")
        return found

    def __str__(self) -> str:
        lines = [*self.violations, *self.details]
        counts = ", ".join(
            f"{name}: {value}" for name, value in asdict(self.counts).items() if value
        )
        return "\n  ".join([f"{self.scenario}, seed {self.seed}: {counts}", *lines])


def judge_calls(
    verdict: Verdict, calls: Iterable[Call], rows: Mapping[int, int], transfers: set[int]
) -> None:
    """Compare each call with its rows in `witness`, and its transfer with the books."""
    counts = verdict.counts
    for call in calls:
        setattr(counts, call.answer, getattr(counts, call.answer) + 1)
        counts.attempts += call.attempts
        committed = rows.get(call.number, 0)
        wrong: list[str] = []
        is_booked = committed and call.transfer in transfers | {None}
        if call.answer is Answer.ACKNOWLEDGED and not is_booked:
            counts.lost += 1
            wrong.append("lost")
        if call.answer is Answer.REFUSED and committed:
            counts.ghosts += 1
            wrong.append("a ghost")
        if call.reason and not call.reason.startswith(UNTELLABLE):
            counts.untold += 1
            wrong.append(f"unknown though the server knew: {call.reason}")
        if committed > 1:
            counts.doubled += 1
            wrong.append("doubled")
        if (call.commits, call.rollbacks) != _due(call, committed):
            counts.wrong_hooks += 1
            wrong.append(f"on_commit ran {call.commits} times, on_rollback {call.rollbacks}")
        if wrong:
            answer = f"{call.answer} {call.said}".strip()
            about = (
                f"{call.attempts} attempts in {call.ended - call.began:.2f} s, "
                f"{committed} of them in the books"
            )
            verdict.details.append(f"call {call.number}: {', '.join(wrong)}; {answer}; {about}")


def judge_totals(
    verdict: Verdict, calls: Iterable[Call], totals: TransactionTotals, holds: Holds
) -> None:
    """Compare the ends of transactions that `status()` has counted with the calls."""
    calls = list(calls)
    ends = sum(asdict(totals).values()) - totals.settled
    expected = {
        "ends": (ends, sum(call.attempts for call in calls) + holds.begun),
        "committed": (totals.committed, sum(call.commits for call in calls) + holds.ended),
        "unknown": (totals.unknown, sum(call.answer is Answer.UNKNOWN for call in calls)),
    }
    for name, (counted, due) in expected.items():
        verdict.counts.miscounted += abs(counted - due)
        if counted != due:
            verdict.details.append(f"status() counts {counted} {name}, and the calls {due}")


def judge_telemetry(
    verdict: Verdict,
    totals: TransactionTotals,
    in_spans: Mapping[str, int],
    in_metrics: Mapping[str, int],
) -> None:
    """Compare the ends of transactions that OpenTelemetry was told with `status()`."""
    for name, counted in asdict(totals).items():
        for source, told in (("spans", in_spans), ("metrics", in_metrics)):
            verdict.counts.mistold += abs(told.get(name, 0) - counted)
            if told.get(name, 0) != counted:
                verdict.details.append(
                    f"the {source} tell of {told.get(name, 0)} {name}, and status() of {counted}"
                )


def _due(call: Call, committed: int) -> tuple[int, int]:
    """Return how often its hooks must run, after a commit and after a rollback."""
    if call.answer is Answer.UNKNOWN or not call.attempts:
        return 0, 0
    return (1, 0) if committed else (0, 1)


def judge_recovery(verdict: Verdict, calls: Iterable[Call], returned: float) -> None:
    """Measure from the server's return to the last failure, or the first success."""
    after = [call for call in calls if call.ended > returned and not call.is_fair]
    failures = [call for call in after if call.answer in (Answer.REFUSED, Answer.UNKNOWN)]
    successes = [
        call.ended for call in after if call.answer is Answer.ACKNOWLEDGED and call.began > returned
    ]
    last = max((call.ended for call in failures), default=returned)
    verdict.counts.recovery = (max(last, min(successes)) if successes else float("inf")) - returned
    if verdict.counts.recovery > RECOVERY:
        said = Counter(call.said for call in failures if call.ended > returned + 1).most_common(3)
        verdict.details += [
            f"{count} times, a second after the server's return and later: {what}"
            for what, count in said
        ]


class Living:
    """How many objects of each kind are alive."""

    def __init__(self) -> None:
        gc.collect()
        types = Counter(map(type, gc.get_objects()))
        self.sessions = _of(types, Session)
        self.scopes = _of(types, Scope)
        self.drivers = _of(types, asyncpg.Connection, aiosqlite.Connection, psycopg.AsyncConnection)


def _of(types: Mapping[type, int], *kinds: type) -> int:
    return sum(count for one, count in types.items() if issubclass(one, kinds))
