"""Name the environment variable of a key, and reject names that are nearly right."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from pydantic import AliasChoices, AliasPath
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from sessionwire.errors import ConfigurationError

from .sections import models_in
from .suggestions import did_you_mean


def variable_name(settings: type[BaseSettings], key: Sequence[str | int]) -> str:
    """Return the name of the environment variable that sets `key`."""
    prefix = settings.model_config.get("env_prefix", "")
    return (prefix + _delimiter(settings).join(map(str, key))).upper()


def similar_variable(variable: str) -> str:
    """Return a variable that is set and differs in underscores only, or ""."""
    letters = variable.replace("_", "")
    return next((name for name in os.environ if name.upper().replace("_", "") == letters), "")


def check_variables(settings: type[BaseSettings]) -> None:
    """Reject environment variables with misspelt underscores or sections.

    pydantic-settings ignores misspelt sections. With an `env_prefix` they can be
    detected.

    Raises:
        ConfigurationError: A variable would be ignored.
    """
    check_underscores(settings, os.environ, "environment variable ")
    prefix, delimiter = variable_name(settings, ()), _delimiter(settings)
    sections = [name.upper() for name in settings.model_fields]
    for variable in os.environ:
        section, nested, _ = variable.upper().removeprefix(prefix).partition(delimiter)
        is_ours = prefix and nested and variable.upper().startswith(prefix)
        if is_ours and section not in sections:
            hint = did_you_mean(section, sections) or f"choose one of {', '.join(sorted(sections))}"
            raise ConfigurationError(
                f"environment variable {variable}: there is no section {section!r}; {hint}"
            )


def check_underscores(settings: type[BaseSettings], names: Iterable[str], place: str) -> None:
    """Reject a name that has the letters of a key, but other underscores.

    Args:
        settings: The class whose keys are compared.
        names: Names of environment variables or of files with secrets.
        place: The origin of the names; it precedes a name in the error.

    Raises:
        ConfigurationError: A name would be ignored.
    """
    prefix, delimiter = variable_name(settings, ()), _delimiter(settings)
    fields = {
        str(field.validation_alias or prefix + name).upper(): field
        for name, field in settings.model_fields.items()
        if not isinstance(field.validation_alias, AliasChoices | AliasPath)
    }
    found = {name.upper(): name for name in names}
    for upper, name in found.items():
        if prefix and (upper.startswith(prefix) or delimiter in upper):
            meant = delimiter.join(_key_of(upper.replace("_", ""), fields)).upper()
            if meant and meant not in found:
                raise ConfigurationError(
                    f"{place}{name} is not read: its underscores are not those of {meant}"
                )


def _delimiter(settings: type[BaseSettings]) -> str:
    return settings.model_config.get("env_nested_delimiter") or "__"


def _key_of(letters: str, fields: Mapping[str, FieldInfo]) -> tuple[str, ...]:
    """Return the key with these letters, whatever its underscores, or ()."""
    for name, field in fields.items():
        head, models = name.upper().replace("_", ""), models_in(field.annotation)
        if letters == head:
            return (name,)
        rest = letters.removeprefix(head)
        if rest != letters and len(models) == 1 and (key := _key_of(rest, models[0].model_fields)):
            return (name, *key)
    return ()
