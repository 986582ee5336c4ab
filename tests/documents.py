"""The pages that users read, README.md and docs/, and how the tests run them.

The conventions, for each page on its own:

- ```` ```python ```` without a file name is typed in order in one process, as at the
  prompt of `python -m asyncio`. `print(…)  # this` must print just that. A block that
  begins with `# PostgreSQL only` is typed in there alone.
- A block that begins with `# name.py` (or .yaml, .ini, .toml) is saved under this name
  before all else; blocks of one name are joined. A page that has no shop.py finds the
  one of docs/tutorial.md beside its files.
- A block that begins with `# from path/in/repository` is an excerpt: its lines are in
  that file, in order.
- ```` ```sh ```` holds commands, which are run in order in the page's directory: see
  KINDS. What `curl …  # this` says is the answer. ```` ```text ```` is output and the
  like.

Databases and directories are redirected (`Reader.redirected`), and so is port 8000.
Nothing else is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<language>[^\s`]*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
FILE_NAME = re.compile(r"[#;] ([\w./-]+\.(?:py|yaml|ini|toml))\n")
ONLY = "# PostgreSQL only\n"


# What is on a page


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """Return the name of the file to save it in, or an empty string."""
        first = FILE_NAME.match(self.text)
        return first[1] if first else ""

    @property
    def excerpt_of(self) -> str:
        first = re.match(r"# from (\S+)\n", self.text)
        return first[1] if first else ""

    @property
    def is_for_postgresql(self) -> bool:
        return self.text.startswith(ONLY)

    @property
    def is_markup(self) -> bool:
        """Return whether it is a directive of the site's generator."""
        return self.language.startswith("{")

    @property
    def prints(self) -> list[str]:
        """Return the promised output: `print(…)  # this`."""
        return re.findall(r"^ *print\(.*\)  # (.+)$", self.text, re.MULTILINE)


@dataclass(frozen=True)
class Command:
    block: Block
    line: str

    @property
    def says(self) -> str:
        """Return the promised answer: `curl …  # this`."""
        return self.line.partition("  # ")[2]

    @property
    def words(self) -> list[str]:
        return [word for word in shlex.split(self.line, comments=True) if not is_variable(word)]

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables in front of the command: `NAME=value python shop.py`."""
        found = (
            word.partition("=")
            for word in shlex.split(self.line, comments=True)
            if is_variable(word)
        )
        return {name: value for name, _, value in found}


def is_variable(word: str) -> bool:
    return bool(re.match("[A-Z][A-Z0-9_]*=", word))


@dataclass(frozen=True)
class Document:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(CHECKOUT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        return [
            Block(
                self.name,
                found["language"],
                found["text"],
                self.text[: found.start("text")].count("\n") + 1,
            )
            for found in FENCE.finditer(self.text)
        ]

    @cached_property
    def prose(self) -> str:
        return FENCE.sub("", self.text)

    @cached_property
    def prompt(self) -> list[Block]:
        return [
            block
            for block in self.blocks
            if block.language == "python" and not (block.file or block.excerpt_of)
        ]

    @cached_property
    def files(self) -> dict[str, Block]:
        """Return the files of the page, each joined from the blocks of its name."""
        return {
            block.file: replace(
                block,
                text="\n\n".join(each.text for each in self.blocks if each.file == block.file),
            )
            for block in self.blocks
            if block.file
        }

    @cached_property
    def commands(self) -> list[Command]:
        return [
            Command(block, line)
            for block in self.blocks
            if block.language == "sh"
            for line in block.text.replace("\\\n", "").splitlines()
            if line.strip() and not line.startswith("#")
        ]

    @cached_property
    def code(self) -> list[str]:
        return code_in(self.prose)

    def rows(self, heading: str) -> list[list[str]]:
        """Return the cells of the first table below a heading."""
        _, _, below = self.prose.partition(f" {heading}\n")
        table = re.search(r"^\|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", below, re.MULTILINE)
        assert table is not None, f"{self.name} has no table below {heading!r}"
        return [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()
        ]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


README = Document(CHECKOUT / "README.md")
PAGES = [
    Document(path)
    for path in sorted((CHECKOUT / "docs").rglob("*.md"))
    if "_build" not in path.parts
]
DOCUMENTS = [README, *PAGES]
PAGE = {document.name: document for document in DOCUMENTS}
COMMANDS = [command for document in DOCUMENTS for command in document.commands]


def each_document(having: Callable[[Document], object]) -> pytest.MarkDecorator:
    """Parametrize by README.md in the quick run, by docs/ in the long one."""
    return pytest.mark.parametrize(
        "document",
        [
            pytest.param(
                document, id=document.name, marks=[] if document is README else [pytest.mark.long]
            )
            for document in DOCUMENTS
            if having(document)
        ],
    )


def commands_like(pattern: str) -> list[str]:
    """Return the distinct commands on all pages that match."""
    return list(
        dict.fromkeys(command.line for command in COMMANDS if re.search(pattern, command.line))
    )


def page_with(command: str) -> Document:
    """Return the first page that has this command."""
    return next(
        document
        for document in DOCUMENTS
        if any(each.line == command for each in document.commands)
    )


# What follows a snippet unseen, by page and by a text of the snippet

AFTER = {
    "docs/reference/settings.md": {
        "secrets_dir=": "assert settings.database.url.database == 'of-the-secret'"
    },
}

# Warnings that a page's packages cause by themselves, as for Python's option -W
WARNINGS: dict[str, list[str]] = {
    "docs/coming-from/advanced-alchemy.md": [
        "ignore:The declarative_mixin decorator"
    ],  # on SQLAlchemy 2.1
}

# The prompt runs each snippet in order, with its hidden continuation, and prints a
# separator after each.
AT_THE_PROMPT = r"""
import ast, asyncio, inspect, json, sys, types

