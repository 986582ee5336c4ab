"""The spans of transactions, savepoints and statements, and the duration of statements."""

from __future__ import annotations

import os
from time import perf_counter_ns, time_ns
from typing import Any

from opentelemetry.context import Context, attach, create_key, get_current, set_value
from opentelemetry.metrics import Histogram
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from sessionwire._database.call_sites import CallSite
from sessionwire._database.driver_errors import sqlstate
from sessionwire._database.observer import OBSERVED
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.transaction_settings import SENT_AHEAD

from .names import (
    ATTEMPT,
    CODE_FUNCTION_NAME,
    CONNECTION_WAIT,
    DB_COLLECTION_NAME,
    DB_NAMESPACE,
    DB_OPERATION_NAME,
    DB_QUERY_SUMMARY,
    DB_QUERY_TEXT,
    DB_RESPONSE_STATUS_CODE,
    ERROR_TYPE,
    ISOLATION,
    JOINED,
    OUTCOME,
    PROPAGATION,
    READ_ONLY,
    RETRY_REASON,
    SAVEPOINT,
    SETTLED,
)
from .place import Attributes, Place
from .sql_summary import hide_values, summarize_statement

# In a context of OpenTelemetry: the innermost transaction around the running code.
INNERMOST = create_key("sessionwire-transaction")
WAITED = "sessionwire_waited"  # in the info of a place in the pool: seconds
BEGAN = "sessionwire_began"  # on SQLAlchemy's context of an execution: nanoseconds
# No trace is noted beside a measured time, which would cost a tenth more.
WITHOUT_TRACE = Context()
ERROR = Status(StatusCode.ERROR)  # without a text, because that of an error has values in it
# What a transaction's own span shows.
WITHOUT_SPAN = (SENT_AHEAD, "SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")
HIDES_VALUES = ("postgresql", "sqlite")  # whose literals are known
MAX_STATEMENTS = 1000  # whose attributes are remembered
MAX_TEXT = 8192  # characters of a statement in a span
NO_TRANSACTION = "transaction"  # the name of a span whose call site is unknown


def function_name(call_site: CallSite | None) -> str | None:
    """Return the name of the user's function, such as `Accounts.balance`."""
    return None if call_site is None else call_site[0].co_qualname


def describe_error(*errors: BaseException | None) -> Attributes:
    """Return the type of the first error, and the first code that one of them has."""
    kind = type(errors[0])
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    described: Attributes = {ERROR_TYPE: f"{module}{kind.__qualname__}"}
    codes = [code for error in errors if (code := sqlstate(error))]
    if codes:
        described[DB_RESPONSE_STATUS_CODE] = codes[0]
    return described


class TransactionSpan:
    """The span of a transaction or savepoint.

    While its block is open it is the current one, so that spans of users become its
    children. Blocks end in any order, and in other tasks than they began in. So no
    token is kept: at the end, the former context is made the current one only if the
    span still is current.
    """

    __slots__ = (
        "_enclosing",
        "_former",
        "_has_ended",
        "_is_savepoint",
        "_process",
        "_was_settled",
        "function",
        "span",
        "waited",
    )

    def __init__(
        self, span: Span, former: Context, function: str | None, *, is_savepoint: bool
    ) -> None:
        self.span = span
        self.function = function
        self.waited: float | None = None  # seconds for its connection
        self._enclosing = _innermost(former)
        self._former = former
        self._is_savepoint = is_savepoint
        self._has_ended = self._was_settled = False
        self._process = os.getpid()

    def attach(self) -> None:
        """Make the span the current one."""
        # The context is not kept: it would know this, and this it, in a cycle.
        attach(set_value(INNERMOST, self, set_span_in_context(self.span, self._former)))

    def innermost_in(self, context: Context) -> TransactionSpan | None:
        """Return the innermost transaction of a context, or None if this is not around it."""
        innermost = found = _innermost(context)
        while found is not None and found is not self:
            found = found._enclosing
        return None if found is None else innermost

    def _is_current_in(self, context: Context) -> bool:
        return _innermost(context) is self and get_current_span(context) is self.span

    def join(self, call_site: CallSite | None, propagation: str) -> None:
        if self.span.is_recording():
            name = function_name(call_site) or ""
            self.span.add_event(JOINED, {CODE_FUNCTION_NAME: name, PROPAGATION: propagation})

    def settle(self) -> None:
        self._was_settled = True

    def end(
        self,
        outcome: str | None,
        error: BaseException | None = None,
        retry_reason: str | None = None,
    ) -> None:
        if self._has_ended or os.getpid() != self._process:  # The parent process ends it.
            return
        self._has_ended = True
        span = self.span
        if span.is_recording():
            span.set_attributes(self._describe_end(outcome, error, retry_reason))
            if error is not None:
                span.set_status(ERROR)
        span.end()
        if self._is_current_in(get_current()):
            context = self._former
            # One whose transaction has ended already is current nowhere.
            while (
                (inner := _innermost(context)) is not None
                and inner._has_ended
                and inner._is_current_in(context)
            ):
                context = inner._former
            attach(context)

    def _describe_end(
        self, outcome: str | None, error: BaseException | None, retry_reason: str | None
    ) -> Attributes:
        attributes: Attributes = {}
        if outcome is not None:
            attributes[SAVEPOINT if self._is_savepoint else OUTCOME] = outcome
        if self.waited is not None:
            attributes[CONNECTION_WAIT] = self.waited
        if self._was_settled:
            attributes[SETTLED] = True
        if retry_reason is not None:
            attributes[RETRY_REASON] = retry_reason
        if error is not None:
            attributes |= describe_error(error, error.__cause__)
        return attributes


