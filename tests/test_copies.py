"""A manager stays one object in a container, which copies its providers' arguments."""

from __future__ import annotations

import copy

import pytest
from dependency_injector import containers, providers
from sqlalchemy import text

from sessionwire import CurrentSession, DatabaseSessionManager, TransactionManager, sessionmanager
from sessionwire._database.runtime import database_of

from .sample_app import Notebook, Notes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: copy.deepcopy([it])[0]])
def test_copying_a_manager_returns_the_same_manager(copied) -> None:  # type: ignore[no-untyped-def]
    manager = DatabaseSessionManager("sqlite://")
    assert copied(manager) is manager


def test_copies_of_a_session_and_a_transaction_belong_to_the_same_manager() -> None:
    manager = DatabaseSessionManager("sqlite://")
    assert copy.deepcopy(CurrentSession(manager))._database is database_of(manager)
    assert copy.deepcopy(manager.transaction)._database is database_of(manager)


async def test_a_container_can_be_given_an_existing_manager(
    manager: DatabaseSessionManager,
) -> None:
    class Container(containers.DeclarativeContainer):
        session = providers.Factory(CurrentSession, manager)
        notes = providers.Factory(Notes, session)
        notebook = providers.Factory(Notebook, notes, transaction=manager.transaction)
        another = providers.Factory(
            Notebook,
            providers.Factory(Notes, CurrentSession(manager)),
            transaction=TransactionManager(manager),
        )

    container = Container()
    await container.notebook().write("first")
    await container.another().write("second")
    async with manager.transaction():
        assert await container.notes().texts() == ["first", "second"]
        assert await container.another().read() == ["first", "second"]


async def test_the_manager_of_a_module_can_be_given_to_a_container(database_url: str) -> None:
    class Container(containers.DeclarativeContainer):
        session = providers.Factory(CurrentSession, sessionmanager)

    sessionmanager.init(database_url)
    async with sessionmanager.transaction():
        assert await Container().session().scalar(text("SELECT 1")) == 1
    await sessionmanager.close()
