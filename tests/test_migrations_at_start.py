"""Migrations at the start of a program: `Lifespan(migrations=…)`, and several processes."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import text

from sessionwire import (
    ConfigurationError,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    MigrationsPendingError,
)

from .conftest import DATABASE, Postgres
from .migration_projects import CONCURRENTLY, DROP_FIRST, FIRST, SECOND, Project
from .pgbouncer import NEWEST, pgbouncer
from .postgres import OnPostgres, until


@pytest.fixture
def project(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path / "shop", env=ENV_PY)
    monkeypatch.chdir(project.directory)
    return project.add(FIRST, DROP_FIRST)


# What `Lifespan` opens is what the migrations run on, so this database is never opened.
ENV_PY = """\
from sessionwire import DatabaseSessionManager
from sessionwire.alembic import run_migrations

run_migrations(DatabaseSessionManager("postgresql://nowhere/shop"))
"""


async def products(manager: DatabaseSessionManager) -> AsyncIterator[list[str]]:
    """A resource that needs the table."""
    async with manager.connect() as connection:
        await connection.execute(text("INSERT INTO product (name) VALUES ('tea')"))
        yield list(await connection.scalars(text("SELECT name FROM product")))


class Shop(containers.DeclarativeContainer):
    settings: providers.Dependency[Any] = providers.Dependency()
    db = DatabaseContainer.nested(settings=settings, migrations="migrations")
    products = providers.Resource(products, db.sessionmanager)


class TwoDatabases(containers.DeclarativeContainer):
    settings: providers.Dependency[Any] = providers.Dependency()
    plain = DatabaseContainer.nested(settings="sqlite://")
    shop = DatabaseContainer.nested(settings=settings, migrations="migrations")


class TestLifespan:
    async def test_it_upgrades_before_it_opens_what_depends_on_the_database(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        async with Lifespan(Shop(settings=settings), migrations="upgrade") as shop:
            assert await shop.products() == ["tea"]  # type: ignore[misc]

    async def test_it_requires_what_was_migrated_before(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        shop = Shop(settings=settings)
        with pytest.raises(MigrationsPendingError) as caught:
            await Lifespan(shop, migrations="require").__aenter__()
        assert "is behind this build: it lacks 0001 of its migrations" in str(caught.value)
        assert 'Lifespan(container, migrations="upgrade")' in str(caught.value)
        assert not shop.db.sessionmanager().is_initialized

        async with Lifespan(shop.db, migrations="upgrade"):
            pass
        async with Lifespan(shop, migrations="require"):
            pass

    @pytest.mark.parametrize("migrations", ["require", "upgrade"])
    async def test_a_database_that_is_ahead_is_accepted_with_a_warning(
        self,
        settings: DatabaseSettings,
        project: Project,
        migrations: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        shop = Shop(settings=settings)
        newer = project.add().migrations / "versions" / "0002.py"
        async with Lifespan(shop.db, migrations="upgrade"):
            newer.unlink()

        async with Lifespan(shop, migrations=migrations):
            pass

        assert "is ahead of this build: it is at 0002" in caplog.text

    async def test_by_default_it_ignores_migrations(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        async with Lifespan(Shop(settings=settings).db) as db:
            assert (await db.sessionmanager().migration_state()).is_behind

    async def test_a_database_without_migrations_stays_as_it_is(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        async with Lifespan(TwoDatabases(settings=settings), migrations="upgrade") as container:
            assert not (await container.shop.sessionmanager().migration_state()).is_behind
            with pytest.raises(ConfigurationError, match="the manager has none"):
                await container.plain.sessionmanager().migration_state()

    async def test_a_container_in_which_nothing_has_migrations_says_what_to_write(self) -> None:
        container = DatabaseContainer(settings="sqlite://")

        with pytest.raises(ConfigurationError, match=r"no database of the container has any"):
            await Lifespan(container, migrations="upgrade").__aenter__()

    def test_another_word_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigurationError, match="write 'ignore', 'require' or 'upgrade'"):
            Lifespan(DatabaseContainer(), migrations="always")  # type: ignore[arg-type]

    async def test_a_lifespan_inside_another_leaves_the_database_as_that_has_found_it(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        shop = Shop(settings=settings)
        async with Lifespan(shop.db), Lifespan(shop.db, migrations="upgrade"):
            assert (await shop.db.sessionmanager().migration_state()).is_behind


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(project: Project, url: str, processes: list[subprocess.Popen[str]], count: int) -> None:
    """Start processes that wait for a word, so that all begin at once."""
    processes += [project.start(url) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


async def end(*processes: subprocess.Popen[str]) -> list[str]:
    """Return what each process has run. None may have failed or said anything else."""
    ends = [await asyncio.to_thread(each.communicate, timeout=60) for each in processes]
    assert [each.returncode for each in processes] == [0] * len(processes), ends
    return [output.strip() for output, _ in ends]


@pytest.mark.long
class TestProcesses:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Project:
        return Project(tmp_path / "shop").add(FIRST, DROP_FIRST)

    @pytest.mark.parametrize("count", [2, 5])
    async def test_of_processes_that_start_at_once_on_an_empty_database_one_migrates(
        self,
        project: Project,
        database_url: str,
        processes: list[subprocess.Popen[str]],
        count: int,
    ) -> None:
        project.add(SECOND).add(CONCURRENTLY)
        start(project, database_url, processes, count)

        go(*processes)

        assert sorted(await end(*processes)) == [""] * (count - 1) + ["0001,0002,0003"]

    async def test_one_of_two_migrates_a_database_that_is_behind(
        self, project: Project, database_url: str, processes: list[subprocess.Popen[str]]
    ) -> None:
        assert project.alembic(database_url, "upgrade", "head").returncode == 0
        project.add(SECOND)
        start(project, database_url, processes, 2)

        go(*processes)

        assert sorted(await end(*processes)) == ["", "0002"]

    async def test_two_leave_alone_a_database_that_is_ahead(
        self, project: Project, database_url: str, processes: list[subprocess.Popen[str]]
    ) -> None:
        project.add(SECOND)
        assert project.alembic(database_url, "upgrade", "head").returncode == 0
        (project.migrations / "versions" / "0002.py").unlink()
        start(project, database_url, processes, 2)

        go(*processes)

        assert await end(*processes) == ["", ""]

    async def test_if_the_process_that_migrates_is_killed_the_one_that_waits_migrates(
        self,
        project: Project,
        database_url: str,
        processes: list[subprocess.Popen[str]],
        backend: str,
    ) -> None:
        marker = project.directory / "running"
        long = "op.execute('SELECT pg_sleep(60)')" if backend == "postgresql" else "time.sleep(60)"
        wait_once = f"""\
        import pathlib, time
        {SECOND}
        marker = pathlib.Path({str(marker)!r})
        if not marker.exists():
            marker.touch()
            {long}
        """
        project.add(wait_once)
        start(project, database_url, processes, 2)
        first, second = processes
        go(first)

        async def runs() -> bool:
            return marker.exists()

        await until(runs, 20)
        go(second)
        await asyncio.sleep(0.5)  # It waits for the other one, which must not end before.
        assert second.poll() is None

        first.kill()

        async with asyncio.timeout(20):
            assert await end(second) == ["0001,0002"]

    async def test_the_command_waits_for_a_process_that_migrates(
        self, project: Project, database_url: str, processes: list[subprocess.Popen[str]]
    ) -> None:
        marker = project.directory / "running"
        project.add(
            f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(1)\n{SECOND}"
        )
        start(project, database_url, processes, 1)
        go(*processes)

        async def runs() -> bool:
            return marker.exists()

        await until(runs, 20)
        command = await asyncio.to_thread(project.alembic, database_url, "upgrade", "head")

        assert command.returncode == 0, command.stderr
        assert await end(*processes) == ["0001,0002"]

    async def test_the_command_does_all_that_alembic_can(
        self, project: Project, database_url: str
    ) -> None:
        for arguments, words in {
            ("upgrade", "head"): "",
            ("check",): "No new upgrade operations detected.",
            ("current",): "0001 (head)",
            ("downgrade", "base"): "",
            ("upgrade", "head", "--sql"): "CREATE TABLE product",
        }.items():
            done = await asyncio.to_thread(project.alembic, database_url, *arguments)
            assert done.returncode == 0, done.stderr
            assert words in done.stdout


@pytest.mark.long
class TestBehindPgBouncer(OnPostgres):
    async def test_migrations_go_past_a_transaction_pooler(
        self, project: Project, postgres: Postgres, database_url: str
    ) -> None:
        project.add(CONCURRENTLY)
        async with pgbouncer(NEWEST, postgres.host, pool_mode="transaction") as bouncer:
            behind = {"url": bouncer.url(DATABASE), "pooler": "transaction"}
            with pytest.raises(ConfigurationError, match=re.escape("migrations_url: pooler: tr")):
                await Lifespan(
                    Shop(settings=DatabaseSettings.model_validate(behind)), migrations="upgrade"
                ).__aenter__()

            direct = {**behind, "migrations_url": postgres.url("")}
            shop = Shop(settings=DatabaseSettings.model_validate(direct))
            async with Lifespan(shop, migrations="upgrade") as shop:
                assert await shop.products() == ["tea"]  # type: ignore[misc]
