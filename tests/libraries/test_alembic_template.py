"""Alembic's `async` template: it migrates as it is, or with a manager of this library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect, make_url, text

from sessionwire import DatabaseSessionManager, DatabaseSettings
from tests.documents import environment

pytestmark = pytest.mark.long

MIGRATIONS = {
    "0001": ("op.create_table('shelf', sa.Column('id', sa.Integer, primary_key=True))", None),
    "0002": ("op.execute('INSERT INTO shelf VALUES (7)')", "0001"),
}
WITH_A_MANAGER = """
from sessionwire import DatabaseSessionManager


async def run_async_migrations() -> None:
    manager = DatabaseSessionManager(config.get_main_option("sqlalchemy.url"))
    async with manager, manager.connect() as connection:
        await connection.run_sync(do_run_migrations)


def run_migrations_online"""


def alembic(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def make_project(directory: Path, settings: DatabaseSettings, *, with_a_manager: bool) -> None:
    made = alembic(directory, "init", "-t", "async", "migrations")
    assert made.returncode == 0, made.stderr
    ini, env = directory / "alembic.ini", directory / "migrations" / "env.py"
    url = make_url(settings.url).render_as_string(hide_password=False).replace("%", "%%")
    ini.write_text(re.sub("(?m)^sqlalchemy.url = .*$", f"sqlalchemy.url = {url}", ini.read_text()))
    if with_a_manager:
        own = r"(?s)\nasync def run_async_migrations.*?\ndef run_migrations_online"
        changed, count = re.subn(own, WITH_A_MANAGER, env.read_text())
        assert count == 1
        env.write_text(changed)
    for revision, (upgrade, before) in MIGRATIONS.items():
        (directory / "migrations" / "versions" / f"{revision}.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n"
            f"revision, down_revision = {revision!r}, {before!r}\n"
            f"def upgrade():\n    {upgrade}\n"
        )


@pytest.mark.parametrize("with_a_manager", [False, True], ids=["as it is", "with a manager"])
async def test_the_template_migrates(
    with_a_manager: bool, settings: DatabaseSettings, tmp_path: Path
) -> None:
    make_project(tmp_path, settings, with_a_manager=with_a_manager)

    upgraded = alembic(tmp_path, "upgrade", "head")

    assert upgraded.returncode == 0, upgraded.stderr
    async with DatabaseSessionManager(settings) as manager, manager.session() as session:
        assert await session.scalar(text("SELECT id FROM shelf")) == 7
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == "0002"


async def test_with_a_manager_a_migration_that_fails_undoes_those_before_it(
    settings: DatabaseSettings, tmp_path: Path
) -> None:
    make_project(tmp_path, settings, with_a_manager=True)
    second = tmp_path / "migrations" / "versions" / "0002.py"
    second.write_text(second.read_text().replace("INTO shelf", "INTO nowhere"))

    assert alembic(tmp_path, "upgrade", "head").returncode != 0

    async with DatabaseSessionManager(settings) as manager, manager.connect() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert "shelf" not in tables
