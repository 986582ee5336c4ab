"""What the library logs: one tree of loggers below `sessionwire`, and all its events."""

from __future__ import annotations

import logging
from dataclasses import dataclass


@dataclass(frozen=True)
class LogEvent:
    """One event, which a program knows by `record.event`.

    Attributes:
        place: The logger is `sessionwire.<place>`.
        level: The level, by `logging`.
        name: The value of `record.event`.
        message: The message. Its fields are attributes of the record too.
    """

    place: str
    level: int
    name: str
    message: str

    def log(self, *, failure: BaseException | None = None, **fields: object) -> None:
        """Log the event.

        Args:
            failure: An error, which is logged with its traceback.
            **fields: All fields of the message, and perhaps further ones.
        """
        logger = logging.getLogger(f"sessionwire.{self.place}")
        if logger.isEnabledFor(self.level):
            extra = {"event": self.name, **fields}
            values = (fields,) if fields else ()
            logger.log(
                self.level, self.message, *values, exc_info=failure, extra=extra, stacklevel=2
            )


DRIVER_UNCERTIFIED = LogEvent(
    "open",
    logging.WARNING,
    "driver_uncertified",
    "%(driver)s is no certified driver: read-only blocks can write; a cancelled statement may go "
    "on in the server; a cancellation or a deadline in a savepoint costs the whole transaction; a "
    "COMMIT that the server answers with a rollback may pass for success; settings= and "
    "session_settings raise; connect_timeout holds for open() only; application_name, "
    "pool.ping_after and tcp_timeout are ignored; connections of a closed event loop or of a "
    "parent process stay open; retries know the errors that have an SQLSTATE, and lost connections",
)
WAITING_FOR_DATABASE = LogEvent(
    "open",
    logging.WARNING,
    "waiting_for_database",
    "waiting up to %(timeout)g s for the database: %(reason)s",
)
POOLER_IGNORES_SETTINGS = LogEvent(
    "open",
    logging.WARNING,
    "pooler_ignores_settings",
    "the pooler in front of the server ignores %(ignored)s: write pooler: %(setting)s beside url, "
    "which lets them reach the server",
)
POOLER_SHARES_SESSIONS = LogEvent(
    "open",
    logging.WARNING,
    "pooler_shares_sessions",
    "a pooler in front of the server gives each transaction another session: write pooler: "
    "transaction beside url, so that nothing here needs a session of its own",
)
POOLER_FOUND = LogEvent(
    "open",
    logging.WARNING,
    "pooler_found",
    "a pooler or proxy answers in place of the server: write pooler: transaction beside url if it "
    "gives each transaction another session, as PgBouncer does with pool_mode = transaction, and "
    "otherwise pooler: session",
)
LOOK_UPS_IMPOSSIBLE = LogEvent(
    "open",
    logging.DEBUG,
    "look_ups_impossible",
    "outcomes of commits can't be looked up: %(error)s",
)
CONNECTION_HELD = LogEvent(
    "pool", logging.WARNING, "connection_held", "a connection is held for long: %(holder)s"
)
ATTEMPT_FAILED = LogEvent(
    "retry",
    logging.INFO,
    "attempt_failed",
    "attempt %(attempt)d of %(attempts)d failed: %(error)s",
)
COMMIT_LOOKED_UP = LogEvent(
    "commit",
    logging.WARNING,
    "commit_looked_up",
    "the answer to a COMMIT was lost, and looked up: transaction %(outcome)s",
)
ROLLBACK_FAILED = LogEvent(
    "rollback",
    logging.WARNING,
    "rollback_failed",
    "the rollback failed, and its connection was closed: %(error)s",
)
HOOK_FAILED = LogEvent("hooks", logging.ERROR, "hook_failed", "the on_commit hook %(hook)s failed")
SLOW_STATEMENT = LogEvent(
    "slow",
    logging.WARNING,
    "slow_statement",
    "a statement took %(duration).3g s, at %(line)s, for %(call_site)s: %(statement)s "
    "[%(parameter_types)s]",
)
SLOW_BLOCK = LogEvent(
    "slow", logging.WARNING, "slow_block", "a block took %(duration).3g s: %(call_site)s"
)
WAITING_FOR_MIGRATIONS = LogEvent(
    "migrations",
    logging.WARNING,
    "waiting_for_migrations",
    "waiting for another process, which migrates the database",
)
DATABASE_AHEAD = LogEvent(
    "migrations",
    logging.WARNING,
    "database_ahead",
    "%(database)s is ahead of this build: it is at %(unknown)s, and this build ends at %(heads)s; "
    "it stays as it is",
)
DRAIN_BEGINS = LogEvent(
    "close",
    logging.INFO,
    "drain_begins",
    "closing: waiting up to %(timeout)g s for %(blocks)d open block(s)",
)
BLOCK_CUT_OFF = LogEvent(
    "close", logging.WARNING, "block_cut_off", "closing: cut off a block, %(block)s"
)
WORK_UNDONE_IN_SANDBOX = LogEvent(
    "testing",
    logging.WARNING,
    "work_undone_in_sandbox",
    "what was committed at %(committed)s is rolled back together with the enclosing transaction, "
    "which was begun at %(begun)s: in a sandbox both share one connection",
)

EVENTS = tuple(event for event in tuple(globals().values()) if isinstance(event, LogEvent))
