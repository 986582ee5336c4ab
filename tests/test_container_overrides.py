"""Overrides of providers: at any time, in any nesting, and reset in each way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import Column, Integer, MetaData, Table, inspect
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    ConfigurationError,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    NoSessionError,
    NotInitializedError,
    TransactionManager,
)

from .conftest import notes
from .sample_app import Container, Notebook, Notes, create_tables, started


@inject
async def read(notebook: Notebook = Provide[Container.notebook]) -> list[str]:
    return await notebook.read()


@inject
async def read_with(
    session: AsyncSession = Provide[Container.db.session],
    transaction: TransactionManager = Provide[Container.db.transaction],
) -> list[str]:
    return await Notebook(Notes(session), transaction).read()


class FakeNotes(Notes):
    """What a user puts in the place of a repository."""

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)

    async def texts(self) -> list[str]:
        return self._texts


@pytest.fixture
def settings(tmp_path: Path) -> DatabaseSettings:
    """Use SQLite: the database plays no role here."""
    return DatabaseSettings(url=f"sqlite:///{tmp_path / 'test.db'}")


@pytest.fixture
async def container(settings: DatabaseSettings) -> AsyncIterator[Container]:
    """Yield a container, not yet started, whose database has the note 'own'."""
    async with started(Container(settings=settings)) as other:
        await other.notebook().write("own")
    container = Container(settings=settings)
    yield container
    container.unwire()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[DatabaseSessionManager]:
    """Yield the open manager of another database, which has the note 'other'."""
    async with started(
        Container(settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'other.db'}"))
    ) as container:
        await container.notebook().write("other")
        yield container.db.sessionmanager()


# What can be overridden


def override_sessionmanager(
    container: Container, other: DatabaseSessionManager
) -> list[providers.Provider[Any]]:
    container.db.sessionmanager.override(other)
    return [container.db.sessionmanager]


def override_session_and_transaction(
    container: Container, other: DatabaseSessionManager
) -> list[providers.Provider[Any]]:
    container.db.session.override(providers.Factory(CurrentSession, other))
    container.db.transaction.override(other.transaction)
    return [container.db.session, container.db.transaction]


def override_transaction_and_repository(
    container: Container, other: DatabaseSessionManager
) -> list[providers.Provider[Any]]:
    container.db.transaction.override(other.transaction)
    container.notes.override(FakeNotes("other"))
    return [container.db.transaction, container.notes]


def override_repository(
    container: Container, other: DatabaseSessionManager
) -> list[providers.Provider[Any]]:
    container.notes.override(providers.Factory(FakeNotes, "other"))
    return [container.notes]


def override_service(
    container: Container, other: DatabaseSessionManager
) -> list[providers.Provider[Any]]:
    container.notebook.override(Notebook(FakeNotes("other"), other.transaction))
    return [container.notebook]


OVERRIDES: list[Callable[[Container, DatabaseSessionManager], list[providers.Provider[Any]]]] = [
    override_sessionmanager,
    override_session_and_transaction,
    override_transaction_and_repository,
    override_repository,
    override_service,
]


def take_back_the_last(provider: providers.Provider[Any]) -> None:
    provider.reset_last_overriding()


def take_back_all(provider: providers.Provider[Any]) -> None:
    provider.reset_override()


@pytest.mark.parametrize("take_back", [take_back_the_last, take_back_all])
@pytest.mark.parametrize("moment", ["before wiring", "before the start", "after the start"])
@pytest.mark.parametrize("override", OVERRIDES)
async def test_an_override_applies_to_objects_built_next_until_it_is_reset(
    override: Callable[[Container, DatabaseSessionManager], list[providers.Provider[Any]]],
    moment: str,
    take_back: Callable[[providers.Provider[Any]], None],
    container: Container,
    other: DatabaseSessionManager,
) -> None:
    overridden = override(container, other) if moment == "before wiring" else []
    container.wire(modules=[__name__])
    overridden += override(container, other) if moment == "before the start" else []
    async with other, Lifespan(container):
        overridden += override(container, other) if moment == "after the start" else []
        assert await read() == ["other"]
        for provider in overridden:
            take_back(provider)
        if (
            moment == "after the start" or override is not override_sessionmanager
        ):  # This one was not opened instead.
            assert await read() == ["own"]
            assert await read_with() == ["own"]
    async with Lifespan(container):
        assert await read() == ["own"]


@pytest.mark.parametrize("moment", ["before wiring", "after wiring"])
async def test_an_override_by_context_manager_ends_with_the_block(
    moment: str, container: Container, other: DatabaseSessionManager
) -> None:
    if moment == "after wiring":
        container.wire(modules=[__name__])
    async with Lifespan(container):
        with (
            container.db.sessionmanager.override(other),
            container.notes.override(FakeNotes("fake")),
        ):
            if moment == "before wiring":
                container.wire(modules=[__name__])
            assert await read() == ["fake"]
            assert await read_with() == ["other"]
        assert await read() == await read_with() == ["own"]


async def test_an_override_by_context_manager_ends_if_the_block_fails(container: Container) -> None:
    container.wire(modules=[__name__])
    async with Lifespan(container):
        with pytest.raises(ZeroDivisionError), container.notes.override(FakeNotes("fake")):
            raise ZeroDivisionError
        assert await read() == ["own"]


async def test_nested_overrides_are_reset_one_by_one(
    container: Container, other: DatabaseSessionManager
) -> None:
    container.wire(modules=[__name__])
    async with Lifespan(container):
        with container.notes.override(FakeNotes("outer")):
            with container.notes.override(FakeNotes("inner")):
                with container.notebook.override(
                    Notebook(FakeNotes("innermost"), other.transaction)
                ):
                    assert await read() == ["innermost"]
                assert await read() == ["inner"]
            assert await read() == ["outer"]
            container.notes.override(FakeNotes("again"))
            container.notes.override(FakeNotes("and again"))
            assert await read() == ["and again"]
            container.notes.reset_last_overriding()
            assert await read() == ["again"]
            container.notes.reset_last_overriding()
        assert await read() == ["own"]
        container.notes.override(FakeNotes("one"))
        container.notes.override(FakeNotes("two"))
        container.notes.reset_override()
        assert await read() == ["own"]


async def test_an_object_built_before_an_override_keeps_its_dependencies(
    container: Container,
) -> None:
    async with Lifespan(container):
        before = container.notebook()
        with container.notes.override(FakeNotes("fake")):
            between = container.notebook()
            assert await before.read() == ["own"]
        assert await between.read() == ["fake"]


async def test_an_argument_takes_precedence_over_an_override(
    container: Container, other: DatabaseSessionManager
) -> None:
    container.wire(modules=[__name__])
    async with Lifespan(container):
        with container.notes.override(FakeNotes("fake")):
            assert await read(notebook=Notebook(FakeNotes("argument"), other.transaction)) == [
                "argument"
            ]


async def test_an_override_of_a_container_class_applies_to_containers_created_meanwhile(
    container: Container, settings: DatabaseSettings
) -> None:
    with Container.notes.override(FakeNotes("fake")):
        made_meanwhile = Container(settings=settings)
    async with Lifespan(made_meanwhile):
        assert await made_meanwhile.notebook().read() == ["fake"]
    async with Lifespan(container):
        assert await container.notebook().read() == ["own"]


class Replacement(containers.DeclarativeContainer):
    notes = providers.Factory(FakeNotes, "replaced")


async def test_a_container_can_override_another(container: Container) -> None:
    async with Lifespan(container):
        container.override(Replacement())
        assert await container.notebook().read() == ["replaced"]
        container.notes.reset_override()
        assert await container.notebook().read() == ["own"]


async def test_a_session_of_another_manager_needs_a_scope_of_that_manager(
    container: Container, other: DatabaseSessionManager
) -> None:
    async with Lifespan(container):
        container.db.session.override(providers.Factory(CurrentSession, other))
        with pytest.raises(NoSessionError, match="was the right one injected"):
            await container.notebook().read()


# Overriding the manager, its settings and its tables


async def test_an_overriding_manager_is_opened_and_closed_instead_of_its_own(
    container: Container, tmp_path: Path
) -> None:
    instead = DatabaseSessionManager(f"sqlite:///{tmp_path / 'instead.db'}")
    container.db.sessionmanager.override(instead)
    async with Lifespan(container):
        await create_tables(instead)
        await container.notebook().write("instead")
        assert await notes(instead) == ["instead"]
    with pytest.raises(NotInitializedError):
        _ = instead.engine
    container.db.sessionmanager.reset_override()
    async with Lifespan(container):
        assert await container.notebook().read() == ["own"]


async def test_a_container_with_an_overriding_manager_needs_no_settings(
    other: DatabaseSessionManager,
) -> None:
    container = DatabaseContainer(sessionmanager=other)
    async with Lifespan(container):
        assert await Notebook(Notes(container.session()), container.transaction()).read() == [
            "other"
        ]


async def test_a_manager_that_overrides_after_the_start_is_not_closed_by_the_container(
    container: Container, other: DatabaseSessionManager
) -> None:
    async with Lifespan(container):
        own = container.db.sessionmanager()
        container.db.sessionmanager.override(other)
    assert await notes(other) == ["other"]
    with pytest.raises(NotInitializedError):
        _ = own.engine


@pytest.mark.parametrize(
    "built", [False, True], ids=["before it was built", "reset after it was built"]
)
async def test_overridden_settings_apply_to_the_next_manager(
    built: bool, container: Container, tmp_path: Path
) -> None:
    instead = DatabaseSettings(url=f"sqlite:///{tmp_path / 'instead.db'}")
    if built:
        container.notebook()
    with container.settings.override(instead):
        if built:
            container.db.sessionmanager.reset()
        async with Lifespan(container):
            assert container.db.sessionmanager().engine.url.database == str(tmp_path / "instead.db")
    container.db.sessionmanager.reset()
    async with Lifespan(container):
        assert await container.notebook().read() == ["own"]


async def test_overridden_metadata_applies_to_the_next_manager(container: Container) -> None:
    others = MetaData()
    Table("other", others, Column("id", Integer, primary_key=True))
    container.db.metadata.override(others)
    async with started(container), container.db.sessionmanager().connect() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert "other" in tables


async def test_a_whole_database_can_be_overridden(container: Container, tmp_path: Path) -> None:
    instead = DatabaseSettings(url=f"sqlite:///{tmp_path / 'instead.db'}")
    container.db.override(providers.Container(DatabaseContainer, settings=instead))
    async with started(container):
        await container.notebook().write("instead")
        assert await container.notebook().read() == ["instead"]
    container.db.reset_last_overriding()
    async with Lifespan(container):
        assert await container.notebook().read() == ["own"]


# What cannot take effect


@contextmanager
def overridden_manager(container: Container) -> Iterator[None]:
    with container.db.manager.override(DatabaseSessionManager("sqlite://")):
        yield


@contextmanager
def settings_overridden_late(container: Container) -> Iterator[None]:
    container.notebook()
    with container.db.settings.override(DatabaseSettings(url="sqlite://")):
        yield


@contextmanager
def settings_of_the_application_overridden_late(container: Container) -> Iterator[None]:
    container.notebook()
    with container.settings.override(DatabaseSettings(url="sqlite://")):
        yield


@contextmanager
def metadata_overridden_late(container: Container) -> Iterator[None]:
    container.notebook()
    with container.db.metadata.override(MetaData()):
        yield


@contextmanager
def migrations_overridden_late(container: Container) -> Iterator[None]:
    container.notebook()
    with container.db.migrations.override("others"):
        yield


INEFFECTIVE = {
    overridden_manager: ("manager is overridden", "override Container.db.sessionmanager"),
    settings_overridden_late: (
        "settings or metadata were overridden",
        "call Container.db.sessionmanager.reset() first",
    ),
    settings_of_the_application_overridden_late: (
        "settings",
        "call Container.db.sessionmanager.reset() first",
    ),
    metadata_overridden_late: (
        "metadata were overridden",
        "call Container.db.sessionmanager.reset() first",
    ),
    migrations_overridden_late: (
        "migrations was overridden",
        "call Container.db.sessionmanager.reset() first",
    ),
}


@pytest.mark.parametrize(("ineffective", "message"), INEFFECTIVE.items())
async def test_an_override_that_cannot_take_effect_is_refused_at_the_start(
    ineffective: Callable[[Container], Any], message: tuple[str, str], container: Container
) -> None:
    culprit, remedy = message
    with ineffective(container):
        for _ in range(2):
            with pytest.raises(ConfigurationError) as refused:
                await Lifespan(container).__aenter__()
            assert culprit in str(refused.value)
            assert remedy in str(refused.value)
            with pytest.raises(NotInitializedError):
                _ = container.db.sessionmanager().engine
    async with Lifespan(container):
        assert await container.notebook().read() == ["own"]


async def test_a_config_changed_after_settings_were_built_from_it_is_refused(
    tmp_path: Path,
) -> None:
    container = DatabaseContainer(config={"url": f"sqlite:///{tmp_path / 'early.db'}"})
    container.session()
    container.config.from_dict({"url": f"sqlite:///{tmp_path / 'late.db'}"})
    with pytest.raises(
        ConfigurationError,
        match=r"config was changed .* call DatabaseContainer\.settings\.reset\(\)",
    ):
        await Lifespan(container).__aenter__()
    container.settings.reset()
    with pytest.raises(
        ConfigurationError, match=r"call DatabaseContainer\.sessionmanager\.reset\(\) first"
    ):
        await Lifespan(container).__aenter__()
    container.sessionmanager.reset()
    async with Lifespan(container):
        assert container.sessionmanager().engine.url.database == str(tmp_path / "late.db")


async def test_settings_overridden_while_the_container_runs_are_refused_at_the_next_start(
    container: Container,
) -> None:
    async with Lifespan(container):
        container.settings.override(DatabaseSettings(url="sqlite://"))
        assert await container.notebook().read() == ["own"]
    with pytest.raises(ConfigurationError, match=r"db\.sessionmanager\.reset\(\)"):
        await Lifespan(container).__aenter__()
    container.db.sessionmanager.reset()
    async with Lifespan(container):
        assert container.db.sessionmanager().settings == DatabaseSettings(url="sqlite://")


class TwoDatabases(containers.DeclarativeContainer):
    here = providers.Container(DatabaseContainer)
    there = providers.Container(DatabaseContainer)


async def test_the_error_names_which_of_several_databases_has_the_wrong_override() -> None:
    container = TwoDatabases()
    container.here.config.from_dict({"url": "sqlite://"})
    container.there.manager.override(DatabaseSessionManager("sqlite://"))
    with pytest.raises(ConfigurationError, match=r"^TwoDatabases\.there\.manager is overridden"):
        await Lifespan(container).__aenter__()
