"""Read the sources of settings: the environment, a secrets directory, raw values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NestedSecretsSettingsSource,
    SecretsSettingsSource,
    SettingsError,
)

from sessionwire.errors import ConfigurationError

from .keys import check_sections, check_underscores, variable_name
from .yaml_files import TOO_DEEP

# The names of the sources that are no files.
ARGUMENT, ENVIRONMENT, CONFIG = "argument", "environment", "config"
SERVICE_PORT = re.compile("(tcp|udp|sctp)://")


class Source(NamedTuple):
    """The name of a source, for errors, and the values that it provides."""

    name: str
    values: Mapping[str, Any]


def raw_source(raw: object) -> Source:
    """Read the raw values of a `Configuration` provider, where None means not set.

    Raises:
        ConfigurationError: They are no mapping, or contain themselves.
    """
    if raw and not isinstance(raw, Mapping):
        raise ConfigurationError(
            f"{CONFIG}: expected a mapping with keys such as url and pool, got {type(raw).__name__}"
        )
    try:
        return Source(CONFIG, _without_none(raw or {}))
    except RecursionError:
        raise ConfigurationError(f"{CONFIG}: {TOO_DEEP}") from None


def _without_none(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    items = cast("Mapping[str, Any]", value).items()
    return {key: _without_none(item) for key, item in items if item is not None}


def environment_source(settings: type[BaseSettings]) -> Source:
    """Read the environment variables of `settings`.

    Raises:
        ConfigurationError: The variable of a whole section is not JSON, or a name is
            nearly that of a key.
    """
    values = _Environment(settings)()
    # Kubernetes sets SHOP_DATABASE_PORT=tcp://… for a service of the name shop-database.
    own = (name for name, value in os.environ.items() if not SERVICE_PORT.match(value))
    check_underscores(settings, own, "environment variable ")
    check_sections(settings, os.environ)
    return Source(ENVIRONMENT, values)


class _Environment(EnvSettingsSource):
    def prepare_field_value(
        self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool
    ) -> Any:
        """Name the section that cannot be parsed, which pydantic-settings does not."""
        try:
            return super().prepare_field_value(field_name, field, value, value_is_complex)
        except (ValueError, RecursionError):
            variable = variable_name(self.settings_cls, (field_name,))
            raise ConfigurationError(
                f"{field_name} (environment variable {variable}, or one below it): this is not "
                f"JSON; write JSON, or set each key by itself, as {variable}__…"
            ) from None


def secrets_source(settings: type[BaseSettings], directory: str | Path) -> Source:
    """Read a secrets directory: a file per value, named as its environment variable.

    Raises:
        ConfigurationError: There is no such directory, or a file name in it is nearly
            that of a key.
    """
    try:
        files = SecretsSettingsSource(settings, directory)
        values = NestedSecretsSettingsSource(files, secrets_dir_missing="error")()
    except SettingsError as error:
        raise ConfigurationError(
            f"secrets_dir: {error}; it must contain one file per value"
        ) from None
    check_underscores(settings, os.listdir(directory), f"{Path(directory)}{os.sep}")
    return Source(f"secrets in {directory}", values)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; earlier ones take precedence."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = merge(merged[key], cast("Mapping[str, Any]", value))
            else:
                merged.setdefault(key, value)
    return merged