prompt = sys.modules["prompt"] = types.ModuleType("prompt")  # for wire(modules=[__name__])

async def main():
    page, snippets = json.load(sys.stdin)
    for line, snippet, after in snippets:
        for source in ("\n" * (line - 1) + snippet, after):
            code = compile(source, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            done = eval(code, vars(prompt))
            if code.co_flags & inspect.CO_COROUTINE:
                await done
        print("\x1e", end="")

asyncio.run(main())
"""


# Who reads it


class Reader:
    """A reader who saved the page's files in a directory, and types in the rest."""

    def __init__(self, document: Document, directory: Path, database_url: str) -> None:
        self.document = document
        self.directory = directory
        self.database_url = database_url
        self.secrets = directory / "secrets"
        self.port = free_port()
        self.redirected = {
            "postgresql://localhost/shop": database_url,
            "sqlite:///shop.db": database_url,
            "/run/secrets": str(self.secrets),
        }
        self.secrets.mkdir()
        (self.secrets / "shop_database__url").write_text("postgresql://localhost/of-the-secret")
        for name, block in {**shared_files(), **document.files}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.redirect(block.text), encoding="utf-8")

    def redirect(self, text: str) -> str:
        for name, here in self.redirected.items():
            text = text.replace(name, here)
        return text

    @property
    def warnings(self) -> list[str]:
        filters = "error", *WARNINGS.get(self.document.name, [])
        return [argument for each in filters for argument in ("-W", each)]

    def run(self, *arguments: str, given: str = "", **variables: str) -> str:
        return run(self.directory, *self.warnings, *arguments, given=given, **variables)

    def type_in(self, blocks: list[Block]) -> list[str]:
        """Type in the blocks, and return the output of each."""
        after = AFTER.get(self.document.name, {})
        typed = [
            (
                block.line,
                self.redirect(block.text),
                "\n".join(after[text] for text in after if text in block.text),
            )
            for block in blocks
        ]
        *printed, rest = self.run(
            "-c", AT_THE_PROMPT, given=json.dumps([self.document.name, typed])
        ).split("\x1e")
        assert (len(printed), rest) == (len(blocks), "")
        return printed


def shared_files() -> dict[str, Block]:
    """Return the files of the shop, which any page may use."""
    tutorial = next((document for document in PAGES if document.name == "docs/tutorial.md"), README)
    return {"shop.py": tutorial.files["shop.py"]} if "shop.py" in tutorial.files else {}


def environment(**variables: str) -> dict[str, str]:
    foreign = ("LEDGER_", "SHOP_", "DATABASE__", "PYTEST_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return own | {
        "PYTHONPATH": str(CHECKOUT / "src"),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
        **variables,
    }


