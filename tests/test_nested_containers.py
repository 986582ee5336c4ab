"""Nested containers whose types are known: at run time they are container providers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import make_url

from sessionwire import (
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    nested_container,
)
from sessionwire.testing import overriding

from .sample_app import Notebook, Notes, create_tables


class Databases(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    shop = DatabaseContainer.nested(settings=settings)
    archive = DatabaseContainer.nested(config={"url": "sqlite://"})


class Application(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    databases = nested_container(Databases, settings=settings)
    notes = providers.Factory(Notes, session=databases.shop.session)
    notebook = providers.Factory(Notebook, notes=notes, transaction=databases.shop.transaction)
    old_notes = providers.Factory(Notes, session=databases.archive.session)
    old_notebook = providers.Factory(
        Notebook, notes=old_notes, transaction=databases.archive.transaction
    )


class Plant(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    application = nested_container(Application, settings=settings)


class ExtendedPlant(Plant):
    archivist = providers.Factory(list, Plant.application.old_notebook)


def test_a_nested_container_is_a_container_provider() -> None:
    assert type(Plant.application) is providers.Container
    assert type(Plant.application.databases.shop) is providers.Container


def test_a_nested_container_refuses_a_provider_that_the_container_lacks() -> None:
    with pytest.raises(AttributeError, match="setings"):
        DatabaseContainer.nested(setings="sqlite://")


@pytest.mark.parametrize("plant_class", [Plant, ExtendedPlant])
async def test_services_over_two_nested_databases_write_to_each(
    plant_class: type[Plant], settings: DatabaseSettings
) -> None:
    async with Lifespan(plant_class(settings=settings)) as plant:
        application = plant.application
        for database in (application.databases.shop, application.databases.archive):
            assert database.sessionmanager().is_open
            await create_tables(database.sessionmanager())
        await application.notebook().write("new")
        await application.old_notebook().write("old")

        assert await application.notebook().read() == ["new"]
        assert await application.old_notebook().read() == ["old"]
    assert not application.databases.shop.sessionmanager().is_open


def test_each_instance_of_the_outer_container_has_its_own_nested_databases() -> None:
    settings = DatabaseSettings(url="sqlite://")
    one, other = Plant(settings=settings), Plant(settings=settings)
    copied = deepcopy(one)
    managers = {
        id(plant.application.databases.shop.sessionmanager()) for plant in (one, other, copied)
    }
    assert len(managers) == 3


def test_an_override_reaches_the_nested_database(tmp_path: Path) -> None:
    plant = Plant(settings=DatabaseSettings(url="sqlite:///real.db"))
    database = plant.application.databases.shop
    instead = DatabaseSettings(url=f"sqlite:///{tmp_path / 'instead.db'}")
    own = database.sessionmanager()

    with overriding(plant, application__databases__shop__settings=instead):
        assert url_of(database) == make_url(instead.url)
    assert database.sessionmanager() is own

    plant.application.databases.override(Databases(settings=instead))
    database.sessionmanager.reset()
    assert url_of(database) == make_url(instead.url)


def url_of(database: DatabaseContainer) -> object:
    return make_url(database.sessionmanager()._database.constructor_settings.url)


@inject
def wired(
    manager: DatabaseSessionManager = Provide[Plant.application.databases.shop.sessionmanager],
) -> DatabaseSessionManager:
    return manager


def test_a_marker_may_name_a_provider_of_a_nested_container() -> None:
    plant = Plant(settings=DatabaseSettings(url="sqlite://"))
    plant.wire(modules=[__name__])
    try:
        assert wired() is plant.application.databases.shop.sessionmanager()
    finally:
        plant.unwire()
