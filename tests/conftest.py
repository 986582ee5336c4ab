"""Real databases, a fresh one for each test: SQLite, and an embedded PostgreSQL."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import psycopg
import pytest
from sqlalchemy import make_url, select
from sqlalchemy.pool import QueuePool

from sessionwire import DatabaseSessionManager, DatabaseSettings, PoolSettings, Settings
from sessionwire._config.url import ASYNC_DRIVERS
from sessionwire.embedded import EmbeddedServer
from sessionwire.testing._servers import disable_durability, temporary_directory

from .models import Note

DATABASE = "tests"
CONNECTED_TO = f"FROM pg_stat_activity WHERE datname = '{DATABASE}'"


# What a run may do without, and the markers of the tests that cannot.
VARIANTS = {
    "--no-pipeline": ("pipeline_only",),
    "--pool-of-one": ("several_connections",),
    "--driver": ("asyncpg_only", "pipeline_only"),
}
POOL_OF_ONE = {"size": 1, "max_overflow": 0}
SHORT = 5  # seconds after which a test fails that needs a second connection


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-pipeline", action="store_true", help="let the setting `pipeline` be false by default"
    )
    parser.addoption(
        "--pool-of-one",
        action="store_true",
        help="let a pool have one connection, unless a test sets another size",
    )
    parser.addoption(
        "--driver",
        choices=["psycopg"],
        help="let the URLs of PostgreSQL mean this driver instead of asyncpg",
    )
    parser.addoption("--share", metavar="K/N", help="run the K-th of N shares of the tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-pipeline") or config.getoption("--driver"):
        DatabaseSettings.model_fields["pipeline"].default = False
    if driver := config.getoption("--driver"):
        ASYNC_DRIVERS["postgresql"] = f"postgresql+{driver}"
    if config.getoption("--pool-of-one"):
        for name, value in POOL_OF_ONE.items():
            PoolSettings.model_fields[name].default = value
        PoolSettings.model_rebuild(force=True)
        DatabaseSettings.model_fields["pool"].default = PoolSettings(timeout=SHORT)
    for model in (DatabaseSettings, Settings):
        model.model_rebuild(force=True)


def pytest_report_header(config: pytest.Config) -> str:
    settings = DatabaseSettings(url="postgresql://")
    driver = make_url(settings.url).get_driver_name()
    return f"defaults: driver={driver}, pipeline={settings.pipeline}, pool: {settings.pool}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := config.getoption("--share"):
        number, count = map(int, share.split("/"))
        left_out = [item for at, item in enumerate(items) if at % count != number % count]
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[number % count :: count]
    for option, names in VARIANTS.items():
        if not config.getoption(option):
            continue
        for item in items:
            for marker in filter(None, map(item.get_closest_marker, names)):
                item.add_marker(pytest.mark.skip(reason=f"{option}: {marker.args[0]}"))


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over what was imported, which no test frees."""
    gc.collect()
    gc.freeze()


class Postgres:
    """The server of a test run, as an administrator sees it."""

    def __init__(self, host: str) -> None:
        self.host = host

    async def execute(
        self, sql: str, *parameters: object, database: str = "postgres"
    ) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(host=self.host, user="postgres", database=database)
        try:
            return await connection.fetch(sql, *parameters)
        finally:
            await connection.close()

    async def run(self, script: str, database: str) -> None:
        connection = await asyncpg.connect(host=self.host, user="postgres", database=database)
        try:
            await connection.execute(script)
        finally:
            await connection.close()

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.host}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # pytest closes its own directories to the server's user
    directory = tempfile.mkdtemp(prefix="sessionwire-", dir=temporary_directory())
    with EmbeddedServer(Path(directory) / "data") as server:
        administrator = Postgres(server.socket_directory)
        asyncio.run(disable_durability(DatabaseSettings(url=server.url)))
        asyncio.run(administrator.execute(f"CREATE DATABASE {DATABASE}"))
        yield administrator
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def administrator(postgres: Postgres) -> Iterator[psycopg.Connection]:
    """Yield a connection for all tests: each new one takes the server longer than a query."""
    with psycopg.connect(
        host=postgres.host, user="postgres", dbname="postgres", autocommit=True
    ) as administrator:
        yield administrator


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(backend: str, request: pytest.FixtureRequest) -> Postgres | None:
    """Return the server of this test's database, or None for SQLite."""
    return request.getfixturevalue("postgres") if backend == "postgresql" else None


@pytest.fixture
async def database_url(
    server: Postgres | None, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """Yield the URL of an empty database. At the end nobody may be connected to it."""
    if server is None:
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    # A new database has this grant.
    anew = (
        "DROP SCHEMA IF EXISTS public CASCADE; CREATE SCHEMA public; "
        "GRANT USAGE ON SCHEMA public TO PUBLIC"
    )
    await server.run(anew, DATABASE)
    administrator: psycopg.Connection = request.getfixturevalue("administrator")
    yield server.url(DATABASE)
    try:
        async with asyncio.timeout(5):
            while left := administrator.execute(f"SELECT query, state {CONNECTED_TO}").fetchall():
                # A server process outlives its client for a moment.
                await asyncio.sleep(0.002)
    finally:  # They are none of the next test.
        administrator.execute(f"SELECT pg_terminate_backend(pid) {CONNECTED_TO}")
    assert not left


@pytest.fixture
def settings(database_url: str, request: pytest.FixtureRequest) -> DatabaseSettings:
    pool = PoolSettings(size=3, max_overflow=2, timeout=10)
    if request.config.getoption("--pool-of-one"):
        pool = PoolSettings(timeout=SHORT)
    return DatabaseSettings(url=database_url, pool=pool)


@pytest.fixture
async def manager(settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    """Yield an open manager with empty tables. At the end all connections are back."""
    async with DatabaseSessionManager(settings) as manager:
        async with manager.connect() as connection:
            await connection.run_sync(manager.metadata.create_all, checkfirst=False)
        yield manager
        await assert_all_returned(manager)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"


def checked_out(manager: DatabaseSessionManager) -> int:
    pool = manager.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


async def assert_all_returned(manager: DatabaseSessionManager) -> None:
    """Assert that all connections return. Aborted ones are closed in the background."""
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            while checked_out(manager):
                await asyncio.sleep(0.01)
    assert checked_out(manager) == 0


async def notes(manager: DatabaseSessionManager) -> list[str]:
    """Return the notes in the database, read on a separate connection."""
    async with manager.connect() as connection:
        return list(await connection.scalars(select(Note.text).order_by(Note.text)))
