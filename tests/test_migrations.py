"""Migrations with Alembic: `manager.migrate()`, and `run_migrations()` in an env.py."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    MigrationError,
    NotInitializedError,
)
from sessionwire._migrations.locks import MIGRATION_LOCK

from .conftest import DATABASE, Postgres, assert_all_returned
from .migration_projects import CONCURRENTLY, DROP_FIRST, FIRST, MODELS, SECOND, SLOW, Project
from .postgres import OnPostgres, kill, running, until


@pytest.fixture
def project(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A project with one migration, whose env.py the process can import."""
    monkeypatch.setenv("SHOP_URL", database_url)
    monkeypatch.syspath_prepend(str(tmp_path / "shop"))
    monkeypatch.chdir(tmp_path)
    yield Project(tmp_path / "shop").add(FIRST, DROP_FIRST)
    sys.modules.pop("models", None)


@pytest.fixture
async def shop(
    settings: DatabaseSettings, project: Project
) -> AsyncIterator[DatabaseSessionManager]:
    """An open manager of an empty database, with the migrations of the project."""
    async with DatabaseSessionManager(settings, migrations=project.migrations) as manager:
        yield manager
        await assert_all_returned(manager)


async def columns(manager: DatabaseSessionManager) -> list[str]:
    """Return the columns of the table `product`; none if it is not there."""
    sql = (
        "SELECT name FROM pragma_table_info('product')"
        if manager.engine.dialect.name == "sqlite"
        else "SELECT column_name FROM information_schema.columns WHERE table_name = 'product' "
        "ORDER BY ordinal_position"
    )
    async with manager.connect() as connection:
        return list(await connection.scalars(text(sql)))


async def execute(manager: DatabaseSessionManager, *statements: str) -> None:
    async with manager.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))


