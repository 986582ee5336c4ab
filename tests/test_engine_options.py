"""Options of the engine, the driver and the pool: each has its effect, or is refused."""

from __future__ import annotations

import itertools
import json
import logging
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from pydantic_settings import SettingsConfigDict
from sqlalchemy import JSON, URL, Engine, bindparam, event, literal, make_url, select, text
from sqlalchemy.dialects import plugins
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import CreateEnginePlugin
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import NullPool

import sessionwire.asyncpg
from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    Settings,
)
from sessionwire._database.asyncpg_connection import Connection
from sessionwire.testing import count_statements

from .conftest import Postgres, notes
from .models import Note
from .postgres import OnPostgres
from .test_pipeline import tls_proxy


@asynccontextmanager
async def opened(settings: DatabaseSettings, **options: Any) -> AsyncIterator[Any]:
    """Yield a session of a manager with these options."""
    async with (
        DatabaseSessionManager(settings, **options) as manager,
        manager.transaction() as session,
    ):
        yield session


# Options of the engine


async def test_json_is_written_and_read_by_the_functions_of_the_user(
    settings: DatabaseSettings,
) -> None:
    def dumps(value: object) -> str:
        return json.dumps({"wrapped": value})

    def loads(value: str) -> object:
        return ("read", json.loads(value))

    kind = JSONB if settings.url.get_backend_name() == "postgresql" else JSON  # type: ignore[union-attr]
    options = {"json_serializer": dumps, "json_deserializer": loads}
    async with opened(settings, engine_options=options) as session:
        value = await session.scalar(select(bindparam("value", [1, 2], kind)))
    assert value == ("read", {"wrapped": [1, 2]})


async def test_parameters_can_be_hidden_in_errors(manager: DatabaseSessionManager) -> None:
    for hidden in (True, False):
        with pytest.raises(IntegrityError) as raised:
            async with opened(
                manager.settings, engine_options={"hide_parameters": hidden}
            ) as session:
                session.add(Note(id=1, text="secret"))
                await session.flush()
                session.add(Note(id=2, text="secret"))
        assert ("parameters hidden" in str(raised.value)) == hidden


async def test_statements_are_cached_as_many_as_the_option_says(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings, engine_options={"query_cache_size": 0})
    manager.init(settings)
    assert manager.engine.sync_engine._compiled_cache is None  # type: ignore[attr-defined]


async def test_the_engine_and_its_pool_are_logged_by_the_given_names(
    settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"logging_name": "shop", "pool_logging_name": "lake", "echo_pool": "debug"}
    with caplog.at_level(logging.DEBUG, "sqlalchemy"):
        async with opened(
            settings.model_copy(update={"echo": True}), engine_options=options
        ) as session:
            await session.execute(text("SELECT 1"))
    names = {record.name for record in caplog.records}
    assert any(name.startswith("sqlalchemy.engine") and name.endswith(".shop") for name in names)
    assert any(name.startswith("sqlalchemy.pool") and name.endswith(".lake") for name in names)


async def test_execution_options_hold_for_each_statement_of_the_engine(
    manager: DatabaseSessionManager,
) -> None:
    options = {"execution_options": {"schema_translate_map": {None: "elsewhere"}}}
    with pytest.raises(DBAPIError, match="elsewhere"):
        async with opened(manager.settings, engine_options=options) as session:
            await session.scalars(select(Note))


