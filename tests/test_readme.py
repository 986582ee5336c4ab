"""README.md is true: its snippets and commands are run, its tables are held against the code, its links lead somewhere.

Python without a file name runs in order in one process, as at a prompt where `await` is allowed. Python and YAML that
begin with a file name are saved under it. A snippet that begins with `# PostgreSQL only` is typed in there alone. The
name of a database is redirected, and nothing else is changed.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args
from urllib.request import urlopen

import pytest
from annotated_types import Ge, Gt
from packaging.requirements import Requirement
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sqlalchemy import make_url

import sessionwire.asgi
import sessionwire.fastapi
from sessionwire import DatabaseContainer, DatabaseSettings, Propagation, Settings, errors
from sessionwire._core.definition import TransactionOptions

from .conftest import Postgres
from .testing.test_plugin import assert_passed, pytest_run

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int

    @property
    def file(self) -> str:
        """The name to save it under, or nothing."""
        first = re.match(r"# ([\w.]+)\n", self.text)
        return first[1] if first else ""

    @property
    def excerpt_of(self) -> str:
        first = re.match(r"# from (\S+)\n", self.text)
        return first[1] if first else ""

    @property
    def is_for_postgresql(self) -> bool:
        return self.text.startswith("# PostgreSQL only\n")

    @property
    def prints(self) -> list[str]:
        """What it says that it prints: `print(…)  # this`."""
        return re.findall(r"^ *print\(.*\)  # (.+)$", self.text, re.MULTILINE)


BLOCKS = [
    Block(found[1], found[2], README[: found.start(2)].count("\n") + 1)
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
PROMPT = [
    block
    for block in BLOCKS
    if block.language == "python" and not block.file and not block.excerpt_of
]
FILES = {  # blocks of one name, one after the other
    block.file: replace(
        block, text="\n\n".join(each.text for each in BLOCKS if each.file == block.file)
    )
    for block in BLOCKS
    if block.file
}
COMMANDS = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
CODE = re.findall(r"`([^`]+)`", PROSE)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    _, _, below = PROSE.partition(f" {heading}\n")
    table = re.search(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", below, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Each block is run


def test_no_block_is_of_a_kind_that_nobody_runs() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert not re.search(r"^(~~~|    \S)", PROSE, re.MULTILINE)
    for block in BLOCKS:
        known = {"python": True, "yaml": bool(block.file), "sh": True, "text": True}
        assert known.get(block.language), (
            f"README.md:{block.line}: nobody runs this {block.language!r}"
        )


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.excerpt_of], ids=lambda block: block.excerpt_of
)
def test_an_excerpt_is_what_the_file_says(block: Block) -> None:
    lines = iter((CHECKOUT / block.excerpt_of).read_text(encoding="utf-8").splitlines())
    for line in block.text.splitlines()[1:]:
        assert line in lines, (
            f"README.md:{block.line}: {line!r} is not in {block.excerpt_of}, or not after the one before"
        )


def test_each_file_is_used_by_a_command_or_a_snippet() -> None:
    for name, block in FILES.items():
        used = (
            name == "conftest.py"
            or any(name in command.split() for command in COMMANDS)
            or any(f'"{name}"' in b.text for b in PROMPT)
        )
        assert used, f"README.md:{block.line}: nothing uses {name}"


# What is at the prompt, in order, each snippet with what follows it unseen; prints a separator after each.
AT_THE_PROMPT = r"""
import ast, asyncio, inspect, json, sys, types

prompt = sys.modules["prompt"] = types.ModuleType("prompt")  # where wire(modules=[__name__]) looks

async def main():
    for line, snippet, after in json.load(sys.stdin):
        for source in ("\n" * (line - 1) + snippet, after):
            code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            done = eval(code, vars(prompt))
            if code.co_flags & inspect.CO_COROUTINE:
                await done
        print("\x1e", end="")

