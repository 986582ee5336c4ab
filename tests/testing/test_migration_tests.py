"""`MigrationTests`: what its tests say about migrations that are wrong."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table

from sessionwire import DatabaseSessionManager
from sessionwire.testing import MigrationTests
from sessionwire.testing.migrations import MigratedDatabase
from tests.migration_projects import DROP_FIRST, FIRST, SECOND, Project

DROP_SECOND = "with op.batch_alter_table('product') as batch: batch.drop_column('stock')"


@pytest.fixture
def metadata() -> MetaData:
    metadata = MetaData()
    Table("product", metadata, Column("name", String(), primary_key=True))
    return metadata


@pytest.fixture
def project(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    monkeypatch.setenv("SHOP_URL", database_url)
    monkeypatch.syspath_prepend(str(tmp_path / "shop"))
    yield Project(tmp_path / "shop").add(FIRST, DROP_FIRST)
    sys.modules.pop("models", None)


@pytest.fixture
def database(
    project: Project, database_url: str, metadata: MetaData
) -> Iterator[list[MigratedDatabase]]:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        manager = DatabaseSessionManager(
            database_url, metadata=metadata, migrations=project.migrations
        )
        runner.run(manager.open())
        yield [MigratedDatabase(manager, runner)]
        runner.run(manager.close())


def test_migrations_that_are_right_pass(
    database: list[MigratedDatabase], project: Project, metadata: MetaData
) -> None:
    project.add(SECOND, DROP_SECOND).add()
    metadata.tables["product"].append_column(Column("stock", Integer()))

    MigrationTests().test_there_is_one_head(database)
    MigrationTests().test_each_migration_goes_up_down_and_up_again(database)
    MigrationTests().test_the_models_equal_the_migrations(database)


def test_two_heads_are_named_with_the_remedy(
    database: list[MigratedDatabase], project: Project
) -> None:
    project.write("0002", "0001").write("0003", "0001")

    with pytest.raises(AssertionError, match=r"2 heads, 000\d and 000\d: .* alembic merge heads"):
        MigrationTests().test_there_is_one_head(database)


def test_what_the_migrations_lack_is_shown_as_python(
    database: list[MigratedDatabase], metadata: MetaData
) -> None:
    metadata.tables["product"].append_column(Column("stock", Integer()))

    with pytest.raises(AssertionError) as caught:
        MigrationTests().test_the_models_equal_the_migrations(database)

    assert "sa.Column('stock', sa.Integer(), nullable=True)" in str(caught.value)
    assert "alembic revision --autogenerate writes it" in str(caught.value)


def test_a_downgrade_that_leaves_something_is_named(
    database: list[MigratedDatabase], project: Project
) -> None:
    project.add(SECOND)

    with pytest.raises(AssertionError) as caught:
        MigrationTests().test_each_migration_goes_up_down_and_up_again(database)

    assert "downgrade() of 0002 does not undo all that its upgrade() does" in str(caught.value)
    assert re.search(r"drop_column\((.*, )?'stock'\)", str(caught.value))


def test_a_revision_without_a_way_down_is_left_out_if_it_is_named(
    database: list[MigratedDatabase], project: Project
) -> None:
    class Tests(MigrationTests):
        irreversible = ("0002",)

    project.add(SECOND, "raise NotImplementedError").add()

    Tests().test_each_migration_goes_up_down_and_up_again(database)


def test_branches_that_are_merged_pass(database: list[MigratedDatabase], project: Project) -> None:
    project.write("0002", "0001", SECOND, DROP_SECOND).write("0003", "0001")
    (project.migrations / "versions" / "0004.py").write_text(
        "revision, down_revision = '0004', ('0002', '0003')\n"
        "def upgrade(): pass\n"
        "def downgrade(): pass\n"
    )

    MigrationTests().test_there_is_one_head(database)
    MigrationTests().test_each_migration_goes_up_down_and_up_again(database)
