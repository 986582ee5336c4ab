"""Directories of migrations for tests, as a project has them, and processes that run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

from .documents import CHECKOUT

ENV_PY = """\
import os

from sessionwire import DatabaseSessionManager
from sessionwire.alembic import run_migrations

from models import metadata

run_migrations(DatabaseSessionManager(os.environ["SHOP_URL"], metadata=metadata))
"""
MODELS = """\
import sqlalchemy as sa

metadata = sa.MetaData()
product = sa.Table("product", metadata, sa.Column("name", sa.String(), primary_key=True))
"""
ALEMBIC_INI = """\
[alembic]
script_location = migrations
prepend_sys_path = .
path_separator = os
"""
SCRIPT = """\
import sqlalchemy as sa
from alembic import op

revision, down_revision = ${repr(up_revision)}, ${repr(down_revision)}


def upgrade():
    ${upgrades if upgrades else "pass"}
"""
FIRST = "op.create_table('product', sa.Column('name', sa.String(), primary_key=True))"
DROP_FIRST = "op.drop_table('product')"
SECOND = "op.add_column('product', sa.Column('stock', sa.Integer()))"
CONCURRENTLY = """\
with op.get_context().autocommit_block():
    op.create_index('ix_name', 'product', ['name'], postgresql_concurrently=True)
"""
SLOW = "op.execute('SELECT pg_sleep(30)')"
# A program that migrates, and says when it begins and what it has run.
MIGRATE = """\
import asyncio, sys
from sessionwire import DatabaseSessionManager

async def main():
    async with DatabaseSessionManager(sys.argv[1], migrations="migrations") as manager:
        print("ready", flush=True)
        sys.stdin.readline()
        state = await manager.migrate()
        print(",".join(state.pending), flush=True)

asyncio.run(main())
"""


class Project:
    """A directory with models.py, alembic.ini and migrations/."""

    def __init__(self, directory: Path, *, env: str = ENV_PY) -> None:
        self.directory = directory
        self.migrations = directory / "migrations"
        (self.migrations / "versions").mkdir(parents=True)
        (self.migrations / "env.py").write_text(env)
        (self.migrations / "script.py.mako").write_text(SCRIPT)
        (directory / "models.py").write_text(MODELS)
        (directory / "alembic.ini").write_text(ALEMBIC_INI)
        self._count = 0

    def add(self, upgrade: str = "pass", downgrade: str = "pass") -> Project:
        """Add a migration after the last one."""
        before = f"{self._count:04}" if self._count else None
        self._count += 1
        return self.write(f"{self._count:04}", before, upgrade, downgrade)

    def write(
        self, revision: str, before: str | None, upgrade: str = "pass", downgrade: str = "pass"
    ) -> Project:
        text = [
            "import sqlalchemy as sa\nfrom alembic import op\n",
            f"revision, down_revision = {revision!r}, {before!r}\n",
        ]
        for name, body in (("upgrade", upgrade), ("downgrade", downgrade)):
            text.append(f"\ndef {name}():\n{indent(dedent(body), '    ')}\n")
        (self.migrations / "versions" / f"{revision}.py").write_text("".join(text))
        return self

    def alembic(self, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command `alembic`."""
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "alembic", *arguments],
            cwd=self.directory,
            env=self._environment(url),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, url: str) -> subprocess.Popen[str]:
        """Start a process that migrates as soon as it reads a line."""
        return subprocess.Popen(
            [sys.executable, "-c", MIGRATE, url],
            cwd=self.directory,
            env=self._environment(url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _environment(self, url: str) -> dict[str, str]:
        path = f"{CHECKOUT / 'src'}{os.pathsep}{self.directory}"
        return {**os.environ, "PYTHONPATH": path, "SHOP_URL": url}
