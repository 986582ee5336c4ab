"""`sessionwire check`, `wait`, `migrate` and `status`, as programs and people call them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sessionwire._cli import postgresql_checks
from sessionwire._cli.commands import commands

from .cluster import cluster
from .conftest import DATABASE, Postgres

Run = Callable[..., Result]
APP = """
from dependency_injector import containers
from sqlalchemy import Column, Integer, MetaData, Table
from sessionwire import DatabaseContainer, DatabaseSessionManager

metadata = MetaData()
Table("cup", metadata, Column("id", Integer, primary_key=True))


class Container(containers.DeclarativeContainer):
    db = DatabaseContainer.nested(settings={url!r}, metadata=metadata)
    archive = DatabaseContainer.nested(settings={url!r}, metadata=MetaData())


class Empty(containers.DeclarativeContainer):
    pass


manager = DatabaseSessionManager({url!r})
not_callable = 3
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs the command line in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(commands, arguments, prog_name="sessionwire")

    return call


def found(result: Result, database: str = "database") -> dict[str, list[str]]:
    """Return the findings as `level: message`, by their subjects."""
    findings: dict[str, list[str]] = {}
    for each in json.loads(result.output)["databases"][database]:
        findings.setdefault(each["subject"], []).append(f"{each['level']}: {each['message']}")
    return findings


@pytest.fixture
def app(tmp_path: Path, url: str) -> Iterator[str]:
    (tmp_path / "cups.py").write_text(APP.format(url=url))
    yield "cups"
    sys.modules.pop("cups", None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shop.db'}"


@pytest.fixture
def config(tmp_path: Path, url: str) -> str:
    file = tmp_path / "shop.yaml"
    file.write_text(f"database:\n  url: {url}\nother:\n  key: 1\n")
    return str(file)


class TestCheckOnSQLite:
    def test_a_file_that_is_as_it_should_be_has_no_error(self, run: Run, config: str) -> None:
        result = run("check", "--config", config, "--json")
        assert result.exit_code == 0
        findings = found(result)
        assert {*findings} == {"connection", "file", "journal", "content", "encoding"}
        assert all(each.startswith("ok: ") for all_ in findings.values() for each in all_)

    def test_it_is_plain_in_a_pipe(self, run: Run, config: str) -> None:
        result = run("check", "--config", config)
        assert "\x1b" not in result.output
        first, *_, last = result.output.splitlines()
        assert (first, last) == ("database", "0 error(s), 0 warning(s)")
        assert "  ok       journal: readers and the writer don't wait" in result.output

    def test_a_table_of_the_models_that_is_missing_is_an_error(self, run: Run, app: str) -> None:
        result = run("check", "--app", f"{app}:Container", "--json")
        assert result.exit_code == 1
        assert found(result, "db")["tables"] == ["error: not there: cup; migrate the database"]
        assert "tables" not in found(result, "archive")

    def test_a_damaged_file_is_an_error(self, run: Run, config: str, tmp_path: Path) -> None:
        (tmp_path / "shop.db").write_text("this is no database, and long enough to be read" * 40)
        result = run("check", "--config", config)
        assert result.exit_code == 1
        assert "error    connection: could not open database" in result.output

    def test_strict_fails_for_a_warning(self, run: Run, config: str) -> None:
        arguments = "check", "--config", config, "--processes", "2"
        assert run(*arguments).exit_code == 0
        result = run(*arguments, "--strict")
        assert "warning  processes: 2 processes share one writer" in result.output
        assert result.exit_code == 1


class TestTargets:
    @pytest.mark.parametrize("name", ["Container", "manager", "Container.db"])
    def test_a_container_its_part_and_a_manager_will_do(
        self, run: Run, app: str, name: str
    ) -> None:
        result = run("wait", "--app", f"{app}:{name}")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "answers" in result.output

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("cups", "name the module and the object in it"),
            ("saucers:Container", "No module named 'saucers'; it was looked for in "),
            ("cups:Missing", "cups has no Missing"),
            ("cups:Empty", "there is no DatabaseContainer in this container"),
            ("cups:not_callable", "this is no container"),
        ],
    )
    def test_another_is_refused_with_the_remedy(
        self, run: Run, app: str, given: str, said: str
    ) -> None:
        result = run("check", "--app", given)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"sessionwire: --app {given}: ")
        assert said in result.stderr

    def test_one_of_app_and_config_is_needed_and_no_more(
        self, run: Run, app: str, config: str
    ) -> None:
        assert "which database?" in run("check").stderr
        both = run("check", "--app", f"{app}:manager", "--config", config)
        assert (both.exit_code, "give one of them" in both.stderr) == (2, True)

    def test_a_file_is_read_with_its_section_and_the_environment(
        self, run: Run, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "two.yaml").write_text(f"archive:\n  url: {url}\n  pool:\n    size: 3\n")
        monkeypatch.setenv("SHOP_ARCHIVE__POOL__SIZE", "0")
        arguments = "wait", "--config", "two.yaml", "--section", "archive"
        assert run(*arguments).output.startswith("archive: database ")
        wrong = run(*arguments, "--env-prefix", "SHOP_")
        assert wrong.exit_code == 2
        assert "archive.pool.size (environment variable SHOP_ARCHIVE__POOL__SIZE)" in wrong.stderr

    def test_a_file_that_is_missing_is_said_to_be(self, run: Run) -> None:
        result = run("check", "--config", "none.yaml")
        assert (result.exit_code, result.output) == (2, result.stderr)
        assert "none.yaml: No such file or directory" in result.stderr


