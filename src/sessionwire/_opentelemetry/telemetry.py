"""`Telemetry`: the observer of one database, which makes spans and metrics of it."""

from __future__ import annotations

import weakref
from typing import Any

from opentelemetry.trace import Tracer
from sqlalchemy import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire._database.runtime import Database
from sessionwire._database.totals import Totals
from sessionwire.settings import DatabaseSettings, PoolSettings
from sessionwire.status import PoolStatus

from .metrics import Instruments
from .names import POOL_NAME
from .place import Attributes, Place
from .spans import WAITED, WITHOUT_TRACE, Spans


class Telemetry(Spans):
    """Observe one database.

    Args:
        database: The database.
        tracer: Makes the spans.
        instruments: The instruments of the metrics.
    """

    def __init__(self, database: Database, tracer: Tracer, instruments: Instruments) -> None:
        super().__init__(tracer, instruments.duration)
        self._database = weakref.ref(database)
        self.totals: Totals = database.totals
        self.pool_name = ""
        self._pool_attributes: Attributes = {}
        self._instruments = instruments
        self._record_wait = instruments.wait_time.record
        self._record_use = instruments.use_time.record
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        instruments.add(self)

    @property
    def pool(self) -> tuple[PoolStatus, PoolSettings] | None:
        database = self._database()
        engines = None if database is None else database.current_engines
        if database is None or engines is None:
            return None
        return engines.pool.status_now(), database.settings.pool

    def watch(self, engine: Engine, settings: DatabaseSettings) -> None:
        if engine in self._engines:
            return
        place = Place.of(engine, settings)
        if place != self.place:
            self.pool_name = ""
            self.pool_name = self._instruments.unused_name(place.pool)
            self._pool_attributes = {POOL_NAME: self.pool_name}
        self._engines.add(engine)
        self.listen(engine, place)

    def stop(self) -> None:
        """Stop listening. Spans that are open end with their blocks."""
        self._instruments.remove(self)
        for engine in list(self._engines):
            self.stop_listening(engine)
        self._engines.clear()

    def take(self, place: ConnectionPoolEntry, waited: float) -> None:
        place_info: Any = place.record_info
        place_info[WAITED] = waited
        self._record_wait(waited, self._pool_attributes, WITHOUT_TRACE)

    def give_back(self, held: float) -> None:
        self._record_use(held, self._pool_attributes, WITHOUT_TRACE)

    def make_connection(self, took: float) -> None:
        self._instruments.create_time.record(took, self._pool_attributes, WITHOUT_TRACE)
