"""The metrics of the ledger, as Prometheus reads them at `/metrics`."""

from collections.abc import Generator
from contextlib import contextmanager

from fastapi import FastAPI, Response
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sessionwire.opentelemetry import instrument

from .container import Container


@contextmanager
def metrics_at(path: str, app: FastAPI, container: Container) -> Generator[None]:
    """Measure the container's database, and answer with it at this path of the app."""
    provider = MeterProvider([PrometheusMetricReader()])

    @app.get(path, include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    with instrument(container, meter_provider=provider):
        yield
    provider.shutdown()