class TestOnPostgreSQL:
    @pytest.fixture
    def url(self, postgres: Postgres) -> str:
        self.sql(postgres, f"ALTER DATABASE {DATABASE} RESET ALL")
        return postgres.url(DATABASE)

    @staticmethod
    def sql(postgres: Postgres, *statements: str) -> None:
        async def execute() -> None:
            for statement in statements:
                await postgres.execute(statement)

        asyncio.run(execute())

    @contextmanager
    def changed(self, postgres: Postgres, *settings: str) -> Iterator[None]:
        for setting in settings:
            self.sql(postgres, f"ALTER DATABASE {DATABASE} SET {setting}")
        try:
            yield
        finally:
            self.sql(postgres, f"ALTER DATABASE {DATABASE} RESET ALL")

    def test_it_looks_at_all_that_the_page_lists(
        self, run: Run, config: str, postgres: Postgres
    ) -> None:
        findings = found(run("check", "--config", config, "--json"))
        assert {*findings} == {
            "connection",
            "server",
            "tls",
            "role",
            "pool",
            "pooler",
            "time",
            "encoding",
            "isolation",
            "commits",
        }
        assert findings["tls"] == ["ok: the connection is a local socket"]
        assert findings["role"][0].startswith("warning: 'postgres' is a superuser")
        assert findings["time"][0].startswith("ok: the clocks agree")
        assert findings["pooler"] == ["ok: none is in front of the server"]
        # The server of the tests does without durability.
        assert findings["commits"][0].startswith("error: fsync is off")

    def test_defaults_that_surprise_are_found(
        self, run: Run, config: str, postgres: Postgres
    ) -> None:
        settings = (
            "default_transaction_isolation = 'serializable'",
            "default_transaction_read_only = on",
        )
        with self.changed(postgres, *settings):
            findings = found(run("check", "--config", config, "--json"))
        assert findings["isolation"][0].startswith("warning: the default is SERIALIZABLE")
        assert findings["role"][0].startswith("error: transactions are read-only by default")

    def test_a_pool_that_the_server_has_no_room_for_is_an_error(
        self, run: Run, config: str, postgres: Postgres
    ) -> None:
        findings = found(run("check", "--config", config, "--json", "--processes", "100"))
        assert findings["pool"][0].startswith("error: 100 process(es) of pool.size + ")
        assert "need 1500 connections, and the server lets " in findings["pool"][0]

    def test_the_limit_of_the_role_and_its_rights_are_looked_at(
        self, run: Run, app: str, postgres: Postgres, tmp_path: Path
    ) -> None:
        self.sql(
            postgres,
            "DROP ROLE IF EXISTS waiter",
            "CREATE ROLE waiter LOGIN CONNECTION LIMIT 7",
        )
        asyncio.run(postgres.run("DROP TABLE IF EXISTS cup; CREATE TABLE cup (id int)", DATABASE))
        url = postgres.url(DATABASE).replace("postgres@", "waiter@")
        (tmp_path / "cups.py").write_text(APP.format(url=url))
        try:
            findings = found(run("check", "--app", "cups:Container", "--json"), "db")
        finally:
            asyncio.run(postgres.run("DROP TABLE cup", DATABASE))
            self.sql(postgres, "DROP ROLE waiter")
        assert findings["role"] == ["ok: 'waiter' is no superuser"]
        assert findings["pool"][0].endswith(
            "the role lets 7 in: make the pool smaller, or put a pooler in front"
        )
        assert findings["rights"] == [
            "warning: the role may not select, insert, update and delete in all tables, cup is "
            "not open to it: GRANT what the service needs"
        ]

    def findings_in_another(
        self, run: Run, postgres: Postgres, tmp_path: Path, *statements: str
    ) -> dict[str, list[str]]:
        """Check a database `other` of its own, which these statements make."""
        self.sql(postgres, "DROP DATABASE IF EXISTS other", *statements)
        (tmp_path / "other.yaml").write_text(f"database:\n  url: {postgres.url('other')}\n")
        try:
            return found(run("check", "--config", "other.yaml", "--json"))
        finally:
            self.sql(postgres, "DROP DATABASE other")

    def test_an_encoding_that_checks_nothing_is_found(
        self, run: Run, postgres: Postgres, tmp_path: Path
    ) -> None:
        findings = self.findings_in_another(
            run,
            postgres,
            tmp_path,
            "CREATE DATABASE other ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'",
        )
        assert findings["encoding"][0].startswith("warning: the database is in SQL_ASCII")

    def test_a_collation_that_has_changed_since_is_an_error(
        self, run: Run, postgres: Postgres, tmp_path: Path
    ) -> None:
        findings = self.findings_in_another(
            run,
            postgres,
            tmp_path,
            "CREATE DATABASE other TEMPLATE template0",
            "UPDATE pg_database SET datcollversion = 'of before' WHERE datname = 'other'",
        )
        assert findings["encoding"][1].startswith(
            "error: the collation of the database has changed, from version of before to "
        )

    @pytest.mark.parametrize(("minutes", "word"), [(-1, "ahead of"), (1, "behind")])
    def test_clocks_that_differ_are_found(
        self,
        run: Run,
        config: str,
        monkeypatch: pytest.MonkeyPatch,
        minutes: int,
        word: str,
    ) -> None:
        class OtherClock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + timedelta(minutes=minutes)

        monkeypatch.setattr(postgresql_checks, "datetime", OtherClock)
        (message,) = found(run("check", "--config", config, "--json"))["time"]
        assert re.match(rf"warning: the server's clock is (59|60)\.\d s {word} this", message)

    async def test_a_standby_is_an_error_and_tcp_without_tls_a_warning(
        self, run: Run, tmp_path: Path
    ) -> None:
        async with cluster(tcp=True) as both:
            url = both.standby.tcp_url("postgres")
            (tmp_path / "standby.yaml").write_text(f"database:\n  url: {url}\n")
            result = await asyncio.to_thread(run, "check", "--config", "standby.yaml", "--json")
        findings = found(result)
        assert result.exit_code == 1
        assert findings["role"][0] == (
            "error: this server is a standby, and refuses writes: connect to the primary"
        )
        assert findings["tls"][0].startswith("warning: the connection is not encrypted")

    def test_a_server_that_is_not_there_is_an_error_and_is_waited_for_in_vain(
        self, run: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "no.yaml").write_text(f"database:\n  url: postgresql:///x?host={tmp_path}\n")
        result = run("check", "--config", "no.yaml")
        assert result.exit_code == 1
        assert "error    connection: could not open database 'x'" in result.output
        result = run("wait", "--config", "no.yaml", "--timeout", "0.3")
        assert result.exit_code == 2
        assert "waited 0." in result.stderr

    def test_status_without_a_service_shows_the_sessions_of_the_role(
        self, run: Run, config: str, postgres: Postgres
    ) -> None:
        async def hold() -> Result:
            import asyncpg

            connection = await asyncpg.connect(
                host=postgres.host,
                user="postgres",
                database=DATABASE,
                server_settings={"application_name": "the barista"},
            )
            try:
                await connection.execute("BEGIN; SELECT 'espresso'")
                return await asyncio.to_thread(run, "status", "--config", config)
            finally:
                await connection.close()

        result = asyncio.run(hold())
        (line,) = [line for line in result.output.splitlines() if "the barista" in line]
        assert "idle in transaction" in line
        assert "SELECT 'espresso'" in line


