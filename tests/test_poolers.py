"""The setting `pooler` lets all the others hold behind a pooler, and `open()` asks for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from sessionwire import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    Propagation,
    Settings,
)
from sessionwire._cli.checks import check
from sessionwire._database.driver_errors import is_retryable, sqlstate

from .cluster import PATIENCE
from .conftest import DATABASE, notes
from .documents import CHECKOUT, environment
from .models import Note
from .pgbouncer import DEBIAN_12, NEWEST, PgBouncer
from .postgres import until
from .test_pgbouncer import (
    NO_CACHE,
    ONE_LINE,
    READ,
    READ_ONLY_TRANSACTION,
    ROUNDS,
    TASKS,
    Behind,
    Way,
    each_way,
    load,
    settings_for,
)

pytestmark = pytest.mark.long

DRIVERS = "asyncpg", "psycopg"
ASKED_FOR: dict[str, Any] = {
    "application_name": "shop's",
    "search_path": ["it's \"\\", "public"],
    "statement_timeout": 7,
    "lock_timeout": 0.3,
    "idle_in_transaction_timeout": 30,
}
SEEN = ["shop's", '"it\'s ""\\", "public"', "7s", "300ms", "30s"]
SHOW = text(
    "SELECT current_setting('application_name'), current_setting('search_path'), "
    "current_setting('statement_timeout'), current_setting('lock_timeout'), "
    "current_setting('idle_in_transaction_session_timeout')"
)
MANY = [{"text": "one"}, {"text": "two"}]
ADD_MANY = text("INSERT INTO note (text) VALUES (:text)")


async def seen_by(session: AsyncSession | AsyncConnection) -> list[str]:
    return list((await session.execute(SHOW)).one())


async def in_a_transaction(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction() as session:
        return await seen_by(session)


async def in_a_read_only_transaction(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction(read_only=True) as session:
        return await seen_by(session)


async def in_a_read(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction(**READ) as session:
        return await seen_by(session)


async def in_autocommit(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
        return await seen_by(session)


async def in_a_session(manager: DatabaseSessionManager) -> list[str]:
    async with manager.session() as session:
        return await seen_by(session)


async def on_a_connection(manager: DatabaseSessionManager) -> list[str]:
    async with manager.connect() as connection:
        return await seen_by(connection)


async def on_the_engine(manager: DatabaseSessionManager) -> list[str]:
    async with manager.engine.begin() as connection:
        return await seen_by(connection)


async def after_many_rows(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction() as session:
        await session.execute(ADD_MANY, MANY)
        seen = await seen_by(session)
        await session.execute(text("DELETE FROM note"))
        return seen


async def in_a_stream(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction() as session:
        result = await session.stream(SHOW)
        return [value async for row in result for value in row]


async def in_a_savepoint(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction(), manager.transaction(Propagation.NESTED) as session:
        return await seen_by(session)


EACH_BLOCK: list[Callable[[DatabaseSessionManager], Awaitable[list[str]]]] = [
    in_a_transaction,
    in_a_read_only_transaction,
    in_a_read,
    in_autocommit,
    in_a_session,
    on_a_connection,
    on_the_engine,
    after_many_rows,
    in_a_stream,
    in_a_savepoint,
]
WITHOUT_PIPELINE = [replace(way, pipeline=False) for way in ONE_LINE if way.driver == "asyncpg"]


class BehindPgBouncer(Behind):
    more_settings: ClassVar[dict[str, str | int]] = {"default_pool_size": 2}

    @pytest.fixture
    async def remote(self, way: Way, bouncer: PgBouncer) -> AsyncIterator[DatabaseSessionManager]:
        settings = settings_for(way, bouncer, size=2, **ASKED_FOR)
        async with asyncio.timeout(60), DatabaseSessionManager(settings) as remote:
            yield remote


@each_way(ONE_LINE + WITHOUT_PIPELINE)
class TestSettingsOfTheServer(BehindPgBouncer):
    async def test_they_hold_in_each_block_and_nothing_of_them_stays(
        self, way: Way, remote: DatabaseSessionManager, bouncer: PgBouncer
    ) -> None:
        for _ in range(3):  # cold and warm
            for show in EACH_BLOCK:
                assert await show(remote) == SEEN, show.__name__
        if way.pool_mode == "session":
            await remote.close()
        others = [
            await asyncpg.connect(
                bouncer.url(DATABASE),
                statement_cache_size=0,
                server_settings={"application_name": "other"},
            )
            for _ in range(2)
        ]
        for other in others:
            await other.execute("BEGIN")
        for other in others:
            found = list(await other.fetchrow(str(SHOW)))
            assert found == ["other", '"$user", public', "0", "0", "0"]
            await other.close()

    async def test_the_server_stops_a_statement_that_takes_too_long(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        settings = settings_for(way, bouncer, size=1, statement_timeout=0.1)
        async with DatabaseSessionManager(settings) as remote:
            for options in ({}, READ, {"propagation": Propagation.NOT_SUPPORTED}):
                with pytest.raises(DBAPIError) as raised:
                    async with remote.transaction(**options) as session:
                        await session.execute(text("SELECT pg_sleep(60)"))
                assert sqlstate(raised.value) == "57014"  # query_canceled

    async def test_a_transaction_may_set_others_for_itself(
        self, remote: DatabaseSessionManager
    ) -> None:
        own = {"statement_timeout": "9s"}
        for options in ({}, READ, {"propagation": Propagation.NOT_SUPPORTED}):
            async with remote.transaction(settings=own, **options) as session:
                assert (await seen_by(session))[2] == "9s"
            async with remote.transaction(**options) as session:
                assert (await seen_by(session))[2] == "7s"

    async def test_a_statement_that_takes_nothing_ahead_of_it_does_without(
        self, way: Way, remote: DatabaseSessionManager
    ) -> None:
        vacuum = text("VACUUM note")
        if way.pool_mode == "transaction":
            with pytest.raises(DBAPIError) as raised:
                async with remote.transaction(Propagation.NOT_SUPPORTED) as session:
                    await session.execute(vacuum)
            assert "sessionwire_without_hooks" in str(raised.value.__notes__)
        without: Any = {"execution_options": {"sessionwire_without_hooks": True}}
        async with remote.transaction(Propagation.NOT_SUPPORTED, **without) as session:
            await session.execute(vacuum)
        assert await in_autocommit(remote) == SEEN

    async def test_a_write_through_a_read_scope_is_refused(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        for _ in range(2):
            with pytest.raises(DBAPIError) as raised:
                async with remote.transaction(**READ) as session:
                    await session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
            assert sqlstate(raised.value) == READ_ONLY_TRANSACTION
        assert await notes(manager) == []


@each_way(ONE_LINE)
class TestListen(BehindPgBouncer):
    async def test_listen_is_refused_where_sessions_are_shared(
        self, way: Way, remote: DatabaseSessionManager
    ) -> None:
        heard: list[object] = []

        def hear(*news: object) -> None:
            heard.append(news)

        async with remote.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection

            async def listen() -> None:
                if way.driver == "asyncpg":
                    await driver.add_listener("news", hear)
                else:
                    driver.add_notify_handler(heard.append)
                    await connection.execute(text("LISTEN news"))
                    await connection.commit()

            async def is_heard() -> bool:
                await connection.execute(text("SELECT 1"))  # psycopg reads it by the way.
                return bool(heard)

            if way.pool_mode == "transaction":
                with pytest.raises(ConfigurationError, match="connect to the server itself"):
                    await listen()
                if way.driver == "psycopg":
                    with pytest.raises(ConfigurationError, match="connect to the server itself"):
                        driver.notifies()
                return
            await listen()
            async with remote.transaction() as session:
                await session.execute(text("NOTIFY news"))
            await until(is_heard)
            if way.driver == "asyncpg":
                await driver.remove_listener("news", hear)


# Two processes, and restarts

PROGRAM = """
import asyncio, sys
from tests.test_poolers import work_until_told
asyncio.run(work_until_told(*sys.argv[1:]))
"""


async def work_until_told(settings: str, name: str) -> None:
    """Write and read until the end of the standard input, and print what happened."""
    kept: list[str] = []
    unknown: list[str] = []
    restarts = 0
    is_ending = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        is_ending.set()

    async def work(manager: DatabaseSessionManager, task: int) -> None:
        nonlocal restarts
        for each in itertools.count():
            if is_ending.is_set():
                return
            note = f"{name} {task} {each}"
            await asyncio.sleep(0.01)  # Leave the processor to the other processes.
            try:
                async with manager.transaction() as session:
                    session.add(Note(text=note))
                    assert await seen_by(session) == SEEN
                kept.append(note)
                async with manager.transaction(**READ) as session:
                    assert await seen_by(session) == SEEN
                async with manager.transaction(**READ) as session:
                    await session.execute(ADD_MANY, {"text": f"{note} by a read"})
                raise AssertionError("a read scope has written")
            except CommitOutcomeUnknownError:
                unknown.append(note)
            except Exception as error:
                if sqlstate(error) == READ_ONLY_TRANSACTION:
                    continue
                if not is_retryable(error):
                    raise
                restarts += 1

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    manager = DatabaseSessionManager(DatabaseSettings.model_validate_json(settings))
    async with manager, asyncio.TaskGroup() as group:
        for task in range(6):
            group.create_task(work(manager, task))
    print(json.dumps([kept, unknown, restarts]))


@each_way(ONE_LINE)
class TestTwoProcessesAndRestarts(Behind):
    more_settings: ClassVar = {"default_pool_size": 4}

    async def test_restarts_under_load_cause_no_error_but_those_of_lost_connections(
        self, way: Way, bouncer: PgBouncer, manager: DatabaseSessionManager
    ) -> None:
        # In session mode a client keeps its server connection.
        size = 6 if way.pool_mode == "transaction" else 2
        settings = settings_for(way, bouncer, size=size, **ASKED_FOR).model_dump_json()
        variables = environment()
        variables["PYTHONPATH"] += f":{CHECKOUT}"
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", PROGRAM, settings, name),
                env=variables,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for name in ("one", "two")
        ]

        async def both_have_written(than: list[str]) -> bool:
            new = set(await notes(manager)).difference(than)
            return {note.split()[0] for note in new} == {"one", "two"} and len(new) > 40

        kept: set[str] = set()
        unknown: set[str] = set()
        try:
            async with asyncio.timeout(PATIENCE * 4):
                for _ in range(2):
                    await until(partial(both_have_written, await notes(manager)), PATIENCE)
                    bouncer.kill()
                    await bouncer.start()
                await until(partial(both_have_written, await notes(manager)), PATIENCE)
                for process in processes:
                    output, _ = await process.communicate(b"")
                    one_kept, one_unknown, restarts = json.loads(output)
                    assert restarts > 0
                    kept.update(one_kept)
                    unknown.update(one_unknown)
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        there = set(await notes(manager))
        assert kept <= there
        assert there <= kept | unknown


# What open() finds out


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def each(driver: str, *ways: tuple[str, str]) -> list[Way]:
    return [Way(suite, pool_mode, driver=driver) for suite, pool_mode in ways]


IN_TRANSACTION_MODE = [(DEBIAN_12, "transaction"), (NEWEST, "transaction")]
IN_SESSION_MODE = [(DEBIAN_12, "session"), (NEWEST, "session")]


class TestOpen(Behind):
    @each_way(ONE_LINE)
    async def test_nothing_is_told_where_the_setting_is_right(
        self, way: Way, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with DatabaseSessionManager(settings_for(way, bouncer)):
            assert told(caplog) == []

    @each_way([way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE[:1])])
    async def test_a_pooler_that_loses_prepared_statements_is_refused(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        with pytest.raises(ConfigurationError, match="write pooler: transaction beside url"):
            await DatabaseSessionManager(settings_for(way, bouncer)).open()

    @each_way([way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE)])
    async def test_a_pooler_that_shares_sessions_is_refused_if_it_is_said_not_to(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        settings = settings_for(replace(way, pooler="session"), bouncer)
        with pytest.raises(ConfigurationError, match="write pooler: transaction"):
            await DatabaseSessionManager(settings).open()

    @each_way(
        [
            *(way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE[1:])),
            Way(DEBIAN_12, "transaction", NO_CACHE),
        ]
    )
    async def test_one_warning_tells_of_a_pooler_that_shares_sessions(
        self, way: Way, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with DatabaseSessionManager(settings_for(way, bouncer)):
            assert [line.partition("another session: ")[2][:26] for line in told(caplog)] == [
                "write pooler: transaction "
            ]

    @each_way(
        [way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE[1:])],
    )
    async def test_the_command_line_finds_it_and_asks_for_the_setting(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        async def findings(**changes: object) -> list[str]:
            settings = settings_for(way, bouncer).model_copy(update=changes)
            found = check(DatabaseSessionManager(settings), processes=1)
            return [
                f"{each.level} {each.message}" async for each in found if each.subject == "pooler"
            ]

        (without,) = await findings()
        assert without.startswith("error a pooler or proxy is in front of the server: write pooler")
        (with_it,) = await findings(pooler="transaction")
        assert with_it == "ok a pooler is in front of the server, and pooler: transaction is set"

    @each_way([way for driver in DRIVERS for way in each(driver, *IN_SESSION_MODE)])
    async def test_one_warning_tells_of_a_pooler_of_sessions(
        self, way: Way, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with DatabaseSessionManager(settings_for(way, bouncer)):
            assert ["answers in place of the server" in line for line in told(caplog)] == [True]

    @each_way(
        [way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE, *IN_SESSION_MODE)]
    )
    async def test_the_error_of_a_refused_parameter_names_the_setting(
        self, way: Way, bouncer: PgBouncer
    ) -> None:
        settings = settings_for(way, bouncer, statement_timeout=5)
        with pytest.raises(ConnectionFailedError, match=r"pooler: transaction or pooler: session"):
            await DatabaseSessionManager(settings).open()


class TestOpenWithoutAPooler(Behind):
    @pytest.mark.parametrize("pooler", [None, "transaction", "session"])
    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_nothing_is_told_of_the_server_itself(
        self,
        driver: str,
        pooler: Any,
        manager: DatabaseSessionManager,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        url = make_url(manager.settings.url).set(drivername=f"postgresql+{driver}")
        settings = DatabaseSettings(url=url, pooler=pooler, **ASKED_FOR)
        async with DatabaseSessionManager(settings) as direct:
            for show in EACH_BLOCK:
                assert await show(direct) == SEEN, show.__name__
            assert direct.status().connections.made == 1
            assert told(caplog) == []


@each_way([way for driver in DRIVERS for way in each(driver, *IN_TRANSACTION_MODE[1:])])
class TestIgnoredParameters(Behind):
    more_settings: ClassVar = {
        "ignore_startup_parameters": "options, statement_timeout, lock_timeout"
    }

    async def test_a_warning_names_what_the_pooler_ignores(
        self, way: Way, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = settings_for(way, bouncer, statement_timeout=5, lock_timeout=1)
        async with DatabaseSessionManager(settings):
            (line,) = told(caplog)
        assert "lock_timeout" in line
        assert "statement_timeout" in line
        assert "write pooler: transaction " in line


@each_way(each("asyncpg", *IN_SESSION_MODE[:1]))
class TestFullPooler(Behind):
    more_settings: ClassVar = {"default_pool_size": 1}

    async def test_open_does_not_wait_for_a_second_session(
        self, way: Way, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = settings_for(way, bouncer, size=1, connect_timeout=1)
        async with asyncio.timeout(10), DatabaseSessionManager(settings):
            assert len(told(caplog)) == 1
        settings = settings_for(replace(way, pooler="session"), bouncer, size=1, connect_timeout=1)
        async with asyncio.timeout(10), DatabaseSessionManager(settings):
            assert len(told(caplog)) == 1


# The file for production

LINE = "  # pooler: transaction\n"


@each_way([way for way in ONE_LINE if way.pool_mode == "transaction"])
class TestProduction(Behind):
    async def test_the_file_for_production_works_behind_pgbouncer_by_changing_one_line(
        self,
        way: Way,
        bouncer: PgBouncer,
        manager: DatabaseSessionManager,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.delenv("DATABASE__URL", raising=False)
        written = (CHECKOUT / "config" / "production.yaml").read_text()
        assert written.count(LINE) == 1
        file = tmp_path / "production.yaml"
        file.write_text(written.replace(LINE, "  pooler: transaction\n"))
        url = make_url(bouncer.url(DATABASE)).set(drivername=f"postgresql+{way.driver}")
        settings = Settings.load(file, database={"url": url, **ASKED_FOR}).database
        async with DatabaseSessionManager(settings) as shop:
            await load(shop, "shop")
            assert await in_a_transaction(shop) == SEEN
        assert told(caplog) == []
        assert len(await notes(manager)) == TASKS * ROUNDS * 3
