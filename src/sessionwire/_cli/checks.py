"""Connect as the service would, and look for what goes wrong in production."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from time import monotonic

from sessionwire._database.options import WITHOUT_HOOKS
from sessionwire._log_events import POOLER_FOUND
from sessionwire.errors import SessionwireError
from sessionwire.manager import DatabaseSessionManager

from .findings import Finding, error, ok, warning
from .postgresql_checks import POSTGRESQL_CHECKS
from .sqlite_checks import SQLITE_CHECKS


async def check(manager: DatabaseSessionManager, processes: int) -> AsyncIterator[Finding]:
    """Open the manager, look at its database, and close it.

    Args:
        manager: The manager.
        processes: How many processes of the service there are.
    """
    began = monotonic()
    with _warnings_of_open() as warnings:
        try:
            await manager.open()
        except SessionwireError as failure:
            yield error("connection", str(failure))
            return
    try:
        seconds = monotonic() - began
        yield ok("connection", f"{manager.status().name} answers; open() took {seconds:.2f} s")
        for message in warnings:
            yield warning("connection", message)
        async for finding in _look(manager, processes):
            yield finding
    finally:
        await manager.close()


async def _look_at_migrations(manager: DatabaseSessionManager) -> AsyncIterator[Finding]:
    if manager.migrations is None:
        return
    state = await manager.migration_state()
    if state.is_ahead:
        yield warning(
            "migrations",
            f"the database is ahead of this build, at {', '.join(state.current)}: a newer build "
            "has migrated it",
        )
    elif state.is_behind:
        yield error(
            "migrations",
            f"the database lacks {', '.join(state.pending)}: run `sessionwire migrate`",
        )
    else:
        yield ok("migrations", f"up to date, at {', '.join(state.current)}")


async def _look(manager: DatabaseSessionManager, processes: int) -> AsyncIterator[Finding]:
    checks = SQLITE_CHECKS if manager.engine.dialect.name == "sqlite" else POSTGRESQL_CHECKS
    engine = manager.engine.execution_options(isolation_level="AUTOCOMMIT", **{WITHOUT_HOOKS: True})
    async with engine.connect() as connection:
        for subject, look in checks.items():
            try:
                async for finding in look(connection, manager, processes):
                    yield finding
            except Exception as failure:
                yield warning(subject, f"it can't be looked at: {_first_line(failure)}")
    try:
        async for finding in _look_at_migrations(manager):
            yield finding
    except Exception as failure:
        yield error("migrations", _first_line(failure))


def _first_line(failure: Exception) -> str:
    return str(getattr(failure, "orig", None) or failure).partition("\n")[0]


@contextmanager
def _warnings_of_open() -> Generator[list[str]]:
    """Collect what `open()` logs, instead of printing it."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(f"sessionwire.{POOLER_FOUND.place}"), Collector()
    propagates, logger.propagate = logger.propagate, False
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
