"""URLs: unencoded passwords, parameters, read-only files, and names in errors."""

from __future__ import annotations

import sqlite3
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import AnyUrl, PostgresDsn, Secret, SecretStr
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
)

from .postgres import OnPostgres, until

SECRET = "hunter2"


def refusal(url: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        DatabaseSettings(url=url)
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    return str(refused.value)


# Passwords

NOT_ENCODED = [
    f"postgresql://shop:p@{SECRET}@db/shop",
    f"postgresql://shop:p@{SECRET}@db:5432/shop?sslmode=disable",
    f"postgresql://shop:p@{SECRET}@",
    f"postgresql://shop:p@:{SECRET}@db/shop",
    f"postgresql://shop:p@1:2/{SECRET}@db/shop",
    f"postgresql://shop:p@/{SECRET}@db/shop",
    f"postgresql://shop:p@x/{SECRET}@db/shop",
    f"postgresql://shop:p@?{SECRET}@db/shop",
    f"postgresql://shop:p@?{SECRET}=3@db/shop",
    f"postgresql://shop:p@x/?application_name={SECRET}@db/shop",
    f"postgresql://shop:p@#{SECRET}@db/shop",
    f"postgresql://shop/x:{SECRET}@db/shop",
    f"postgresql://db?password=p@{SECRET}",
    f"mysql+asyncmy://shop:p@{SECRET}@db/shop",
    make_url(f"postgresql://shop:p@{SECRET}@db/shop"),
    make_url(f"postgresql://shop:p@x/{SECRET}@db/shop"),
]


@pytest.mark.parametrize(
    "url", NOT_ENCODED, ids=[f"{type(url).__name__} {i}" for i, url in enumerate(NOT_ENCODED)]
)
def test_a_password_that_is_not_encoded_is_refused_and_not_shown(url: str | URL) -> None:
    assert "percent-encoded: @ is %40" in refusal(url)


@pytest.mark.parametrize("rest", [f"a&{SECRET}", f"a&{SECRET}=b", f"a&b=&{SECRET}"])
def test_a_password_with_an_ampersand_in_the_query_is_refused_and_not_shown(
    rest: str,
) -> None:
    assert "%26" in refusal(f"postgresql://db/shop?password={rest}")


@pytest.mark.parametrize("password", ["a:b", "a/b", "a?b", "a#b", "a:/?#b=c&d"])
def test_an_unambiguous_password_is_accepted(password: str) -> None:
    url = make_url(DatabaseSettings(url=f"postgresql://shop:{password}@db/shop").url)
    assert (url.username, url.password, url.host, url.database) == ("shop", password, "db", "shop")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@tenant:pw@db/shop",
        "postgresql://shop@db/shop?application_name=a@b",
        "postgresql:///shop?user=a@b",
        "sqlite:///a:b@c.db",
        URL.create("postgresql", host="db", database="a@b"),
    ],
)
def test_an_at_sign_outside_a_password_is_accepted(url: str | URL) -> None:
    settings = DatabaseSettings(url=url)
    assert DatabaseSettings(**settings.model_dump()) == settings


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shop:***@db/shop",
        "postgresql://shop@db/shop?password=***",
        "postgresql://shop@db/shop?sslpassword=%2A%2A%2A",
        str(DatabaseSettings(url="postgresql://shop:secret@db/shop").url),
        str(SecretStr("postgresql://shop:secret@db/shop")),
        URL.create("postgresql", "shop", "***", "db"),
    ],
)
def test_a_url_whose_password_was_hidden_is_refused(url: str | URL) -> None:
    assert "the password was hidden; give the URL itself" in refusal(url)


def test_settings_dumped_as_json_with_a_hidden_password_are_refused() -> None:
    dumped = DatabaseSettings(url="postgresql://shop:secret@db/shop").model_dump_json()
    with pytest.raises(ValueError, match="the password was hidden"):
        DatabaseSettings.model_validate_json(dumped)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (
            PostgresDsn("postgresql://shop:p%40ss@db:5433/shop"),
            "postgresql+asyncpg://shop:p%40ss@db:5433/shop",
        ),
        (PostgresDsn("postgresql://shop:p@ss@db/shop"), "postgresql+asyncpg://shop:p%40ss@db/shop"),
        (PostgresDsn("postgresql+asyncpg://db/shop"), "postgresql+asyncpg://db/shop"),
        (
            AnyUrl("postgresql://shop:pw@db/shop?sslmode=require"),
            "postgresql+asyncpg://shop:pw@db/shop?sslmode=require",
        ),
        (AnyUrl("sqlite:///var/shop.db"), "sqlite+aiosqlite:///var/shop.db"),
        (AnyUrl("sqlite://"), "sqlite+aiosqlite://"),
        (SecretStr("postgresql://shop:pw@db/shop"), "postgresql+asyncpg://shop:pw@db/shop"),
        (
            Secret[PostgresDsn](PostgresDsn("postgresql://shop:pw@db/shop")),
            "postgresql+asyncpg://shop:pw@db/shop",
        ),
    ],
)
def test_urls_of_pydantic_are_accepted_with_their_password(given: Any, meant: str) -> None:
    settings = DatabaseSettings(url=given)
    assert make_url(settings.url).render_as_string(hide_password=False) == meant
    assert DatabaseSessionManager(given).settings == settings


