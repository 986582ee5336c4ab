"""`DatabaseContainer`: providers, configuration, services, and several databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import yaml
from dependency_injector import containers, providers
from pydantic_settings import SettingsConfigDict
from sqlalchemy import Column, Integer, MetaData, Table, inspect, text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    Base,
    ConfigurationError,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    NoSessionError,
    NotInitializedError,
    Settings,
    TransactionManager,
)

from .conftest import notes
from .models import Note
from .sample_app import Container, Notebook, Notes, create_tables, started


@pytest.fixture
def sqlite(tmp_path: Path) -> DatabaseSettings:
    return DatabaseSettings(url=f"sqlite:///{tmp_path / 'sqlite.db'}")


# The providers

PROVIDERS: dict[str, tuple[type, type]] = {
    "config": (providers.Configuration, dict),
    "settings": (providers.ThreadSafeSingleton, DatabaseSettings),
    "metadata": (providers.Object, MetaData),
    "migrations": (providers.Object, NoneType),
    "session_settings": (providers.Object, NoneType),
    "credentials": (providers.Object, NoneType),
    "session_class": (providers.Object, NoneType),
    "session_options": (providers.Object, NoneType),
    "engine_options": (providers.Object, NoneType),
    "connect_args": (providers.Object, NoneType),
    "sessionmanager": (providers.ThreadSafeSingleton, DatabaseSessionManager),
    "manager": (providers.Resource, asyncio.Future),
    "session": (providers.Factory, CurrentSession),
    "transaction": (providers.Factory, TransactionManager),
}


def test_the_container_has_these_providers_and_no_others() -> None:
    assert {name: type(provider) for name, provider in DatabaseContainer.providers.items()} == {
        name: kind for name, (kind, _) in PROVIDERS.items()
    }


async def test_each_provider_returns_the_documented_type() -> None:
    container = DatabaseContainer(config={"url": "sqlite://"})
    for name, (_, given) in PROVIDERS.items():
        assert isinstance(container.providers[name](), given), name
    assert await container.manager() is container.sessionmanager()  # type: ignore[misc]
    await container.manager.shutdown()  # type: ignore[misc]


def test_sessions_and_transactions_are_built_at_each_call_and_the_rest_once() -> None:
    container = DatabaseContainer(config={"url": "sqlite://"})
    assert container.settings() is container.settings()
    assert container.sessionmanager() is container.sessionmanager()
    assert container.session() is not container.session()
    assert container.transaction() is not container.transaction()


def test_the_injected_session_is_an_async_session() -> None:
    assert isinstance(DatabaseContainer(config={"url": "sqlite://"}).session(), AsyncSession)


def test_two_database_containers_share_nothing() -> None:
    one, other = (DatabaseContainer(config={"url": "sqlite://"}) for _ in range(2))
    assert one.sessionmanager() is not other.sessionmanager()


def test_the_container_has_the_tables_of_base_unless_others_are_given() -> None:
    others = MetaData()
    assert DatabaseContainer(config={"url": "sqlite://"}).sessionmanager().metadata is Base.metadata
    assert (
        DatabaseContainer(config={"url": "sqlite://"}, metadata=others).sessionmanager().metadata
        is others
    )


async def test_create_all_makes_the_tables_of_the_given_metadata(sqlite: DatabaseSettings) -> None:
    others = MetaData()
    Table("other", others, Column("id", Integer, primary_key=True))
    async with Lifespan(DatabaseContainer(settings=sqlite, metadata=others)) as container:
        manager = container.sessionmanager()
        await create_tables(manager)
        async with manager.connect() as connection:
            assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == [
                "other"
            ]


# The graph is synchronous


async def test_services_are_built_synchronously_before_during_and_after_the_start(
    sqlite: DatabaseSettings,
) -> None:
    container = Container(settings=sqlite)
    built = [container.notebook()]
    for _ in range(2):
        async with Lifespan(container):
            built.append(container.notebook())
        built.append(container.notebook())
    for notebook in built:
        assert type(notebook) is Notebook
        assert type(notebook.notes) is Notes
        assert type(notebook.notes.session) is CurrentSession
        assert type(notebook.transaction) is TransactionManager


async def test_a_service_built_before_the_start_works_after_it(
    settings: DatabaseSettings,
) -> None:
    container = Container(settings=settings)
    notebook = container.notebook()
    async with started(container):
        await notebook.write("a")
        assert await container.notebook().read() == ["a"]


def test_building_all_services_opens_no_database(tmp_path: Path) -> None:
    Container(settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'untouched.db'}")).notebook()
    Container(settings=DatabaseSettings(url="postgresql://nobody@127.0.0.1:1/nowhere")).notebook()
    assert not list(tmp_path.iterdir())


async def test_a_service_used_before_the_start_or_after_the_end_says_what_is_missing(
    sqlite: DatabaseSettings,
) -> None:
    container = Container(settings=sqlite)
    notebook = container.notebook()
    for _ in range(2):
        with pytest.raises(
            NotInitializedError, match="DatabaseSessionManager is not initialized"
        ) as refused:
            await notebook.read()
        assert "Lifespan" in "".join(refused.value.__notes__)
        async with started(container):
            await notebook.read()


class Keeper(containers.DeclarativeContainer):
    """The same repository, kept in each way that dependency-injector has."""

    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = providers.Container(DatabaseContainer, settings=settings)
    factory = providers.Factory(Notes, session=db.session)
    singleton = providers.Singleton(Notes, session=db.session)
    thread_safe = providers.ThreadSafeSingleton(Notes, session=db.session)
    thread_local = providers.ThreadLocalSingleton(Notes, session=db.session)
    context_local = providers.ContextLocalSingleton(Notes, session=db.session)
    item = providers.Dict(notes=singleton).provided["notes"]


KEPT = ("factory", "singleton", "thread_safe", "thread_local", "context_local", "item")


async def test_repositories_of_any_provider_share_the_transaction_of_their_caller(
    settings: DatabaseSettings,
) -> None:
    async with started(Keeper(settings=settings)) as keeper:
        manager = keeper.db.sessionmanager()
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction():
                for kept in KEPT:
                    await keeper.providers[kept]().add(kept)
                assert await keeper.factory().texts() == sorted(KEPT)
                raise ZeroDivisionError
        assert await notes(manager) == []


@pytest.mark.parametrize("kept", KEPT)
async def test_a_repository_of_any_provider_gives_two_tasks_two_sessions(
    kept: str, sqlite: DatabaseSettings
) -> None:
    both_are_inside = asyncio.Barrier(2)

    async def session_of_a_task() -> object:
        async with keeper.db.sessionmanager().session():
            await both_are_inside.wait()
            return keeper.providers[kept]().session.sync_session

    async with started(Keeper(settings=sqlite)) as keeper:
        one, other = await asyncio.gather(session_of_a_task(), session_of_a_task())
    assert one is not other


# Both ways in


class ShopSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")


class Configured(containers.DeclarativeContainer):
    """An application with one `Configuration` for all."""

    config = providers.Configuration()
    db = providers.Container(DatabaseContainer, config=config.database)
    notebook = providers.Factory(
        Notebook, notes=providers.Factory(Notes, session=db.session), transaction=db.transaction
    )


class Typed(containers.DeclarativeContainer):
    """An application with one settings object for all."""

    settings = providers.ThreadSafeSingleton(ShopSettings.load)
    db = providers.Container(DatabaseContainer, settings=settings.provided.database)


class WaysIn:
    """Ways to configure a container: that URL, two connections, and the name `shop`."""

    def __init__(self, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._values = {"url": url, "pool": {"size": 2}, "application_name": "shop"}
        self._typed = DatabaseSettings.load(self._values)
        self._path = directory / "shop.yaml"
        self._monkeypatch = monkeypatch

    def _yaml(self, values: dict[str, Any]) -> str:
        self._path.write_text(yaml.safe_dump(values))
        return str(self._path)

    def _environment(self, prefix: str = "") -> None:
        url, size = str(self._values["url"]), "2"
        for name, value in {"URL": url, "POOL__SIZE": size, "APPLICATION_NAME": "shop"}.items():
            self._monkeypatch.setenv(f"{prefix}DATABASE__{name}", value)

    def typed(self) -> Any:
        return DatabaseContainer(settings=self._typed)

    def typed_by_a_provider(self) -> Any:
        return DatabaseContainer(settings=providers.Callable(lambda: self._typed))

    def typed_from_environment(self) -> Any:
        self._environment("SHOP_")
        return Typed().db

    def typed_from_yaml(self) -> Any:
        return Typed(settings=ShopSettings.load(self._yaml({"database": self._values}))).db

    def raw(self) -> Any:
        return DatabaseContainer(config=self._values)

    def raw_from_yaml(self) -> Any:
        container = DatabaseContainer()
        container.config.from_yaml(self._yaml(self._values))
        return container

    def raw_from_yaml_and_environment(self) -> Any:
        self._monkeypatch.setenv("APP_URL", str(self._values["url"]))
        container = DatabaseContainer()
        container.config.from_yaml(self._yaml({**self._values, "url": "sqlite:///not-this.db"}))
        container.config.url.from_env("APP_URL")
        container.config.echo.from_env("APP_ECHO")  # there is none
        return container

    def raw_from_yaml_with_a_variable_in_it(self) -> Any:
        self._monkeypatch.setenv("APP_URL", str(self._values["url"]))
        container = DatabaseContainer()
        container.config.from_yaml(
            self._yaml({**self._values, "url": "${APP_URL}", "echo": "${APP_ECHO:false}"})
        )
        return container

    def raw_from_environment(self) -> Any:
        self._environment()
        container = DatabaseContainer()
        container.config.url.from_env("DATABASE__URL", required=True)
        container.config.pool.size.from_env("DATABASE__POOL__SIZE", as_=int)
        container.config.application_name.from_env("DATABASE__APPLICATION_NAME")
        # This variable is not set.
        container.config.drain_timeout.from_env("DATABASE__DRAIN_TIMEOUT")
        return container

    def raw_from_pydantic_settings(self) -> Any:
        self._environment()
        container = Configured()
        container.config.from_pydantic(Settings.load())
        return container.db

    def raw_of_the_whole_application(self) -> Any:
        container = Configured()
        container.config.from_yaml(self._yaml({"database": self._values, "greeting": "hi"}))
        return container.db

    def raw_from_files_that_the_provider_knows(self) -> Any:
        container = DatabaseContainer()
        container.config.set_yaml_files([self._yaml(self._values)])
        container.load_config()
        return container


@pytest.mark.parametrize("way", [name for name in vars(WaysIn) if not name.startswith("_")])
async def test_a_container_configured_in_any_way_reaches_its_database(
    way: str, sqlite: DatabaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = getattr(WaysIn(str(sqlite.url), tmp_path, monkeypatch), way)()
    settings = container.settings()
    assert (settings.url, settings.pool.size, settings.application_name) == (
        sqlite.url,
        2,
        "shop",
    )
    async with container.sessionmanager() as manager, manager.transaction() as session:
        assert await session.scalar(text("SELECT 5")) == 5


async def test_a_password_from_pydantic_settings_is_used_and_never_shown() -> None:
    container = Configured()
    container.config.from_pydantic(
        Settings(database=DatabaseSettings(url="postgresql://shop:hunter2@db/shop"))
    )
    assert container.db.settings().url.password == "hunter2"
    assert "hunter2" not in f"{container.config()}"


def test_the_config_may_be_loaded_until_the_first_object_is_built() -> None:
    container = Configured()
    container.config.from_dict({"database": {"url": "sqlite:///first.db"}})
    container.config.from_dict({"database": {"url": "sqlite:///second.db"}})
    assert container.db.settings().url.database == "second.db"


WRONG_CONFIGS: dict[str, tuple[Any, str, str]] = {
    "nothing": ({}, "url", "is missing: set it in config"),
    "no url": ({"echo": True}, "url", "is missing: set it in config"),
    "a variable that is not there": ({"url": None}, "url", "is missing: set it in config"),
    "a misspelt key": ({"url": "sqlite://", "ecco": True}, "ecco (config)", "did you mean 'echo'?"),
    "a misspelt key, deep": (
        {"url": "sqlite://", "pool": {"sze": 1}},
        "pool.sze (config)",
        "did you mean 'size'?",
    ),
    "a wrong type": (
        {"url": "sqlite://", "pool": {"size": "many"}},
        "pool.size (config)",
        "valid integer",
    ),
    "a value for a section": (
        {"url": "sqlite://", "pool": 5},
        "pool (config)",
        "a section, with keys below it: size",
    ),
    "a URL for all": (
        "sqlite://",
        "config",
        "expected a mapping with keys such as url and pool, got str",
    ),
}


@pytest.mark.parametrize(("config", "key", "remedy"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
@pytest.mark.parametrize("when", ["building", "starting"])
async def test_the_error_of_a_wrong_config_names_key_source_and_remedy(
    config: Any, key: str, remedy: str, when: str
) -> None:
    container = DatabaseContainer(config=config)
    with pytest.raises(ConfigurationError) as refused:
        if when == "building":
            container.session()
        else:
            await Lifespan(container).__aenter__()
    assert str(refused.value).startswith(f"{key}: ")
    assert remedy in str(refused.value)


# In containers of one's own


async def test_a_database_container_works_without_an_application_container(
    sqlite: DatabaseSettings,
) -> None:
    async with Lifespan(DatabaseContainer(settings=sqlite)) as container:
        await create_tables(container.sessionmanager())
        async with container.transaction()():
            container.session().add(Note(text="a"))
        assert await notes(container.sessionmanager()) == ["a"]


async def test_a_database_container_can_be_subclassed(sqlite: DatabaseSettings) -> None:
    class Extended(DatabaseContainer):
        notes = providers.Factory(Notes, session=DatabaseContainer.session)

    async with Lifespan(Extended(settings=sqlite)) as container:
        await create_tables(container.sessionmanager())
        async with container.sessionmanager().transaction():
            await container.notes().add("a")
        assert await notes(container.sessionmanager()) == ["a"]


class Services(containers.DeclarativeContainer):
    """A part of an application that is given its database."""

    db = providers.DependenciesContainer()
    notes = providers.Singleton(Notes, session=db.session)
    notebook = providers.Factory(Notebook, notes=notes, transaction=db.transaction)


class Application(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = providers.Container(DatabaseContainer, settings=settings)
    services = providers.Container(Services, db=db)


async def test_a_container_can_be_given_the_database_of_its_parent(
    sqlite: DatabaseSettings,
) -> None:
    async with started(Application(settings=sqlite)) as application:
        await application.services.notebook().write("a")
        assert await application.services.notebook().read() == ["a"]
        assert await notes(application.db.sessionmanager()) == ["a"]


# Several databases


class TwoDatabases(containers.DeclarativeContainer):
    here = providers.Container(Container)
    there = providers.Container(Container)


@pytest.fixture
async def two(settings: DatabaseSettings, sqlite: DatabaseSettings) -> AsyncIterator[TwoDatabases]:
    two = TwoDatabases()
    two.here.settings.override(settings)
    two.there.settings.override(sqlite)
    async with Lifespan(two):
        await create_tables(two.here.db.sessionmanager())
        await create_tables(two.there.db.sessionmanager())
        yield two


async def what_is_in(two: TwoDatabases) -> tuple[list[str], list[str]]:
    return await notes(two.here.db.sessionmanager()), await notes(two.there.db.sessionmanager())


async def test_two_databases_are_open_side_by_side(two: TwoDatabases) -> None:
    await two.here.notebook().write("here")
    await two.there.notebook().write("there")
    assert await what_is_in(two) == (["here"], ["there"])


async def test_nested_transactions_of_two_databases_end_independently(two: TwoDatabases) -> None:
    async def refused_there() -> None:
        async with two.there.db.transaction()():
            await two.there.notes().add("there")
            await two.here.notebook().write("here, from inside there")
            raise ZeroDivisionError

    async with two.here.db.transaction()():
        await two.here.notes().add("here")
        with pytest.raises(ZeroDivisionError):
            await refused_there()
        await two.there.notebook().write("there, in a transaction of its own")
        await two.here.notes().add("here again")
    assert await what_is_in(two) == (
        ["here", "here again", "here, from inside there"],
        ["there, in a transaction of its own"],
    )


async def test_an_error_in_one_database_leaves_a_commit_in_the_other(two: TwoDatabases) -> None:
    with pytest.raises(ZeroDivisionError):
        async with two.here.db.transaction()():
            await two.here.notes().add("here")
            await two.there.notebook().write("there")
            raise ZeroDivisionError
    assert await what_is_in(two) == ([], ["there"])


@pytest.mark.parametrize("block", ["session", "transaction"])
async def test_a_scope_of_one_database_is_not_found_by_the_other(
    two: TwoDatabases, block: str
) -> None:
    async with getattr(two.there.db.sessionmanager(), block)():
        with pytest.raises(
            NoSessionError, match="one of another database is, was the right one injected"
        ):
            await two.here.notes().texts()
        assert not two.here.db.transaction().active


async def test_nested_scopes_of_two_databases_each_find_their_own_session(
    two: TwoDatabases,
) -> None:
    here, there = two.here.db.sessionmanager(), two.there.db.sessionmanager()
    stand_in_here, stand_in_there = two.here.db.session(), two.there.db.session()
    async with here.session() as outer, there.session() as between:
        async with here.session() as inner, there.session() as innermost:
            assert stand_in_here.sync_session is inner.sync_session
            assert stand_in_there.sync_session is innermost.sync_session
        assert stand_in_here.sync_session is outer.sync_session
        assert stand_in_there.sync_session is between.sync_session


async def test_scopes_of_two_managers_of_one_database_stay_apart(
    sqlite: DatabaseSettings,
) -> None:
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(Lifespan(DatabaseContainer(settings=sqlite)))
            for _ in "12"
        ]
        await create_tables(one.sessionmanager())
        with pytest.raises(ZeroDivisionError):
            async with one.sessionmanager().transaction():
                with pytest.raises(NoSessionError):
                    await other.session().scalar(text("SELECT 1"))
                async with other.sessionmanager().session() as session:
                    assert await session.scalar(text("SELECT count(*) FROM note")) == 0
                one.session().add(Note(text="a"))
                raise ZeroDivisionError
        assert await notes(other.sessionmanager()) == []


async def test_many_concurrent_tasks_keep_two_databases_apart(two: TwoDatabases) -> None:
    async def write(number: int) -> None:
        async with two.here.db.transaction()(), two.there.db.transaction()():
            await two.here.notes().add(f"{number:02}")
            await two.there.notes().add(f"{number:02}")
            if number % 2:
                raise ZeroDivisionError

    results = await asyncio.gather(*map(write, range(20)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ZeroDivisionError] * 10
    even = [f"{number:02}" for number in range(0, 20, 2)]
    assert await what_is_in(two) == (even, even)
