"""SQLModel: its models are written, read and returned through sessions of this library."""

from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, Relationship, SQLModel, select

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    TransactionManager,
    transactional,
)
from tests.http_server import served

pytestmark = pytest.mark.long


class Band(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    players: list["Player"] = Relationship(back_populates="band")


class Player(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    band_id: int | None = Field(default=None, foreign_key="band.id")
    band: Band | None = Relationship(back_populates="players")


class Bands:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session, self.transaction = session, transaction

    @transactional
    async def found(self, name: str, *players: str) -> Band:
        band = Band(name=name, players=[Player(name=player) for player in players])
        self.session.add(band)
        return band

    @transactional
    async def players(self, band: int) -> list[Player]:
        found = await self.session.get_one(Band, band)
        return list(await self.session.scalars(select(Player).where(Player.band == found)))


async def test_models_and_relationships_work_and_are_responses_of_fastapi(
    settings: DatabaseSettings,
) -> None:
    async with DatabaseSessionManager(settings, metadata=SQLModel.metadata) as manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        bands = Bands(CurrentSession(manager), manager.transaction)
        app = FastAPI()

        async def found(name: str, player: str) -> Any:
            return await bands.found(name, player)

        async def players(band: int) -> Any:
            return await bands.players(band)

        app.post("/bands", response_model=Band)(found)
        app.get("/bands/{band}/players", response_model=list[Player])(players)
        async with served(app) as client:
            founded = await client.post("/bands", params={"name": "Trio", "player": "Ada"})
            assert founded.json() == {"id": 1, "name": "Trio"}
            answer = await client.get("/bands/1/players")
            assert answer.json() == [{"id": 1, "name": "Ada", "band_id": 1}]