# Parameters of PostgreSQL's

NO_PARAMETERS = {
    "prepared_statement_cache_size=none": "a whole number, at least 0",
    "statement_cache_size=many": "a whole number, at least 0",
    "statement_cache_size=-1": "a whole number, at least 0",
    "max_cached_statement_lifetime=1.5": "a whole number, at least 0",
    "max_cacheable_statement_size=x": "a whole number, at least 0",
    "command_timeout=x": "a number of seconds, above 0",
    "command_timeout=0": "a number of seconds, above 0",
    "command_timeout=nan": "a number of seconds, above 0",
    "command_timeout=inf": "a number of seconds, above 0",
    "direct_tls=perhaps": "true or false",
    "port=x": "non-integer port",
    "host=one,two": "write ?host=one:5432&host=two:5432",
    "host=one:x&host=two:1": "write ?host=one:5432&host=two:5432",
    "ssl=on": "choose one of disable, allow, prefer",
    "target_session_attrs=writable": "choose one of any, primary, standby, read-write",
    "gsslib=x": "choose one of gssapi, sspi",
    "timeout=3": "set connect_timeout beside url",
    "connect_timeout=3": "set connect_timeout beside url",
    "server_settings=x": "options=-c%20name=value",
    "dsn=x": "its parts",
    "loop=x": "a Python object",
    "connection_class=x": "a Python object",
    "record_class=x": "a Python object",
    "prepared_statement_name_func=x": "a Python object",
    "async_creator_fn=x": "a Python object",
    "sslmodes=require": "did you mean 'sslmode'?",
    "sslmode=": "name=value",
    "sslmode": "name=value",
    "sslmode=require&sslmode=disable": "more than once",
    "command_timeout=1&command_timeout=2": "more than once",
}


@pytest.mark.parametrize(("query", "remedy"), NO_PARAMETERS.items(), ids=NO_PARAMETERS)
def test_an_unsupported_url_parameter_is_refused_with_the_remedy(query: str, remedy: str) -> None:
    assert remedy in refusal(f"postgresql://db/shop?{query}")


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("postgresql://one,two/shop", "postgresql:///shop?host=one:5432&host=two:5432"),
        (
            "postgresql://a:b@one:1,two:2/shop?ssl=disable",
            "postgresql://a:b@/shop?host=one:1&host=two:2&ssl=disable",
        ),
        (
            PostgresDsn("postgresql://a:b@one:1,two/shop"),
            "postgresql://a:b@/shop?host=one:1&host=two:5432",
        ),
    ],
)
def test_several_hosts_can_be_written_in_the_form_of_libpq(url: Any, meant: str) -> None:
    assert DatabaseSettings(url=url) == DatabaseSettings(url=meant)


class TestParameters(OnPostgres):
    @pytest.mark.parametrize(
        "query",
        [
            "statement_cache_size=0",
            "statement_cache_size=0&prepared_statement_cache_size=0",
            "prepared_statement_cache_size=5",
            "max_cached_statement_lifetime=0",
            "max_cacheable_statement_size=0",
            "direct_tls=false",
            "target_session_attrs=read-write",
            "port=5432",
            "ssl=disable&passfile=/nowhere&krbsrvname=postgres",
        ],
    )
    async def test_url_parameters_of_the_driver_are_accepted_by_it(
        self, query: str, database_url: str
    ) -> None:
        async with DatabaseSessionManager(f"{database_url}&{query}") as manager:
            for _ in range(2):
                async with manager.transaction() as session:
                    assert await session.scalar(text("SELECT 5")) == 5

    async def test_a_numeric_url_parameter_takes_effect(self, database_url: str) -> None:
        async with (
            DatabaseSessionManager(f"{database_url}&command_timeout=0.05") as manager,
            manager.session() as session,
        ):
            with pytest.raises(TimeoutError):
                await session.execute(text("SELECT pg_sleep(5)"))


