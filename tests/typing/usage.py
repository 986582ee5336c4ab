"""What users write, as type checkers see it: checked by mypy and pyright in strict mode, never run."""

from __future__ import annotations

from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    TransactionManager,
    sessionmanager,
    transactional,
)
from sessionwire import Settings as BaseSettings


class ShopSettings(BaseSettings):
    greeting: str = "hello"


class Service:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.transaction = transaction

    @transactional
    async def price(self, item: int, *, currency: str = "EUR") -> float:
        return 1.0


async def use(manager: DatabaseSessionManager) -> None:
    DatabaseSettings(url="sqlite://", pool=PoolSettings(size=3))
    assert_type(ShopSettings.load("config.yaml", greeting="hi"), ShopSettings)
    sessionmanager.init("postgresql://localhost/shop")
    service = Service(CurrentSession(manager), manager.transaction)
    assert_type(await service.price(1, currency="CHF"), float)
    async with manager.session() as session, manager.transaction() as same, manager.connect() as connection:
        assert_type(session, AsyncSession)
        assert_type(same, AsyncSession)
        assert_type(connection, AsyncConnection)
    async with manager as opened:
        assert_type(opened, DatabaseSessionManager)
