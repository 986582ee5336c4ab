"""Keys beside the URL: its parts, the server's settings, and what contradicts itself."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    Settings,
)

from .conftest import Postgres
from .passwords import asking_for_passwords
from .postgres import OnPostgres

SECRET = "hunter2"


class ShopSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")


def whole(**keys: Any) -> str:
    url = make_url(DatabaseSettings(**keys).url)
    return url.render_as_string(hide_password=False).replace("+asyncpg", "")


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        DatabaseSettings(**keys)
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    return str(refused.value)


# Parts of the URL

URL = "postgresql://shop:old@db:5433/shop?sslmode=require"
COMPLETED = {
    "a host": ({"host": "other"}, "postgresql://shop:old@other:5433/shop?sslmode=require"),
    "a port": ({"port": 1}, "postgresql://shop:old@db:1/shop?sslmode=require"),
    "a host with its port": (
        {"host": "other:1", "port": 2},
        "postgresql://shop:old@other:1/shop?sslmode=require",
    ),
    "an IPv6 address": ({"host": "::1"}, "postgresql://shop:old@[::1]:5433/shop?sslmode=require"),
    "an IPv6 address with its port": (
        {"host": "[::1]:2"},
        "postgresql://shop:old@[::1]:2/shop?sslmode=require",
    ),
    "a name": ({"username": "a@b"}, "postgresql://a%40b:old@db:5433/shop?sslmode=require"),
    "a password": (
        {"password": "p@ss:/?#%40"},
        "postgresql://shop:p%40ss%3A%2F%3F%23%2540@db:5433/shop?sslmode=require",
    ),
    "a hidden password": (
        {"password": SecretStr("new")},
        "postgresql://shop:new@db:5433/shop?sslmode=require",
    ),
    "an empty password": ({"password": ""}, URL),
    "a database": ({"database": "b"}, "postgresql://shop:old@db:5433/b?sslmode=require"),
}


@pytest.mark.parametrize(("keys", "meant"), COMPLETED.values(), ids=COMPLETED)
def test_a_key_replaces_its_part_of_the_url(keys: dict[str, Any], meant: str) -> None:
    assert whole(url=URL, **keys) == meant


@pytest.mark.parametrize(
    ("url", "keys", "meant"),
    [
        ("/shop?host=/run", {"host": "db"}, "db/shop"),
        ("/shop?host=/run", {"port": 5433}, "/shop?host=%2Frun&port=5433"),
        ("db:1/shop", {"host": "/run"}, "/shop?host=%2Frun&port=1"),
        ("db:1/shop", {"host": "/run", "port": 2}, "/shop?host=%2Frun&port=2"),
        ("db:1/shop", {"host": "a,b:2"}, "/shop?host=a%3A5432&host=b%3A2"),
        ("db/shop", {"host": "a,b:2", "port": 3}, "/shop?host=a%3A3&host=b%3A2"),
        ("a:1,b:2/shop", {"host": "c"}, "c/shop"),
        ("[::1]:1,[::2]/shop", {}, "/shop?host=%3A%3A1%2C%3A%3A2&port=1%2C5432"),
        (
            "/?user=u&password=p&database=d",
            {"username": "a", "password": "b", "database": "c"},
            "a:b@/c",
        ),
    ],
)
def test_a_key_replaces_what_stands_among_the_parameters(
    url: str, keys: dict[str, Any], meant: str
) -> None:
    assert whole(url=f"postgresql://{url}", **keys) == f"postgresql://{meant}"


def test_a_host_or_a_database_can_do_without_a_url() -> None:
    keys = {"host": "db", "port": 1, "username": "shop", "password": "pw", "database": "books"}
    assert whole(**keys) == "postgresql://shop:pw@db:1/books"
    assert whole(database="books") == "postgresql:///books"
    assert make_url(DatabaseSettings.load({"host": "db"}).url).drivername == "postgresql+asyncpg"
    for keys in ({"username": "shop"}, {"password": "pw"}, {"port": 1}):
        assert "url: is missing" in refusal(**keys)


def test_a_variable_completes_the_url_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("database: {url: 'postgresql://shop@db/shop?sslmode=require'}")
    for password in ("p@ss", "12345", "null", '{"a": 1}', "[1]"):
        monkeypatch.setenv("SHOP_DATABASE__PASSWORD", password)
        assert make_url(ShopSettings.load(file).database.url).password == password
    monkeypatch.delenv("SHOP_DATABASE__PASSWORD")
    (tmp_path / "shop_database__password").write_text("of-secret\n")
    loaded = ShopSettings.load(file, secrets_dir=tmp_path).database
    assert make_url(loaded.url).password == "of-secret"


def test_the_parts_of_a_service_may_come_from_variables_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {"HOST": "db", "PORT": "1", "USERNAME": "shop", "PASSWORD": "pw", "DATABASE": "books"}
    for key, value in parts.items():
        monkeypatch.setenv(f"SHOP_DATABASE__{key}", value)
    # Kubernetes sets this for a service with the name shop-database.
    monkeypatch.setenv("SHOP_DATABASE_PORT", "tcp://10.0.0.1:5432")
    url = make_url(ShopSettings.load().database.url)
    assert url.render_as_string(False) == "postgresql+asyncpg://shop:pw@db:1/books"


CONTRADICTIONS = {
    "both passwords": (
        {"url": URL, "password": SECRET, "password_file": __file__},
        "password_file (argument): password is set too: leave out one of them",
    ),
    "a host of SQLite": (
        {"url": "sqlite://", "host": "db"},
        "host (argument): the url is that of an SQLite file, which has no host: leave it out, or",
    ),
    "a password of SQLite": (
        {"url": "sqlite:///shop.db", "password": SECRET},
        "password (argument): the url is that of an SQLite file",
    ),
    "a database of an embedded server": (
        {"url": "embedded:./var", "database": "shop"},
        "database (argument): the url is that of an embedded server, which has no database",
    ),
    "a search path of SQLite": (
        {"url": "sqlite://", "search_path": "shop"},
        "search_path (argument): only PostgreSQL has it, and the url is that of sqlite: leave",
    ),
    "a timeout of SQLite": (
        {"url": "sqlite://", "statement_timeout": 1},
        "statement_timeout (argument): only PostgreSQL",
    ),
    "a port for several hosts": (
        {"url": "postgresql://a:1,b:2/shop", "port": 3},
        "port (argument): the url names each host with its port",
    ),
    "a host that is none": ({"host": "a:b"}, "host (argument): a host is written as db.example"),
    "a port that is none": ({"url": URL, "port": 70000}, "port (argument): "),
    "a number for a password": (
        {"url": URL, "password": 12345},
        "password (argument): a password is a text: write it in quotes",
    ),
    "a hidden password": (
        {"url": URL, "password": "***"},
        "password (argument): it is nothing but *, so somebody has hidden it: give the password",
    ),
    "a file that is not there": (
        {"url": URL, "password_file": "/nowhere/password"},
        "password_file (argument): /nowhere/password: No such file",
    ),
    "a relative file that is not there": (
        {"url": URL, "password_file": "password"},
        "the path is relative to ",
    ),
    "a timeout of nothing": ({"url": URL, "lock_timeout": 0}, "lock_timeout (argument): "),
}


@pytest.mark.parametrize(("keys", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_by_key_source_and_remedy(
    keys: dict[str, Any], message: str
) -> None:
    assert message in refusal(**keys)


def test_the_error_of_a_contradiction_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.yaml").write_text("database: {url: 'sqlite://'}")
    monkeypatch.setenv("SHOP_DATABASE__HOST", "db")
    with pytest.raises(
        ConfigurationError,
        match=r"^database\.host \(environment variable SHOP_DATABASE__HOST\): the url is that of",
    ):
        ShopSettings.load(tmp_path / "shop.yaml")


def test_a_password_beside_the_url_is_shown_nowhere() -> None:
    settings = ShopSettings.load(database={"host": "db", "password": SECRET}).database
    for shown in (settings, settings.password, settings.model_dump(), vars(settings)):
        assert SECRET not in f"{shown} {shown!r}"
    assert SECRET not in settings.model_dump_json() + json.dumps(settings.model_dump())
    assert SECRET not in yaml.safe_dump(settings.model_dump(mode="json"))
    with pytest.raises(ValidationError) as refused:
        DatabaseSettings.model_validate({"password": SECRET, "port": SECRET})
    assert SECRET not in f"{refused.value} {refused.value.errors()} {refused.value.json()}"


@pytest.mark.parametrize(
    "keys",
    [
        {"url": URL, "password": SECRET, "host": "a,b:1", "port": 2, "search_path": ["a"]},
        {"database": "shop", "password_file": __file__},
    ],
)
def test_settings_made_from_a_dump_equal_those_that_were_dumped(keys: dict[str, Any]) -> None:
    settings = DatabaseSettings(**keys)
    again = DatabaseSettings(**settings.model_dump())
    assert again == settings
    assert again.url == settings.url


# A password on the wire


async def test_a_rotated_password_file_is_read_for_each_new_connection(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    async with asking_for_passwords() as running:
        settings = DatabaseSettings(
            host="127.0.0.1",
            port=running.port,
            username="shop",
            database="postgres",
            password_file=file,
        )
        async with DatabaseSessionManager(settings) as manager:
            file.write_text("second\r\n")
            await running.execute("ALTER ROLE shop PASSWORD 'second'")
            async with manager.session() as first, manager.session() as second:
                assert await first.scalar(text("SELECT 1")) == 1
                assert await second.scalar(text("SELECT 1")) == 1
                file.unlink()
                async with manager.session() as third:
                    with pytest.raises(DBAPIError, match=r"password_file failed: .*No such file"):
                        await third.scalar(text("SELECT 1"))
        with pytest.raises(ConnectionFailedError, match=r"password_file failed: .*No such file"):
            await manager.open()
        for wrong in (b"", b"\n", b"\xff"):
            file.write_bytes(wrong)
            with pytest.raises(ConnectionFailedError, match=r"file is empty|not a text in UTF-8"):
                await manager.open()


async def test_a_password_beside_the_url_opens_the_database() -> None:
    async with asking_for_passwords() as running:
        url = running.tcp_url("postgres").replace("postgres@", "shop:wrong@")
        async with DatabaseSessionManager(DatabaseSettings(url=url, password="first")) as manager:
            assert manager.is_open
        with pytest.raises(ConnectionFailedError, match="password authentication failed"):
            await DatabaseSessionManager(url).open()


# Settings of the server


class TestServerSettings(OnPostgres):
    async def asked(self, url: str, *names: str, **keys: Any) -> list[str]:
        async with (
            DatabaseSessionManager(DatabaseSettings(url=url, **keys)) as manager,
            manager.session() as session,
        ):
            return [str(await session.scalar(text(f"SHOW {name}"))) for name in names]

    async def test_each_connection_begins_with_them(self, database_url: str) -> None:
        assert await self.asked(
            database_url,
            "search_path",
            "statement_timeout",
            "lock_timeout",
            "idle_in_transaction_session_timeout",
            search_path='"$user", shop',
            statement_timeout=1.5,
            lock_timeout=0.0001,
            idle_in_transaction_timeout=60,
        ) == ['"$user", shop', "1500ms", "1ms", "1min"]

    async def test_a_search_path_may_be_a_list_of_schemas(
        self, database_url: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strange = 'a "b", c'
        assert await self.asked(database_url, "search_path", search_path=["$user", strange]) == [
            '"$user", "a ""b"", c"'
        ]
        monkeypatch.setenv("SHOP_DATABASE__SEARCH_PATH", '["shop", "public"]')
        assert ShopSettings.load(database={"url": database_url}).database.search_path == [
            "shop",
            "public",
        ]
        monkeypatch.setenv("SHOP_DATABASE__SEARCH_PATH", "shop, public")
        loaded = ShopSettings.load(database={"url": database_url}).database
        assert loaded.search_path == "shop, public"

    async def test_a_statement_that_takes_too_long_is_ended_by_the_server(
        self, database_url: str
    ) -> None:
        settings = DatabaseSettings(url=database_url, statement_timeout=0.05)
        async with DatabaseSessionManager(settings) as manager, manager.session() as session:
            with pytest.raises(DBAPIError, match="statement timeout"):
                await session.execute(text("SELECT pg_sleep(30)"))


def test_options_in_the_url_are_refused_behind_a_pooler() -> None:
    with pytest.raises(ConfigurationError, match=r"pooler.*beside url, or all else by ALTER ROLE"):
        DatabaseSettings(url="postgresql://shop/?options=-c%20jit=off", pooler="session")


def test_a_pooler_is_refused_in_front_of_an_sqlite_file() -> None:
    with pytest.raises(ConfigurationError, match="only PostgreSQL has it"):
        DatabaseSettings(url="sqlite:///shop.db", pooler="transaction")


class TestMigrationsURL:
    BEHIND = "postgresql://shop:hunter2@pooler:6432/shop"

    @pytest.mark.parametrize(
        ("direct", "means"),
        [
            ("postgresql://server", "postgresql://shop:hunter2@server/shop"),
            ("postgresql://shop@server:5433", "postgresql://shop:hunter2@server:5433/shop"),
            ("postgresql://owner@server", "postgresql://owner@server/shop"),
            ("postgresql://owner:pw@server/other", "postgresql://owner:pw@server/other"),
        ],
    )
    def test_it_takes_user_password_and_database_from_url_unless_it_names_them(
        self, direct: str, means: str
    ) -> None:
        settings = DatabaseSettings(url=self.BEHIND, migrations_url=direct)

        completed: Any = settings.migrations_url
        whole = completed.render_as_string(hide_password=False)
        assert whole.replace("+asyncpg", "") == means

    def test_its_password_is_hidden(self) -> None:
        settings = DatabaseSettings(url=self.BEHIND, migrations_url="postgresql://a:secret@b")

        for shown in (repr(settings), str(settings.model_dump()), settings.model_dump_json()):
            assert "secret" not in shown
        assert DatabaseSettings.model_validate(settings.model_dump()) == settings

    def test_it_is_refused_on_sqlite(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"migrations_url \(argument\): only PostgreSQL"
        ):
            DatabaseSettings(url="sqlite://", migrations_url="postgresql://server")
