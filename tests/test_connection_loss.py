"""Blocks whose connection is killed, or whose server no longer answers."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConcurrentSessionError,
    DatabaseSessionManager,
    DatabaseSettings,
    Propagation,
    UnexpectedRollbackError,
)

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, OnPostgres, kill


class TestPostgres(OnPostgres):
    @pytest.fixture
    def server(self, postgres: Postgres) -> Postgres:
        return postgres

    @pytest.mark.parametrize("kind", ["session", "transaction", "connect"])
    async def test_a_connection_killed_in_a_block_is_an_error_and_is_replaced(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                await kill(server, manager)
                await opened.execute(select(1))
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_the_error_of_a_failed_rollback_is_a_note_on_the_error_of_the_block(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        with pytest.raises(ValueError, match="mine") as raised:
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                await kill(server, manager)
                raise ValueError("mine")
        assert "the rollback failed" in raised.value.__notes__[0]
        assert checked_out(manager) == 0

    async def test_an_idle_connection_that_was_killed_is_replaced_silently(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        await notes(manager)
        await kill(server, manager)
        assert await notes(manager) == []

    async def test_a_task_that_never_stops_using_the_session_costs_only_the_connection(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async with DatabaseSessionManager(
            settings.model_copy(update={"rollback_timeout": 0.2})
        ) as hasty:
            with pytest.raises(ConcurrentSessionError):
                async with hasty.transaction() as session:
                    session.add(Note(text="lost"))
                    await session.flush()
                    sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(60)")))
                    await asyncio.sleep(0.05)
            with pytest.raises(DBAPIError):
                await sleeping
            assert checked_out(hasty) == 0
        assert await notes(manager) == []


class TestNetwork(OnFaultyNetwork):
    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_a_rollback_without_an_answer_ends_in_time_and_costs_the_connection(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, kind: str
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(ValueError, match="mine"):
                async with getattr(remote, kind)() as opened:
                    await opened.execute(insert(Note).values(text="lost"))
                    network.swallows = True
                    raise ValueError("mine")

    async def test_a_savepoint_whose_rollback_gets_no_answer_rolls_the_transaction_back(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: FaultyNetwork,
    ) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(UnexpectedRollbackError):
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="lost"))
                    with pytest.raises(ValueError, match="mine"):
                        async with remote.transaction(Propagation.NESTED):
                            await session.execute(insert(Note).values(text="lost too"))
                            network.swallows = True
                            raise ValueError("mine")
                    network.swallows = False
        assert await notes(manager) == []
