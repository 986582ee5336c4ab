"""Everything holds behind a real PgBouncer, with the settings that docs/ tells."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from configparser import ConfigParser
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import asyncpg
import pytest
from sqlalchemy import func, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    Settings,
    TransactionTimeoutError,
    read_only,
)
from sessionwire._database.driver_errors import is_retryable, sqlstate

from .cluster import PATIENCE
from .conftest import DATABASE, Postgres, checked_out, notes
from .documents import CHECKOUT, environment
from .documents import PAGE as PAGES
from .models import Note
from .pgbouncer import DEBIAN_12, NEWEST, PgBouncer, pgbouncer
from .postgres import OnPostgres, running, until

pytestmark = pytest.mark.long

READ_ONLY_TRANSACTION, INVALID_VALUE = "25006", "22023"
READ: dict[str, Any] = {"propagation": Propagation.SUPPORTS, "read_only": True}
TENANT = select(func.current_setting("app.tenant", True))
ROW_LEVEL_SECURITY = """
    CREATE TABLE parcel (
        tenant text DEFAULT current_setting('app.tenant'), content text UNIQUE
    );
    CREATE POLICY own ON parcel
        USING (tenant = nullif(current_setting('app.tenant', true), ''));
    ALTER TABLE parcel ENABLE ROW LEVEL SECURITY;
    DO $$ BEGIN CREATE ROLE shop LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    GRANT ALL ON parcel TO shop;
