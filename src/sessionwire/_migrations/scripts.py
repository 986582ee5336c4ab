"""`Scripts`: a directory of migrations, and what its env.py runs on."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData

from sessionwire.errors import ConfigurationError, MigrationError
from sessionwire.status import MigrationState

try:
    from alembic import context as context
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError as CommandError
    from alembic.util import to_tuple
except ImportError as error:
    raise ImportError("migrations need Alembic: pip install 'sessionwire[alembic]'") from error

GIVEN = "sessionwire"  # among the attributes of Alembic's Config: see `Given`
POLL_INTERVAL = 0.02  # seconds
OUR_CALL = re.compile(r"(?<!context\.)\brun_migrations\(")
ENV_PY = """\
from sessionwire.alembic import run_migrations

from shop import Container

run_migrations(Container())"""

Steps = Callable[[tuple[str, ...], Any], Iterable[Any]]


@dataclass
class Given:
    """What an env.py that `Scripts` runs shall work on, in place of its own database."""

    connection: Connection
    metadata: MetaData
    was_used: bool = False

    def run(self, options: Mapping[str, Any]) -> None:
        self.was_used = True
        configure(self.connection, self.metadata, options)
        run()


class Scripts:
    """The migrations in one directory.

    Args:
        location: The directory, or `package:directory`.
        metadata: The tables of the models.

    Raises:
        ConfigurationError: There are no migrations.
    """

    def __init__(self, location: str | Path, metadata: MetaData) -> None:
        self.config = Config(stdout=StringIO())
        self.config.set_main_option("script_location", str(location).replace("%", "%%"))
        self._metadata = metadata
        try:
            self.directory = ScriptDirectory.from_config(self.config)
            self._check_environment()
        except (CommandError, ImportError, OSError, TypeError) as error:
            raise ConfigurationError(
                f"migrations: {str(location)!r} is no directory of migrations, nor one of a "
                f"package, such as 'shop:migrations': {error}"
            ) from error

    def _check_environment(self) -> None:
        """Refuse Alembic's own env.py before it opens a database of its own."""
        text = Path(self.directory.env_py_location).read_text(encoding="utf-8")
        if "context.configure" in text and not OUR_CALL.search(text):
            raise self._not_ours()

    def _not_ours(self) -> ConfigurationError:
        return ConfigurationError(
            f"migrations: {self.directory.env_py_location} does not call run_migrations() of "
            f"sessionwire.alembic, so it would not migrate this database; write there:\n\n{ENV_PY}"
        )

    def look(self, connection: Connection, revision: str = "heads") -> MigrationState:
        """Return how far the database is from a revision. Changes nothing."""
        states: list[MigrationState] = []

        def take_no_step(current: tuple[str, ...], _context: Any) -> Iterable[Any]:
            states.append(self._state(current, revision))
            return ()

        self.run_environment(connection, take_no_step, dont_mutate=True)
        return states[0]

    def upgrade(self, connection: Connection, revision: str = "heads") -> MigrationState:
        """Upgrade to a revision, unless the database is there or is ahead.

        Returns:
            How far it was before.
        """
        states: list[MigrationState] = []
        running = ""

        def take_steps(current: tuple[str, ...], _context: Any) -> Iterator[Any]:
            nonlocal running
            states.append(self._state(current, revision))
            for step in () if states[0].is_ahead else self._steps(current, revision):
                running = step.revision.revision
                yield step

        try:
            self.run_environment(connection, take_steps, destination_rev=revision)
        except Exception as error:
            if running:
                error.add_note(f"raised by migration {running}")
            raise
        return states[0]

    def run_environment(self, connection: Connection, steps: Steps, **options: Any) -> None:
        """Run env.py on a connection.

        Args:
            connection: The connection, in no transaction.
            steps: Returns Alembic's steps from the current revisions on.
            **options: Options of Alembic's `EnvironmentContext`.

        Raises:
            ConfigurationError: env.py does not call `run_migrations()`.
            MigrationError: Alembic refuses.
        """
        with (
            self.given(connection),
            EnvironmentContext(self.config, self.directory, fn=steps, **options),
        ):
            self.directory.run_env()

    @contextmanager
    def given(self, connection: Connection) -> Generator[Config]:
        """Let env.py work on a connection. It is for commands with this configuration."""
        given = self.config.attributes[GIVEN] = Given(connection, self._metadata)
        try:
            yield self.config
        except CommandError as error:
            raise MigrationError(f"Alembic refuses: {error}") from error
        if not given.was_used:
            raise self._not_ours()

    def _state(self, current: tuple[str, ...], revision: str) -> MigrationState:
        known = {script.revision for script in self.directory.walk_revisions()}
        unknown = tuple(each for each in current if each not in known)
        steps = () if unknown else self._steps(current, revision)
        return MigrationState(
            current=current,
            heads=tuple(self.directory.get_heads()),
            pending=tuple(step.revision.revision for step in steps),
            unknown=unknown,
        )

    def _steps(self, current: tuple[str, ...], revision: str) -> list[Any]:
        wanted = {script.revision for script in self.directory.get_revisions(revision)}
        if wanted <= {script.revision for script in self.directory.get_all_current(current)}:
            return []
        # Alembic's documentation calls it too: "Run Multiple Alembic Environments".
        upgrade_revs: Any = self.directory._upgrade_revs  # pyright: ignore[reportPrivateUsage]
        return list(upgrade_revs(revision, current))