asyncio.run(main())
"""

# The web application is started, answers a request, and is stopped.
REQUEST = """
async def request(app, method, path):
    received = iter([{"type": "http.request", "body": b"", "more_body": False}])
    async def receive():
        for message in received:
            return message
        await asyncio.Event().wait()  # the client stays

    sent = []
    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "headers": []}
    address = {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http"}
    await app({**scope, **address}, receive, send)
    return sent[0]["status"], sent[1]["body"]

async with app.router.lifespan_context(app):
    status, body = await request(app, "POST", "/orders/tea")
    assert status == 200 and int(body) > 1, (status, body)
"""
MIDDLEWARE = """
async with site.router.lifespan_context(site):
    assert await request(site, "POST", "/sets") == (200, b"sold")
"""
STREAM = """
site = Starlette(routes=[Route("/journal", journal)], lifespan=Lifespan(container))
site.add_middleware(TransactionMiddleware, transaction=container.db.transaction())
async with site.router.lifespan_context(site):
    status, body = await request(site, "GET", "/journal")
    assert status == 200 and body, (status, body)
"""
AFTER = {
    "FastAPI(": REQUEST,
    "Starlette(": MIDDLEWARE,
    "StreamingResponse(": STREAM,
    "secrets_dir=": "assert settings.database.url.database == 'of-the-secret'",
}


class Reader:
    """Somebody who saved the page's files in a directory, and types in the rest there."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.secrets = directory / "secrets"
        self.redirected = {
            "postgresql://localhost/shop": database_url,
            "sqlite:///shop.db": database_url,
            "/run/secrets": str(self.secrets),
        }
        self.secrets.mkdir()
        (self.secrets / "shop_database__url").write_text("postgresql://localhost/of-the-secret")
        for name, block in FILES.items():
            (directory / name).write_text(self.redirect(block.text), encoding="utf-8")

    def redirect(self, text: str) -> str:
        for name, here in self.redirected.items():
            text = text.replace(name, here)
        return text

    def run(self, *arguments: str, given: str = "") -> str:
        return run(self.directory, "-W", "error", *arguments, given=given)


def run(directory: Path, *arguments: str, given: str = "", **variables: str) -> str:
    """What this Python prints."""
    foreign = ("LEDGER_", "SHOP_", "DATABASE__", "PYTEST_")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(foreign)
    }
    environment |= {
        "PYTHONPATH": str(CHECKOUT / "src"),
        "PYTHONUTF8": "1",
        "COLUMNS": "120",
        **variables,
    }
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr or finished.stdout
    assert "Warning" not in finished.stderr
    return finished.stdout


@pytest.fixture
async def reader(tmp_path: Path, database_url: str, server: Postgres | None) -> Reader:
    """On PostgreSQL a user who is no superuser, for whom row-level security holds."""
    url = make_url(database_url)
    if server is not None:
        name = f"reader_{uuid.uuid4().hex}"
        await server.execute(f"CREATE ROLE {name} LOGIN CREATEDB")
        await server.execute(f"ALTER SCHEMA public OWNER TO {name}", database=str(url.database))
        url = url.set(username=name)
    return Reader(tmp_path, url.render_as_string(hide_password=False))


def test_the_snippets_work_one_after_the_other_and_print_what_they_say(
    reader: Reader, backend: str, subtests: pytest.Subtests
) -> None:
    for marker in AFTER:
        assert sum(marker in block.text for block in PROMPT) == 1, marker
    blocks = [block for block in PROMPT if backend == "postgresql" or not block.is_for_postgresql]
    for block in PROMPT:
        if block not in blocks:
            with subtests.test(line=block.line):
                pytest.skip(f"README.md:{block.line} is for PostgreSQL only, as it says")
    typed = [
        (
            block.line,
            reader.redirect(block.text),
            next((AFTER[marker] for marker in AFTER if marker in block.text), ""),
        )
        for block in blocks
    ]

    printed = reader.run("-c", AT_THE_PROMPT, given=json.dumps(typed)).split("\x1e")

    assert len(printed) == len(blocks) + 1
    for block, output in zip(blocks, printed, strict=False):
        assert output.splitlines() == block.prints, f"README.md:{block.line}"


def test_the_program_prints_what_it_says(reader: Reader) -> None:
    assert "python shop.py" in COMMANDS
    assert reader.run("shop.py").splitlines() == FILES["shop.py"].prints


@pytest.mark.long
def test_workers_do_their_work_with_the_same_container(reader: Reader) -> None:
    reader.run("shop.py")
    for name in ("worker.py", "tasks.py"):
        assert f"python {name}" in COMMANDS
        assert reader.run(name).splitlines() == FILES[name].prints


def test_the_container_with_its_test_is_under_forty_lines() -> None:
    files = [FILES[name].text.splitlines() for name in ("shop.py", "test_shop.py")]
    assert len(files[0]) < 40
    assert sum(bool(line) for lines in files for line in lines) < 40


@pytest.mark.parametrize(
    "name", [name for name, block in FILES.items() if block.language == "yaml"]
)
def test_a_yaml_file_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE__URL", raising=False)
    (tmp_path / name).write_text(FILES[name].text, encoding="utf-8")
    assert Settings.load(tmp_path / name).database


# Each command is run


@pytest.fixture
def clone() -> Iterator[Path]:
    """The checkout without its data. Not in pytest's directory, which is closed to the user of a PostgreSQL server."""
    with TemporaryDirectory(prefix="sessionwire-") as directory:
        for name in ("src", "config"):
            Path(directory, name).symlink_to(CHECKOUT / name)
        yield Path(directory)


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if "-m ledger demo" in command]
)
def test_a_demo_proves_what_the_page_shows(command: str, clone: Path) -> None:
    environment, python, *arguments = shlex.split(command)
    assert (environment, python) == (".ci/env", "python")

    printed = run(
        clone, "-W", "error", *arguments, "--transfers", "20", PYTHONPATH=str(clone / "src")
    )

    (shown_here,) = (block for block in BLOCKS if block.language == "text" and "✔" in block.text)
    assert shape(printed) >= shape(shown_here.text)


