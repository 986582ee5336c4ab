"""advanced-alchemy: its repositories flush, unless `auto_commit=True` lets them commit."""

from __future__ import annotations

import pytest
from advanced_alchemy.base import BigIntBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy.orm import Mapped

from sessionwire import DatabaseSessionManager, DatabaseSettings, ScopeOwnsTransactionError

pytestmark = pytest.mark.long


class Coffee(BigIntBase):
    name: Mapped[str]


class Coffees(SQLAlchemyAsyncRepository[Coffee]):
    model_type = Coffee


async def test_a_repository_that_commits_itself_belongs_in_a_session(
    settings: DatabaseSettings,
) -> None:
    metadata = Coffee.__table__.metadata
    async with DatabaseSessionManager(settings, metadata=metadata) as manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        async with manager.session() as session:
            await Coffees(session=session, auto_commit=True).add(Coffee(name="mocha"))
        with pytest.raises(ScopeOwnsTransactionError):
            async with manager.transaction() as session:
                await Coffees(session=session, auto_commit=True).add(Coffee(name="lost"))
        async with manager.transaction() as session:
            await Coffees(session=session).add(Coffee(name="latte"))

        async with manager.transaction(read_only=True) as session:
            names = {coffee.name for coffee in await Coffees(session=session).get_many()}
    assert names == {"mocha", "latte"}
