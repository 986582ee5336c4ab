"""Databases from a template: copied, shared by processes, and dropped in the end."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import DBAPIError

import sessionwire
from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    SessionwireError,
)
from sessionwire.testing import DatabaseCopy, DatabaseTemplate
from tests.cancellation import each_cancellation
from tests.conftest import DATABASE, Postgres, notes
from tests.models import Note
from tests.postgres import OnPostgres, until

Look = Callable[[], Awaitable[set[str]]]


@pytest.fixture
async def databases(
    server: Postgres | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Look]:
    """Yield a function that lists new databases. At the end there may be none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def look() -> set[str]:
        if server is None:
            files = {
                f"{directory}/{file}" for directory, _, files in os.walk(tmp_path) for file in files
            }
            return {file for file in files if not file.endswith(("-wal", "-shm"))}
        return {
            row["datname"] for row in await server.execute("SELECT datname FROM pg_database")
        } - before

    before: set[str] = set()
    before = await look()
    yield look
    assert await look() == set()
    assert os.listdir(tmp_path) == []


async def seed(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await manager.create_all(connection)
    async with manager.transaction() as session:
        session.add(Note(text="seeded"))


async def write(copy: DatabaseCopy, note: str) -> list[str]:
    """Commit one more note to a copy, and return its notes."""
    async with DatabaseSessionManager(copy.settings) as manager:
        async with manager.transaction() as session:
            session.add(Note(text=note))
        return await notes(manager)


@pytest.mark.usefixtures("databases")
class TestCopies:
    async def test_a_copy_contains_the_seed_and_nothing_of_another_copy(
        self, database_url: str
    ) -> None:
        async with DatabaseTemplate(database_url, seed) as template:
            async with template.copy() as first, template.copy() as second:
                assert await write(first, "first") == ["first", "seeded"]
                assert await write(second, "second") == ["second", "seeded"]
            async with template.copy() as third:
                assert await write(third, "third") == ["seeded", "third"]

    async def test_a_template_leaves_the_database_of_its_url_alone(
        self, database_url: str, server: Postgres | None, databases: Look
    ) -> None:
        async with DatabaseTemplate(database_url, seed) as template, template.copy():
            assert len(await databases()) == 2  # template and copy
            async with (
                DatabaseSessionManager(database_url) as manager,
                manager.connect() as connection,
            ):
                assert not await connection.run_sync(
                    lambda sync: sync.dialect.has_table(sync, "note")
                )
        if server is None:
            os.unlink(make_url(database_url).database or "")

    async def test_several_copies_can_be_created_concurrently(self, database_url: str) -> None:
        async def use(template: DatabaseTemplate, note: str) -> list[str]:
            async with template.copy() as copy:
                return await write(copy, note)

        async with DatabaseTemplate(database_url, seed) as template:
            used = await asyncio.gather(*(use(template, f"note {n}") for n in range(5)))
        assert used == [[f"note {n}", "seeded"] for n in range(5)]

    async def test_a_copy_has_the_settings_of_the_template_except_its_name(
        self, database_url: str
    ) -> None:
        settings = DatabaseSettings(
            url=database_url, pool=PoolSettings(size=2), application_name="shop"
        )
        async with DatabaseTemplate(settings, seed) as template, template.copy() as copy:
            assert make_url(copy.settings.url).database != make_url(settings.url).database
            assert copy.settings.model_copy(update={"url": settings.url}) == settings

    async def test_a_synchronous_fixture_can_drive_a_template_step_by_step(
        self, database_url: str
    ) -> None:
        def drive() -> list[str]:
            with asyncio.Runner() as runner:
                template = DatabaseTemplate(database_url, seed)
                runner.run(template.__aenter__())
                opening = template.copy()
                copy = runner.run(opening.__aenter__())
                written = runner.run(write(copy, "by hand"))
                runner.run(opening.__aexit__(None, None, None))
                runner.run(template.__aexit__(None, None, None))
                return written

        assert await asyncio.to_thread(drive) == ["by hand", "seeded"]

    @pytest.mark.long
    async def test_a_copy_reports_how_many_connections_were_left_open(
        self, database_url: str, backend: str
    ) -> None:
        async with DatabaseTemplate(database_url, seed) as template, AsyncExitStack() as left:
            async with template.copy() as copy:
                await write(copy, "and closed")
            assert copy.connections_left == 0
            async with template.copy() as copy:
                manager = await left.enter_async_context(DatabaseSessionManager(copy.settings))
                async with manager.session() as first, manager.session() as second:
                    await first.execute(text("SELECT 1"))
                    await second.execute(text("SELECT 1"))
            assert copy.connections_left == (2 if backend == "postgresql" else 1)

    async def test_a_template_that_is_not_open_cannot_be_copied(self, database_url: str) -> None:
        template = DatabaseTemplate(database_url, seed)
        for _ in range(2):
            with pytest.raises(SessionwireError, match="inside `async with template:`"):
                async with template.copy():
                    pass
            async with template, template.copy() as copy:
                assert await write(copy, "open") == ["open", "seeded"]


@pytest.mark.long
class TestSeeding:
    async def test_a_failed_seed_leaves_no_database(
        self, database_url: str, databases: Look
    ) -> None:
        async def fail(manager: DatabaseSessionManager) -> None:
            await seed(manager)
            raise ValueError("no such migration")

        with pytest.raises(ValueError, match="no such migration") as raised:
            async with DatabaseTemplate(database_url, fail):
                pass
        assert await databases() == set()
        assert not hasattr(raised.value, "__notes__")

    async def test_a_seed_that_leaves_a_connection_open_is_refused(
        self, database_url: str, databases: Look
    ) -> None:
        async def leave_open(manager: DatabaseSessionManager) -> None:
            await stack.enter_async_context(DatabaseSessionManager(manager.settings))

        async with AsyncExitStack() as stack:
            with pytest.raises(SessionwireError, match="dispose each engine"):
                async with DatabaseTemplate(database_url, leave_open):
                    pass
        assert await databases() == set()

    async def test_a_seed_cancelled_at_any_await_leaves_no_database(
        self, database_url: str, databases: Look
    ) -> None:
        async def use() -> None:
            async with DatabaseTemplate(database_url, seed):
                pass

        async for _ in each_cancellation(
            use, stride=5
        ):  # Each of some sixty creates and drops a database.
            assert await databases() == set()

    async def test_a_cancelled_copy_leaves_the_template_usable(
        self, database_url: str, databases: Look
    ) -> None:
        async def use() -> None:
            async with template.copy():
                await asyncio.sleep(0)

        async with DatabaseTemplate(database_url, seed) as template:
            alone = await databases()
            async for _ in each_cancellation(use):
                assert await databases() == alone
            async with template.copy() as copy:
                assert await write(copy, "done") == ["done", "seeded"]


class Seeds:
    """A seed that counts how often it begins, and then waits."""

    def __init__(self, *, failures: int = 0) -> None:
        self.failures = failures
        self.begun = 0
        self.go_on = asyncio.Event()

    async def __call__(self, manager: DatabaseSessionManager) -> None:
        self.begun += 1
        await seed(manager)
        await self.go_on.wait()
        if self.begun <= self.failures:
            raise ValueError("the seed failed")


@pytest.mark.usefixtures("databases")
class TestKeys:
    async def test_a_second_user_waits_for_the_template_and_finds_it_ready(
        self, database_url: str
    ) -> None:
        async def use(note: str) -> list[str]:
            async with (
                DatabaseTemplate(database_url, seeds, key="run 1") as template,
                template.copy() as copy,
            ):
                written = await write(copy, note)
                await all_have_it.wait()
                return written

        seeds, all_have_it = Seeds(), asyncio.Barrier(3)
        async with asyncio.TaskGroup() as group:
            used = [group.create_task(use(f"note {n}")) for n in range(3)]
            await until(lambda: asyncio.sleep(0, seeds.begun))
            seeds.go_on.set()
        assert [task.result() for task in used] == [[f"note {n}", "seeded"] for n in range(3)]
        assert seeds.begun == 1

    async def test_the_last_user_drops_the_template(
        self, database_url: str, databases: Look
    ) -> None:
        async with DatabaseTemplate(database_url, seed, key="run 1") as last:
            async with DatabaseTemplate(database_url, seed, key="run 1"):
                assert len(await databases()) == 1
            async with last.copy() as copy:
                assert await write(copy, "still there") == ["seeded", "still there"]
        assert await databases() == set()

    async def test_the_next_user_builds_a_template_that_the_first_failed_to_build(
        self, database_url: str
    ) -> None:
        async def use() -> list[str]:
            async with (
                DatabaseTemplate(database_url, seeds, key="run 1") as template,
                template.copy() as copy,
            ):
                return await write(copy, "made")

        seeds = Seeds(failures=1)
        first = asyncio.create_task(use())
        await until(lambda: asyncio.sleep(0, seeds.begun))
        second = asyncio.create_task(use())
        seeds.go_on.set()
        with pytest.raises(ValueError, match="the seed failed"):
            await first
        assert await second == ["made", "seeded"]

    async def test_templates_with_different_keys_are_separate(
        self, database_url: str, databases: Look
    ) -> None:
        for key in ("run 2", None):
            seeds = Seeds()
            seeds.go_on.set()
            async with DatabaseTemplate(database_url, seed, key="run 1"):
                async with DatabaseTemplate(database_url, seeds, key=key):
                    assert len(await databases()) == 2
                assert seeds.begun == 1


PROGRAM = """
import asyncio, sys
from sqlalchemy import text
from sessionwire import DatabaseSessionManager
from sessionwire.testing import DatabaseTemplate

url, key, where = sys.argv[1:]

async def hold(place):
    if place == where:
        print(place, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

async def seed(manager):
    print("seeding", flush=True)
    async with manager.connect() as connection:
        await connection.execute(text("CREATE TABLE note (text TEXT)"))
    await hold("in the seed")

async def main():
    async with DatabaseTemplate(url, seed, key=key or None) as template, template.copy() as copy:
        async with (
            DatabaseSessionManager(copy.settings) as manager,
            manager.connect() as connection,
        ):
            await connection.execute(text("SELECT * FROM note"))
            await hold("in a copy")

asyncio.run(main())
"""


@asynccontextmanager
async def process(url: str, *, where: str, key: str = "") -> AsyncIterator[Process]:
    """Run another process with a template, which stays until it gets a line."""
    source = Path(sessionwire.__file__).parents[1]
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, url, key, where, cwd=source, stdin=PIPE, stdout=PIPE
    )
    try:
        yield program
    finally:
        if program.returncode is None:
            program.kill()
        await program.communicate()