class TestMigrate:
    async def test_it_upgrades_an_empty_database_to_the_newest_revision(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.add(SECOND)

        state = await shop.migrate()

        assert (state.current, state.pending) == ((), ("0001", "0002"))
        assert await columns(shop) == ["name", "stock"]
        assert (await shop.migration_state()).current == ("0002",)

    async def test_it_upgrades_to_a_revision_that_is_named(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.add(SECOND)

        await shop.migrate("0001")

        state = await shop.migration_state()
        assert (state.current, state.heads, state.pending) == (("0001",), ("0002",), ("0002",))
        assert state.is_behind
        assert not state.is_ahead

    async def test_a_database_that_is_past_the_revision_stays_as_it_is(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.add(SECOND)
        await shop.migrate()

        assert not (await shop.migrate("0001")).pending

        assert await columns(shop) == ["name", "stock"]

    async def test_a_database_that_is_up_to_date_is_only_looked_at(
        self, shop: DatabaseSessionManager
    ) -> None:
        await shop.migrate()
        sent: list[str] = []
        event.listen(
            shop.engine.sync_engine,
            "before_cursor_execute",
            lambda *arguments: sent.append(arguments[2]),
        )

        await shop.migrate()

        assert not [sql for sql in sent if "lock" in sql.lower() or sql.startswith("SET")]
        assert any("alembic_version" in sql for sql in sent)

    async def test_a_database_that_is_ahead_stays_as_it_is_and_is_warned_of(
        self,
        shop: DatabaseSessionManager,
        project: Project,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        project.add(SECOND)
        await shop.migrate()
        (project.migrations / "versions" / "0002.py").unlink()

        state = await shop.migrate()

        assert state.is_ahead
        assert (state.current, state.heads) == (("0002",), ("0001",))
        [record] = [each for each in caplog.records if each.name == "sessionwire.migrations"]
        assert record.levelno == logging.WARNING
        assert "is ahead of this build: it is at 0002, and this build ends at 0001" in (
            record.getMessage()
        )

    async def test_several_managers_at_once_migrate_once(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        project.add(SECOND)
        managers = [
            DatabaseSessionManager(settings, migrations=project.migrations) for _ in range(5)
        ]
        for manager in managers:
            await manager.open()

        states = await asyncio.gather(*(manager.migrate() for manager in managers))

        ran = [state.pending for state in states if state.pending]
        assert ran == [("0001", "0002")]
        for manager in managers:
            await manager.close()

    async def test_a_migration_that_fails_leaves_the_revision_before_and_names_itself(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        await shop.migrate()
        project.add(f"{SECOND}; op.execute('SELECT nonsense')")

        with pytest.raises(DBAPIError) as caught:
            await shop.migrate()

        assert "raised by migration 0002" in caught.value.__notes__
        assert await columns(shop) == ["name"]
        assert (await shop.migration_state()).current == ("0001",)

    async def test_tables_that_were_made_without_migrations_are_explained(
        self, shop: DatabaseSessionManager
    ) -> None:
        await execute(shop, "CREATE TABLE product (name TEXT)")

        with pytest.raises(DBAPIError) as caught:
            await shop.migrate()

        assert any("alembic stamp" in note for note in caught.value.__notes__)

    async def test_alembics_own_errors_are_errors_of_this_library(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.write("0002", "0001").write("0003", "0001")

        with pytest.raises(MigrationError, match="Multiple head revisions"):
            await shop.migrate("head")

        assert len((await shop.migrate()).pending) == 3
        with pytest.raises(MigrationError, match="Can't locate revision identified by '0009'"):
            await shop.migrate("0009")

    async def test_a_manager_that_is_not_open_says_so(self, project: Project) -> None:
        manager = DatabaseSessionManager(migrations=project.migrations)

        with pytest.raises(NotInitializedError):
            await manager.migrate()

    async def test_logging_is_not_touched(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        logger = logging.getLogger("shop.orders")
        root = logging.getLogger()
        before = root.level, list(root.handlers)

        await shop.migrate()

        assert not logger.disabled
        assert (root.level, root.handlers) == before

    async def test_it_needs_one_connection_of_the_pool(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        pool = settings.pool.model_copy(update={"size": 1, "max_overflow": 0, "timeout": 3})
        one = settings.model_copy(update={"pool": pool})

        async with DatabaseSessionManager(one, migrations=project.migrations) as manager:
            await manager.migrate()

            assert await columns(manager) == ["name"]

    async def test_all_of_one_upgrade_is_kept_or_nothing(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.add("raise ValueError('no')")

        with pytest.raises(ValueError, match="no"):
            await shop.migrate()

        assert await columns(shop) == []


class TestAnEnvironment:
    async def test_a_manager_without_migrations_says_what_to_write(
        self, settings: DatabaseSettings
    ) -> None:
        async with DatabaseSessionManager(settings) as manager:
            with pytest.raises(ConfigurationError, match="the manager has none: write"):
                await manager.migrate()

    @pytest.mark.parametrize("location", ["nowhere", "no_such_package:migrations", "os:migrations"])
    async def test_a_directory_that_is_missing_is_named(
        self, settings: DatabaseSettings, location: str
    ) -> None:
        async with DatabaseSessionManager(settings, migrations=location) as manager:
            with pytest.raises(ConfigurationError, match=f"'{location}' is no directory of mig"):
                await manager.migrate()

    async def test_the_env_py_of_alembics_templates_is_refused_before_it_runs(
        self, settings: DatabaseSettings, tmp_path: Path
    ) -> None:
        from alembic import __file__ as alembic

        template = Path(alembic).parent / "templates" / "async" / "env.py"
        project = Project(tmp_path / "shop", env=template.read_text()).add(FIRST)

        async with DatabaseSessionManager(settings, migrations=project.migrations) as manager:
            with pytest.raises(ConfigurationError) as caught:
                await manager.migrate()

        assert "env.py does not call run_migrations() of sessionwire.alembic" in str(caught.value)
        assert "run_migrations(Container())" in str(caught.value)

    async def test_an_env_py_that_does_nothing_is_refused(
        self, settings: DatabaseSettings, tmp_path: Path
    ) -> None:
        project = Project(tmp_path / "shop", env="import sessionwire").add(FIRST)

        async with DatabaseSessionManager(settings, migrations=project.migrations) as manager:
            with pytest.raises(ConfigurationError, match="does not call run_migrations"):
                await manager.migrate()

    async def test_an_error_of_env_py_is_raised_as_it_is(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        (project.migrations / "env.py").write_text("import sessionwire, no_such_module")

        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            await shop.migrate()

    async def test_options_of_env_py_reach_alembic(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        env = project.migrations / "env.py"
        env.write_text(
            env.read_text().replace("=metadata)", "=metadata), version_table='versions'")
        )

        await shop.migrate()

        async with shop.connect() as connection:
            assert await connection.scalar(text("SELECT version_num FROM versions")) == "0001"
        assert not (await shop.migration_state()).is_behind

    async def test_hooks_of_transactions_are_left_out(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        shop.transaction.on_begin(lambda connection: pytest.fail("a hook ran"))

        await shop.migrate()

        assert not (await shop.migration_state()).is_behind


class TestTheCommand:
    """What `alembic` runs; each command is called in this process, which has no event loop."""

    @pytest.fixture
    def config(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> Config:
        monkeypatch.chdir(project.directory)
        return Config("alembic.ini", stdout=StringIO(), output_buffer=StringIO())

    def test_it_upgrades_and_downgrades_and_tells_the_revision(
        self, config: Config, project: Project, database_url: str
    ) -> None:
        project.add(SECOND, "with op.batch_alter_table('product') as b: b.drop_column('stock')")

        command.upgrade(config, "head")
        command.current(config)
        command.downgrade(config, "0001")
        command.current(config)
        command.stamp(config, "base")
        command.current(config)

        assert said(config.stdout) == ["0002 (head)", "0001"]

    def test_check_compares_the_models_with_the_database(
        self, config: Config, project: Project
    ) -> None:
        command.upgrade(config, "head")
        command.check(config)
        project.add(SECOND)
        command.upgrade(config, "head")

        with pytest.raises(CommandError, match=r"New upgrade operations detected: .*stock"):
            command.check(config)

    def test_a_revision_is_made_from_the_models(self, config: Config, project: Project) -> None:
        command.upgrade(config, "head")
        (project.directory / "models.py").write_text(
            MODELS + "product.append_column(sa.Column('stock', sa.Integer()))\n"
        )
        sys.modules.pop("models", None)

        script = command.revision(config, "stock", autogenerate=True)

        made = Path(script.path).read_text()  # type: ignore[union-attr]
        assert "sa.Column('stock', sa.Integer(), nullable=True)" in made
        assert ("batch_alter_table" in made) is ("sqlite" in os.environ["SHOP_URL"])

    def test_the_offline_mode_writes_sql_and_needs_no_database(
        self, config: Config, project: Project, monkeypatch: pytest.MonkeyPatch, backend: str
    ) -> None:
        nowhere = "sqlite:////nowhere/x.db" if backend == "sqlite" else "postgresql://nowhere/x"
        monkeypatch.setenv("SHOP_URL", nowhere)
        project.add(
            "product = sa.table('product', sa.column('name', sa.String()))\n"
            "op.execute(product.insert().values(name='tea'))"
        )

        command.upgrade(config, "head", sql=True)

        lines = said(config.output_buffer)
        assert (lines[0], lines[-1]) == ("BEGIN;", "COMMIT;")
        assert "CREATE TABLE product (" in lines
        assert any(line.startswith("INSERT INTO product (name) VALUES ('tea')") for line in lines)

    def test_loggers_of_the_application_stay_on(self, config: Config, project: Project) -> None:
        logger = logging.getLogger("shop.orders")
        with Path("alembic.ini").open("a") as file:
            file.write(LOGGING)

        with keeps_root_logger():
            command.upgrade(config, "head")

        assert not logger.disabled
        assert logging.getLogger("alembic.shop").level == logging.ERROR

    async def test_in_an_event_loop_it_says_what_to_call_instead(self, config: Config) -> None:
        with pytest.raises(CommandError, match=r"write await manager.migrate\(\)"):
            command.upgrade(config, "head")

    def test_a_container_of_several_databases_is_asked_for_one(
        self, config: Config, project: Project
    ) -> None:
        (project.migrations / "env.py").write_text(TWO_DATABASES)

        with pytest.raises(CommandError, match="this container has several databases: give"):
            command.upgrade(config, "head")

        env = TWO_DATABASES.replace("Container())", "Container().one)")
        (project.migrations / "env.py").write_text(env)
        command.upgrade(config, "head")
        assert (project.directory / "one.db").exists()


class TestOnSQLite:
    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"

    @pytest.fixture
    async def sale(self, shop: DatabaseSessionManager) -> DatabaseSessionManager:
        """A product, and a sale that would be deleted with it."""
        await shop.migrate()
        await execute(
            shop,
            "CREATE TABLE sale (id INTEGER PRIMARY KEY, "
            "product TEXT REFERENCES product(name) ON DELETE CASCADE)",
            "INSERT INTO product VALUES ('tea')",
            "INSERT INTO sale VALUES (7, 'tea')",
        )
        return shop

    BATCH = """\
    with op.batch_alter_table("product") as batch:
        batch.add_column(sa.Column("stock", sa.Integer()))
        batch.alter_column("name", type_=sa.String(50))
    """

    async def test_a_batch_keeps_the_rows_that_refer_to_the_table(
        self, sale: DatabaseSessionManager, project: Project
    ) -> None:
        project.add(self.BATCH)

        await sale.migrate()

        async with sale.connect() as connection:
            rows = await connection.execute(text("SELECT id, product FROM sale"))
            assert rows.all() == [(7, "tea")]
            assert await connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert await columns(sale) == ["name", "stock"]

    async def test_foreign_keys_that_a_migration_breaks_are_named_and_nothing_is_kept(
        self, sale: DatabaseSessionManager, project: Project
    ) -> None:
        project.add('op.execute("DELETE FROM product")')

        with pytest.raises(MigrationError) as caught:
            await sale.migrate()

        assert "upgrade 0002 leaves foreign keys that refer to nothing" in str(caught.value)
        assert "table 'sale', row 7: product refers to no row of 'product'" in str(caught.value)
        async with sale.connect() as connection:
            assert await connection.scalar(text("SELECT name FROM product")) == "tea"

    async def test_a_statement_in_an_autocommit_block_runs_outside_of_a_transaction(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        project.add("with op.get_context().autocommit_block():\n    op.execute('VACUUM')")

        await shop.migrate()

        assert not (await shop.migration_state()).is_behind

    async def test_a_cancellation_frees_the_lock_and_leaves_a_whole_revision(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        await shop.migrate()
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n"
        project.add(f"{SECOND}\nopen('begun', 'w').close()\nop.execute('{endless}')")
        task = asyncio.create_task(shop.migrate())

        await until(partial(asyncio.to_thread, os.path.exists, "begun"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        project.write("0002", "0001", SECOND)
        async with asyncio.timeout(5):
            assert (await shop.migrate()).pending == ("0002",)
        assert await columns(shop) == ["name", "stock"]

    async def test_a_database_in_a_temporary_file_is_migrated(self, project: Project) -> None:
        async with DatabaseSessionManager("sqlite://", migrations=project.migrations) as manager:
            file = Path(str(manager.engine.url.database))
            await manager.migrate()
            assert await columns(manager) == ["name"]

        assert list(file.parent.glob(f"{file.name}*")) == []


class TestOnPostgreSQL(OnPostgres):
    async def test_an_index_is_built_concurrently_by_one_of_several(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        project.add(CONCURRENTLY)
        managers = [
            DatabaseSessionManager(settings, migrations=project.migrations) for _ in range(3)
        ]
        for manager in managers:
            await manager.open()

        async with asyncio.timeout(30):
            states = await asyncio.gather(*(manager.migrate() for manager in managers))

        assert [state.pending for state in states if state.pending] == [("0001", "0002")]
        async with managers[0].connect() as connection:
            valid = text("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_name'::regclass")
            assert await connection.scalar(valid) is True
        for manager in managers:
            await manager.close()

    @pytest.mark.several_connections("another connection has the lock")
    async def test_a_lock_of_another_transaction_is_waited_for_shortly_and_explained(
        self, shop: DatabaseSessionManager, project: Project
    ) -> None:
        await shop.migrate()
        project.add(SECOND)

        async with shop.connect() as other:
            await other.execute(text("SELECT * FROM product"))
            with pytest.raises(DBAPIError, match="ALTER TABLE product ADD COLUMN stock") as caught:
                await shop.migrate(lock_timeout=0.1)

        notes = "\n".join(caught.value.__notes__)
        assert "raised by migration 0002" in notes
        assert "the statement waited 0.1 s for a lock that another transaction holds" in notes
        await shop.migrate()
        assert await columns(shop) == ["name", "stock"]

    async def test_the_limits_of_the_service_do_not_end_a_migration(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        limits = {"statement_timeout": 0.1, "idle_in_transaction_timeout": 0.1}
        strict = settings.model_copy(update=limits)
        project.add("import time; op.execute('SELECT pg_sleep(0.2)'); time.sleep(0.2)")

        async with DatabaseSessionManager(strict, migrations=project.migrations) as manager:
            await manager.migrate()

            async with manager.connect() as connection:
                assert await connection.scalar(text("SHOW statement_timeout")) == "100ms"

    async def test_nothing_that_was_set_or_locked_stays_on_a_connection_of_the_pool(
        self, shop: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        await shop.migrate()

        async def no_lock() -> bool:
            held = await postgres.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'")
            return not held

        await until(no_lock)
        for _ in range(3):
            async with shop.connect() as connection:
                assert await connection.scalar(text("SHOW lock_timeout")) == "0"

    async def test_a_cancellation_frees_the_lock_and_leaves_a_whole_revision(
        self, shop: DatabaseSessionManager, project: Project, postgres: Postgres
    ) -> None:
        await shop.migrate()
        project.add(f"{SECOND}; {SLOW}")
        task = asyncio.create_task(shop.migrate())
        await until(lambda: running(postgres, shop, "%pg_sleep%"))

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def stopped() -> bool:
            return not await running(postgres, shop, "%pg_sleep%")

        await until(stopped)
        project.write("0002", "0001", SECOND)
        async with asyncio.timeout(5):
            await shop.migrate()
        assert await columns(shop) == ["name", "stock"]

    async def test_a_cancellation_in_an_autocommit_block_stays_one(
        self, shop: DatabaseSessionManager, project: Project, postgres: Postgres
    ) -> None:
        project.add(f"with op.get_context().autocommit_block():\n    {SLOW}")
        task = asyncio.create_task(shop.migrate())
        await until(lambda: running(postgres, shop, "%pg_sleep%"))

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (await shop.migration_state()).current in [(), ("0001",)]

    @pytest.mark.several_connections("another connection has the lock")
    async def test_a_cancellation_while_it_waits_for_another_process_leaves_that_alone(
        self, shop: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async with shop.engine.connect() as other:
            await other.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
            task = asyncio.create_task(shop.migrate())
            await until(lambda: waits(postgres))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await other.execute(text(f"SELECT pg_advisory_unlock({MIGRATION_LOCK})"))

        await shop.migrate()

    @pytest.mark.several_connections("another connection has the lock")
    async def test_a_wait_that_is_too_long_says_so(self, shop: DatabaseSessionManager) -> None:
        async with shop.engine.connect() as other:
            await other.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
            with pytest.raises(MigrationError, match=r"were not done within 0\.2 s"):
                await shop.migrate(timeout=0.2)
            await other.execute(text(f"SELECT pg_advisory_unlock({MIGRATION_LOCK})"))

    @pytest.mark.several_connections("another connection has the lock")
    async def test_a_long_wait_is_logged(
        self,
        shop: DatabaseSessionManager,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr("sessionwire._migrations.locks.PATIENCE", 0.05)
        async with shop.engine.connect() as other:
            await other.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
            with pytest.raises(MigrationError):
                await shop.migrate(timeout=0.4)
            await other.execute(text(f"SELECT pg_advisory_unlock({MIGRATION_LOCK})"))

        said = [each for each in caplog.records if each.name == "sessionwire.migrations"]
        assert [each.getMessage() for each in said] == [
            "waiting for another process, which migrates the database"
        ]

    async def test_a_server_that_is_killed_in_the_middle_leaves_the_revision_before(
        self, shop: DatabaseSessionManager, project: Project, postgres: Postgres
    ) -> None:
        await shop.migrate()
        project.add(f"{SECOND}; {SLOW}")
        task = asyncio.create_task(shop.migrate())
        await until(lambda: running(postgres, shop, "%pg_sleep%"))

        await kill(postgres, shop, "%pg_sleep%")
        with pytest.raises(DBAPIError):
            await task

        assert (await shop.migration_state()).current == ("0001",)
        project.write("0002", "0001", SECOND)
        await shop.migrate()
        assert await columns(shop) == ["name", "stock"]

    async def test_a_transaction_pooler_needs_a_way_past_it(
        self, settings: DatabaseSettings, project: Project
    ) -> None:
        behind = settings.model_copy(update={"pooler": "transaction"})

        async with DatabaseSessionManager(behind, migrations=project.migrations) as manager:
            with pytest.raises(ConfigurationError, match="migrations_url: pooler: transaction is"):
                await manager.migrate()
            assert (await manager.migration_state()).is_behind

    async def test_the_migrations_url_is_used_for_the_migrations_alone(
        self, settings: DatabaseSettings, project: Project, postgres: Postgres
    ) -> None:
        direct = f"{postgres.url('')}&application_name=direct"
        named = "current_setting('application_name')"
        project.add(f'op.execute("CREATE TABLE app AS SELECT {named}")')
        behind = DatabaseSettings(
            url=settings.url, pool=settings.pool, pooler="transaction", migrations_url=direct
        )

        async with DatabaseSessionManager(behind, migrations=project.migrations) as manager:
            await manager.migrate()

            async with manager.connect() as connection:
                assert await connection.scalar(text("SELECT * FROM app")) == "direct"
                assert await connection.scalar(text(f"SELECT {named}")) != "direct"


LOGGING = """
[loggers]
keys = root,shop
[handlers]
keys =
[formatters]
keys =
[logger_root]
level = WARNING
handlers =
[logger_shop]
level = ERROR
handlers =
qualname = alembic.shop
"""
TWO_DATABASES = """\
from dependency_injector import containers
from sessionwire import DatabaseContainer
from sessionwire.alembic import run_migrations


class Container(containers.DeclarativeContainer):
    one = DatabaseContainer.nested(settings="sqlite:///one.db")
    two = DatabaseContainer.nested(settings="sqlite:///two.db")


run_migrations(Container())
"""


def said(output: Any) -> list[str]:
    return [line for line in output.getvalue().splitlines() if line]


@contextmanager
def keeps_root_logger() -> Iterator[None]:
    """Set the root logger, which a configuration replaces, back at the end."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


async def waits(server: Postgres) -> bool:
    """Tell whether a process has asked for the lock of the migrations, in vain."""
    asked = (
        "SELECT 1 FROM pg_stat_activity WHERE query ~ 'pg_try_advisory_lock' "
        "AND datname = $1 AND pid <> pg_backend_pid()"
    )
    return bool(await server.execute(asked, DATABASE))