def run(directory: Path, *arguments: str, given: str = "", **variables: str) -> str:
    """Return the output of this Python."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(**variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(given, timeout=60)
        except BaseException:
            # Its children would keep the pipes open, and be waited for without end.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors or printed
    assert "Warning" not in errors, errors
    return printed


# The commands of a page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Shell:
    """Run the commands of a page in order.

    A server or a worker runs until the next one is started or the page ends.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.running: subprocess.Popen[str] | None = None
        self.log = reader.directory / "server.log"

    def run(self, command: Command) -> None:
        for pattern, runner in KINDS.items():
            if re.fullmatch(pattern, command.line):
                return runner(self, command)
        raise AssertionError(f"{command.block.place}: nobody runs {command.line!r}")

    def arguments(self, command: Command) -> list[str]:
        return [
            self.reader.redirect(word).replace("8000", str(self.reader.port))
            for word in command.words
        ]

    def start(self, command: Command, *options: str) -> None:
        """Start a server or a worker, and let it run."""
        self.stop()
        program, *rest = self.arguments(command)
        with self.log.open("w") as log:
            self.running = subprocess.Popen(
                [sys.executable, "-m", program, *rest, *options],
                cwd=self.reader.directory,
                env=environment(**command.variables),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def stop(self) -> None:
        """Stop it with SIGTERM, as Kubernetes does."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            raise
        log = self.log.read_text()
        assert running.returncode in (0, -signal.SIGTERM), log
        assert "Traceback" not in log, log


def run_program(shell: Shell, command: Command) -> None:
    _, *arguments = shell.arguments(command)
    file = shell.reader.document.files.get(arguments[0]) or shared_files()[arguments[0]]
    printed = shell.reader.run(*arguments, **command.variables)
    assert printed.splitlines() == file.prints, command.block.place


def run_tests(shell: Shell, command: Command) -> None:
    """Run tests on PostgreSQL as written, or in the plugin's SQLite databases."""
    _, *arguments = shell.arguments(command)
    on_sqlite = (
        shell.reader.database_url.startswith("sqlite") and "--sessionwire-url" not in command.line
    )
    url = ["--sessionwire-url=sqlite://"] if on_sqlite else []
    # pytest-asyncio warns of a project that does not set it.
    asked = "-oasyncio_default_fixture_loop_scope=function"
    # It asks for httpx2, which is not used here.
    client = "-Wignore:Using `httpx` with `starlette.testclient`"
    options = *shell.reader.warnings, client, asked, *url
    printed = run(shell.reader.directory, "-m", "pytest", *options, *arguments, **command.variables)
    assert re.search(r"^=+ \d+ passed in .*=$", printed.splitlines()[-1]), printed


def run_tool(shell: Shell, command: Command) -> None:
    shell.reader.run("-m", *shell.arguments(command), **command.variables)


def serve(shell: Shell, command: Command) -> None:
    """Start it on a port that is free, and wait until it listens there."""
    option = "--bind=127.0.0.1:" if command.words[0] == "gunicorn" else "--port="
    shell.start(command, *([] if "8000" in command.line else [f"{option}{shell.reader.port}"]))
    assert shell.running is not None
    for _ in range(300):
        assert shell.running.poll() is None, shell.log.read_text()
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", shell.reader.port), timeout=1),
        ):
            return
        time.sleep(0.1)
    raise AssertionError(shell.log.read_text())


def work(shell: Shell, command: Command) -> None:
    shell.start(command)


CURL = argparse.ArgumentParser("curl")
CURL.add_argument("-X", "--request")
CURL.add_argument("-H", "--header", action="append", default=[])
CURL.add_argument("-d", "--data", "--json")
CURL.add_argument("-s", "--silent", action="store_true")
CURL.add_argument("address")


def ask(shell: Shell, command: Command) -> None:
    """Send the request without curl, which not every machine has."""
    asked = CURL.parse_args(shell.arguments(command)[1:])
    address = asked.address if "://" in asked.address else f"http://{asked.address}"
    headers = dict(header.split(": ", 1) for header in asked.header)
    data = None if asked.data is None else asked.data.encode()
    if "--json" in command.words:
        headers |= {"Content-Type": "application/json"}
    method = asked.request or ("GET" if data is None else "POST")
    request = Request(address.replace("localhost", "127.0.0.1"), data, headers, method=method)
    try:
        with urlopen(request, timeout=20) as answer:
            body = answer.read().decode()
    except HTTPError as error:
        raise AssertionError(
            f"{command.block.place}: {error}, {error.read()!r}\n{shell.log.read_text()}"
        ) from None
    if command.says:
        assert body.strip() == command.says, command.block.place


def install(shell: Shell, command: Command) -> None:
    check_installed(command)


def check_installed(command: Command) -> None:
    """Check a `pip install`: the project offers it, or the tests' environment has it.

    The gate installs the wheel for real.
    """
    groups = PYPROJECT["dependency-groups"].values()
    known = [Requirement(line).name for group in groups for line in group if isinstance(line, str)]
    for wanted in map(Requirement, command.words[2:]):
        if wanted.name == PROJECT["name"]:
            assert wanted.extras <= PROJECT["optional-dependencies"].keys()
        else:
            assert wanted.name in known, (
                f"{command.block.place}: {wanted.name} is in no group of pyproject.toml"
            )


def elsewhere(shell: Shell, command: Command) -> None:
    """Skip it: a separate test runs it in a clone, see test_documents.py."""


# How each kind of command is run. One that fits none fails.
KINDS: dict[str, Callable[[Shell, Command], None]] = {
    r"\.ci/env python -m ledger (demo|serve|compare)( .+)?": elsewhere,
    r"\.ci/env python -m tests\.benchmarks": elsewhere,
    r"\.ci/env pytest": elsewhere,
    r"pip install .+": install,
    r"([A-Z_]+=\S+ )*python \w+\.py( .+)?": run_program,
    r"([A-Z_]+=\S+ )*pytest( .+)?": run_tests,
    r"([A-Z_]+=\S+ )*(alembic|sessionwire) .+": run_tool,
    r"([A-Z_]+=\S+ )*(uvicorn|gunicorn|litestar) .+": serve,
    r"([A-Z_]+=\S+ )*(celery|taskiq) .+": work,
    r"curl .+": ask,
}


@contextmanager
def shell_of(reader: Reader) -> Iterator[Shell]:
    shell = Shell(reader)
    try:
        yield shell
        shell.stop()
    finally:
        if shell.running is not None:
            shell.running.kill()
            shell.running.wait()
