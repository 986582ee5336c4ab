"""Give a database other settings or engines for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.runtime import Database
from sessionwire.settings import DatabaseSettings


@contextmanager
def override_settings(database: Database, settings: DatabaseSettings) -> Generator[None]:
    """Open the database with these settings instead of its own.

    They are of another server, which has other passwords.
    """
    own = database.constructor_settings, database.given_settings
    make_own: Any = database.make_engines
    database.constructor_settings = database.given_settings = settings
    database.make_engines = partial(make_own, credentials=None)
    try:
        yield
    finally:
        database.constructor_settings, database.given_settings = own
        database.make_engines = make_own


@contextmanager
def substitute_engines(
    database: Database, factory: Callable[[DatabaseEngines], DatabaseEngines]
) -> Generator[None]:
    """Use `factory(engines)` instead of its engines, also after a `close()` and an `init()`."""
    real, make_real, settings = database.engines, database.make_engines, database.given_settings

    def recreate(settings: DatabaseSettings) -> DatabaseEngines:
        nonlocal real
        if real.is_closed:
            real = make_real(settings)
        return factory(real)

    database.make_engines, database.current_engines = recreate, factory(real)
    try:
        yield
    finally:
        database.make_engines = make_real
        if not real.is_closed:
            database.current_engines, database.given_settings = real, settings
            real.tell_observer()
            database.is_open = True
