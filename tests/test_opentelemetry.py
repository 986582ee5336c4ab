"""Spans and metrics, as an application's SDK of OpenTelemetry gets them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import bindparam, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

import sessionwire
from sessionwire import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    PoolSettings,
    Propagation,
    TransactionManager,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    read_only,
    transactional,
)
from sessionwire.opentelemetry import Instrumentation, instrument
from sessionwire.testing import sandbox

from .asgi_requests import get
from .conftest import Postgres
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, OnPostgres, kill, until

QUERY = text("SELECT 1")


class Spans:
    """What the application's exporter has got."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("the application")

    def take(self) -> list[ReadableSpan]:
        """Return the spans since the last look, in the order of their begin."""
        found = sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        self.exporter.clear()
        return found

    def tree(self) -> list[str]:
        """Return the names of the spans since the last look, indented by their depth."""
        return self.tree_of(self.take())

    @staticmethod
    def tree_of(spans: list[ReadableSpan]) -> list[str]:
        parents = {span.context.span_id: span.parent for span in spans if span.context}
        assert len(parents) == len(spans)

        def depth(parent: trace.SpanContext | None) -> int:
            is_known = parent is not None and parent.span_id in parents
            return 1 + depth(parents[parent.span_id]) if is_known and parent else 0

        return [f"{'  ' * depth(span.parent)}{span.name}" for span in spans]