"""
PAGE = PAGES["docs/how-to/pgbouncer.md"]
tenant = ContextVar("tenant", default="")
ADD_PARCEL = text("INSERT INTO parcel (content) VALUES (:content)")
PARCELS = text("SELECT content FROM parcel ORDER BY content")


@dataclass(frozen=True)
class Way:
    """A PgBouncer, and how to connect to it."""

    suite: str
    pool_mode: str
    query: str = ""  # of the URL
    pipeline: bool = True
    pooler: Literal["transaction", "session"] | None = None  # the setting
    driver: str = "asyncpg"

    def __str__(self) -> str:
        words = (
            self.suite,
            self.pool_mode,
            self.query.strip("&"),
            "" if self.pipeline else "no pipeline",
            f"set, {self.driver}" if self.pooler else "",
        )
        return " ".join(filter(None, words))


MODES: tuple[Literal["transaction", "session"], ...] = "transaction", "session"
NO_CACHE = "&statement_cache_size=0"
WAYS = [
    Way(suite, pool_mode, query, pipeline)
    for suite, pool_mode, query in (
        (DEBIAN_12, "transaction", NO_CACHE),
        (DEBIAN_12, "session", ""),
        (NEWEST, "transaction", NO_CACHE),
        (NEWEST, "transaction", ""),
        (NEWEST, "session", ""),
    )
    for pipeline in (True, False)
]
# With the one setting that names the mode, and nothing in the URL.
ONE_LINE = [
    Way(suite, mode, pooler=mode, driver=driver)
    for suite in (DEBIAN_12, NEWEST)
    for mode in MODES
    for driver in ("asyncpg", "psycopg")
]
IN_TRANSACTION_MODE = [way for way in WAYS + ONE_LINE if way.pool_mode == "transaction"]


def each_way(ways: list[Way]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", ways, ids=str)


class Behind(OnPostgres):
    """A class of tests whose `manager` makes the tables, and `remote` is behind PgBouncer."""

    more_settings: ClassVar[dict[str, str | int]] = {}

    @pytest.fixture
    async def bouncer(
        self, way: Way, postgres: Postgres, manager: DatabaseSessionManager
    ) -> AsyncIterator[PgBouncer]:
        settings: dict[str, str | int] = {"pool_mode": way.pool_mode, "default_pool_size": 10}
        async with pgbouncer(
            way.suite, postgres.host, **{**settings, **self.more_settings}
        ) as bouncer:
            yield bouncer

    @pytest.fixture
    async def remote(self, way: Way, bouncer: PgBouncer) -> AsyncIterator[DatabaseSessionManager]:
        async with (
            asyncio.timeout(60),
            DatabaseSessionManager(settings_for(way, bouncer)) as remote,
        ):
            yield remote
            await until(lambda: is_back(remote))


async def is_back(manager: DatabaseSessionManager) -> bool:
    return checked_out(manager) == 0


def settings_for(
    way: Way, bouncer: PgBouncer, *, user: str = "postgres", size: int = 10, **more: Any
) -> DatabaseSettings:
    url = make_url(bouncer.url(DATABASE, user=user, query=way.query))
    return DatabaseSettings(
        url=url.set(drivername=f"postgresql+{way.driver}"),
        pool=PoolSettings(size=size, max_overflow=0),
        pipeline=way.pipeline,
        pooler=way.pooler,
        **more,
    )


class Reader:
    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.session, self.transaction = CurrentSession(manager), manager.transaction

    @read_only
    async def texts(self) -> list[str]:
        return list(await self.session.scalars(select(Note.text).order_by(Note.text)))


async def add(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction() as session:
        session.add(Note(text=note))


async def write_many(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(text("INSERT INTO note (text) VALUES (:text)"), [{"text": "a"}] * 2)


@each_way(WAYS)
class TestEachMode(Behind):
    async def test_transactions_keep_or_lose_their_work_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        for _ in range(3):  # cold and warm
            with pytest.raises(ValueError, match="mine"):
                async with remote.transaction() as session:
                    session.add(Note(text="lost"))
                    await session.flush()
                    raise ValueError("mine")
        for each in range(3):
            await add(remote, f"kept {each}")
        async with remote.transaction():
            pass  # An empty one.
        assert await notes(manager) == ["kept 0", "kept 1", "kept 2"]

    async def test_savepoints_keep_or_lose_their_work_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        async with remote.transaction() as session:
            for each in range(3):
                async with remote.transaction(Propagation.NESTED):
                    session.add(Note(text=f"kept {each}"))
                with pytest.raises(IntegrityError):
                    async with remote.transaction(Propagation.NESTED):
                        await session.execute(insert(Note).values(text=f"kept {each}"))
        assert await notes(manager) == ["kept 0", "kept 1", "kept 2"]

    async def test_reads_without_a_transaction_work_behind_pgbouncer(
        self, remote: DatabaseSessionManager
    ) -> None:
        reader = Reader(remote)
        for each in range(3):
            await add(remote, f"note {each}")
            assert len(await reader.texts()) == each + 1

    async def test_a_write_through_a_read_scope_is_refused_by_the_server_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        for each in range(3):
            with pytest.raises(DBAPIError) as raised:
                async with remote.transaction(**READ) as session:
                    await session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
            assert sqlstate(raised.value) == READ_ONLY_TRANSACTION
            await add(remote, f"kept {each}")  # Nothing of it stays on the connection.
        assert len(await notes(manager)) == 3

    async def test_statements_in_autocommit_work_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        for each in range(3):
            async with remote.transaction(Propagation.NOT_SUPPORTED) as session:
                await session.execute(insert(Note).values(text=f"note {each}"))
                await session.execute(text("VACUUM note"))
        assert len(await notes(manager)) == 3

    async def test_many_rows_are_written_at_once_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        rows = [{"text": f"note {each}"} for each in range(100)]
        for _ in range(2):
            async with remote.transaction() as session:
                await session.execute(text("INSERT INTO note (text) VALUES (:text)"), rows)
                await session.execute(text("DELETE FROM note"))
        with pytest.raises(IntegrityError):
            await write_many(remote)
        assert await notes(manager) == []
        async with remote.transaction() as session:
            session.add_all([Note(**row) for row in rows])
        assert len(await notes(manager)) == 100

    async def test_streams_are_read_to_their_end_behind_pgbouncer(
        self, remote: DatabaseSessionManager
    ) -> None:
        numbers = text("SELECT g FROM generate_series(1, 200) AS g")
        for _ in range(2):
            async with remote.transaction(read_only=True) as session:
                result = await session.stream_scalars(numbers)
                assert [number async for number in result] == list(range(1, 201))
            async with remote.transaction() as session:
                async for number in await session.stream_scalars(numbers):
                    if number == 60:
                        break
                assert await session.scalar(select(1)) == 1

    async def test_copies_and_scripts_of_the_driver_work_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        async with remote.transaction() as session:
            raw = await (await session.connection()).get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None
            await driver.copy_records_to_table("note", records=[("copied",)], columns=["text"])
            await driver.execute("INSERT INTO note (text) VALUES ('a'); SELECT 1")
        assert await notes(manager) == ["a", "copied"]

    async def test_the_error_of_a_statement_is_raised_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        await add(remote, "there")
        for _ in range(3):
            with pytest.raises(IntegrityError):
                await add(remote, "there")
            with pytest.raises(DBAPIError, match="division by zero"):
                async with remote.transaction(**READ) as session:
                    await session.execute(text("SELECT 1/0"))
            with pytest.raises(DBAPIError, match="invalid input for query argument"):
                async with remote.transaction() as session:
                    await session.execute(text("SELECT CAST(:n AS integer)"), {"n": "no number"})
        assert await Reader(remote).texts() == ["there"]
        assert await notes(manager) == ["there"]

    async def test_settings_of_a_transaction_end_with_it_behind_pgbouncer(
        self, remote: DatabaseSessionManager
    ) -> None:
        for tenant in "1", "2":
            async with remote.transaction(settings={"app.tenant": tenant}) as session:
                assert await session.scalar(TENANT) == tenant
            async with remote.transaction(settings={"app.tenant": tenant}, **READ) as session:
                assert await session.scalar(TENANT) == tenant
        async with remote.transaction(**READ) as session:
            assert not await session.scalar(TENANT)

    async def test_row_level_security_holds_behind_pgbouncer(
        self, way: Way, bouncer: PgBouncer, postgres: Postgres
    ) -> None:
        await postgres.run(ROW_LEVEL_SECURITY, DATABASE)
        shop = DatabaseSessionManager(
            settings_for(way, bouncer, user="shop"),
            session_settings=lambda: {"app.tenant": tenant.get()},
        )
        async with shop:
            for name in "north", "south", "north", "south":
                tenant.set(name)
                async with shop.transaction() as session:
                    content = f"{name} {len((await session.execute(PARCELS)).all())}"
                    await session.execute(ADD_PARCEL, {"content": content})
            for name, expected in (
                ("north", ["north 0", "north 1"]),
                ("south", ["south 0", "south 1"]),
                ("", []),
            ):
                tenant.set(name)
                async with shop.transaction(**READ) as session:
                    assert list(await session.scalars(PARCELS)) == expected
                async with shop.transaction() as session:
                    assert list(await session.scalars(PARCELS)) == expected

    async def test_a_deadline_stops_the_statement_in_the_server_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        for options in {}, READ:
            with pytest.raises(TransactionTimeoutError):
                async with remote.transaction(timeout=0.1, **options) as session:
                    await session.execute(text("SELECT pg_sleep(60)"))
        await until(lambda: is_stopped(postgres, manager, "%pg_sleep%"))
        await add(remote, "next")
        assert await notes(manager) == ["next"]

    async def test_a_cancellation_rolls_back_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def work() -> None:
            async with remote.transaction(settings={"app.tenant": "7"}) as session:
                await session.execute(insert(Note).values(text="lost"))
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(work())
        await until(lambda: running(postgres, manager, "%pg_sleep%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: is_stopped(postgres, manager, "%pg_sleep%"))
        assert await notes(manager) == []

    async def test_a_cancellation_inside_a_savepoint_costs_only_that_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        async with remote.transaction() as session:
            session.add(Note(text="kept"))
            with pytest.raises(TransactionTimeoutError):
                async with remote.transaction(Propagation.NESTED, timeout=0.2):
                    session.add(Note(text="lost"))
                    await session.flush()
                    await session.execute(text("SELECT pg_sleep(60)"))
            session.add(Note(text="kept too"))
        assert await notes(manager) == ["kept", "kept too"]

    async def test_cancellations_at_any_moment_leave_nothing_behind_pgbouncer(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        async def work(at: int) -> None:
            async with remote.transaction(settings={"app.tenant": str(at)}) as session:
                await session.execute(insert(Note).values(text=f"note {at}"))
                async with remote.transaction(Propagation.NESTED):
                    await session.execute(select(func.now()))
            async with remote.transaction(settings={"app.tenant": str(at)}, **READ) as session:
                assert await session.scalar(TENANT) == str(at)

        for at in range(60):
            task = asyncio.create_task(work(at))
            await asyncio.sleep(at * 0.0002)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
        await add(remote, "next")
        async with remote.transaction() as session:
            assert not await session.scalar(TENANT)
        assert "next" in await notes(manager)


async def is_stopped(server: Postgres, manager: DatabaseSessionManager, query: str) -> bool:
    return not await running(server, manager, query)


# What goes wrong in what was sent ahead, and what follows it


async def follow_with_a_statement(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        await session.execute(insert(Note).values(text="lost"))


async def follow_with_many_rows(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        rows = [{"text": "lost"}, {"text": "lost too"}]
        await session.execute(text("INSERT INTO note (text) VALUES (:text)"), rows)


async def follow_with_a_stream(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        await session.stream(text("SELECT 1"))


async def follow_with_a_script(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        raw = await (await session.connection()).get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        await driver.execute("INSERT INTO note (text) VALUES ('lost')")


async def follow_with_a_copy(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        raw = await (await session.connection()).get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        await driver.copy_records_to_table("note", records=[("lost",)], columns=["text"])


async def follow_with_an_error(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}) as session:
        await session.connection()
        raise ValueError("mine")


async def follow_with_a_read(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(settings={"statement_timeout": "never"}, **READ) as session:
        await session.execute(select(Note))


FOLLOW = [
    follow_with_a_statement,
    follow_with_many_rows,
    follow_with_a_stream,
    follow_with_a_script,
    follow_with_a_copy,
    follow_with_an_error,
    follow_with_a_read,
]


@each_way(WAYS)
class TestOneServerConnection(Behind):
    """What one client leaves on the only server connection, the next one has."""

    more_settings: ClassVar = {"default_pool_size": 1, "query_wait_timeout": 5}

    @pytest.mark.parametrize("follow", FOLLOW)
    async def test_an_error_of_what_was_sent_ahead_leaves_the_server_connection_to_the_next(
        self,
        way: Way,
        bouncer: PgBouncer,
        manager: DatabaseSessionManager,
        follow: Callable[[DatabaseSessionManager], Awaitable[None]],
    ) -> None:
        raised = ValueError if follow is follow_with_an_error and way.pipeline else Exception
        async with DatabaseSessionManager(settings_for(way, bouncer, size=1)) as first:
            for _ in range(2):
                with pytest.raises(raised) as error:
                    await follow(first)
                if raised is not ValueError:
                    assert INVALID_VALUE in (sqlstate(error.value), code_in(error.value))
            await add(first, "by the first")
            if way.pool_mode == "session":
                await first.close()
            async with DatabaseSessionManager(settings_for(way, bouncer, size=1)) as second:
                await add(second, "by the second")
                assert await Reader(second).texts() == ["by the first", "by the second"]
        assert len(await notes(manager)) == 2

    async def test_nothing_of_one_clients_settings_is_seen_by_the_next(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        settings = {"app.tenant": "7", "statement_timeout": "1234", "search_path": "pg_catalog"}
        seen = text(
            "SELECT pg_backend_pid(), current_setting('app.tenant', true), "
            "current_setting('statement_timeout'), current_setting('search_path'), "
            "current_setting('transaction_read_only'), "
            "current_setting('default_transaction_read_only')"
        )
        pids: set[int] = set()

        async def check(manager: DatabaseSessionManager) -> None:
            async with manager.transaction() as session:
                pid, tenant, *others = (await session.execute(seen)).one()
            pids.add(pid)
            assert not tenant
            assert others == ["0", '"$user", public', "off", "off"]

        async with DatabaseSessionManager(settings_for(way, bouncer, size=1)) as first:
            async with first.transaction(settings=settings) as session:
                await session.execute(select(1))
            async with first.transaction(settings=settings, **READ) as session:
                await session.execute(select(1))
            with pytest.raises(DBAPIError):
                async with first.transaction(settings=settings) as session:
                    await session.execute(text("SELECT 1/0"))
            with pytest.raises(DBAPIError):
                async with first.transaction(settings=settings, **READ) as session:
                    await session.execute(text("SELECT 1/0"))
            with pytest.raises(DBAPIError):
                async with first.transaction(settings=settings, **READ) as session:
                    await session.execute(text("SELECT :n + 1"), {"n": "no number"})
            await check(first)
            if way.pool_mode == "session":
                await first.close()
            async with DatabaseSessionManager(settings_for(way, bouncer, size=1)) as second:
                await check(second)
                async with second.transaction(**READ) as session:
                    assert not await session.scalar(TENANT)
        assert len(pids) == 1


def code_in(error: BaseException) -> str:
    """Return the SQLSTATE of an error of the driver's, or of its cause."""
    cause = error if isinstance(error, asyncpg.PostgresError) else error.__cause__
    return getattr(cause, "sqlstate", None) or ""


