"""Spans and metrics for OpenTelemetry, by its API alone: the application sets up an SDK.

Nothing of this runs where `instrument()` is not called.
"""

from __future__ import annotations

from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

try:
    from opentelemetry import trace
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
except ImportError as error:
    raise ImportError(
        "sessionwire.opentelemetry needs OpenTelemetry: pip install 'sessionwire[opentelemetry]'"
    ) from error

from ._database.runtime import Database, database_of
from ._managers import managers_of
from ._opentelemetry.metrics import instruments_of
from ._opentelemetry.names import SCHEMA_URL, SCOPE
from ._opentelemetry.telemetry import Telemetry
from .errors import ConfigurationError


class Instrumentation:
    """What `instrument()` has switched on, until `stop()`.

    It is a context manager, which stops at the end of its block, and so the resource of
    a container.
    """

    def __init__(self, observed: list[tuple[Database, Telemetry]]) -> None:
        self._observed = observed

    def stop(self) -> None:
        """Make no more spans and metrics. Spans of blocks that are open end with them."""
        while self._observed:
            database, telemetry = self._observed.pop()
            database.observe(None)
            telemetry.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def instrument(
    database: Any,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Instrumentation:
    """Make spans of a database's transactions and statements, and metrics.

    It may be called at any time: before the database is opened, and while it is in use.
    What it does lasts when the database is closed and opened anew.

    Args:
        database: A manager, or a container for all databases in it.
        tracer_provider: Whom spans are given to. Default: the global provider, which
            may be set later.
        meter_provider: Whom metrics are given to. Default: the global one, likewise.

    Raises:
        ConfigurationError: A database is instrumented already, or the container has
            none.

    Example:
        ```python
        class Container(containers.DeclarativeContainer):
            db = DatabaseContainer.nested(settings="postgresql://localhost/shop")
            telemetry = providers.Resource(instrument, db.sessionmanager)
        ```
    """
    databases = [database_of(manager) for manager in managers_of(database)]
    if any(each.observer is not None for each in databases):
        raise ConfigurationError(
            "this database is instrumented already, and would have each span twice: call "
            "instrument() once for each database, or stop() the former instrumentation"
        )
    release = version("sessionwire")
    tracer = trace.get_tracer(SCOPE, release, tracer_provider, SCHEMA_URL)
    instruments = instruments_of(meter_provider, release)
    observed: list[tuple[Database, Telemetry]] = []
    for each in databases:
        telemetry = Telemetry(each, tracer, instruments)
        each.observe(telemetry)
        observed.append((each, telemetry))
    return Instrumentation(observed)