async def arrival(program: Process, where: str) -> list[str]:
    """Return its output until it has arrived there."""
    assert program.stdout is not None
    said: list[str] = []
    async with asyncio.timeout(30):
        while where not in said:
            line = (await program.stdout.readline()).decode()
            assert line, "it has ended"
            said.append(line.strip())
    return said


@pytest.mark.long
class TestProcesses:
    async def test_processes_with_one_key_share_one_template(
        self, database_url: str, databases: Look
    ) -> None:
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(
                    process(database_url, where="in a copy", key="run 1")
                )
                for _ in range(3)
            ]
            said = [line for worker in workers for line in await arrival(worker, "in a copy")]
            assert said.count("seeding") == 1
            assert len(await databases()) == 4
            for worker in workers:
                await worker.communicate(b"\n")
            assert [worker.returncode for worker in workers] == [0, 0, 0]
        assert await databases() == set()

    @pytest.mark.parametrize(("where", "key"), [("in the seed", "run 1"), ("in a copy", "")])
    async def test_databases_of_a_killed_process_are_dropped_and_those_of_living_ones_kept(
        self, database_url: str, databases: Look, where: str, key: str
    ) -> None:
        async def is_dropped() -> bool:
            async with DatabaseTemplate(database_url, seed, key=key or None) as anew:
                if len(await databases()) > 3:
                    return False  # the server has not seen yet that its client is gone
                async with anew.copy() as copy:
                    return await write(copy, "anew") == ["anew", "seeded"]

        async with (
            DatabaseTemplate(database_url, seed) as live,
            live.copy() as copy,
            process(database_url, where=where, key=key) as killed,
        ):
            await arrival(killed, where)
            assert len(await databases()) == (3 if where == "in the seed" else 4)
            killed.kill()
            await killed.wait()
            await until(is_dropped, 30)
            assert await write(copy, "live") == ["live", "seeded"]

    async def test_a_template_that_is_being_built_is_not_dropped_as_stale(
        self, database_url: str, databases: Look
    ) -> None:
        async with process(database_url, where="in the seed") as living:
            await arrival(living, "in the seed")
            async with DatabaseTemplate(database_url, seed):
                assert len(await databases()) == 2
            await living.communicate(b"\n")
            assert living.returncode == 0


