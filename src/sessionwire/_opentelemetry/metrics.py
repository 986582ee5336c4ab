"""The metrics of databases: what each collection asks for, and four histograms.

A meter has each instrument once. So all databases that report to one provider share
them, and each has the name of its pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from sessionwire._database.totals import Totals
from sessionwire.settings import PoolSettings
from sessionwire.status import PoolStatus

from .names import (
    BOUNDARIES,
    CONNECTION_STATE,
    OUTCOME,
    POOL_NAME,
    RETRY_REASON,
    SCHEMA_URL,
    SCOPE,
)
from .place import Attributes

OUTCOMES = ("committed", "rolled_back", "unexpected", "unknown", "timed_out")
Observed = list[tuple[int, Attributes]]


class Source(Protocol):
    """A database, as a collection sees it, which may run in another thread."""

    pool_name: str  # empty before the database is initialized

    @property
    def totals(self) -> Totals: ...
    @property
    def pool(self) -> tuple[PoolStatus, PoolSettings] | None:
        """The connections now, and their settings; None: it is not initialized."""
        ...


def _one(value: int) -> Observed:
    return [(value, {})]


# Name, unit, description, and what is observed
OF_POOL: list[tuple[str, str, str, Callable[[PoolStatus, PoolSettings], Observed]]] = [
    (
        "db.client.connection.count",
        "{connection}",
        "The connections that are in this state",
        lambda pool, _: [
            (pool.in_use, {CONNECTION_STATE: "used"}),
            (pool.idle, {CONNECTION_STATE: "idle"}),
        ],
    ),
    (
        "db.client.connection.idle.max",
        "{connection}",
        "The highest number of idle connections: pool.size",
        lambda _, settings: _one(settings.size),
    ),
    (
        "db.client.connection.idle.min",
        "{connection}",
        "The lowest number of idle connections",
        lambda _, __: _one(0),  # They are opened when they are needed.
    ),
    (
        "db.client.connection.max",
        "{connection}",
        "The highest number of connections: pool.size + pool.max_overflow",
        lambda pool, _: _one(pool.limit),
    ),
    (
        "db.client.connection.pending_requests",
        "{request}",
        "The tasks that wait for a connection",
        lambda pool, _: _one(pool.waiting),
    ),
]
OF_TOTALS: list[tuple[str, str, str, Callable[[Totals], Observed]]] = [
    (
        "db.client.connection.timeouts",
        "{timeout}",
        "The waits for a connection that ended at pool.timeout",
        lambda totals: _one(totals.connections.timed_out),
    ),
    (
        "sessionwire.transactions",
        "{transaction}",
        "The ends of transactions",
        lambda totals: [(getattr(totals, each), {OUTCOME: each}) for each in OUTCOMES],
    ),
    (
        "sessionwire.transactions.settled",
        "{transaction}",
        "The commits whose answer was lost, and whose outcome was looked up",
        lambda totals: _one(totals.settled),
    ),
    (
        "sessionwire.retries",
        "{retry}",
        "The blocks that were run again",
        # A copy, because the event loop may add to it.
        lambda totals: [(n, {RETRY_REASON: each}) for each, n in dict(totals.retries).items()],
    ),
    (
        "sessionwire.connections.made",
        "{connection}",
        "The connections that were opened",
        lambda totals: _one(totals.made),
    ),
    (
        "sessionwire.connections.replaced",
        "{connection}",
        "The connections that had reached pool.max_lifetime",
        lambda totals: _one(totals.replaced),
    ),
    (
        "sessionwire.connections.lost",
        "{connection}",
        "The connections that died, or did not answer",
        lambda totals: _one(totals.lost),
    ),
]


class Instruments:
    """The instruments of one provider, and the databases that they tell of."""

    def __init__(self, meter: Meter) -> None:
        # The tuple is replaced, never changed, because collections run in other threads.
        self._sources: tuple[weakref.ref[Source], ...] = ()
        for name, unit, description, of_pool in OF_POOL:
            callback = self._callback(partial(_observe_pool, of_pool))
            meter.create_observable_up_down_counter(name, [callback], unit, description)
        for name, unit, description, of_totals in OF_TOTALS:
            callback = self._callback(partial(_observe_totals, of_totals))
            meter.create_observable_counter(name, [callback], unit, description)
        self.duration = _histogram(
            meter, "db.client.operation.duration", "The time that a statement took"
        )
        self.create_time = _histogram(
            meter, "db.client.connection.create_time", "The time that it took to open a connection"
        )
        self.wait_time = _histogram(
            meter,
            "db.client.connection.wait_time",
            "The time that it took to get an open connection from the pool",
        )
        self.use_time = _histogram(
            meter,
            "db.client.connection.use_time",
            "The time between getting a connection and giving it back",
        )

    def add(self, source: Source) -> None:
        self._sources = (*self._sources, weakref.ref(source))

    def remove(self, source: Source) -> None:
        self._sources = tuple(each for each in self._sources if each() not in (source, None))

    def unused_name(self, name: str) -> str:
        """Return a name for a pool that no other one has."""
        used = {source.pool_name for each in self._sources if (source := each()) is not None}
        number, unused = 1, name
        while unused in used:
            number += 1
            unused = f"{name}#{number}"
        return unused

    def _callback(
        self, observe: Callable[[Source], Observed]
    ) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def callback(_options: CallbackOptions) -> Iterator[Observation]:
            for each in self._sources:
                source = each()
                if source is not None and source.pool_name:
                    for value, attributes in observe(source):
                        yield Observation(value, {POOL_NAME: source.pool_name, **attributes})

        return callback


def _observe_pool(
    of_pool: Callable[[PoolStatus, PoolSettings], Observed], source: Source
) -> Observed:
    pool = source.pool
    return [] if pool is None else of_pool(*pool)


def _observe_totals(of_totals: Callable[[Totals], Observed], source: Source) -> Observed:
    return of_totals(source.totals)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(
        name, "s", description, explicit_bucket_boundaries_advisory=BOUNDARIES
    )


_of_providers: weakref.WeakKeyDictionary[MeterProvider, Instruments] = weakref.WeakKeyDictionary()
_of_global_provider: list[Instruments] = []


def instruments_of(provider: MeterProvider | None, version: str) -> Instruments:
    """Return the instruments of a provider. None: the global one, which may be set later."""
    # Before it is set, a proxy stands for it, which is another object.
    if provider is None or provider is get_meter_provider():
        if not _of_global_provider:
            meter = get_meter_provider().get_meter(SCOPE, version, SCHEMA_URL)
            _of_global_provider.append(Instruments(meter))
        return _of_global_provider[0]
    if provider not in _of_providers:
        _of_providers[provider] = Instruments(provider.get_meter(SCOPE, version, SCHEMA_URL))
    return _of_providers[provider]
