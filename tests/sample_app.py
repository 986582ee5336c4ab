"""A small application for the tests of containers: a repository and a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from dependency_injector import containers, providers
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    TransactionManager,
    transactional,
)

from .models import Note

C = TypeVar("C", bound=containers.Container)


class Notes:
    """The repository."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, text: str) -> None:
        self.session.add(Note(text=text))
        await self.session.flush()

    async def texts(self) -> list[str]:
        return list(await self.session.scalars(select(Note.text).order_by(Note.text)))


class Notebook:
    """The service."""

    def __init__(self, notes: Notes, transaction: TransactionManager) -> None:
        self.notes = notes
        self.transaction = transaction

    @transactional
    async def write(self, *texts: str) -> None:
        for text in texts:
            await self.notes.add(text)

    @transactional
    async def read(self) -> list[str]:
        return await self.notes.texts()


class Container(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = DatabaseContainer.nested(settings=settings)
    notes = providers.Factory(Notes, session=db.session)
    notebook = providers.Factory(Notebook, notes=notes, transaction=db.transaction)


async def create_tables(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await manager.create_all(connection)


@asynccontextmanager
async def started(container: C) -> AsyncIterator[C]:
    """Start the container, and create its tables."""
    async with Lifespan(container):
        await create_tables(container.db.sessionmanager())
        yield container
