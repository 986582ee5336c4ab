"""The documentation is true: tests run its code and commands, and follow its links.

Its tables are compared with the code. documents.py describes how a page is read, and
the conventions for its authors.
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
from collections.abc import AsyncIterator, Iterator
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args, get_origin
from urllib.request import urlopen

import pytest
import yaml
from _pytest.mark import ParameterSet
from annotated_types import Ge, Gt
from packaging.requirements import Requirement
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sqlalchemy import make_url

import sessionwire.alembic
import sessionwire.asgi
import sessionwire.fastapi
from sessionwire import DatabaseContainer, DatabaseSettings, Propagation, Settings, errors
from sessionwire._core.definition import TransactionOptions

from .conftest import Postgres
from .documents import (
    AFTER,
    CHECKOUT,
    COMMANDS,
    DOCUMENTS,
    KINDS,
    PAGE,
    PROJECT,
    README,
    TOOLS,
    Block,
    Command,
    Document,
    Reader,
    check_installed,
    code_in,
    commands_like,
    each_document,
    page_with,
    run,
    shared_files,
    shell_of,
)
from .testing.test_plugin import assert_passed, pytest_run

TESTS_WITH_ROLLBACK = PAGE["docs/how-to/tests-with-rollback.md"]
BLOCKS = [block for document in DOCUMENTS for block in document.blocks]
FILES = [block for document in DOCUMENTS for block in document.files.values()]


# Each block is run


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_each_code_block_of_the_documentation_is_of_a_kind_that_tests_run(
    document: Document,
) -> None:
    assert len(re.findall("`{3,}", document.text)) == 2 * len(document.blocks)
    assert not re.search(r"^(~~~|    \S)", document.prose, re.MULTILINE)
    for block in document.blocks:
        named = bool(block.file)
        known = {
            "python": True,
            "yaml": named,
            "ini": named,
            "toml": named,
            "sh": True,
            "text": True,
        }
        assert block.is_markup or known.get(block.language), (
            f"{block.place}: nobody runs this {block.language!r}"
        )


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.excerpt_of], ids=lambda block: block.excerpt_of
)
def test_an_excerpt_on_a_page_equals_the_file_that_it_names(block: Block) -> None:
    lines = iter((CHECKOUT / block.excerpt_of).read_text(encoding="utf-8").splitlines())
    for line in block.text.splitlines()[1:]:
        assert line in lines, (
            f"{block.place}: {line!r} is not in {block.excerpt_of}, or not after the one before"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_each_file_on_a_page_is_used_by_a_command_or_by_other_code(document: Document) -> None:
    for name, block in document.files.items():
        others = [
            b
            for b in document.blocks
            if b.language in ("python", "sh", "yaml", "ini", "toml") and b.file != name
        ]
        mention = rf"\b({re.escape(name)}|{re.escape(Path(name).stem)})\b"
        of_other_tools = (
            block.language in ("ini", "toml")
            or "apiVersion:" in block.text
            or name == "conftest.py"
        )
        # Alembic finds its migrations there.
        of_other_tools = of_other_tools or name.startswith("migrations/")
        collected = name.startswith("test_") and any(
            command.line == "pytest" for command in document.commands
        )
        used = of_other_tools or collected or block == shared_files().get(name)
        used = used or any(re.search(mention, other.text) for other in others)
        assert used, f"{block.place}: nothing uses {name}"


@pytest.fixture
async def reader(
    document: Document, tmp_path: Path, database_url: str, server: Postgres | None
) -> AsyncIterator[Reader]:
    """Run as a PostgreSQL user without superuser rights: row-level security holds."""
    if server is None:
        yield Reader(document, tmp_path, database_url)
        return
    url = make_url(database_url)
    database, name = str(url.database), f"reader_{uuid.uuid4().hex}"
    await server.execute(f"CREATE ROLE {name} LOGIN CREATEDB")
    await server.execute(f"GRANT CREATE ON DATABASE {database} TO {name}")
    await server.execute(f"ALTER SCHEMA public OWNER TO {name}", database=database)
    yield Reader(document, tmp_path, url.set(username=name).render_as_string(hide_password=False))
    await server.execute(f"DROP OWNED BY {name} CASCADE", database=database)


@each_document(lambda document: document.prompt)
def test_the_snippets_of_a_page_run_in_order_and_print_the_shown_output(
    document: Document, reader: Reader, backend: str, subtests: pytest.Subtests
) -> None:
    for marker in AFTER.get(document.name, {}):
        assert sum(marker in block.text for block in document.prompt) == 1, marker
    blocks = [
        block for block in document.prompt if backend == "postgresql" or not block.is_for_postgresql
    ]
    for block in document.prompt:
        if block not in blocks:
            with subtests.test(line=block.line):
                pytest.skip(f"{block.place} is for PostgreSQL only, as it says")

    for block, output in zip(blocks, reader.type_in(blocks), strict=True):
        assert output.splitlines() == block.prints, block.place


def command_runs() -> Iterator[ParameterSet]:
    """Yield each page with commands, and each database that they run on.

    On PostgreSQL most pages' commands do what they do on SQLite, and take as long.
    """
    for document in DOCUMENTS:
        needs_server = any(command.block.is_for_postgresql for command in document.commands)
        for backend in ("sqlite", "postgresql") if document.commands else ():
            is_long = backend == "sqlite" or needs_server or document.name == "docs/tutorial.md"
            mark = pytest.mark.long if is_long else pytest.mark.slow
            yield pytest.param(document, backend, id=f"{backend}-{document.name}", marks=mark)


@pytest.mark.parametrize(("document", "backend"), list(command_runs()))
def test_the_commands_of_a_page_run_in_order(
    document: Document, reader: Reader, backend: str
) -> None:
    with shell_of(reader) as shell:
        for command in document.commands:
            if backend == "postgresql" or not command.block.is_for_postgresql:
                shell.run(command)


@pytest.mark.parametrize(
    "document", [page_with("python shop.py")], ids=lambda document: document.name
)
def test_the_program_of_a_page_prints_the_shown_output(document: Document, reader: Reader) -> None:
    assert reader.run("shop.py").splitlines() == document.files["shop.py"].prints


def test_readme_can_be_read_in_a_few_minutes() -> None:
    assert len(README.text.splitlines()) <= 150


def test_the_container_example_with_its_test_is_under_forty_lines() -> None:
    files = [
        page_with("python shop.py").files[name].text.splitlines()
        for name in ("shop.py", "test_shop.py")
    ]
    assert len(files[0]) < 40
    assert sum(bool(line) for lines in files for line in lines) < 40


@pytest.mark.parametrize(
    "block",
    [block for block in FILES if block.language in ("yaml", "ini", "toml")],
    ids=lambda block: block.file,
)
def test_a_configuration_file_on_a_page_loads(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE__URL", raising=False)
    (tmp_path / "file.yaml").write_text(block.text, encoding="utf-8")
    match block.language:
        case "yaml":
            documents = list(yaml.safe_load_all(block.text))
            assert all(documents)
            if documents[0].keys() == {"database"} and "${" not in block.text:
                assert Settings.load(tmp_path / "file.yaml").database
        case "ini":
            parsed = ConfigParser(interpolation=None)
            parsed.read_string(block.text)
            assert parsed.sections()
        case "toml":
            assert tomllib.loads(block.text)


# Each command is run


@pytest.fixture
def clone() -> Iterator[Path]:
    """Copy the checkout without its data.

    pytest's directories are closed to the user of a PostgreSQL server.
    """
    with TemporaryDirectory(prefix="sessionwire-") as directory:
        for name in ("src", "config"):
            Path(directory, name).symlink_to(CHECKOUT / name)
        yield Path(directory)


@pytest.mark.long
@pytest.mark.parametrize("command", commands_like("-m ledger demo"))
def test_a_demo_gives_the_results_that_the_page_shows(command: str, clone: Path) -> None:
    environment, python, *arguments = shlex.split(command)
    assert (environment, python) == (".ci/env", "python")

    printed = run(
        clone, "-W", "error", *arguments, "--transfers", "20", PYTHONPATH=str(clone / "src")
    )

    (shown_here,) = (block for block in BLOCKS if block.language == "text" and "✔" in block.text)
    assert shape(printed) >= shape(shown_here.text)


@pytest.mark.long
def test_the_server_of_a_page_starts_answers_and_ends(clone: Path) -> None:
    (command,) = commands_like("-m ledger serve")
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
def test_the_comparison_has_the_rows_of_the_page_and_finds_no_fault_in_sessionwire(
    clone: Path,
) -> None:
    (command,) = commands_like("-m ledger compare")

    printed = run(
        clone,
        "-W",
        "error",
        *shlex.split(command)[2:],
        "--requests",
        "40",
        PYTHONPATH=str(clone / "src"),
    )

    (shown,) = {
        block.text
        for block in BLOCKS
        if block.language == "text" and "documented recipe" in block.text
    }
    assert shape(printed) >= shape(shown)
    *counts, lines = (line for line in printed.splitlines() if re.search(r"\d$", line))
    assert all(re.search(r" 0 +0$", line) for line in counts)
    assert lines.split() == shown.splitlines()[-1].split()


@pytest.mark.long
def test_the_message_counts_of_the_page_are_those_on_the_wire(tmp_path: Path) -> None:
    (command,) = commands_like(r"-m tests\.benchmarks")

    run(CHECKOUT, *shlex.split(command)[2:], "messages", "--output", str(tmp_path))

    (counted,) = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert {name: counts for name, *counts in MEASUREMENTS.rows("Messages to the server")} == {
        name: [f"{count:g}" for count in counts[:6]] for name, counts in counted["rows"].items()
    }


def shape(output: str) -> set[str]:
    """Return the distinct lines, with their figures replaced."""
    return {re.sub(r"[\d.,]*\d", "0", " ".join(line.split())) for line in output.splitlines()}


def test_the_documented_command_for_tests_is_the_one_of_the_gate() -> None:
    commands = commands_like(r"^\.ci/env pytest")
    assert commands == [".ci/env pytest"]
    assert commands[0] in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8").splitlines()

    assert TOOLS["pytest"]["ini_options"]["testpaths"] == ["tests"]


@pytest.mark.long
def test_a_test_on_a_page_passes(tmp_path: Path) -> None:
    page = page_with("pytest test_shop.py")
    reader = Reader(
        page, tmp_path, "postgresql://nowhere.invalid/shop"
    )  # it says that it needs none
    assert "1 passed" in run(
        reader.directory, "-m", "pytest", "test_shop.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--sessionwire-url=sqlite://",)])
def test_tests_on_a_page_run_in_the_databases_of_the_plugin(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    assert " ".join(("pytest test_shop.py", *options)) in [
        command.line for command in TESTS_WITH_ROLLBACK.commands
    ]
    reader = Reader(TESTS_WITH_ROLLBACK, tmp_path, "postgresql://nowhere.invalid/shop")
    assert_passed(pytest_run(reader.directory, "test_shop.py", *options), 2)


@pytest.mark.long
def test_a_synchronous_test_on_a_page_passes(tmp_path: Path) -> None:
    reader = Reader(TESTS_WITH_ROLLBACK, tmp_path, "postgresql://nowhere.invalid/shop")
    assert_passed(pytest_run(reader.directory, "test_web.py::test_tea_that_is_not_there"), 1)


@pytest.mark.long
def test_tests_on_a_page_need_only_plugins_that_the_extra_installs(tmp_path: Path) -> None:
    brought = {
        "sessionwire",
        *(Requirement(line).name for line in PROJECT["optional-dependencies"]["testing"]),
    }
    others = [
        plugin.name
        for plugin in entry_points(group="pytest11")
        if plugin.dist and plugin.dist.name not in brought
    ]
    reader = Reader(TESTS_WITH_ROLLBACK, tmp_path, "postgresql://nowhere.invalid/shop")
    command = "test_shop.py", "--sessionwire-url=sqlite://", *(f"-pno:{name}" for name in others)
    assert_passed(pytest_run(reader.directory, *command), 2)


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: f"{command.block.place}-{command.words[0]}"
)
def test_each_command_of_the_documentation_is_tested(command: Command) -> None:
    assert any(re.fullmatch(pattern, command.line) for pattern in KINDS), (
        f"{command.block.place}: nobody runs {command.line!r}"
    )


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.line.startswith("pip install ")], ids=lambda c: c.line
)
def test_each_documented_pip_install_names_an_extra_of_the_project(command: Command) -> None:
    """The gate installs the wheel for real; no index has it before its release."""
    check_installed(command)


def test_each_extra_has_a_documented_pip_install() -> None:
    wanted = [
        Requirement(word)
        for command in COMMANDS
        if command.words[:2] == ["pip", "install"]
        for word in command.words[2:]
    ]
    extras = {
        extra
        for requirement in wanted
        if requirement.name == PROJECT["name"]
        for extra in requirement.extras
    }
    assert extras == PROJECT["optional-dependencies"].keys()


# Tables and names

MEASUREMENTS = PAGE["docs/explanation/measurements.md"]
CONTAINERS, ERRORS, SETTINGS, TRANSACTIONS = (
    PAGE[f"docs/reference/{name}.md"]
    for name in ("containers", "errors", "settings", "transactions")
)


def keys(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{section}{name}.")
        else:
            yield section + name, field


TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def type_of(field: FieldInfo) -> str:
    if get_origin(field.annotation) is dict:
        return "mapping"
    parts = get_args(field.annotation) or (field.annotation,)
    words = [TYPES[part] for part in parts if part in TYPES]
    words += [" or ".join(get_args(part)) for part in parts if get_origin(part) is Literal]
    for limit in field.metadata:
        if isinstance(limit, Ge):
            words.append(f"at least {limit.ge}")
        if isinstance(limit, Gt):
            words.append(f"above {limit.gt}")
    return ", ".join(words)


def shown(value: object) -> str:
    return "none" if value is None else str(value).lower()


@pytest.mark.asyncpg_only("this option is another default than the documented one")
@pytest.mark.pipeline_only("this option is another default than the documented one")
@pytest.mark.several_connections("this option is another default than the documented one")
def test_the_reference_of_settings_equals_the_models() -> None:
    documented = [[cell.replace("`", "") for cell in row] for row in SETTINGS.rows("Configuration")]
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
    for row in SETTINGS.rows("The URL")
    for cell in row
    for url in code_in(cell)
    if re.match("[a-z+]+:", url)
]


@pytest.mark.parametrize("url", URLS)
def test_each_documented_form_of_a_url_is_accepted(url: str) -> None:
    drivers = {
        "postgresql+psycopg": "postgresql+psycopg",
        "postgres": "postgresql+asyncpg",
        "sqlite": "sqlite+aiosqlite",
        "embedded": "embedded",
    }
    driver = next(drivers[name] for name in drivers if url.startswith(name))
    complete = url + "host/name" if url == "postgres://" else url
    assert make_url(DatabaseSettings(url=complete).url).drivername == driver


def test_each_documented_environment_variable_belongs_to_a_key() -> None:
    named = {
        name for page in DOCUMENTS for name in re.findall(r"\b[A-Z_]*DATABASE__[A-Z_]+", page.text)
    }
    assert named
    for variable in named:
        _, _, name = variable.partition("DATABASE__")
        key, known = name.lower().replace("__", "."), dict(keys(DatabaseSettings))
        section = key.partition(".")[0]
        assert key in known or type_of(known[section]) == "mapping", variable


def test_the_documentation_explains_each_error_and_warning_and_no_other() -> None:
    explained = [name for row in ERRORS.rows("Errors") for name in code_in(row[0])]
    public = [
        name
        for name, error in vars(errors).items()
        if inspect.isclass(error)
        and issubclass(error, Exception)
        and error.__module__ == errors.__name__
    ]
    assert explained == public
    assert set(explained) <= set(sessionwire.__all__)
    for name, when, data, _ in ERRORS.rows("Errors"):
        assert when, name
        assert data, name


def test_each_propagation_mode_is_in_the_documented_table() -> None:
    modes = TRANSACTIONS.rows("What joins what")
    assert [code_in(mode)[0] for mode, _, _ in modes] == [mode.name for mode in Propagation]
    for _, inside, without in modes:
        for error in (*code_in(inside), *code_in(without)):
            assert error in sessionwire.__all__


def test_each_option_of_a_transaction_is_in_the_documented_table() -> None:
    options = [code_in(option)[0] for option, _, _ in TRANSACTIONS.rows("Options")]
    assert options == list(TransactionOptions.__annotations__)


def test_the_table_of_parts_names_each_provider_and_only_existing_names() -> None:
    names = {name for row in CONTAINERS.rows("Parts") for name in code_in(row[2])}
    providers = set(DatabaseContainer.providers)
    assert providers <= names
    frameworks = {
        f"{module.__name__}.{name}"
        for module in (sessionwire.alembic, sessionwire.asgi, sessionwire.fastapi)
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "") == module.__name__
    }
    assert names <= providers | set(sessionwire.__all__) | frameworks | {
        "override()",
        "python -m ledger demo",
    }


def slug(heading: str) -> str:
    """Make an anchor of a heading, as GitHub does."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_each_link_of_the_documentation_has_a_target(document: Document) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.prose):
        path, _, anchor = target.partition("#")
        if re.match(r"https?://", path):
            continue
        assert (document.path.parent / path).exists(), f"{document.name}: {target}"
        linked = document if not path else Document((document.path.parent / path).resolve())
        if anchor:
            assert anchor in {
                slug(heading) for heading in re.findall(r"^#+ (.+)$", linked.prose, re.MULTILINE)
            }, f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_each_file_named_in_the_documentation_exists(document: Document) -> None:
    for code in document.code:
        if re.fullmatch(r"(src|tests|config|\.ci)(/[\w.-]+)*", code):
            assert (CHECKOUT / code).exists(), f"{document.name}: {code}"


def test_the_changelog_begins_with_the_current_version() -> None:
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert first is not None
    assert first[1] == PROJECT["version"]
