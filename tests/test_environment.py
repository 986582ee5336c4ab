"""`.ci/env` replaces an environment that is out of date or has another interpreter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project with an up-to-date environment. Replacing it fails."""
    scripts = tmp_path / ".ci"
    scripts.mkdir()
    shutil.copy(CHECKOUT / ".ci" / "env", scripts)
    (scripts / "venv").write_text('#!/bin/sh\necho "anew: $1 with ${PYTHON:-python3}"\nexit 3\n')
    (scripts / "venv").chmod(0o755)
    (tmp_path / "pyproject.toml").write_text("# anything")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / ".venv" / "installed-from")
    return tmp_path


@pytest.fixture
def other_python(tmp_path: Path) -> str:
    """Make an interpreter that differs from the environment's, and says so if asked."""
    path = tmp_path / "python3.99"
    path.write_text("#!/bin/sh\necho /elsewhere 3.99\n")
    path.chmod(0o755)
    return str(path)


def env(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")
    }
    return subprocess.run(
        [project / ".ci" / "env", "python", "-c", "import sys; print(sys.prefix)"],
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def test_an_environment_of_the_same_interpreter_is_reused(project: Path) -> None:
    ended = env(project, PYTHON=sys.executable)

    assert ended.stdout == f"{project / '.venv'}\n", ended.stderr


def test_an_environment_of_another_interpreter_is_replaced(
    project: Path, other_python: str
) -> None:
    ended = env(project, PYTHON=other_python)

    assert (ended.returncode, ended.stdout) == (3, f"anew: .venv with {other_python}\n"), (
        ended.stderr
    )


def test_an_environment_made_from_another_project_file_is_replaced(project: Path) -> None:
    (project / "pyproject.toml").write_text("# something else")

    ended = env(project, PYTHON=sys.executable)

    assert (ended.returncode, ended.stdout) == (3, f"anew: .venv with {sys.executable}\n"), (
        ended.stderr
    )


def test_each_directory_has_a_separate_environment(project: Path) -> None:
    ended = env(project, PYTHON=sys.executable, VENV=".venv-other")

    assert (ended.returncode, ended.stdout) == (3, f"anew: .venv-other with {sys.executable}\n"), (
        ended.stderr
    )


def test_a_missing_interpreter_leaves_the_environment_alone(project: Path) -> None:
    ended = env(project, PYTHON="python3.99")

    assert ended.returncode != 0
    assert "python3.99" in ended.stderr
    assert (project / ".venv" / "installed-from").exists()


def test_each_file_that_lists_pythons_lists_the_supported_ones() -> None:
    supported = [
        match[1]
        for line in PROJECT["classifiers"]
        if (match := re.search(r"Python :: (3\.\d+)$", line))
    ]
    lowest, *newer = supported
    assert PROJECT["requires-python"] == f">={lowest}"
    for file, words in (
        ("README.md", f"Python {lowest} to {newer[-1]},"),
        (".ci/newest", f"for version in {' '.join(reversed(newer))}; do"),
    ):
        assert words in (CHECKOUT / file).read_text(encoding="utf-8")
