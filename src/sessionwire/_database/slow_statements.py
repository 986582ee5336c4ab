"""Log slow statements, and name the block in the text of each statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from sessionwire._log_events import SLOW_STATEMENT
from sessionwire.settings import DatabaseSettings
from sessionwire.status import SlowStatement

from .call_sites import BY_HAND, line_of, running_line
from .options import CALL_SITE
from .totals import Totals

BEGAN = "_sessionwire_began"  # the attribute of an execution, by the monotonic clock
# Their text is read elsewhere, and they tell nothing.
SAVEPOINT_VERBS = ("SAVEPOINT", "RELEASE", "ROLLBACK")


def watch_statements(engine: Engine, settings: DatabaseSettings, totals: Totals) -> None:
    """Do with the statements of an engine what the settings ask for."""
    if settings.annotate_statements:
        event.listen(engine, "before_cursor_execute", _annotate, retval=True)
    if settings.slow_statement is not None:
        _log_slow_statements(engine, settings.slow_statement, totals)


def _annotate(
    connection: Connection,
    _cursor: Any,
    statement: str,
    parameters: Any,
    _context: Any,
    _executemany: bool,
) -> tuple[str, Any]:
    site = connection.__dict__.get(CALL_SITE)
    if site is not None and not statement.startswith(SAVEPOINT_VERBS):
        statement = f"{statement} /* {site[0].co_qualname} */"
    return statement, parameters


def _log_slow_statements(engine: Engine, limit: float, totals: Totals) -> None:
    def end(connection: Connection, context: Any, statement: str) -> None:
        duration = monotonic() - context.__dict__[BEGAN]
        if duration > limit:
            slow = SlowStatement(
                at=datetime.now(UTC),
                duration=duration,
                statement=statement,
                parameter_types=_types(context.parameters),
                call_site=call_site_of(connection),
                line=running_line(),
            )
            totals.slow_statements.appendleft(slow)
            SLOW_STATEMENT.log(
                duration=duration,
                statement=statement,
                parameter_types=", ".join(slow.parameter_types),
                call_site=slow.call_site,
                line=slow.line,
            )

    @event.listens_for(engine, "before_cursor_execute")
    def begin(
        _connection: Any, _cursor: Any, _statement: str, _parameters: Any, *rest: Any
    ) -> None:
        context, _executemany = rest
        context.__dict__[BEGAN] = monotonic()

    @event.listens_for(engine, "after_cursor_execute")
    def end_well(
        connection: Connection, _cursor: Any, statement: str, _parameters: Any, *rest: Any
    ) -> None:
        context, _executemany = rest
        end(connection, context, statement)

    @event.listens_for(engine, "handle_error")
    def end_badly(error: ExceptionContext) -> None:
        context = error.execution_context
        if error.connection is not None and context is not None and BEGAN in context.__dict__:
            end(error.connection, context, error.statement or "")


def call_site_of(connection: Connection) -> str:
    """Return the function or line of the block that uses a connection."""
    attributes = connection.__dict__
    return line_of(attributes[CALL_SITE]) if CALL_SITE in attributes else BY_HAND


def _types(parameters: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of the types of the first row of parameters."""
    first: Any = parameters[0] if parameters else ()
    values = cast("Mapping[str, Any]", first).values() if isinstance(first, Mapping) else first
    return tuple(type(value).__name__ for value in values)
