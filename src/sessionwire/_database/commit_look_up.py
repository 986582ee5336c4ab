"""`LookUp`: asks on another connection whether a transaction was committed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple

from sqlalchemy.util import greenlet_spawn

from sessionwire._error_reports import summarize
from sessionwire.errors import CommitOutcomeUnknownError, NotInitializedError

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two questions
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
WAITING = "it waits for a synchronous standby"
IN_PROGRESS = "it is still in progress"


class Outcome(Enum):
    COMMITTED = auto()
    NOT_COMMITTED = auto()
    UNKNOWN = auto()


class Question(NamedTuple):
    """What was asked ahead of COMMIT."""

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
        if self._connection.driver_connection.NUMBERS_PARAMETERS:
            cursor.execute(sql, arguments)
        else:
            names = {f"p{number}": value for number, value in enumerate(arguments, 1)}
            cursor.execute(re.sub(r"\$(\d)", r"%(p\1)s", sql), names)
        row = cursor.fetchone()
        cursor.close()
        return row

    def drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.driver_connection.terminate()


class LookUp:
    """The look-up of one transaction.

    Args:
        question: What was asked ahead of its COMMIT.
        system_identifier: That of the database system.
        asking: The connection to ask on.
        confirming: The connection for a small commit that synchronous standbys confirm.
    """

    def __init__(
        self,
        question: Question,
        system_identifier: str | None,
        asking: SharedConnection,
        confirming: SharedConnection,
    ) -> None:
        self._question = question
        self._system_identifier = system_identifier
        self._asking = asking
        self._confirming = confirming
        self.reason = "the server could not be asked in time"  # why the outcome is unknown

    async def run(self, until: float) -> Outcome:
        """Ask until the outcome is known or can't be known.

        Args:
            until: When to give up, by the clock of the event loop.
        """
        pause = FIRST_PAUSE
        try:
            async with asyncio.timeout_at(until):
                while (outcome := await self._ask()) is None:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                return outcome
        except TimeoutError:
            return Outcome.UNKNOWN

    async def _ask(self) -> Outcome | None:
        """Return the outcome, or None if a later answer may be another one."""
        try:
            status, has_standbys = await self._asking.ask(
                LOOK_UP, *self._question[:3], self._system_identifier, self._question.asked_at
            )
            if status == "aborted":
                return Outcome.NOT_COMMITTED
            if status == "committed":
                if has_standbys:
                    self.reason = WAITING
                    await self._confirming.ask(CONFIRM)
                return Outcome.COMMITTED
            if status == "in progress":
                self.reason = await self._end_backend()
                return None
            self.reason = status or "the server does not know its id any more"
        except NotInitializedError:
            self.reason = "the manager was closed meanwhile"
        except CommitOutcomeUnknownError as error:  # The small commit was not confirmed.
            self.reason = str(error)
        except Exception as error:
            if self.reason != WAITING:
                self.reason = f"the server could not be asked: {summarize(error)}"
            return None
        if self.reason != IN_RECOVERY:
            return Outcome.UNKNOWN
        self._asking.drop()  # The primary may come back, at another host of the URL.
        return None

    async def _end_backend(self) -> str:
        """End the server process of the transaction. Return why it is not done yet."""
        arguments = self._question.transaction_id, self._question.asked_at
        found = await self._asking.ask(END_BACKEND, *arguments)
        return WAITING if found and found[0] else IN_PROGRESS