_environment = threading.Lock()


@asynccontextmanager
async def alone_in_process() -> AsyncGenerator[None]:
    """Wait until nobody else runs an env.py: Alembic keeps its context in global variables."""
    while not _environment.acquire(blocking=False):
        await asyncio.sleep(POLL_INTERVAL)
    try:
        yield
    finally:
        _environment.release()


# In an env.py


def configure(connection: Connection, metadata: MetaData, options: Mapping[str, Any]) -> None:
    """Configure Alembic's context for a connection that is in no transaction."""
    backend = connection.dialect.name
    listeners = to_tuple(options.get("on_version_apply"), default=())
    if backend == "sqlite":
        listeners = (_check_foreign_keys, *listeners)
    arguments: dict[str, Any] = {
        **defaults(backend, metadata),
        **options,
        "on_version_apply": listeners,
    }
    context.configure(connection=connection, **arguments)


def defaults(backend: str, metadata: MetaData) -> dict[str, Any]:
    """Return the arguments of Alembic's `configure()` that a user need not give."""
    arguments: dict[str, Any] = {"target_metadata": metadata}
    if backend == "sqlite":
        # With this library, DDL is transactional on SQLite too.
        arguments |= {"render_as_batch": True, "transactional_ddl": True}
    return arguments


def changes_database() -> bool:
    """Tell whether the command that runs env.py is one such as `upgrade`."""
    return "destination_rev" in context.get_context().opts


def run() -> None:
    """Run the migrations of the command in transactions, on SQLite without foreign keys."""
    connection = context.get_bind()
    if connection.dialect.name == "sqlite" and changes_database():
        # A batch makes a table anew and drops the old one, with all rows that refer to it.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.commit()
    with context.begin_transaction():
        context.run_migrations()


def _check_foreign_keys(*, ctx: Any, step: Any, **_: Any) -> None:
    connection: Connection = ctx.connection
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(3)
    if not broken:
        return
    rows = ", ".join(_describe(connection, *row) for row in broken)
    way = "upgrade" if step.is_upgrade else "downgrade"
    raise MigrationError(
        f"the {way} {step.up_revision_id} leaves foreign keys that refer to nothing: {rows}; its "
        "transaction was rolled back: let it repair or delete these rows too"
    )


def _describe(connection: Connection, table: str, row: int | None, parent: str, key: int) -> str:
    keys = connection.exec_driver_sql(
        'SELECT "from" FROM pragma_foreign_key_list(?) WHERE id = ? ORDER BY seq', (table, key)
    )
    columns = ", ".join(keys.scalars())
    return f"table {table!r}, row {row}: {columns} refers to no row of {parent!r}"