class Marking(CreateEnginePlugin):
    """Adds a comment to each statement."""

    def __init__(self, url: Any, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        self.mark = kwargs.pop("mark", "marked")

    def update_url(self, url: URL) -> URL:
        return url

    def engine_created(self, engine: Engine) -> None:
        @event.listens_for(engine, "before_cursor_execute", retval=True)
        def add_mark(_c: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> tuple[str, Any]:
            return f"{sql} /* {self.mark} */", parameters


@pytest.fixture
def plugin() -> str:
    plugins.register("marking", __name__, "Marking")
    return "marking"


async def test_plugins_take_part_with_their_own_options(
    settings: DatabaseSettings, plugin: str
) -> None:
    options = {"plugins": [plugin], "mark": "shop"}
    sent: list[str] = []
    async with DatabaseSessionManager(settings, engine_options=options) as manager:

        @event.listens_for(manager.engine.sync_engine, "after_cursor_execute")
        def record(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
            sent.append(sql)

        async with manager.transaction() as session:
            await session.execute(text("SELECT 1"))
    assert "SELECT 1 /* shop */" in sent


# Arguments of the driver


class TestOnPostgres(OnPostgres):
    async def test_a_command_timeout_ends_a_slow_statement(
        self, settings: DatabaseSettings
    ) -> None:
        with pytest.raises((TimeoutError, DBAPIError)):
            async with opened(settings, connect_args={"command_timeout": 0.2}) as session:
                await session.execute(text("SELECT pg_sleep(20)"))

    async def test_settings_of_the_server_are_merged_with_the_librarys(
        self, settings: DatabaseSettings
    ) -> None:
        settings = DatabaseSettings(
            url=settings.url,
            application_name="shop",
            connect={"server_settings": {"jit": False, "work_mem": "5MB", "extra_float_digits": 2}},
        )
        own = {"server_settings": {"work_mem": "7MB", "timezone": "Europe/Zurich"}}
        async with opened(settings, connect_args=own) as session:
            values = [
                await session.scalar(text(f"SHOW {name}"))
                for name in (
                    "application_name",
                    "jit",
                    "work_mem",
                    "timezone",
                    "extra_float_digits",
                )
            ]
        assert values == ["shop", "off", "7MB", "Europe/Zurich", "2"]

    async def test_a_cache_of_statements_can_be_left_out(self, settings: DatabaseSettings) -> None:
        numbers = itertools.count()
        options = {
            "prepared_statement_cache_size": 0,
            "statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"own_{next(numbers)}",
        }
        async with opened(settings, connect_args=options) as session:
            for _ in "ab":
                query = text("SELECT name FROM pg_prepared_statements")
                names = (await session.scalars(query)).all()
                assert len(names) == 1
                assert names[0].startswith("own_")

    @pytest.mark.parametrize("page", [1, 1000])
    async def test_the_size_of_a_page_divides_a_bulk_insert(
        self, manager: DatabaseSessionManager, page: int
    ) -> None:
        options = {"insertmanyvalues_page_size": page}
        async with DatabaseSessionManager(manager.settings, engine_options=options) as other:
            with count_statements(other) as sent:
                async with other.transaction() as session:
                    session.add_all([Note(text=name) for name in "abc"])
        assert sum("INSERT" in statement.sql for statement in sent) == (3 if page == 1 else 1)
        assert await notes(manager) == ["a", "b", "c"]

    async def test_a_tls_context_says_whom_to_trust(
        self, settings: DatabaseSettings, postgres: Postgres, tmp_path: Path
    ) -> None:
        async with tls_proxy(postgres, tmp_path) as port:
            url = f"postgresql://postgres@localhost:{port}/{make_url(settings.url).database}"
            trusting = ssl.create_default_context(cafile=tmp_path / "certificate.pem")
            async with opened(DatabaseSettings(url=url), connect_args={"ssl": trusting}) as session:
                assert await session.scalar(text("SELECT 1")) == 1
            manager = DatabaseSessionManager(
                url, connect_args={"ssl": ssl.create_default_context()}
            )
            with pytest.raises(ConnectionFailedError, match="certificate"):
                await manager.open()

    @pytest.mark.parametrize("pipeline", [True, False])
    async def test_a_class_of_connections_derives_from_the_librarys(
        self, settings: DatabaseSettings, pipeline: bool
    ) -> None:
        class Traced(sessionwire.asyncpg.Connection):
            seen: list[str] = []  # noqa: RUF012

            async def prepare(self, query: str, **options: Any) -> Any:
                self.seen.append(query)
                return await super().prepare(query, **options)

        settings = settings.model_copy(update={"pipeline": pipeline, "tcp_timeout": 7})
        async with opened(settings, connect_args={"connection_class": Traced}) as session:
            await session.execute(text("SELECT 'seen'"))
            connection = await session.connection()
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, Traced)
            assert isinstance(driver, Connection)
            assert (driver.has_pipeline, driver.tcp_timeout) == (pipeline, 7)
        assert "SELECT 'seen'" in Traced.seen

    async def test_a_codec_is_set_in_a_listener_of_the_engine(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings)
        manager.init(settings)

        @event.listens_for(manager.engine.sync_engine, "connect")
        def set_codec(connection: Any, _record: Any) -> None:
            connection.run_async(
                lambda driver: driver.set_type_codec(
                    "point",
                    encoder=str,
                    decoder=lambda value: ("point", value),
                    schema="pg_catalog",
                )
            )

        async with manager, manager.transaction() as session:
            assert await session.scalar(text("SELECT point(1, 2)")) == ("point", "(1,2)")

    async def test_a_class_of_pools_derives_from_the_librarys(
        self, settings: DatabaseSettings
    ) -> None:
        class Counting(sessionwire.asyncpg.Pool):
            taken = 0

            def _do_get(self) -> Any:
                type(self).taken += 1
                return super()._do_get()

        async with DatabaseSessionManager(
            settings, engine_options={"poolclass": Counting}
        ) as manager:
            before = Counting.taken
            async with manager.transaction() as session:
                await session.execute(text("SELECT 1"))
                assert manager.status().pool.in_use == 1
            assert Counting.taken == before + 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"connect_args": {"connection_class": dict}}, "sessionwire.asyncpg.Connection"),
            ({"connect_args": {"comand_timeout": 1}}, "did you mean 'command_timeout'"),
            ({"engine_options": {"poolclass": NullPool}}, "sessionwire.asyncpg.Pool"),
            ({"engine_options": {"json_serialiser": json.dumps}}, "'json_serialiser'"),
            ({"engine_options": {"server_side_cursors": True}}, "server_side_cursors"),
        ],
        ids=["connection", "argument", "pool", "option", "cursors"],
    )
    async def test_what_does_not_fit_is_refused_by_init(
        self, settings: DatabaseSettings, options: dict[str, Any], message: str
    ) -> None:
        manager = DatabaseSessionManager(**options)
        with pytest.raises(ConfigurationError, match=message):
            manager.init(settings)
        assert not manager.is_initialized


