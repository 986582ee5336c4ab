"""The migrations of the ledger, on both databases."""

import pytest
from sqlalchemy import MetaData

from ledger.container import Container
from ledger.models import Account, Transfer
from sessionwire import Base, DatabaseContainer
from sessionwire.testing import MigrationTests


@pytest.fixture(scope="session")
def sessionwire_container() -> DatabaseContainer:
    """The ledger's database, without the tables of other tests in this process."""
    own = MetaData(naming_convention=Base.metadata.naming_convention)
    for model in (Account, Transfer):
        model.__table__.to_metadata(own)  # type: ignore[attr-defined]
    return DatabaseContainer(migrations=Container.db.migrations(), metadata=own)


class TestMigrations(MigrationTests):
    pass
