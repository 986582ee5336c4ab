"""`CommitResolver`: asks the server for the outcome of a COMMIT whose answer was lost.

PostgreSQL knows it by the id of the transaction. The id is asked for ahead of COMMIT,
with what tells later whether the server still has the same history: see "Transaction ID
and Snapshot Information Functions" in PostgreSQL's documentation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._error_reports import summarize
from sessionwire._log_events import COMMIT_LOOKED_UP, LOOK_UPS_IMPOSSIBLE
from sessionwire._shield import shielding_tasks
from sessionwire.errors import CommitOutcomeUnknownError

from .commit_look_up import LookUp, Outcome, Question, SharedConnection
from .totals import Totals

# The share of commit_timeout for the answer to the COMMIT, and that until the outcome
# must be known. The rest is for the task that waits.
ANSWER_SHARE, LOOK_UP_SHARE = 0.5, 0.95

# An id is assigned only on a primary. So the others are not called on a standby, where
# they would fail.
QUESTION = """\
SELECT pg_catalog.pg_current_xact_id_if_assigned(),
CASE WHEN pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL
THEN pg_catalog.pg_current_wal_insert_lsn() END,
CASE WHEN pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL
THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END,
pg_catalog.statement_timestamp()"""
# What look-ups call. It fails if a function does not exist or may not be called. What the
# question calls must be allowed to all, because a transaction may change its role.
PROBE = """\
SELECT system_identifier::text, next_xid, pg_xact_status('3'),
pg_stat_get_bgwriter_stat_reset_time(),
CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_insert_lsn()) END,
(SELECT bool_or(has_function_privilege(oid, 'EXECUTE')) FROM pg_proc
WHERE proname = 'pg_logical_emit_message')
AND has_function_privilege('public', 'pg_catalog.pg_current_xact_id_if_assigned()', 'EXECUTE')
AND has_function_privilege('public', 'pg_catalog.pg_current_wal_insert_lsn()', 'EXECUTE')
AND has_function_privilege('public', 'pg_catalog.pg_walfile_name(pg_lsn)', 'EXECUTE')
AND has_function_privilege('public', 'pg_catalog.statement_timestamp()', 'EXECUTE')
FROM pg_control_system(), pg_control_checkpoint()"""
NO_ID = "the id of the transaction had not arrived"
NOT_COMMITTED = "the connection was lost in COMMIT, and the server says: not committed"
MAY_HAVE_WRITTEN = "it had no id, and may have written during the COMMIT, as NOTIFY does"
Answer = Sequence[str | None]  # to `QUESTION`


class CommitResolver:
    """Look up outcomes of commits, for all connections of an engine.

    Look-ups share one connection beside the pool, which is open only meanwhile. Commits
    that wait for a synchronous standby share another one, to hold up no look-up.

    Args:
        connect: Opens a connection, in SQLAlchemy's greenlet.
        commit_timeout: Seconds for a commit, with the look-up.
        totals: The counters of the manager.
    """

    def __init__(self, connect: Callable[[], Any], commit_timeout: float, totals: Totals) -> None:
        self._connect = connect
        self._commit_timeout = commit_timeout
        self._totals = totals
        self.system_identifier: str | None = None
        # The connections that wait for the answer to a COMMIT, and how long they may, by
        # the clock of the event loop: the earliest first. One timer serves them all.
        self._waiting: dict[Any, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._users = 0
        self._asking, self._confirming = SharedConnection(connect), SharedConnection(connect)

    async def prove(self, connection: AsyncConnection) -> None:
        """Find out whether the server lets outcomes be looked up."""
        try:
            row = (await connection.exec_driver_sql(PROBE)).one()
        except DBAPIError as error:
            LOOK_UPS_IMPOSSIBLE.log(error=summarize(error))
            self.system_identifier = None
        else:
            self.system_identifier = row[0] if row[-1] else None

    @property
    def is_on(self) -> bool:
        """Whether `open()` has found that outcomes can be looked up."""
        return self.system_identifier is not None

    # Wait for the answer

    def watch(self, connection: Any) -> float:
        """Terminate a connection if the answer to its COMMIT does not come in time.

        Nothing is cancelled in the server. Returns the time, of the event loop's clock.
        """
        loop = asyncio.get_running_loop()
        until = self._waiting[connection] = loop.time() + self._commit_timeout * ANSWER_SHARE
        if self._timer is None:
            self._timer = loop.call_at(until, self._terminate_late_ones, loop)
        return until

    def unwatch(self, connection: Any) -> None:
        self._waiting.pop(connection, None)

    def _terminate_late_ones(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for connection, until in list(self._waiting.items()):
            if until > loop.time():
                self._timer = loop.call_at(until, self._terminate_late_ones, loop)
                break
            connection.terminate()

    def stop_watching(self) -> None:
        """Stop the timer: the connections are closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._waiting.clear()

    def abandon(self) -> None:
        """Forget what belongs to an event loop that is closed, or to a parent process."""
        self.stop_watching()
        self._users = 0

    # Look up

    async def settle(
        self, answer: Answer | None, lost: Exception, given_up_at: float, *, only_read: bool
    ) -> bool:
        """Return whether a transaction was committed, whose answer was lost.

        Args:
            answer: The answer to `QUESTION`, if it has arrived.
            lost: The error by which the answer was lost.
            given_up_at: When waiting for the answer ends, by the clock of the event loop.
            only_read: Its statements have surely written nothing.

        Raises:
            CommitOutcomeUnknownError: It can't be known.
        """
        if answer is None:
            raise unknown_outcome(NO_ID, answer) from lost
        transaction_id, *others = answer
        if transaction_id is None:
            if not only_read:
                raise unknown_outcome(MAY_HAVE_WRITTEN, answer) from lost
            self._tell("which only read, was nothing to commit")
            return True
        outcome, reason = await self._look_up(
            Question(transaction_id, *map(str, others)),
            until=given_up_at + self._commit_timeout * (LOOK_UP_SHARE - ANSWER_SHARE),
        )
        if outcome is Outcome.UNKNOWN:
            raise unknown_outcome(reason, answer) from lost
        is_committed = outcome is Outcome.COMMITTED
        self._tell(f"{transaction_id} was {'' if is_committed else 'not '}committed")
        return is_committed

    async def _look_up(self, question: Question, until: float) -> tuple[Outcome, str]:
        """Return the outcome, and the reason if it is unknown."""
        if not self._users:
            # Another event loop may have used the last ones.
            self._asking = SharedConnection(self._connect)
            self._confirming = SharedConnection(self._connect)
        self._users += 1
        try:
            look_up = LookUp(question, self.system_identifier, self._asking, self._confirming)
            # A task of its own, because it uses timeouts, which cancel their task.
            task = asyncio.ensure_future(look_up.run(until))
            shielding_tasks.add(task)
            return await task, look_up.reason
        finally:
            self._users -= 1
            if not self._users:
                self._asking.drop()
                self._confirming.drop()

    def _tell(self, outcome: str) -> None:
        self._totals.count_settled()
        COMMIT_LOOKED_UP.log(outcome=outcome)


def unknown_outcome(reason: str, answer: Answer | None) -> CommitOutcomeUnknownError:
    """Make the error of a COMMIT whose outcome could not be settled.

    Args:
        reason: Why not.
        answer: The answer to `QUESTION`, if it has arrived.
    """
    return CommitOutcomeUnknownError(
        f"the COMMIT was sent, and its outcome can't be told: {reason}. Look in the database "
        "whether it was carried out before you run the transaction again",
        transaction_id=transaction_id_in(answer),
        reason=reason,
    )


def unreplicated_commit() -> CommitOutcomeUnknownError:
    """Make the error of a COMMIT whose wait for a synchronous standby was cancelled."""
    return CommitOutcomeUnknownError(
        "committed here, perhaps not replicated: the wait for a synchronous standby was "
        "cancelled. Look in the database whether it was kept before you try again, above all "
        "after a failover",
        reason="its wait for a synchronous standby was cancelled",
    )


def transaction_id_in(answer: Answer | None) -> int | None:
    """Return the id of the transaction, if the answer to `QUESTION` has arrived with one."""
    return int(answer[0]) if answer and answer[0] else None
