"""advanced-alchemy's repositories and services, and SQLAlchemy's close_all_sessions."""

from __future__ import annotations

from typing import Any

import pytest
from advanced_alchemy.base import BigIntBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from dependency_injector import containers, providers
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, close_all_sessions
from sqlalchemy.orm import Mapped

from sessionwire import (
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    NoSessionError,
    NotInitializedError,
    ScopeOwnsTransactionError,
)

from .conftest import checked_out


class Tea(BigIntBase):
    name: Mapped[str]


class Teas(SQLAlchemyAsyncRepository[Tea]):
    model_type = Tea


class TeaService(SQLAlchemyAsyncRepositoryService[Tea, Teas]):
    repository_type = Teas


class Container(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = providers.Container(DatabaseContainer, settings=settings, metadata=BigIntBase.metadata)
    teas = providers.Factory(Teas, session=db.session)
    service = providers.Singleton(TeaService, session=db.session)


@pytest.fixture
async def container(settings: DatabaseSettings) -> Any:
    return Container(settings=settings)


async def create(container: Any) -> None:
    manager = container.db.sessionmanager()
    async with manager.connect() as connection:
        await manager.create_all(connection)


@pytest.mark.parametrize("when", ["before the start", "outside of a block", "inside of one"])
async def test_a_container_builds_repositories_and_services_of_advanced_alchemy(
    container: Any, backend: str, when: str
) -> None:
    built = [container.teas(), container.service()] if when == "before the start" else []
    async with Lifespan(container):
        await create(container)
        transaction = container.db.transaction()
        if when == "inside of one":
            async with transaction():
                built = [container.teas(), container.service()]
        teas, service = built or [container.teas(), container.service()]
        assert teas._dialect.name == backend
        async with transaction():
            oolong = await teas.add(Tea(name="oolong"))
            sencha = await service.create({"name": "sencha"})
        async with transaction():
            assert {tea.name for tea in await teas.get_many()} == {"oolong", "sencha"}
            assert await service.count() == 2
            await teas.delete(oolong.id)
            await service.update({"name": "gyokuro"}, item_id=sencha.id)
        with pytest.raises(RuntimeError, match="undone"):
            async with transaction():
                await service.delete(sencha.id)
                raise RuntimeError("undone")
        async with transaction(read_only=True):
            assert [tea.name for tea in await teas.get_many()] == ["gyokuro"]
        with pytest.raises(NoSessionError):
            await teas.get_many()


async def test_an_injected_session_has_a_bind_and_an_empty_info_outside_of_a_block(
    manager: DatabaseSessionManager,
) -> None:
    current = CurrentSession(manager)
    assert current.bind is manager.engine
    assert current.info == {}
    with pytest.raises(TypeError):
        current.info["lost"] = True
    async with manager.session() as session:
        current.info["kept"] = True
        assert session.info == {"kept": True}
        assert current.bind is session.bind
    unknown = CurrentSession(DatabaseSessionManager())
    with pytest.raises(NotInitializedError):
        _ = unknown.bind


class TestCloseAllSessions:
    async def test_close_all_sessions_ignores_sessions_whose_block_has_ended(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as kept:
            await kept.execute(text("SELECT 1"))
        async with manager.transaction() as committed:
            await committed.execute(text("SELECT 1"))
        async with AsyncSession(manager.engine) as other:  # not sessionwire's
            await other.execute(text("SELECT 1"))
            await close_all_sessions()
            assert not other.in_transaction()
        for ended in (kept, committed):
            await ended.close()
            await ended.reset()
            await ended.invalidate()
            with pytest.raises(NoSessionError):
                await ended.execute(text("SELECT 1"))

    async def test_close_all_sessions_closes_an_open_session(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            await session.execute(text("SELECT 1"))
            await close_all_sessions()
            assert checked_out(manager) == 0
            await session.execute(text("SELECT 1"))

    async def test_close_all_sessions_may_not_end_the_transaction_of_a_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(ScopeOwnsTransactionError):
                await close_all_sessions()
            await session.execute(text("SELECT 1"))