@each_way(WAYS + ONE_LINE)
class TestIgnoredStartupParameters(Behind):
    more_settings: ClassVar = {
        "ignore_startup_parameters": "extra_float_digits, options, default_transaction_read_only"
    }

    async def test_a_write_through_a_read_scope_is_refused_where_start_up_parameters_are_ignored(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(DBAPIError) as raised:
            async with remote.transaction(**READ) as session:
                await session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        assert sqlstate(raised.value) == READ_ONLY_TRANSACTION
        assert await notes(manager) == []


# The page


@pytest.mark.parametrize(("at", "suite"), [(0, NEWEST), (0, DEBIAN_12), (1, NEWEST)])
class TestPage(OnPostgres):
    async def test_the_files_of_the_page_fit_together(
        self,
        at: int,
        suite: str,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("DATABASE__URL", raising=False)
        ini = ConfigParser(interpolation=None)
        ini.read_string(PAGE.files["pgbouncer.ini"].text)
        of_page = dict(ini["pgbouncer"])
        files = [block for block in PAGE.blocks if block.language == "yaml"]
        (tmp_path / "shop.yaml").write_text(files[at].text)
        loaded = Settings.load(tmp_path / "shop.yaml").database
        url = make_url(loaded.url)
        assert str(url.port) == of_page.pop("listen_port")
        assert url.database in ini["databases"]

        async with pgbouncer(suite, postgres.host, **of_page) as bouncer:
            here = make_url(bouncer.url(DATABASE)).update_query_dict(url.query)
            here = here.set(drivername=url.drivername)
            async with DatabaseSessionManager(loaded.model_copy(update={"url": here})) as shop:
                await load(shop, "shop")
        assert len(await notes(manager)) == TASKS * ROUNDS * 3


@each_way([Way(DEBIAN_12, "transaction")])
class TestWithoutTheSetting(Behind):
    async def test_a_prepared_statement_is_missing_on_the_next_server_connection(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        query = text("SELECT 'prepared'")
        remote = DatabaseSessionManager()
        remote.init(settings_for(way, bouncer))  # open() would refuse that.
        with pytest.raises(DBAPIError, match=r"prepared statement .* does not exist") as raised:
            async with remote.connect() as first:
                await first.execute(query)
                await first.rollback()
                async with remote.connect() as second:
                    await second.execute(select(1))  # It has the server connection now.
                    await first.execute(query)
        assert "pooler: transaction" in raised.value.__notes__[0]
        await remote.close()


# Load

PROGRAM = """
import asyncio, sys
from sessionwire import DatabaseSessionManager, DatabaseSettings
from tests.test_pgbouncer import load

async def main(settings, name):
    settings = DatabaseSettings.model_validate_json(settings)
    async with DatabaseSessionManager(settings) as manager:
        await load(manager, name)

asyncio.run(main(*sys.argv[1:]))
"""
TASKS, ROUNDS = 20, 10


async def load(manager: DatabaseSessionManager, name: str) -> None:
    """Let tasks write and read as tenants of their own, and check what they see."""

    async def work(task: int) -> None:
        own = f"{name} {task}"
        settings = {"app.tenant": own}
        for each in range(ROUNDS):
            async with manager.transaction(settings=settings) as session:
                assert await session.scalar(TENANT) == own
                async with manager.transaction(Propagation.NESTED):
                    session.add(Note(text=f"{own} {each}"))
                rows = [{"text": f"{own} {each} {at}"} for at in range(2)]
                await session.execute(text("INSERT INTO note (text) VALUES (:text)"), rows)
            async with manager.transaction(settings=settings, **READ) as session:
                assert await session.scalar(TENANT) == own
            async with manager.transaction(**READ) as session:
                assert not await session.scalar(TENANT)
                found = select(func.count()).where(Note.text.startswith(f"{own} "))
                assert await session.scalar(found) == 3 * (each + 1)
            with pytest.raises(IntegrityError):
                await add(manager, f"{own} 0")

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for task in range(TASKS):
            group.create_task(work(task))


@each_way(WAYS + ONE_LINE)
class TestLoad(Behind):
    more_settings: ClassVar = {"default_pool_size": 2}

    async def test_twenty_tasks_share_two_server_connections(
        self, way: Way, bouncer: PgBouncer, manager: DatabaseSessionManager
    ) -> None:
        size = 20 if way.pool_mode == "transaction" else 2  # Else each client keeps its own.
        async with DatabaseSessionManager(settings_for(way, bouncer, size=size)) as remote:
            await load(remote, "one")
        assert len(await notes(manager)) == TASKS * ROUNDS * 3


@each_way(IN_TRANSACTION_MODE)
class TestTwoProcesses(Behind):
    more_settings: ClassVar = {"default_pool_size": 2}

    async def test_two_processes_share_two_server_connections(
        self, way: Way, bouncer: PgBouncer, manager: DatabaseSessionManager
    ) -> None:
        settings = settings_for(way, bouncer, size=20).model_dump_json()
        variables = environment()
        variables["PYTHONPATH"] += f":{CHECKOUT}"
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", PROGRAM, settings, name),
                env=variables,
                stderr=asyncio.subprocess.PIPE,
            )
            for name in ("one", "two")
        ]
        async with asyncio.timeout(PATIENCE * 2):
            for process in processes:
                _, errors = await process.communicate()
                assert process.returncode == 0, errors.decode()
        assert len(await notes(manager)) == 2 * TASKS * ROUNDS * 3


@each_way(WAYS + ONE_LINE)
class TestRestart(Behind):
    async def test_a_restart_under_load_causes_only_errors_of_lost_connections(
        self, remote: DatabaseSessionManager, bouncer: PgBouncer, manager: DatabaseSessionManager
    ) -> None:
        kept: set[str] = set()
        unknown: set[str] = set()
        errors: list[Exception] = []
        is_ending = False

        async def work(task: int) -> None:
            each = 0
            while not is_ending:
                each += 1
                note = f"{task} {each}"
                try:
                    async with remote.transaction(settings={"app.tenant": note}) as session:
                        session.add(Note(text=note))
                    kept.add(note)
                    async with remote.transaction(settings={"app.tenant": note}, **READ) as session:
                        assert await session.scalar(TENANT) == note
                except CommitOutcomeUnknownError:
                    unknown.add(note)
                except Exception as error:
                    errors.append(error)
                    await asyncio.sleep(0.01)

        async def more_are_kept(than: int) -> bool:
            return len(kept) > than

        async with asyncio.TaskGroup() as group:
            for task in range(8):
                group.create_task(work(task))
            for _ in range(3):
                before = len(kept)
                await until(partial(more_are_kept, before + 20), PATIENCE)
                bouncer.kill()
                await bouncer.start()
            before = len(kept)
            await until(partial(more_are_kept, before + 20), PATIENCE)
            is_ending = True

        assert errors
        assert [error for error in errors if not is_retryable(error)] == []
        there = set(await notes(manager))
        assert kept <= there
        assert there <= kept | unknown
