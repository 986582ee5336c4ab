"""`MigrationTests`: the tests of migrations that everybody writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, MetaData

from sessionwire._database.runtime import database_of
from sessionwire.manager import DatabaseSessionManager


class MigrationTests:
    """Test the migrations of a container, with the pytest plugin, on an empty database.

    Derive a class from it in a file of tests. There is one head; the tables that the
    migrations make equal the models; and each migration goes up, down and up again.

    Attributes:
        irreversible: The revisions that have no way down.

    Example:
        ```python
        class TestMigrations(MigrationTests):
            pass
        ```
    """

    irreversible: Collection[str] = ()

    def test_there_is_one_head(self, sessionwire_migrations: list[MigratedDatabase]) -> None:
        for database in sessionwire_migrations:
            database.check_heads()

    def test_the_models_equal_the_migrations(
        self, sessionwire_migrations: list[MigratedDatabase]
    ) -> None:
        for database in sessionwire_migrations:
            database.check_models()

    def test_each_migration_goes_up_down_and_up_again(
        self, sessionwire_migrations: list[MigratedDatabase]
    ) -> None:
        for database in sessionwire_migrations:
            database.check_steps(self.irreversible)


@dataclass
class MigratedDatabase:
    """An empty database, and the migrations to check on it."""

    manager: DatabaseSessionManager
    runner: asyncio.Runner

    def check_heads(self) -> None:
        heads = self._scripts.directory.get_heads()
        if len(heads) > 1:
            raise AssertionError(
                f"the migrations have {len(heads)} heads, {' and '.join(heads)}: two were written "
                "at the same time; change down_revision of one of them to the other one, or run "
                "alembic merge heads"
            )

    def check_models(self) -> None:
        def work(connection: Connection) -> str:
            self._go(connection, "upgrade", "heads")
            return self._differences(connection, None)

        if missing := self._run(work):
            raise AssertionError(
                "the models and the migrations differ; a migration would have to do this:\n\n"
                f"{missing}\n\nalembic revision --autogenerate writes it"
            )

    def check_steps(self, irreversible: Collection[str]) -> None:
        # From the first to the last; where branches meet, down is not one way.
        revisions = reversed(list(self._scripts.directory.walk_revisions()))

        def work(connection: Connection) -> None:
            for each in revisions:
                before = self._tables(connection)
                self._go(connection, "upgrade", each.revision)
                if each.revision in irreversible or each.is_merge_point:
                    continue
                after = self._tables(connection)
                self._go(connection, "downgrade", f"{each.revision}@{each.down_revision or 'base'}")
                self._compare(connection, before, f"downgrade() of {each.revision} does not undo")
                self._go(connection, "upgrade", each.revision)
                self._compare(connection, after, f"after its downgrade(), {each.revision} lacks")

        self._run(work)

    @property
    def _scripts(self) -> Any:
        from sessionwire._migrations.upgrade import scripts_of  # Alembic is an extra.

        return scripts_of(self.manager.migrations, self.manager.metadata)

    def _run(self, work: Callable[[Connection], Any]) -> Any:
        from sessionwire._migrations.scripts import alone_in_process
        from sessionwire._migrations.upgrade import connection_for_migrations

        async def run() -> Any:
            database = database_of(self.manager)
            async with connection_for_migrations(database) as connection, alone_in_process():
                return await connection.run_sync(work)

        return self.runner.run(run())

    def _go(self, connection: Connection, way: str, revision: str) -> None:
        from alembic import command

        with self._scripts.given(connection) as config:
            getattr(command, way)(config, revision)

    def _compare(self, connection: Connection, expected: MetaData, what: str) -> None:
        if missing := self._differences(connection, expected):
            raise AssertionError(f"{what} all that its upgrade() does; it would take:\n\n{missing}")

    def _tables(self, connection: Connection) -> MetaData:
        """Return the tables in the database, without Alembic's own."""
        found = MetaData()

        def reflect(_: Any, context: Any) -> Iterable[Any]:
            found.reflect(context.connection)
            schema = f"{context.version_table_schema}." if context.version_table_schema else ""
            versions = found.tables.get(f"{schema}{context.version_table}")
            if versions is not None:
                found.remove(versions)
            return ()

        self._scripts.run_environment(connection, reflect, dont_mutate=True)
        return found

    def _differences(self, connection: Connection, expected: MetaData | None) -> str:
        """Return as Python what would make the database like `expected`, or the models."""
        from alembic.autogenerate import produce_migrations, render_python_code

        said: list[str] = []

        def compare(_: Any, context: Any) -> Iterable[Any]:
            metadata = context.opts["target_metadata"] if expected is None else expected
            operations: Any = produce_migrations(context, metadata).upgrade_ops
            if not operations.is_empty():
                batch = context.opts["render_as_batch"]
                code = render_python_code(operations, render_as_batch=batch)
                said.extend(line for line in code.splitlines() if "# ###" not in line)
            return ()

        self._scripts.run_environment(connection, compare, dont_mutate=True)
        return "\n".join(said)
