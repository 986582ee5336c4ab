"""CONTRIBUTING.md is right: its commands, its paths, and contributors' settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from tests.faults.scenarios import SCENARIOS

CHECKOUT = Path(__file__).parents[1]
CONTRIBUTING = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
GATE = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", CONTRIBUTING, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
IN_ENVIRONMENT = [command for command in COMMANDS if ".ci/env " in command]
(MAP,) = (text for language, text in BLOCKS if language == "text" and "src/" in text)
(MESSAGE,) = (text for language, text in BLOCKS if language == "text" and "src/" not in text)


def arguments(command: str) -> list[str]:
    """Return the words after `.ci/env`."""
    _, _, inside = command.partition(".ci/env ")
    return shlex.split(inside)


def run_python(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT / "src")}
    command = [sys.executable, *words]
    finished = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr or finished.stdout
    return finished.stdout


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_contributing_starts_with_an_executable_of_the_checkout(
    command: str,
) -> None:
    program = next(word for word in shlex.split(command) if "=" not in word)

    assert program in {".ci/env", ".ci/run"}
    assert os.access(CHECKOUT / program, os.X_OK)


@pytest.mark.parametrize("command", IN_ENVIRONMENT)
def test_each_tool_that_contributing_runs_is_in_the_environment(command: str) -> None:
    groups = PYPROJECT["dependency-groups"]
    packages = {re.split(r"[\[>=]", line)[0] for line in groups["dev"] if isinstance(line, str)}
    tool = {"lint-imports": "import-linter"}.get(arguments(command)[0], arguments(command)[0])

    assert tool == "python" or tool in packages


@pytest.mark.parametrize("tool", ["ruff", "mypy", "pyright", "lint-imports"])
def test_each_check_in_contributing_is_a_check_of_the_gate(tool: str) -> None:
    commands = [command for command in COMMANDS if command.startswith(f".ci/env {tool}")]

    assert commands
    for command in commands:
        assert command.replace("ruff format", "ruff format --check") in GATE.splitlines()


def test_contributing_and_the_gate_run_the_quick_tests_and_the_long_ones() -> None:
    assert {".ci/env pytest", ".ci/env pytest -m long"} <= set(COMMANDS)
    assert {".ci/env pytest", '.ci/env pytest -m long "--share=$quarter"'} <= set(GATE.splitlines())


@pytest.mark.long
def test_the_shares_of_the_gate_leave_no_test_out_and_run_none_twice() -> None:
    def collected(*options: str) -> list[str]:
        listed = run_python("-m", "pytest", __file__, "--collect-only", "-q", "-n", "0", *options)
        return [line for line in listed.splitlines() if "::" in line]

    shares = [collected(f"--share={number}/3") for number in (1, 2, 3)]

    assert all(shares)
    assert sorted(test for share in shares for test in share) == sorted(collected())


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if "pytest " in command and "tests/" in command]
)
def test_each_pytest_command_of_contributing_finds_tests(command: str) -> None:
    run_python("-m", *arguments(command), "--collect-only", "-q", "-n", "0")


@pytest.mark.parametrize("command", [command for command in COMMANDS if "python -m " in command])
def test_each_module_that_contributing_runs_exists(command: str) -> None:
    _, _, module, *_ = arguments(command)

    assert importlib.util.find_spec(module) is not None


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in COMMANDS if "tests.faults" in command])
def test_each_option_of_the_fault_suite_in_contributing_is_known(command: str) -> None:
    _, *words = arguments(command)
    scenario = words[2] if len(words) > 2 and not words[2].startswith("-") else None

    assert scenario is None or scenario in SCENARIOS
    run_python(*words, "--help")


# Paths and the map


def test_each_path_that_contributing_names_exists() -> None:
    code = re.findall(r"`([^`\n]+)`", PROSE)
    paths = [word for word in code if "/" in word or word.endswith((".md", ".toml"))]

    assert paths
    for path in paths:
        assert (CHECKOUT / path).exists(), path


def test_the_map_in_contributing_shows_each_package_of_the_repository() -> None:
    shown: set[str] = set()
    parent = ""
    for line in MAP.splitlines():
        path = line.split()[0].rstrip("/")
        parent = parent if line.startswith(" ") else path
        shown.add(f"{parent}/{path}" if line.startswith(" ") else path)
    packages = {
        str(directory.relative_to(CHECKOUT))
        for root in ("src", "src/sessionwire", "src/ledger", "tests")
        for directory in (CHECKOUT / root).iterdir()
        if any(directory.glob("*.py"))
    }

    assert packages - shown == set()
    assert {"src/sessionwire", "src/ledger/demo", "tests/faults"} <= packages


# Commit messages


def test_the_commit_message_in_contributing_follows_its_own_rules() -> None:
    subject, blank, *body = MESSAGE.splitlines()

    assert re.fullmatch(r"[\w.-]+: [a-z].{,70}[^.]", subject)
    assert len(subject) <= 72
    assert blank == ""
    assert body
    assert all(len(line) <= 72 for line in body)


def hooks() -> dict[str, dict[str, object]]:
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    return {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}


def test_the_hook_for_commit_messages_refuses_a_subject_of_more_than_72_characters() -> None:
    hook = hooks()["subject"]
    pattern = re.compile(
        str(hook["entry"]), re.MULTILINE | re.DOTALL
    )  # as pygrep does with --multiline

    assert hook["args"] == ["--multiline"]
    assert hook["stages"] == ["commit-msg"]
    assert pattern.search("s" * 73)
    assert pattern.search("s" * 73 + "\n\nbody\n")
    assert not pattern.search("s" * 72 + "\n\n" + "b" * 100 + "\n")


@pytest.mark.parametrize("name", ["ruff-check", "ruff-format"])
def test_a_hook_of_ruff_runs_a_command_of_the_gate(name: str) -> None:
    program, tool, command, *_ = shlex.split(str(hooks()[name]["entry"]))

    assert f"{program} {tool} {command}" in GATE


# .editorconfig


def text_files() -> list[Path]:
    roots = [CHECKOUT / name for name in ("src", "tests", "config", ".ci")]
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    files += [path for path in CHECKOUT.iterdir() if path.suffix in {".md", ".toml", ".yaml"}]
    return [path for path in files if "__pycache__" not in path.parts]


def test_every_file_follows_the_editorconfig() -> None:
    config = ConfigParser()
    config.read_string("[root]\n" + (CHECKOUT / ".editorconfig").read_text(encoding="utf-8"))
    assert dict(config["*"]) == {
        "charset": "utf-8",
        "end_of_line": "lf",
        "indent_style": "space",
        "indent_size": "4",
        "insert_final_newline": "true",
        "trim_trailing_whitespace": "true",
    }

    for path in text_files():
        text = path.read_bytes().decode("utf-8")
        assert "\r" not in text, path
        assert text == "" or text.endswith("\n"), path
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), path
        assert not re.search(r"^\t", text, re.MULTILINE), path


def test_the_prose_of_contributing_is_at_most_88_columns_wide() -> None:
    config = ConfigParser()
    config.read_string("[root]\n" + (CHECKOUT / ".editorconfig").read_text(encoding="utf-8"))

    assert all(len(line) <= config.getint("*.md", "max_line_length") for line in PROSE.splitlines())


# [project.urls]


def test_the_project_names_its_addresses() -> None:
    urls = PYPROJECT["project"]["urls"]

    assert urls.keys() == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    for url in urls.values():
        assert url.startswith(urls["Source"])
    for name in re.findall(r"/blob/main/(\S+)", " ".join(urls.values())):
        assert (CHECKOUT / name).exists()