class TestOnPostgres(OnPostgres):
    @pytest.mark.parametrize("name", ['ein "Überraschungs"-Paket: %s', "ß" * 31])
    async def test_a_template_works_beside_a_database_of_any_name(
        self, postgres: Postgres, databases: Look, name: str
    ) -> None:
        quoted = name.replace('"', '""')
        await postgres.execute(f'CREATE DATABASE "{quoted}"')
        try:
            url = make_url(postgres.url(DATABASE)).set(database=name)
            async with DatabaseTemplate(url, seed) as template, template.copy() as copy:
                assert await write(copy, "any") == ["any", "seeded"]
                assert all(len(made.encode()) <= 63 for made in await databases())
        finally:
            await postgres.execute(f'DROP DATABASE "{quoted}"')

    async def test_a_template_beside_a_missing_database_says_so(self, postgres: Postgres) -> None:
        with pytest.raises(ConnectionFailedError, match="'nowhere'") as raised:
            async with DatabaseTemplate(postgres.url("nowhere"), seed):
                pass
        assert "name one that exists, such as 'postgres'" in raised.value.__notes__[0]

    async def test_a_template_of_a_user_who_cannot_create_databases_says_so(
        self, postgres: Postgres, databases: Look
    ) -> None:
        async with clerk(postgres, "NOCREATEDB") as url:
            with pytest.raises(
                ConfigurationError, match=r"user 'clerk' may not create .* ALTER ROLE … CREATEDB"
            ):
                async with DatabaseTemplate(url, seed):
                    pass

    async def test_a_template_needs_only_the_right_to_create_databases_and_shows_no_password(
        self, postgres: Postgres, databases: Look
    ) -> None:
        async with (
            clerk(postgres, "CREATEDB") as url,
            DatabaseTemplate(url, seed) as template,
            template.copy() as copy,
        ):
            assert await write(copy, "clerk's") == ["clerk's", "seeded"]
            assert make_url(copy.settings.url).password == "s3cret"
            assert "s3cret" not in f"{copy} {copy.settings.url}"

    async def test_a_template_works_on_an_embedded_server(
        self, postgres: Postgres, databases: Look
    ) -> None:
        (running,) = await postgres.execute("SHOW data_directory")
        async with (
            DatabaseTemplate(f"embedded:{running[0]}", seed) as template,
            template.copy() as copy,
        ):
            assert await write(copy, "embedded") == ["embedded", "seeded"]

    async def test_a_template_that_lost_its_connection_says_so_and_the_next_one_cleans_up(
        self, postgres: Postgres, database_url: str, databases: Look
    ) -> None:
        strike = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1"
        with pytest.raises(DBAPIError):
            async with DatabaseTemplate(database_url, seed):
                await postgres.execute(strike, DATABASE)
        with pytest.raises(ValueError, match="the first error") as raised:
            async with DatabaseTemplate(database_url, seed):
                await postgres.execute(strike, DATABASE)
                raise ValueError("the first error")
        assert "left to the next run" in raised.value.__notes__[0]
        async with DatabaseTemplate(database_url, seed):
            assert len(await databases()) == 1


@asynccontextmanager
async def clerk(postgres: Postgres, right: str) -> AsyncIterator[URL]:
    """Yield the URL of a user that has only this right."""
    await postgres.execute(f"CREATE ROLE clerk LOGIN {right}")
    try:
        yield make_url(postgres.url(DATABASE)).set(username="clerk", password="s3cret")
    finally:
        await postgres.execute("DROP ROLE clerk")


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:a?mode=memory&uri=true"]
)
async def test_a_template_of_a_memory_database_is_in_the_temporary_directory(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with DatabaseTemplate(url, seed) as template, template.copy() as copy:
        assert await write(copy, "temporary") == ["seeded", "temporary"]
        (directory,) = os.scandir(tmp_path)
        assert Path(make_url(copy.settings.url).database or "").parent == Path(directory)
        assert directory.stat().st_mode & 0o077 == 0
    assert os.listdir(tmp_path) == []


def test_a_template_of_an_unsupported_database_is_refused_by_name() -> None:
    settings = DatabaseSettings(url="sqlite://").model_copy(
        update={"url": make_url("oracle+oracledb://shop")}
    )
    with pytest.raises(ConfigurationError, match="PostgreSQL and SQLite databases, not of oracle"):
        DatabaseTemplate(settings, seed)