STATUS = {
    "name": "database 'shop'",
    "is_open": True,
    "is_closing": False,
    "open_scopes": 2,
    "pool": {"in_use": 1, "idle": 0, "waiting": 1, "limit": 1},
    "transactions": {"committed": 1234, "rolled_back": 0, "unknown": 2},
    "retries": {},
    "connections": {"made": 3, "held_for": 12.25},
    "holders": [],
    "blocks": [
        {
            "call_site": "services.py:12 in Shop.sell",
            "open_for": 3.21,
            "is_waiting": False,
            "held_for": 3.2,
            "statement": "SELECT item\nFROM shop",
            "task": "Task-7",
            "line": "bank.py:5 in Bank.ask",
        },
        {
            "call_site": "services.py:30 in Shop.list",
            "open_for": 1.0,
            "is_waiting": True,
            "held_for": None,
            "statement": None,
            "task": None,
            "line": None,
        },
    ],
    "slow_statements": [],
}


class Page(BaseHTTPRequestHandler):
    """The answers of a service."""

    def do_GET(self) -> None:
        is_page = self.path == "/status/status.json"
        if is_page and self.headers["Authorization"] != "Bearer key":
            self.send_error(401)
            return
        self.send_response(200)
        self.end_headers()
        answer = {"databases": {"db": STATUS}} if is_page else {}
        self.wfile.write(b"<html>" if self.path == "/text.json" else json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestStatus:
    KEY = "--header", "Authorization: Bearer key"

    @pytest.mark.parametrize("path", ["/status", "/status/", "/status/status.json"])
    def test_it_shows_who_holds_and_who_waits(self, run: Run, service: str, path: str) -> None:
        result = run("status", service + path, *self.KEY)
        assert result.exit_code == 0
        assert result.output.splitlines() == [
            "db: database 'shop', open",
            "pool: 1 of 1 in use, 0 idle, 1 waiting",
            "transactions: 1,234 committed, 2 unknown",
            "retries: none",
            "connections: 3 made, 12.2 s held for",
            "open blocks, the oldest first: 2",
            "  3.2 s  held for 3.2 s  services.py:12 in Shop.sell  bank.py:5 in Bank.ask  "
            "SELECT item FROM shop",
            "  1.0 s  waits for one  services.py:30 in Shop.list",
            "slow statements, the latest first: 0",
        ]

    def test_json_is_what_the_service_says(self, run: Run, service: str) -> None:
        result = run("status", f"{service}/status", "--json", *self.KEY)
        assert json.loads(result.output) == {"databases": {"db": STATUS}}

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("/status", "answers 401 Unauthorized: is the StatusPage mounted there, and does"),
            ("/else", "its answer names no databases"),
            ("/text.json", "its answer is no JSON"),
        ],
    )
    def test_what_is_no_page_is_said_to_be_none(
        self, run: Run, service: str, path: str, said: str
    ) -> None:
        result = run("status", service + path)
        assert result.exit_code == 2
        assert said in result.stderr

    def test_addresses_and_headers_that_cannot_be_are_refused(self, run: Run) -> None:
        assert "write http:// or https://" in run("status", "localhost:80").stderr
        assert "write it as 'Name: value'" in run("status", "http://x", "--header", "y").stderr
        assert "does not answer" in run("status", "http://127.0.0.1:1").stderr

    def test_a_database_without_a_server_has_nothing_to_ask(self, run: Run, config: str) -> None:
        result = run("status", "--config", config)
        assert result.exit_code == 2
        assert "has no server to ask: give the address" in result.stderr