# Parameters of SQLite's


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("sqlite://shop.db", "after three slashes: sqlite:///shop.db"),
        (f"sqlite://shop:{SECRET}@db/shop", "after three slashes: sqlite:///shop.db"),
        ("sqlite:///shop.db?mode=ro", "write sqlite:///file:shop.db?mode=…&uri=true"),
        ("sqlite:///shop.db?mode=ro&uri=true", "write sqlite:///file:shop.db?mode=…&uri=true"),
        ("sqlite:///file:shop.db?immutable=1", "write sqlite:///file:shop.db?immutable=…&uri=true"),
        ("sqlite:///file:shop.db?mode=rx&uri=true", "choose one of ro, rw, rwc, memory"),
        ("sqlite:///file:shop.db?foo=1&uri=true", "unknown URL parameter 'foo'"),
        ("sqlite:///shop.db?foo=1", "unknown URL parameter 'foo'"),
        ("sqlite:///shop.db?timeout=5", "set pool.timeout beside url"),
        ("sqlite:///shop.db?isolation_level=DEFERRED", "can't be a URL parameter"),
        ("sqlite:///shop.db?check_same_thread=true", "can't be a URL parameter"),
        ("sqlite:///shop.db?cached_statements=x", "must be a whole number"),
        ("sqlite:///shop.db?uri=perhaps", "must be true or false"),
    ],
)
def test_url_parts_that_sqlite_would_ignore_are_refused(url: str, remedy: str) -> None:
    assert remedy in refusal(url)


@pytest.mark.parametrize("query", ["mode=ro", "immutable=1"])
async def test_a_file_opened_read_only_can_be_read_and_does_not_change(
    query: str, tmp_path: Path
) -> None:
    file = tmp_path / "shop.db"
    connection = sqlite3.connect(file)
    connection.executescript("CREATE TABLE t AS SELECT 5 AS n")
    connection.close()
    before = file.read_bytes()
    async with DatabaseSessionManager(f"sqlite:///file:{file}?{query}&uri=true") as manager:
        async with manager.transaction(read_only=True) as session:
            assert await session.scalar(text("SELECT n FROM t")) == 5
        with pytest.raises(DBAPIError, match="readonly database"):
            async with manager.transaction() as session:
                await session.execute(text("INSERT INTO t VALUES (6)"))
    assert file.read_bytes() == before


async def no_driver_thread_is_left() -> bool:
    return not any("_connection_worker_thread" in thread.name for thread in threading.enumerate())


async def test_a_file_opened_read_only_is_not_created(tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    with pytest.raises(ConnectionFailedError, match="unable to open database file"):
        await DatabaseSessionManager(f"sqlite:///file:{file}?mode=ro&uri=true").open()
    assert not file.exists()
    await until(no_driver_thread_is_left)


# How errors name a database

UNREACHABLE = {
    "postgresql://shop@127.0.0.1:1/books": "database 'books' on host 127.0.0.1:1 as user shop",
    "postgresql://shop@/books?host=/nowhere": "database 'books' on host /nowhere as user shop",
    "postgresql://shop@/books?host=127.0.0.1&port=1": (
        "database 'books' on host 127.0.0.1:1 as user shop"
    ),
    "postgresql:///?host=127.0.0.1:1&user=shop&database=books": (
        "database 'books' on host 127.0.0.1:1 as user shop"
    ),
    "postgresql://shop@127.0.0.1:1,127.0.0.1:2/books": (
        "database 'books' on host 127.0.0.1:1, 127.0.0.1:2 as user shop"
    ),
    "postgresql://shop@[::1]:1/books": "database 'books' on host [::1]:1 as user shop",
    "sqlite:////dev/null/shop.db": "database '/dev/null/shop.db'",
}


@pytest.mark.parametrize(("url", "named"), UNREACHABLE.items(), ids=UNREACHABLE)
async def test_the_error_of_a_silent_database_names_it_as_in_the_url(url: str, named: str) -> None:
    with pytest.raises(ConnectionFailedError) as failed:
        await DatabaseSessionManager(DatabaseSettings(url=url, connect_timeout=5)).open()
    assert f"could not open {named}: " in str(failed.value)
    await until(no_driver_thread_is_left)


async def test_the_error_names_defaults_that_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in {"PGHOST": "/nowhere", "PGUSER": "shop", "PGDATABASE": "books"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConnectionFailedError, match="database 'books' on host /nowhere as user shop: "
    ):
        await DatabaseSessionManager("postgresql://").open()