def test_the_server_starts_answers_and_ends(clone: Path) -> None:
    (command,) = (command for command in COMMANDS if "-m ledger serve" in command)
    arguments = [sys.executable, *shlex.split(command)[2:], "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(clone / "src")}

    with subprocess.Popen(
        arguments, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        with urlopen(f"{address}/health/ready") as answer:
            assert answer.status == 200
        server.terminate()
    assert server.returncode == 0


@pytest.mark.long
def test_the_comparison_has_the_rows_that_the_page_shows_and_finds_nothing_against_us(
    clone: Path,
) -> None:
    (command,) = (command for command in COMMANDS if "-m ledger compare" in command)

    printed = run(
        clone,
        "-W",
        "error",
        *shlex.split(command)[2:],
        "--requests",
        "40",
        PYTHONPATH=str(clone / "src"),
    )

    (shown_here,) = (
        block for block in BLOCKS if block.language == "text" and "documented recipe" in block.text
    )
    assert shape(printed) >= shape(shown_here.text)
    *counts, lines = (line for line in printed.splitlines() if re.search(r"\d$", line))
    assert all(re.search(r" 0 +0$", line) for line in counts)
    assert lines.split() == shown_here.text.splitlines()[-1].split()


@pytest.mark.long
def test_the_messages_that_the_page_counts_are_those_on_the_wire(tmp_path: Path) -> None:
    (command,) = (command for command in COMMANDS if "-m tests.benchmarks" in command)

    run(CHECKOUT, *shlex.split(command)[2:], "messages", "--output", str(tmp_path))

    (counted,) = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert {name: counts for name, *counts in rows("How fast")} == {
        name: [f"{count:g}" for count in counts[:3]] for name, counts in counted["rows"].items()
    }


def shape(output: str) -> set[str]:
    """The lines, whatever the figures."""
    return {re.sub(r"[\d.,]*\d", "0", " ".join(line.split())) for line in output.splitlines()}


def test_the_command_for_the_tests_is_the_one_of_the_gate_and_finds_them() -> None:
    commands = [command for command in COMMANDS if command.startswith(".ci/env pytest")]
    assert commands == [".ci/env pytest"]
    assert commands[0] in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8").splitlines()

    assert TOOLS["pytest"]["ini_options"]["testpaths"] == ["tests"]


@pytest.mark.long
def test_a_test_of_the_page_passes(tmp_path: Path) -> None:
    assert "pytest test_shop.py" in COMMANDS
    reader = Reader(tmp_path, "postgresql://nowhere.invalid/shop")  # it says that it needs none
    assert "1 passed" in run(
        reader.directory, "-m", "pytest", "test_shop.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if "pytest test_sales.py" in command]
)
def test_tests_of_the_page_run_in_the_databases_of_the_plugin(command: str, tmp_path: Path) -> None:
    reader = Reader(tmp_path, "postgresql://nowhere.invalid/shop")
    assert_passed(pytest_run(reader.directory, *shlex.split(command)[1:]), 2)


@pytest.mark.long
def test_a_test_of_the_page_that_is_not_async_runs_too(tmp_path: Path) -> None:
    assert "pytest test_web.py" in COMMANDS
    assert_passed(
        pytest_run(Reader(tmp_path, "postgresql://nowhere.invalid/shop").directory, "test_web.py"),
        1,
    )


@pytest.mark.long
def test_tests_of_the_page_need_no_plugin_that_the_extra_does_not_bring(tmp_path: Path) -> None:
    brought = {
        "sessionwire",
        *(Requirement(line).name for line in PROJECT["optional-dependencies"]["testing"]),
    }
    others = [
        plugin.name
        for plugin in entry_points(group="pytest11")
        if plugin.dist and plugin.dist.name not in brought
    ]
    reader = Reader(tmp_path, "postgresql://nowhere.invalid/shop")
    command = "test_sales.py", "--sessionwire-url=sqlite://", *(f"-pno:{name}" for name in others)
    assert_passed(pytest_run(reader.directory, *command), 2)


PIP = [command for command in COMMANDS if command.startswith("pip install ")]


@pytest.mark.parametrize("command", PIP)
def test_what_pip_is_to_install_is_what_the_project_offers(command: str) -> None:
    """The gate installs the wheel for real; this is not on any index before its release."""
    (wanted,) = map(Requirement, shlex.split(command)[2:])
    assert wanted.name == PROJECT["name"]
    assert wanted.extras <= PROJECT["optional-dependencies"].keys()


def test_each_extra_has_its_command() -> None:
    extras = {extra for command in PIP for extra in Requirement(shlex.split(command)[2]).extras}
    assert extras == PROJECT["optional-dependencies"].keys()


def test_no_command_is_left_out() -> None:
    known = (
        r"\.ci/env python -m ledger .+",
        r"\.ci/env python -m tests\.benchmarks",
        r"\.ci/env pytest",
        "pip install .+",
        r"python (shop|worker|tasks)\.py",
        r"pytest test_(shop|sales|web)\.py.*",
    )
    for command in COMMANDS:
        assert any(re.fullmatch(pattern, command) for pattern in known), f"nobody runs {command!r}"


# Tables and names


def keys(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{section}{name}.")
        else:
            yield section + name, field


TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def type_of(field: FieldInfo) -> str:
    parts = get_args(field.annotation) or (field.annotation,)
    words = [TYPES[part] for part in parts if part in TYPES]
    for limit in field.metadata:
        if isinstance(limit, Ge):
            words.append(f"at least {limit.ge}")
        if isinstance(limit, Gt):
            words.append(f"above {limit.gt}")
    return ", ".join(words)


def shown(value: object) -> str:
    return "none" if value is None else str(value).lower()


def test_the_reference_of_the_configuration_is_that_of_the_models() -> None:
    documented = [[cell.replace("`", "") for cell in row] for row in rows("Configuration")]
    actual = [
        [
            key,
            type_of(field),
            "required" if field.is_required() else shown(field.default),
            field.description,
        ]
        for key, field in keys(DatabaseSettings)
    ]
    assert documented == actual


URLS = [
    url
    for row in rows("The URL")
    for cell in row
    for url in code_in(cell)
    if re.match("[a-z]+:", url)
]


@pytest.mark.parametrize("url", URLS)
def test_each_form_of_a_url_is_taken(url: str) -> None:
    drivers = {
        "postgres": "postgresql+asyncpg",
        "sqlite": "sqlite+aiosqlite",
        "embedded": "embedded",
    }
    (driver,) = (drivers[name] for name in drivers if url.startswith(name))
    complete = url + "host/name" if url == "postgres://" else url
    assert make_url(DatabaseSettings(url=complete).url).drivername == driver


def test_each_environment_variable_that_is_named_belongs_to_a_key() -> None:
    named = {name for name in re.findall(r"\b[A-Z_]*DATABASE__[A-Z_]+", README)}
    assert named
    for variable in named:
        _, _, key = variable.partition("DATABASE__")
        assert key.lower().replace("__", ".") in dict(keys(DatabaseSettings)), variable


def test_each_error_and_warning_is_explained_and_none_that_is_not() -> None:
    explained = [name for row in rows("Errors") for name in code_in(row[0])]
    public = [
        name
        for name, error in vars(errors).items()
        if inspect.isclass(error)
        and issubclass(error, Exception)
        and error.__module__ == errors.__name__
    ]
    assert explained == public
    assert set(explained) <= set(sessionwire.__all__)
    for name, when, data, _ in rows("Errors"):
        assert when, name
        assert data, name


def test_each_mode_of_a_transaction_is_in_the_table() -> None:
    modes = rows("What joins what")
    assert [code_in(mode)[0] for mode, _, _ in modes] == [mode.name for mode in Propagation]
    for _, inside, without in modes:
        for error in (*code_in(inside), *code_in(without)):
            assert error in sessionwire.__all__


def test_each_option_of_a_transaction_is_in_the_table() -> None:
    options = [code_in(option)[0] for option, _, _ in rows("Options")]
    assert options == list(TransactionOptions.__annotations__)


def test_each_part_of_the_mission_names_what_is_there() -> None:
    names = {name for row in rows("What is where") for name in code_in(row[2])}
    providers = set(DatabaseContainer.providers)
    assert providers <= names
    web = {
        f"{module.__name__}.{name}"
        for module in (sessionwire.asgi, sessionwire.fastapi)
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "") == module.__name__
    }
    assert names <= providers | set(sessionwire.__all__) | web | {
        "override()",
        "python -m ledger demo",
    }


def slug(heading: str) -> str:
    """As GitHub makes an anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_each_link_leads_somewhere() -> None:
    anchors = {f"#{slug(heading)}" for heading in re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert targets
    for target in targets:
        assert target in anchors or (CHECKOUT / target).exists(), target


def test_each_file_that_is_named_is_there() -> None:
    paths = [code for code in CODE if re.fullmatch(r"(src|tests|config|\.ci)(/[\w.-]+)*", code)]
    assert paths
    for path in paths:
        assert (CHECKOUT / path).exists(), path


def test_the_changelog_begins_with_the_version_that_this_is() -> None:
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert first is not None
    assert first[1] == PROJECT["version"]
