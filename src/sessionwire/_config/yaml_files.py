"""Read a YAML file: environment variables expanded, no value shown in an error."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from sessionwire.errors import ConfigurationError

MAX_DEPTH, MAX_NODES = 100, 100_000
TOO_DEEP = "it is nested too deeply, or its aliases repeat too much"
# The syntax that dependency-injector's `Configuration` reads.
VARIABLE = re.compile(r"\$\{(?P<name>[^}^{:]+)(?P<separator>:?)(?P<default>.*?)\}")
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001*\ue002")


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read the mapping in a file; an empty file is an empty mapping.

    Raises:
        ConfigurationError: It cannot be read, is not YAML, or is not a mapping. The
            message names file, line and column.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}; the path is relative to {Path.cwd()}"
        ) from None
    except RecursionError:
        raise ConfigurationError(f"{path}: {TOO_DEEP}") from None
    except Exception as error:  # PyYAML raises errors of any kind for a tag on a wrong value
        raise _unreadable_error(path, error) from None
    if values is not None and not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{path}: expected 'key: value' lines, such as 'database:' and below it 'url: …'"
        )
    return cast("Mapping[str, Any]", values or {})


def _unreadable_error(path: Path, error: Exception) -> ConfigurationError:
    mark = getattr(error, "problem_mark", None)
    position = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    if isinstance(error, _RejectedError):
        return ConfigurationError(f"{position}: {error.problem}")
    problem = getattr(error, "problem", None) or "a value in it cannot be read"
    # Remove quotations from the file: they may be a part of a password.
    problem = re.sub(r" (['\"])(?!<).{2,}\1", "", problem)
    return ConfigurationError(
        f"{position}: this is not YAML in UTF-8: {problem}; "
        "check indentation, colons and quotes there"
    )


class _RejectedError(yaml.MarkedYAMLError):
    """Reject well-formed YAML; the message is shown to the user unchanged."""


class _Loader(yaml.SafeLoader):
    """Expand `${VARIABLE}` and `${VARIABLE:default}` inside scalars.

    The value of a variable is never parsed as YAML, but a plain scalar gets its type
    after the expansion: `${SIZE}` may be a number.
    """

    def __init__(self, text: str) -> None:
        self._variables: list[re.Match[str]] = []
        super().__init__(VARIABLE.sub(self._placeholder, text))

    def _placeholder(self, variable: re.Match[str]) -> str:
        """Return a text of equal length without braces and colons, which YAML reads."""
        self._variables.append(variable)
        start = f"\ue000{len(self._variables) - 1}"
        return start.ljust(len(variable[0]) - 1, "\ue001") + "\ue002"

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        scalar = cast(Any, self).peek_event()
        expand = partial(self._expand, scalar.start_mark)
        scalar.value = PLACEHOLDER.sub(expand, scalar.value)
        return super().compose_scalar_node(anchor)

    def _expand(self, mark: Any, placeholder: re.Match[str]) -> str:
        name, separator, default = self._variables[int(placeholder[1])].groups()
        if name not in os.environ and not separator:
            problem = (
                f"environment variable {name} is not set; set it, or write a default, "
                f"as ${{{name}:default}}"
            )
            raise _RejectedError(problem=problem, problem_mark=mark)
        return os.environ.get(name, default)

    def construct_document(self, node: yaml.Node) -> Any:
        _count_nodes(node)
        return cast(Any, super()).construct_document(node)


def _count_nodes(node: yaml.Node, depth: int = 0) -> int:
    """Count the nodes below `node`, those of an alias each time that it is used.

    Raises:
        _RejectedError: They are too many, or nested too deeply.
    """
    children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in children for child in pair]
    count = 1
    for child in children:
        count += _count_nodes(child, depth + 1)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise _RejectedError(problem=TOO_DEEP, problem_mark=node.start_mark)
    return count