def _innermost(context: Context) -> TransactionSpan | None:
    """Return the innermost transaction in which a context was made, or None."""
    return context.get(INNERMOST)  # type: ignore[return-value]  # a Context maps to objects


class _Reader:
    """The block of a statement without a transaction."""

    __slots__ = ("function",)
    waited: float | None = None

    def __init__(self, function: str | None) -> None:
        self.function = function


class _Statement:
    """What spans and metrics say of a statement: the same for each of its executions."""

    __slots__ = ("attributes", "measured", "name")

    def __init__(self, name: str, attributes: Attributes, measured: Attributes) -> None:
        self.name = name
        self.attributes = attributes
        self.measured = measured


class Spans:
    """Makes the spans of one database.

    Args:
        tracer: Of OpenTelemetry.
        duration: The histogram of the durations of statements.
    """

    def __init__(self, tracer: Tracer, duration: Histogram) -> None:
        self._tracer = tracer
        self._duration = duration
        self.place: Place | None = None
        self._hides_values = False
        self._statements: dict[tuple[str, str | None], _Statement | None] = {}
        self._transactions: dict[object, tuple[str, Attributes]] = {}
        self._readers: dict[object, _Reader] = {}

    # Transactions

    def begin(
        self,
        call_site: CallSite | None,
        options: ConnectionOptions,
        propagation: str | None = None,
        *,
        attempt: int = 1,
        is_block: bool = True,
        is_savepoint: bool = False,
    ) -> TransactionSpan:
        code = None if call_site is None else call_site[0]
        key = code, propagation, options.isolation, options.read_only
        found = self._transactions.get(key)
        if found is None:
            found = self._describe_transaction(call_site, options, propagation)
            _remember(self._transactions, key, found)
        name, attributes = found
        former = get_current()
        span = self._tracer.start_span(name, former, SpanKind.INTERNAL, attributes)
        if attempt > 1:
            span.set_attribute(ATTEMPT, attempt)
        began = TransactionSpan(span, former, code and code.co_qualname, is_savepoint=is_savepoint)
        if is_block:
            began.attach()
        return began

    def _describe_transaction(
        self, call_site: CallSite | None, options: ConnectionOptions, propagation: str | None
    ) -> tuple[str, Attributes]:
        function = function_name(call_site)
        attributes: Attributes = {READ_ONLY: options.read_only}
        if self.place is not None:
            namespace = self.place.attributes.get(DB_NAMESPACE)
            if namespace is not None:
                attributes[DB_NAMESPACE] = namespace
        if function is not None:
            attributes[CODE_FUNCTION_NAME] = function
        if propagation is not None:
            attributes[PROPAGATION] = propagation
        if options.isolation is not None:
            attributes[ISOLATION] = options.isolation
        return function or NO_TRANSACTION, attributes

    def connect(
        self,
        connection: Connection,
        transaction: TransactionSpan | None,
        call_site: CallSite | None,
    ) -> None:
        if transaction is None:
            code = None if call_site is None else call_site[0]
            reader = self._readers.get(code)
            if reader is None:
                reader = _Reader(function_name(call_site))
                _remember(self._readers, code, reader)
            connection.__dict__[OBSERVED] = reader
        else:
            connection.__dict__[OBSERVED] = transaction
            if transaction.waited is None:
                transaction.waited = (connection.connection.record_info or {}).get(WAITED)

    def settle(self) -> None:
        """Note that the outcome of the transaction around this code was looked up."""
        current = _innermost(get_current())
        if current is not None:
            current.settle()

    # Statements

    def listen(self, engine: Engine, place: Place) -> None:
        """Listen to the statements of an engine."""
        if place != self.place:
            self.place = place
            self._hides_values = engine.dialect.name in HIDES_VALUES
            self._statements.clear()
            self._transactions.clear()
        event.listen(engine, "before_cursor_execute", self._on_begin)
        event.listen(engine, "after_cursor_execute", self._on_end)
        # Other listeners wait there for what a cancelled statement has left.
        event.listen(engine, "handle_error", self._on_error, insert=True)

    def stop_listening(self, engine: Engine) -> None:
        event.remove(engine, "before_cursor_execute", self._on_begin)
        event.remove(engine, "after_cursor_execute", self._on_end)
        event.remove(engine, "handle_error", self._on_error)

    def _on_begin(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, _: bool
    ) -> None:
        context.sessionwire_began = perf_counter_ns()

    def _on_end(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, _: bool
    ) -> None:
        took = perf_counter_ns() - context.sessionwire_began
        context.sessionwire_began = None  # An error in reading the result is none of the statement.
        self._record(connection, sql, parameters, took)

    def _on_error(self, failure: ExceptionContext) -> None:
        context: Any = failure.execution_context
        connection, sql = failure.connection, failure.statement
        began = getattr(context, BEGAN, None)
        if began is None or connection is None or sql is None:
            return
        took = perf_counter_ns() - began
        context.sessionwire_began = None
        error = failure.sqlalchemy_exception or failure.original_exception
        self._record(connection, sql, failure.parameters, took, describe_error(error))

    def _record(
        self,
        connection: Connection,
        sql: str,
        parameters: Any,
        took: int,
        failure: Attributes | None = None,
    ) -> None:
        """Make the span of a statement that has ended, and measure it.

        The span is made only now, with its begin of then. So none is ever left open.

        Args:
            connection: The connection that it was sent on.
            sql: Its text.
            parameters: Its parameters, of which nothing is told.
            took: Nanoseconds.
            failure: What is said of its error.
        """
        observed: Any = connection.__dict__.get(OBSERVED)
        function = None if observed is None else observed.function
        parent = get_current()
        if isinstance(observed, TransactionSpan):
            if (inner := observed.innermost_in(parent)) is not None:
                function = inner.function
            else:
                parent = set_span_in_context(observed.span, parent)
        key = sql, function
        try:
            statement = self._statements[key]
        except KeyError:
            statement = self._describe_statement(key, parameters)
        if statement is None:
            return
        attributes, measured = statement.attributes, statement.measured
        if failure is not None:
            attributes, measured = attributes | failure, measured | failure
        end = time_ns()
        span = self._tracer.start_span(
            statement.name, parent, SpanKind.CLIENT, attributes, start_time=end - took
        )
        if failure is not None:
            span.set_status(ERROR)
        span.end(end)
        self._duration.record(took / 1e9, measured, WITHOUT_TRACE)

    def _describe_statement(
        self, key: tuple[str, str | None], parameters: Any
    ) -> _Statement | None:
        sql, function = key
        statement: _Statement | None = None
        if not sql.startswith(WITHOUT_SPAN):
            statement = self._new_statement(sql, function, has_parameters=bool(parameters))
        if len(sql) <= MAX_TEXT:
            _remember(self._statements, key, statement)
        return statement

    def _new_statement(self, sql: str, function: str | None, *, has_parameters: bool) -> _Statement:
        summary = summarize_statement(sql)
        measured: Attributes = dict(self.place.attributes) if self.place else {}
        if summary.operation is not None:
            measured[DB_OPERATION_NAME] = summary.operation
        if summary.table is not None:
            measured[DB_COLLECTION_NAME] = summary.table
        attributes = {**measured, DB_QUERY_SUMMARY: summary.text}
        if summary.operation is None:  # Otherwise it says nothing new, and each one costs.
            measured[DB_QUERY_SUMMARY] = summary.text
        if has_parameters:
            attributes[DB_QUERY_TEXT] = sql[:MAX_TEXT]
        elif self._hides_values:
            attributes[DB_QUERY_TEXT] = hide_values(sql[:MAX_TEXT])
        if function is not None:
            attributes[CODE_FUNCTION_NAME] = function
        return _Statement(summary.text or "SQL", attributes, measured)


def _remember(cache: dict[Any, Any], key: object, value: object) -> None:
    """Add to a cache, which drops the oldest when it is full."""
    while len(cache) >= MAX_STATEMENTS:
        cache.pop(next(iter(cache)))
    cache[key] = value
