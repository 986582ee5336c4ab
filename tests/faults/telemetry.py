"""What OpenTelemetry is told in a run, to be compared with `status()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from sessionwire import DatabaseSessionManager
from sessionwire.opentelemetry import instrument

OUTCOME = "sessionwire.outcome"


class Telemetry(SpanProcessor):
    """The ends of transactions by outcome, as spans and as metrics tell them."""

    def __init__(self) -> None:
        self.in_spans: Counter[str] = Counter()
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes or {}
        if OUTCOME in attributes:
            self.in_spans[str(attributes[OUTCOME])] += 1
        self.in_spans["settled"] += bool(attributes.get("sessionwire.settled"))

    def read_metrics(self) -> Counter[str]:
        """Read the metrics now."""
        found: Counter[str] = Counter()
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in cast(Any, metric.data).data_points:
                        if metric.name == "sessionwire.transactions":
                            found[str(point.attributes[OUTCOME])] += point.value
                        elif metric.name == "sessionwire.transactions.settled":
                            found["settled"] += point.value
        return found


@contextmanager
def telemetry_of(manager: DatabaseSessionManager) -> Generator[Telemetry]:
    """Tell OpenTelemetry what a manager does in this block."""
    telemetry = Telemetry()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(telemetry)
    with instrument(manager, tracer_provider=tracers, meter_provider=telemetry.meters):
        yield telemetry
    telemetry.meters.shutdown()
    tracers.shutdown()