class Metrics:
    """What the application's reader collects."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def collect(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def values(self, name: str, attribute: str = "") -> dict[Any, Any]:
        return {point.attributes.get(attribute): point.value for point in self.collect(name)}

    def value(self, name: str) -> Any:
        (value,) = self.values(name).values()
        return value


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def telemetry(
    manager: DatabaseSessionManager, spans: Spans, metrics: Metrics
) -> Iterator[Instrumentation]:
    with instrument(
        manager, tracer_provider=spans.provider, meter_provider=metrics.provider
    ) as instrumentation:
        yield instrumentation


class Notebook:
    """A service."""

    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session = session
        self.transaction = transaction

    @transactional(isolation="SERIALIZABLE")
    async def write(self, *texts: str) -> None:
        for each in texts:
            await self.add(each)
        await self.count()

    @transactional
    async def add(self, text: str) -> None:
        self.session.add(Note(text=text))
        await self.session.flush()

    @read_only
    async def count(self) -> int:
        return await self.session.scalar(select(func.count()).select_from(Note)) or 0

    @transactional(Propagation.NESTED)
    async def try_to_add(self, text: str) -> None:
        self.session.add(Note(text=text))
        await self.session.flush()

    @transactional(Propagation.REQUIRES_NEW)
    async def add_apart(self, text: str) -> None:
        self.session.add(Note(text=text))

    @transactional(retries=2, retry_on=LookupError)
    async def add_at_the_third_attempt(self, attempts: Iterator[int]) -> None:
        self.session.add(Note(text="retried"))
        await self.session.flush()
        if next(attempts) < 2:
            raise LookupError

    @transactional
    async def wait(self, reached: asyncio.Event) -> None:
        await self.session.execute(QUERY)
        reached.set()
        await asyncio.Event().wait()


@pytest.fixture
def notebook(manager: DatabaseSessionManager, telemetry: Instrumentation) -> Notebook:
    return Notebook(CurrentSession(manager), manager.transaction)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


class TestStatements:
    async def test_a_read_is_one_span_with_the_name_of_its_method(
        self, notebook: Notebook, spans: Spans, manager: DatabaseSessionManager, backend: str
    ) -> None:
        await notebook.count()
        (span,) = spans.take()
        assert span.name == "SELECT note"
        assert (span.kind, span.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
        expected = {
            "code.function.name": "Notebook.count",
            "db.collection.name": "note",
            "db.namespace": manager.engine.url.database,
            "db.operation.name": "SELECT",
            "db.query.summary": "SELECT note",
            "db.query.text": "SELECT count(*) AS count_1 \nFROM note",
            "db.system.name": backend,
        }
        if backend == "postgresql":
            expected["server.address"] = manager.engine.url.query["host"]
        assert attributes(span) == expected
        assert span.end_time is not None
        assert span.start_time is not None
        assert span.end_time > span.start_time

    async def test_the_text_has_placeholders_and_no_value(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="secret"))
            await session.execute(update(Note).where(Note.text == "secret").values(parent_id=None))
            await session.execute(
                text("SELECT id FROM note WHERE text = :text").bindparams(text="secret")
            )
            await session.execute(
                text("SELECT id FROM note WHERE text = 'secret''s' AND id < 47 -- it's 47\n")
            )
            await session.execute(
                delete(Note).where(Note.text.in_(bindparam("texts"))), {"texts": ["secret"]}
            )
        *statements, _ = sorted(spans.take(), key=lambda span: span.kind == SpanKind.INTERNAL)
        texts = [attributes(span)["db.query.text"] for span in statements]
        assert not any("secret" in each for each in texts)
        assert texts[3] == "SELECT id FROM note WHERE text = ? AND id < ? -- it's 47\n"
        assert [span.name for span in statements] == [
            "INSERT note",
            "UPDATE note",
            "SELECT note",
            "SELECT note",
            "DELETE note",
        ]

    async def test_a_failure_has_its_code_and_no_message(
        self,
        manager: DatabaseSessionManager,
        telemetry: Instrumentation,
        spans: Spans,
        metrics: Metrics,
        backend: str,
    ) -> None:
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="twice"))
                await session.execute(insert(Note).values(text="twice"))
        transaction, _, failed = spans.take()
        code = "23505" if backend == "postgresql" else "SQLITE_CONSTRAINT_UNIQUE"
        for span in (transaction, failed):
            assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
            assert attributes(span)["error.type"] == "sqlalchemy.exc.IntegrityError"
            assert attributes(span)["db.response.status_code"] == code
            assert not span.events
        durations = metrics.collect("db.client.operation.duration")
        assert {point.attributes.get("db.response.status_code") for point in durations} == {
            None,
            code,
        }

    async def test_statements_of_the_engine_itself_have_spans_too(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.engine.connect() as connection:
            await connection.execute(select(Note.id))
        (span,) = spans.take()
        assert span.name == "SELECT note"
        assert "code.function.name" not in attributes(span)

    async def test_a_long_text_is_cut(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            await session.execute(text(f"SELECT id FROM note WHERE id IN ({'1, ' * 5000}1)"))
        (span,) = spans.take()
        assert span.name == "SELECT note"
        assert len(attributes(span)["db.query.text"]) <= 8192


class TestTransactions:
    async def test_the_tree_of_a_transaction_is_that_of_its_blocks(
        self, notebook: Notebook, spans: Spans
    ) -> None:
        await notebook.write("a", "b")
        found = spans.take()
        assert spans.tree_of(found) == [
            "Notebook.write",
            "  INSERT note",
            "  INSERT note",
            "  SELECT note",
        ]
        span = found[0]
        seconds = attributes(span).pop("sessionwire.connection.wait")
        assert 0 <= seconds < 5
        assert attributes(span) == {
            "code.function.name": "Notebook.write",
            "db.namespace": notebook.transaction._database.engine.url.database,  # type: ignore[attr-defined]
            "sessionwire.connection.wait": seconds,
            "sessionwire.isolation": "SERIALIZABLE",
            "sessionwire.outcome": "committed",
            "sessionwire.propagation": "REQUIRED",
            "sessionwire.read_only": False,
        }
        assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
            (
                "sessionwire.joined",
                {"code.function.name": name, "sessionwire.propagation": propagation},
            )
            for name, propagation in (
                ("Notebook.add", "REQUIRED"),
                ("Notebook.add", "REQUIRED"),
                ("Notebook.count", "SUPPORTS"),
            )
        ]

    async def test_savepoints_and_new_transactions_are_spans_of_their_own(
        self,
        notebook: Notebook,
        spans: Spans,
        manager: DatabaseSessionManager,
    ) -> None:
        async with manager.transaction():
            await notebook.try_to_add("kept")
            with suppress(IntegrityError):
                await notebook.try_to_add("kept")
            await notebook.count()
        found = spans.take()
        assert spans.tree_of(found)[1:] == [
            "  Notebook.try_to_add",
            "    INSERT note",
            "  Notebook.try_to_add",
            "    INSERT note",
            "  SELECT note",
        ]
        ends = [attributes(span).get("sessionwire.savepoint") for span in found]
        assert ends == [None, "released", None, "rolled_back", None, None]
        assert attributes(found[2])["code.function.name"] == "Notebook.try_to_add"
        assert attributes(found[0])["sessionwire.outcome"] == "committed"

    @pytest.mark.several_connections("a transaction inside another one")
    async def test_a_new_transaction_inside_another_one_is_its_child(
        self, notebook: Notebook, spans: Spans, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(read_only=True) as session:
            await session.execute(QUERY)
            await notebook.add_apart("apart")
            await session.execute(QUERY)
        assert spans.tree()[1:] == [
            "  SELECT",
            "  Notebook.add_apart",
            "    INSERT note",
            "  SELECT",
        ]

    async def test_spans_of_the_application_are_inside(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        with spans.tracer.start_as_current_span("request"):
            async with manager.transaction() as session:
                with spans.tracer.start_as_current_span("work"):
                    await session.execute(QUERY)
                await session.execute(QUERY)
            with spans.tracer.start_as_current_span("afterwards"):
                pass
        request, block, *rest = spans.tree()
        assert (request, block.strip()) == (
            "request",
            "TestTransactions.test_spans_of_the_application_are_inside",
        )
        assert rest == ["    work", "      SELECT", "    SELECT", "  afterwards"]

    @pytest.mark.parametrize(
        ("outcome", "error"),
        [
            ("committed", None),
            ("rolled_back", LookupError),
            ("unexpected", UnexpectedRollbackError),
        ],
    )
    async def test_the_outcome_is_that_of_the_status(
        self,
        manager: DatabaseSessionManager,
        telemetry: Instrumentation,
        spans: Spans,
        outcome: str,
        error: type[Exception] | None,
    ) -> None:
        with suppress(LookupError, UnexpectedRollbackError):
            async with manager.transaction() as session:
                await session.execute(QUERY)
                if outcome == "unexpected":
                    with suppress(DBAPIError):
                        await session.execute(text("SELECT nothing"))
                if outcome == "rolled_back":
                    raise LookupError
        span = spans.take()[0]
        assert attributes(span)["sessionwire.outcome"] == outcome
        assert (span.status.status_code is StatusCode.ERROR) is (error is not None)
        if error is not None:
            assert attributes(span)["error.type"].rpartition(".")[2] == error.__name__

    async def test_a_rollback_on_demand_is_no_error(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(QUERY)
            manager.transaction.set_rollback_only()
        span = spans.take()[0]
        assert attributes(span)["sessionwire.outcome"] == "rolled_back"
        assert span.status.status_code is StatusCode.UNSET

    async def test_a_deadline_is_told(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.05) as session:
                await session.execute(QUERY)
                await asyncio.sleep(1)
        span = spans.take()[0]
        assert attributes(span)["sessionwire.outcome"] == "timed_out"

    async def test_each_attempt_is_a_span_that_says_why_there_is_another_one(
        self, notebook: Notebook, spans: Spans, metrics: Metrics
    ) -> None:
        with spans.tracer.start_as_current_span("request"):
            await notebook.add_at_the_third_attempt(iter(range(3)))
        found = spans.take()
        name = "Notebook.add_at_the_third_attempt"
        assert spans.tree_of(found) == ["request"] + [f"  {name}", "    INSERT note"] * 3
        told = [
            [
                attributes(span).get(f"sessionwire.{key}")
                for key in ("attempt", "retry.reason", "outcome")
            ]
            for span in found
            if span.name == name
        ]
        assert told == [
            [None, "retry_on", "rolled_back"],
            [2, "retry_on", "rolled_back"],
            [3, None, "committed"],
        ]
        assert metrics.values("sessionwire.retries", "sessionwire.retry.reason") == {"retry_on": 2}

    async def test_a_connect_block_has_a_span(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.connect() as connection:
            await connection.execute(QUERY)
        with pytest.raises(LookupError):
            async with manager.connect() as connection:
                await connection.execute(QUERY)
                raise LookupError
        first, inside, second, also_inside = spans.take()
        outcomes = [attributes(each)["sessionwire.outcome"] for each in (first, second)]
        assert outcomes == ["committed", "rolled_back"]
        for transaction, statement in ((first, inside), (second, also_inside)):
            assert statement.parent == transaction.context
        assert second.status.status_code is StatusCode.ERROR

    async def test_each_transaction_of_a_session_block_has_a_span(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="a"))
            await session.commit()
            session.add(Note(text="b"))
            await session.flush()
            await session.rollback()
            await session.execute(QUERY)
        found = [span for span in spans.take() if span.kind is SpanKind.INTERNAL]
        # A session that has only read commits nothing, and is not counted.
        outcomes = [attributes(span).get("sessionwire.outcome") for span in found]
        assert outcomes == ["committed", "rolled_back", None]

    async def test_a_transaction_in_a_session_that_has_read_takes_over(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async with manager.session() as session:
            await session.execute(QUERY)
            async with manager.transaction():
                session.add(Note(text="a"))
        found = spans.take()
        assert [line.count("  ") for line in spans.tree_of(found)] == [0, 1, 0, 1]
        outcomes = [attributes(span).get("sessionwire.outcome") for span in found]
        assert outcomes == [None, None, "committed", None]


class TestEnds:
    """Every span ends once, however its block ends; and the current span is the former one."""

    async def test_of_a_cancelled_block(self, notebook: Notebook, spans: Spans) -> None:
        reached = asyncio.Event()
        task = asyncio.create_task(notebook.wait(reached))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        transaction, _ = spans.take()
        assert attributes(transaction)["error.type"] == "asyncio.exceptions.CancelledError"
        assert attributes(transaction)["sessionwire.outcome"] == "rolled_back"

    async def test_of_a_generator_that_is_dropped(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        async def numbers() -> AsyncIterator[int]:
            async with manager.transaction(read_only=True) as session:
                for number in await session.scalars(text("SELECT 1 UNION SELECT 2")):
                    yield number

        with spans.tracer.start_as_current_span("request") as request:
            async with aclosing(numbers()) as generator:  # type: ignore[type-var]
                async for _ in generator:
                    break
            assert trace.get_current_span() is request
        assert spans.tree()[0] == "request"

    async def test_of_blocks_that_end_in_another_order(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        with spans.tracer.start_as_current_span("request") as request:
            outer, inner = manager.transaction(), manager.transaction(Propagation.SUPPORTS)
            savepoint = manager.transaction(Propagation.NESTED)
            await outer.__aenter__()
            await inner.__aenter__()
            await savepoint.__aenter__()
            with suppress(UnexpectedRollbackError):
                await outer.__aexit__(None, None, None)
            with suppress(UnexpectedRollbackError):
                await savepoint.__aexit__(None, None, None)
            with suppress(UnexpectedRollbackError):
                await inner.__aexit__(None, None, None)
            assert trace.get_current_span() is request
        assert sorted(line.count("  ") for line in spans.tree()) == [0, 1, 2]

    async def test_of_a_block_that_ends_in_another_task(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        block = manager.transaction()
        session = await block.__aenter__()

        async def end_it() -> None:
            with spans.tracer.start_as_current_span("another") as another:
                await session.execute(QUERY)
                await block.__aexit__(None, None, None)
                assert trace.get_current_span() is another

        await asyncio.create_task(end_it(), context=Context())
        assert sorted(spans.tree()) == sorted(
            [
                "TestEnds.test_of_a_block_that_ends_in_another_task",
                "  SELECT",
                "another",
            ]
        )

    async def test_of_a_block_that_is_cut_off_by_close(
        self, settings: DatabaseSettings, spans: Spans, metrics: Metrics
    ) -> None:
        manager = DatabaseSessionManager(settings.model_copy(update={"drain_timeout": 0.05}))
        with instrument(manager, tracer_provider=spans.provider, meter_provider=metrics.provider):
            await manager.open()
            spans.take()
            notebook = Notebook(CurrentSession(manager), manager.transaction)
            reached = asyncio.Event()
            task = asyncio.create_task(notebook.wait(reached))
            await reached.wait()
            await manager.close()
            task.cancel()
            with suppress(asyncio.CancelledError, UnexpectedRollbackError):
                await task
        transaction, _ = spans.take()
        assert attributes(transaction)["sessionwire.outcome"] != "committed"

    async def test_of_detached_work(
        self, manager: DatabaseSessionManager, notebook: Notebook, spans: Spans
    ) -> None:
        async with manager.transaction():
            later = asyncio.create_task(manager.transaction.detached(notebook.count()))
        await later
        assert sorted(spans.tree()) == sorted(["TestEnds.test_of_detached_work", "  SELECT note"])

    def test_of_a_block_whose_event_loop_is_closed(self, spans: Spans, tmp_path: Path) -> None:
        manager = DatabaseSessionManager(f"sqlite:///{tmp_path / 'test.db'}")
        block = manager.transaction()

        async def begin() -> None:
            await manager.open()
            await (await block.__aenter__()).execute(QUERY)

        async def end() -> None:
            error = LookupError()
            await block.__aexit__(LookupError, error, None)
            async with manager:
                pass

        with instrument(manager, tracer_provider=spans.provider):
            asyncio.run(begin())
            asyncio.run(end())
        names = [span.name for span in spans.take() if span.kind is SpanKind.INTERNAL]
        assert len(names) == 1


class TestOnPostgres(OnPostgres):
    async def test_a_transaction_that_is_killed_ends_with_the_code_of_the_server(
        self,
        manager: DatabaseSessionManager,
        telemetry: Instrumentation,
        spans: Spans,
        metrics: Metrics,
        postgres: Postgres,
    ) -> None:
        with pytest.raises(DBAPIError):
            async with manager.transaction() as session:
                await session.execute(QUERY)
                await kill(postgres, manager)
                await session.execute(QUERY)
        transaction, _, failed = spans.take()
        assert attributes(transaction)["sessionwire.outcome"] == "rolled_back"
        for span in (transaction, failed):
            assert span.status.status_code is StatusCode.ERROR
            assert attributes(span)["error.type"].startswith("sqlalchemy.exc.")
        assert metrics.value("sessionwire.connections.lost") == 1

    async def test_a_conflict_is_retried_and_says_so(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation, spans: Spans
    ) -> None:
        attempts = 0

        async def conflict() -> None:
            nonlocal attempts
            attempts += 1
            async with manager.transaction() as session:
                await session.execute(QUERY)
                if attempts == 1:
                    await session.execute(
                        text("DO $$ BEGIN RAISE 'no' USING ERRCODE = '40001'; END $$")
                    )

        await manager.transaction.run(conflict, retries=1)
        first, second = (
            attributes(span) for span in spans.take() if span.kind is SpanKind.INTERNAL
        )
        assert first["sessionwire.retry.reason"] == "serialization_failure"
        assert first["db.response.status_code"] == "40001"
        assert second["sessionwire.attempt"] == 2


class TestLostAnswers(OnFaultyNetwork):
    async def test_an_unknown_outcome_is_told_by_the_span_and_the_metrics(
        self,
        network: FaultyNetwork,
        remote: DatabaseSessionManager,
        spans: Spans,
        metrics: Metrics,
    ) -> None:
        with instrument(remote, tracer_provider=spans.provider, meter_provider=metrics.provider):
            with pytest.raises(CommitOutcomeUnknownError):
                async with remote.transaction() as session:
                    session.add(Note(text="a"))
                    await session.flush()
                    network.swallows = True
            network.swallows = False
            told = metrics.values("sessionwire.transactions", "sessionwire.outcome")
        (transaction, _) = spans.take()
        assert attributes(transaction)["sessionwire.outcome"] == "unknown"
        assert told["unknown"] == 1


class TestMetrics:
    async def test_the_pool_is_observed_as_the_status_shows_it(
        self, database_url: str, spans: Spans, metrics: Metrics
    ) -> None:
        pool = PoolSettings(size=1, max_overflow=0, timeout=0.1)
        manager = DatabaseSessionManager(DatabaseSettings(url=database_url, pool=pool))
        with instrument(manager, meter_provider=metrics.provider):
            assert metrics.collect("db.client.connection.count") == []
            async with manager:
                async with manager.connect():
                    waiting = asyncio.create_task(_waits_in_vain(manager))

                    async def waits() -> bool:
                        return manager.status().pool.waiting == 1

                    await until(waits)
                    count = metrics.values(
                        "db.client.connection.count", "db.client.connection.state"
                    )
                    assert count == {"used": 1, "idle": 0}
                    assert metrics.value("db.client.connection.pending_requests") == 1
                    await waiting
                assert metrics.value("db.client.connection.timeouts") == 1
                assert manager.status().connections.timed_out == 1
                assert metrics.value("db.client.connection.pending_requests") == 0
                assert metrics.value("db.client.connection.max") == 1
                assert metrics.value("db.client.connection.idle.max") == 1
                assert metrics.value("db.client.connection.idle.min") == 0
                for name in ("create_time", "wait_time", "use_time"):
                    (point,) = metrics.collect(f"db.client.connection.{name}")
                    assert point.count == {"create_time": 1}.get(name, 2), name
                    assert point.explicit_bounds[0] == 0.001
            assert metrics.collect("db.client.connection.count") == []
            assert metrics.value("sessionwire.connections.made") == 1

    async def test_totals_agree_with_the_status(
        self,
        manager: DatabaseSessionManager,
        notebook: Notebook,
        spans: Spans,
        metrics: Metrics,
    ) -> None:
        await notebook.write("a")
        with suppress(IntegrityError):
            await notebook.write("a")
        await notebook.add_at_the_third_attempt(iter(range(3)))
        status = manager.status()
        told = metrics.values("sessionwire.transactions", "sessionwire.outcome")
        ends = asdict(status.transactions)
        assert metrics.value("sessionwire.transactions.settled") == ends.pop("settled")
        assert told == ends
        assert told["committed"] > 1
        assert metrics.values("sessionwire.retries", "sessionwire.retry.reason") == status.retries
        of_spans = [attributes(span).get("sessionwire.outcome") for span in spans.take()]
        assert of_spans.count("rolled_back") == told["rolled_back"] == 3

    async def test_the_durations_of_statements_have_the_boundaries_of_the_conventions(
        self, notebook: Notebook, metrics: Metrics
    ) -> None:
        await notebook.count()
        await notebook.count()
        (point,) = metrics.collect("db.client.operation.duration")
        assert point.count == 2
        assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
        assert point.attributes["db.operation.name"] == "SELECT"
        assert point.attributes["db.collection.name"] == "note"
        assert "db.query.text" not in point.attributes
        assert "code.function.name" not in point.attributes

    async def test_two_pools_of_one_database_have_names_of_their_own(
        self, settings: DatabaseSettings, metrics: Metrics
    ) -> None:
        first, second = DatabaseSessionManager(settings), DatabaseSessionManager(settings)
        with (
            instrument(first, meter_provider=metrics.provider),
            instrument(second, meter_provider=metrics.provider),
        ):
            async with first, second:
                names = metrics.values("db.client.connection.max", "db.client.connection.pool.name")
        assert len(names) == 2
        shorter, longer = sorted(names)
        assert longer == f"{shorter}#2"


async def _waits_in_vain(manager: DatabaseSessionManager) -> None:
    with pytest.raises(PoolTimeoutError):
        async with manager.connect():
            raise AssertionError


class TestInstrument:
    async def test_it_survives_close_and_open(
        self, settings: DatabaseSettings, spans: Spans
    ) -> None:
        manager = DatabaseSessionManager(settings)
        with instrument(manager, tracer_provider=spans.provider):
            for _ in range(2):
                async with manager:
                    spans.take()
                    async with manager.transaction() as session:
                        await session.execute(QUERY)
                    assert [line.count("  ") for line in spans.tree()] == [0, 1]

    async def test_after_stop_nothing_is_told(
        self,
        manager: DatabaseSessionManager,
        telemetry: Instrumentation,
        spans: Spans,
        metrics: Metrics,
    ) -> None:
        block = manager.transaction()
        session = await block.__aenter__()
        telemetry.stop()
        telemetry.stop()
        await session.execute(QUERY)
        await block.__aexit__(None, None, None)
        async with manager.transaction() as session:
            await session.execute(QUERY)
        assert len(spans.take()) == 1  # that of the block that was open
        assert metrics.collect("sessionwire.transactions") == []
        with instrument(manager, tracer_provider=spans.provider):
            async with manager.transaction() as session:
                await session.execute(QUERY)
        assert len(spans.take()) == 2

    async def test_twice_is_an_error_that_says_what_to_do(
        self, manager: DatabaseSessionManager, telemetry: Instrumentation
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"instrumented already.*stop\(\)"):
            instrument(manager)

    async def test_a_container_has_it_as_a_resource(
        self, settings: DatabaseSettings, spans: Spans, metrics: Metrics
    ) -> None:
        class Container(containers.DeclarativeContainer):
            db = DatabaseContainer.nested(settings=settings)
            telemetry = providers.Resource(
                instrument,
                db.sessionmanager,
                tracer_provider=providers.Callable(lambda: spans.provider),
                meter_provider=providers.Callable(lambda: metrics.provider),
            )

        container = Container()
        for _ in range(2):
            async with Lifespan(container):
                manager = container.db.sessionmanager()
                async with manager.transaction() as session:
                    await session.execute(QUERY)
                assert len(spans.take()) == 2
            assert metrics.collect("sessionwire.transactions") == []

    async def test_a_whole_container_can_be_given(
        self, settings: DatabaseSettings, spans: Spans
    ) -> None:
        class Container(containers.DeclarativeContainer):
            db = DatabaseContainer.nested(settings=settings)

        container = Container()
        with instrument(container, tracer_provider=spans.provider):
            async with Lifespan(container):
                spans.take()
                async with container.db.transaction()() as session:
                    await session.execute(QUERY)
            assert len(spans.take()) == 2

    async def test_it_works_in_a_sandbox(
        self, manager: DatabaseSessionManager, notebook: Notebook, spans: Spans
    ) -> None:
        async with sandbox(manager):
            spans.take()
            await notebook.write("a")
            assert spans.tree() == ["Notebook.write", "  INSERT note", "  SELECT note"]
        await notebook.count()
        assert spans.tree() == ["SELECT note"]

    async def test_a_database_that_is_not_instrumented_has_no_listener_and_no_current_span(
        self, manager: DatabaseSessionManager
    ) -> None:
        for listener in manager.engine.sync_engine.dispatch.before_cursor_execute:
            assert "opentelemetry" not in getattr(listener, "__module__", "")
        async with manager.transaction():
            assert trace.get_current_span() is trace.INVALID_SPAN

    async def test_a_manager_can_be_freed_while_it_is_instrumented(
        self, spans: Spans, metrics: Metrics
    ) -> None:
        manager = DatabaseSessionManager("sqlite://")
        instrument(manager, tracer_provider=spans.provider, meter_provider=metrics.provider)
        async with manager:
            assert metrics.collect("sessionwire.transactions")
        del manager
        gc.collect()
        assert metrics.collect("sessionwire.transactions") == []


class TestConcurrency:
    async def test_fifty_callers_have_a_tree_each(
        self, notebook: Notebook, spans: Spans, manager: DatabaseSessionManager
    ) -> None:
        async def call(number: int) -> None:
            with spans.tracer.start_as_current_span(f"request {number}"):
                await notebook.add(f"note {number}")
                await notebook.count()

        await asyncio.gather(*map(call, range(50)))
        found = spans.take()
        assert len(found) == 50 * 4
        traces: dict[int, list[ReadableSpan]] = {}
        for span in found:
            assert span.context
            traces.setdefault(span.context.trace_id, []).append(span)
        assert len(traces) == 50
        for each in traces.values():
            assert spans.tree_of(each)[1:] == [
                "  Notebook.add",
                "    INSERT note",
                "  SELECT note",
            ]


async def test_the_tree_of_a_request_is_what_its_code_did(
    notebook: Notebook, spans: Spans, metrics: Metrics, manager: DatabaseSessionManager
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await notebook.count()
        await notebook.write("a")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    traced: Any = OpenTelemetryMiddleware(
        app,
        tracer_provider=spans.provider,
        meter_provider=metrics.provider,
        exclude_spans=["send", "receive"],
    )
    await get(traced, "/notes")
    found = spans.take()
    assert spans.tree_of(found) == [
        "GET /notes",
        "  SELECT note",
        "  Notebook.write",
        "    INSERT note",
        "    SELECT note",
    ]
    assert found[0].kind is SpanKind.SERVER


def test_a_forked_process_ends_no_span_of_its_parent(spans: Spans, tmp_path: Path) -> None:
    manager = DatabaseSessionManager(f"sqlite:///{tmp_path / 'test.db'}")

    async def main() -> None:
        async with manager:
            spans.take()
            block = manager.transaction()
            await (await block.__aenter__()).execute(QUERY)
            if (child := os.fork()) == 0:
                with suppress(BaseException):
                    await block.__aexit__(None, None, None)
                os._exit(len(spans.take()) - 1)  # the statement
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            await block.__aexit__(None, None, None)
            assert len(spans.take()) == 2

    with instrument(manager, tracer_provider=spans.provider):
        asyncio.run(main())


def run(code: str) -> str:
    """Return what a fresh interpreter prints, errors included."""
    source = Path(sessionwire.__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", f"import sys\n{code}"]
    process = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    return process.stdout + process.stderr


@pytest.mark.long
def test_importing_it_without_opentelemetry_says_what_to_install() -> None:
    said = run("sys.modules['opentelemetry'] = None; import sessionwire.opentelemetry")
    assert said.splitlines()[-1] == (
        "ImportError: sessionwire.opentelemetry needs OpenTelemetry: "
        "pip install 'sessionwire[opentelemetry]'"
    )


@pytest.mark.long
def test_a_lone_manager_is_instrumented_without_sdk_and_without_dependency_injector() -> None:
    code = """
import asyncio
sys.modules["dependency_injector"] = sys.modules["opentelemetry.sdk"] = None
from sqlalchemy import text
from sessionwire import DatabaseSessionManager
from sessionwire.opentelemetry import instrument

async def main():
    manager = DatabaseSessionManager("sqlite://")
    with instrument(manager):
        async with manager, manager.transaction() as session:
            print(await session.scalar(text("SELECT 'sold'")))

asyncio.run(main())
"""
    assert run(code) == "sold\n"