class TestMigrate:
    """On the ledger, whose migrations are in its package."""

    @pytest.fixture(autouse=True)
    def own_loggers(self) -> Iterator[None]:
        """Leave the loggers as they were."""
        root, alembic = logging.getLogger(), logging.getLogger("alembic.runtime.migration")
        handlers, level = [*root.handlers], alembic.level
        yield
        root.handlers[:] = handlers
        alembic.setLevel(level)

    def test_it_runs_what_is_missing_and_says_so(
        self, run: Run, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LEDGER_DATABASE__URL", url)
        ledger = "--app", "ledger.container:Container"
        assert "error    migrations: the database lacks 0001" in run("check", *ledger).output
        assert run("migrate", *ledger).output.splitlines()[-1] == "db: ran 0001"
        assert run("migrate", *ledger).output.splitlines()[-1] == "db: up to date, at 0001"
        assert "ok       migrations: up to date, at 0001" in run("check", *ledger).output

    def test_with_a_settings_file_the_directory_is_given(self, run: Run, config: str) -> None:
        assert "migrations: the manager has none" in run("migrate", "--config", config).stderr
        result = run("migrate", "--config", config, "--migrations", "ledger:migrations")
        assert result.output.splitlines()[-1] == "database: ran 0001"


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sessionwire", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.long
def test_it_is_a_program(config: str) -> None:
    result = program("check", "--config", config, "--json")
    assert result.returncode == 0
    assert "database" in json.loads(result.stdout)["databases"]
    assert program("check").returncode == 2


@pytest.mark.long
def test_a_terminal_gets_colours(config: str) -> None:
    result = program("check", "--config", config, FORCE_COLOR="1", COLUMNS="100")
    assert "\x1b[32mok" in result.stdout


def test_each_command_explains_its_options(run: Run) -> None:
    for command in commands.commands.values():
        result = run(str(command.name), "--help")
        assert result.exit_code == 0
        options: list[Any] = [each for each in command.params if hasattr(each, "help")]
        assert all(option.help for option in options if option.name != "address")