class TestOnSQLite:
    async def test_arguments_of_sqlite_go_through(self) -> None:
        import sqlite3

        args = {"detect_types": sqlite3.PARSE_COLNAMES, "cached_statements": 5}
        sqlite3.register_converter("shout", lambda value: value.decode().upper())
        async with opened(DatabaseSettings(url="sqlite://"), connect_args=args) as session:
            assert await session.scalar(text("""SELECT 'milk' AS "m [shout]" """)) == "MILK"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"connect_args": {"cached_statement": 1}}, "did you mean 'cached_statements'"),
            ({"connect_args": {"command_timeout": 1}}, "SQLite has no such argument"),
            ({"engine_options": {"poolclass": NullPool}}, "leave it out"),
        ],
        ids=["argument", "driver", "pool"],
    )
    def test_what_does_not_fit_is_refused_by_init(
        self, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            DatabaseSessionManager(**options).init("sqlite://")


# Refused

ELSEWHERE = {
    "isolation_level": ("SERIALIZABLE", r"transaction\(isolation="),
    "echo": (True, "write echo in the settings"),
    "pool_size": (3, "write pool.size"),
    "max_overflow": (3, "write pool.max_overflow"),
    "pool_timeout": (3, "write pool.timeout"),
    "pool_recycle": (3, "write pool.max_lifetime"),
    "pool_pre_ping": (True, "write pool.ping_after"),
    "pool_use_lifo": (False, "leave it out"),
    "pool_reset_on_return": (None, "leave it out"),
    "skip_autocommit_rollback": (True, "leave it out"),
    "pool": (None, "write poolclass"),
    "pool_class": (NullPool, "SQLAlchemy calls it poolclass"),
    "connect_args": ({}, "beside engine_options"),
    "creator": (print, "connection_class"),
    "async_creator": (print, "connection_class"),
    "module": (sys, "named in url"),
    "execution_options": ({"isolation_level": "AUTOCOMMIT"}, "isolation_level: each block"),
}
CONNECT_ELSEWHERE = {
    **dict.fromkeys(("host", "port", "user", "password", "database", "dsn"), "write it in url"),
    "timeout": "write connect_timeout",
    "loop": "leave it out",
    "async_creator_fn": "write connection_class",
    "isolation_level": "leave it out",
    "check_same_thread": "leave it out",
    "factory": "leave it out",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_engine_option_that_the_library_needs_is_refused_with_the_place(name: str) -> None:
    value, remedy = ELSEWHERE[name]
    with pytest.raises(ConfigurationError, match=rf"engine_options: .*{remedy}"):
        DatabaseSessionManager("sqlite://", engine_options={name: value})
    with pytest.raises(ConfigurationError, match=rf"engine .*{remedy}"):
        DatabaseSettings(url="sqlite://", engine={name: value})


@pytest.mark.parametrize("name", CONNECT_ELSEWHERE)
def test_an_argument_of_the_driver_that_the_library_needs_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"connect_args: {name}: {CONNECT_ELSEWHERE[name]}"
    ):
        DatabaseSessionManager("sqlite://", connect_args={name: "secret"})
    with pytest.raises(ConfigurationError, match=CONNECT_ELSEWHERE[name]) as raised:
        DatabaseSettings(url="sqlite://", connect={name: "secret"})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("argument", ["engine_options", "connect_args", "session_options"])
def test_what_is_no_mapping_is_refused(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument}: expected a mapping, got str"):
        DatabaseSessionManager("sqlite://", **{argument: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["json_serializer", "poolclass"])
def test_a_python_object_written_as_text_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: it is a Python object"):
        DatabaseSettings.load({"url": "sqlite://", "engine": {name: "orjson.dumps"}})


# Settings


class ShopSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")


def test_settings_come_from_a_file_and_from_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(
        "database:\n  url: sqlite://\n  engine: {hide_parameters: true, query_cache_size: 7}\n"
        "  connect: {server_settings: {jit: off}}\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("SHOP_DATABASE__ENGINE__QUERY_CACHE_SIZE", "9")
    monkeypatch.setenv("SHOP_DATABASE__CONNECT__COMMAND_TIMEOUT", "2.5")
    settings = ShopSettings.load(file).database
    assert settings.engine == {"hide_parameters": True, "query_cache_size": 9}
    assert settings.connect == {"server_settings": {"jit": "off"}, "command_timeout": 2.5}
    monkeypatch.setenv("SHOP_DATABASE__ENGINE__QUERY_CACHE_SIZE", "many")
    with pytest.raises(ConfigurationError, match="query_cache_size must be a whole number"):
        ShopSettings.load(file)


def test_settings_with_options_can_be_compared_and_hashed() -> None:
    one, same = (DatabaseSettings(url="sqlite://", engine={"label_length": 9}) for _ in "ab")
    assert one == same
    assert hash(one) == hash(same)
    assert one != DatabaseSettings(url="sqlite://")


def test_an_argument_of_the_manager_takes_precedence_key_by_key() -> None:
    settings = DatabaseSettings(
        url="sqlite://", engine={"hide_parameters": True, "query_cache_size": 0}
    )
    manager = DatabaseSessionManager(engine_options={"query_cache_size": 9})
    manager.init(settings)
    engine: Any = manager.engine.sync_engine
    assert engine.hide_parameters
    assert engine._compiled_cache.capacity == 9


# Containers


async def test_each_option_is_a_provider_that_can_be_given_and_overridden(
    postgres: Postgres, database_url: str
) -> None:
    container = DatabaseContainer(
        settings=database_url,
        engine_options={"hide_parameters": True},
        session_options=providers.Dict(info=providers.Dict(place="here")),
    )
    container.engine_options.override({"query_cache_size": 0})
    async with Lifespan(container), container.transaction()() as session:
        engine: Any = container.sessionmanager().engine.sync_engine
        assert not engine.hide_parameters
        assert engine._compiled_cache is None
        assert session.info == {"place": "here"}
        assert await session.scalar(select(literal(1))) == 1


def test_an_object_that_can_not_be_copied_is_given_to_a_nested_container() -> None:
    context = ssl.create_default_context()

    class Container(containers.DeclarativeContainer):
        db = DatabaseContainer.nested(
            settings="postgresql://localhost/shop", connect_args={"ssl": context}
        )

    manager = Container().db.sessionmanager()
    assert manager._database.make_engines.keywords["options"].connect["ssl"] is context  # type: ignore[attr-defined]
