"""`CommitResolver`: asks the server for the outcome of a COMMIT whose answer was lost.

PostgreSQL knows it by the id of the transaction. The id is asked for ahead of COMMIT,
with what tells later whether the server still has the same history: see "Transaction ID
and Snapshot Information Functions" in PostgreSQL's documentation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.util import greenlet_spawn

from sessionwire._error_reports import summarize
from sessionwire._shield import shielding_tasks
from sessionwire.errors import CommitOutcomeUnknownError, NotInitializedError

from .pipeline import values_in
from .totals import Totals

# The share of commit_timeout for the answer to the COMMIT, and that until the outcome
# must be known. The rest is for the task that waits.
ANSWER_SHARE, LOOK_UP_SHARE = 0.5, 0.95
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two look-ups

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
IN_RECOVERY = "the server is in recovery"
# The status of a transaction, or the reason why the server can't tell, and whether it
# has synchronous standbys. A crash may lose what was written last. If the server's first
# checkpoint after it does not know an id, the id may have been given to another one. A
# crash is told by the server's statistics, which begin anew. The time of a checkpoint is
# in whole seconds.
LOOK_UP = f"""\
SELECT CASE
WHEN pg_is_in_recovery()
THEN '{IN_RECOVERY}'
WHEN system_identifier::text <> $4::text
THEN 'another database system answers'
WHEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) <> left($3::text, 8)
THEN 'another server has taken over'
WHEN pg_current_wal_insert_lsn() < $2::text::pg_lsn
THEN 'the server does not have all that it had written'
WHEN checkpoint_time >= date_trunc('second', $5::text::timestamptz)
AND pg_stat_get_bgwriter_stat_reset_time() >= $5::text::timestamptz
AND (split_part(next_xid, ':', 1)::numeric * 4294967296 + split_part(next_xid, ':', 2)::numeric)
<= $1::text::numeric
THEN 'the server was restarted, and may have given the id to another transaction'
ELSE pg_xact_status($1::text::xid8)
END,
current_setting('synchronous_standby_names') <> ''
FROM pg_control_system(), pg_control_checkpoint()"""
# A pid alone could be that of a later process. A process that waits for a synchronous
# standby is left alone: its end would show the commit before it is replicated.
END_BACKEND = """\
SELECT CASE WHEN wait_event = 'SyncRep' THEN true ELSE NOT pg_terminate_backend(pid) END
FROM pg_stat_activity
WHERE backend_xid = $1::text::xid8::xid AND datname = current_database()
AND backend_start <= $2::text::timestamptz"""
# A small commit, which is answered once it is replicated.
CONFIRM = "SELECT pg_logical_emit_message(true, 'sessionwire', '')::text"

NO_ID = "the id of the transaction had not arrived"
MAY_HAVE_WRITTEN = "it had no id, and may have written during the COMMIT, as NOTIFY does"
WAITING = "it waits for a synchronous standby"
IN_PROGRESS = "it is still in progress"

logger = logging.getLogger("sessionwire.commit")


class NotCommittedError(asyncpg.PostgresConnectionError):
    """The connection was lost at COMMIT, and it is certain that nothing was committed."""

    severity = "ERROR"  # so that it counts as a refusal


class Question(NamedTuple):
    """The answer to `QUESTION`."""

    transaction_id: str
    position: str  # in the log
    log_file: str  # its name begins with the timeline
    asked_at: str


class SharedConnection:
    """A connection beside the pool, which is opened when it is needed.

    Args:
        connect: Opens it, in SQLAlchemy's greenlet.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._connection: Any = None
        self._turn = asyncio.Lock()

    async def ask(self, sql: str, *arguments: str | None) -> Any:
        """Return the row that answers, once those who came before have theirs."""
        async with self._turn:
            try:
                return await greenlet_spawn(self._fetch, sql, arguments)
            except BaseException:
                self.drop()
                raise

    def _fetch(self, sql: str, arguments: tuple[str | None, ...]) -> Any:
        if self._connection is None:
            self._connection = self._connect()
        cursor = self._connection.cursor()
        cursor.execute(sql, arguments)
        row = cursor.fetchone()
        cursor.close()
        return row

    def drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.driver_connection.terminate()


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
            logger.debug("outcomes of commits can't be looked up: %s", summarize(error))
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
        self, row: bytes | None, lost: Exception, given_up_at: float, *, only_read: bool
    ) -> None:
        """Return if a transaction was committed, whose answer was lost.

        Args:
            row: The answer to `QUESTION`, if it has arrived.
            lost: The error by which the answer was lost.
            given_up_at: The time at which waiting for the answer ends, of the event
                loop's clock.
            only_read: Its statements have surely written nothing.

        Raises:
            NotCommittedError: It was not committed.
            CommitOutcomeUnknownError: It can't be known.
        """
        if row is None:
            raise unknown_outcome(NO_ID, row) from lost
        transaction_id, *others = values_in(row)
        if transaction_id is None:
            if not only_read:
                raise unknown_outcome(MAY_HAVE_WRITTEN, row) from lost
            self._tell("which only read, was nothing to commit")
            return
        question = Question(transaction_id, *map(str, others))
        until = given_up_at + self._commit_timeout * (LOOK_UP_SHARE - ANSWER_SHARE)
        # A task of its own, because it uses timeouts, which cancel their task.
        look_up = asyncio.ensure_future(self._look_up(question, until))
        shielding_tasks.add(look_up)
        is_committed, reason = await look_up
        if is_committed is None:
            raise unknown_outcome(reason, row) from lost
        if not is_committed:
            self._tell(f"{transaction_id} was not committed")
            raise NotCommittedError(
                "the connection was lost in COMMIT, and the server says: not committed"
            ) from lost
        self._tell(f"{transaction_id} was committed")

    def _tell(self, outcome: str) -> None:
        self._totals.settled += 1
        logger.warning("the answer to a COMMIT was lost, and looked up: transaction %s", outcome)

    async def _look_up(self, question: Question, until: float) -> tuple[bool | None, str]:
        """Return whether it was committed, or None and the reason why that is not known."""
        reason, pause = "the server could not be asked in time", FIRST_PAUSE
        if not self._users:
            # Another event loop may have used the last ones.
            self._asking = SharedConnection(self._connect)
            self._confirming = SharedConnection(self._connect)
        self._users += 1
        try:
            async with asyncio.timeout_at(until):
                while True:
                    try:
                        status, is_replicated = await self._asking.ask(
                            LOOK_UP, *question[:3], self.system_identifier, question.asked_at
                        )
                        if status == "aborted":
                            return False, ""
                        if status == "committed":
                            if is_replicated:
                                reason = WAITING
                                await self._confirming.ask(CONFIRM)
                            return True, ""
                        if status == "in progress":
                            found = await self._asking.ask(
                                END_BACKEND, question.transaction_id, question.asked_at
                            )
                            reason = WAITING if found and found[0] else IN_PROGRESS
                        else:
                            reason = status or "the server does not know its id any more"
                            if status != IN_RECOVERY:
                                break
                            # The primary may come back, at another host of the URL.
                            self._asking.drop()
                    except NotInitializedError:
                        reason = "the manager was closed meanwhile"
                        break
                    except CommitOutcomeUnknownError as error:  # from CONFIRM
                        reason = str(error)
                        break
                    except Exception as error:
                        if reason != WAITING:
                            reason = f"the server could not be asked: {summarize(error)}"
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except TimeoutError:
            pass
        finally:
            self._users -= 1
            if not self._users:
                self._asking.drop()
                self._confirming.drop()
        return None, reason


def unknown_outcome(reason: str, row: bytes | None) -> CommitOutcomeUnknownError:
    """Make the error of a COMMIT whose outcome could not be settled.

    Args:
        reason: Why not.
        row: The answer to `QUESTION`, if it has arrived.
    """
    return CommitOutcomeUnknownError(
        f"the COMMIT was sent, and its outcome can't be told: {reason}. Look in the database "
        "whether it was carried out before you run the transaction again",
        transaction_id=transaction_id_in(row),
        reason=reason,
    )


def transaction_id_in(row: bytes | None) -> int | None:
    """Return the id of the transaction, if the answer to `QUESTION` has arrived with one."""
    found = None if row is None else values_in(row)[0]
    return None if found is None else int(found)
