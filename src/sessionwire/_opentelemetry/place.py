"""`Place`: how spans and metrics name a database."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import make_url
from sqlalchemy.engine import Engine

from sessionwire._config.url_parameters import hosts_and_ports
from sessionwire._database.sqlite import is_in_memory
from sessionwire.settings import DatabaseSettings

from .names import (
    DB_NAMESPACE,
    DB_SYSTEM_NAME,
    OTHER_SYSTEM,
    SERVER_ADDRESS,
    SERVER_PORT,
    SYSTEMS,
)

Attributes = dict[str, str | int | bool | float]
DEFAULT_PORT = 5432


@dataclass(frozen=True)
class Place:
    """A database and its server.

    Attributes:
        attributes: The attributes of a statement that say where it ran. Of several
            hosts, nobody asks which one a connection leads to.
        pool: The name of the pool, `host:port/database`.
    """

    attributes: Attributes
    pool: str

    @classmethod
    def of(cls, engine: Engine, settings: DatabaseSettings) -> Place:
        """Read it from the settings and an engine made of them."""
        url, system = make_url(settings.url), engine.dialect.name
        attributes: Attributes = {DB_SYSTEM_NAME: SYSTEMS.get(system, OTHER_SYSTEM)}
        database = engine.url.database or ""
        if system == "sqlite" and is_in_memory(url):
            database = ":memory:"  # a temporary file, whose name is new in each process
        if database:
            attributes[DB_NAMESPACE] = database
        if url.drivername == "embedded":
            return cls(attributes, f"embedded:{url.database}/{database}")
        if system == "sqlite":
            return cls(attributes, database)
        is_postgresql = system == "postgresql"
        found = list(hosts_and_ports(url)) if is_postgresql else [(url.host or "", url.port)]
        hosts = [
            (host or "localhost", port or (DEFAULT_PORT if is_postgresql else None))
            for host, port in found
        ]
        if len(hosts) == 1:
            ((host, port),) = hosts
            attributes[SERVER_ADDRESS] = host
            if port is not None and not host.startswith("/"):
                attributes[SERVER_PORT] = port
        names = ",".join(f"{host}:{port}" if port else host for host, port in hosts)
        return cls(attributes, f"{names}/{database}")
