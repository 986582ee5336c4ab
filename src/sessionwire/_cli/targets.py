"""Find the databases that a command is for: in a container, or in a settings file."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import create_model
from pydantic_settings import SettingsConfigDict
from sqlalchemy import MetaData

from sessionwire._managers import managers_by_name
from sessionwire.errors import ConfigurationError
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings, Settings


def managers_in_app(app: str) -> Mapping[str, DatabaseSessionManager]:
    """Return the managers of an object of the application, by the names of their providers.

    Args:
        app: Such as `shop.container:Container`: a container, its class, or a manager.

    Raises:
        ConfigurationError: It can't be imported, or has no database.
    """
    found = _import(app)
    try:
        providers = managers_by_name(found() if isinstance(found, type) else found)
    except ConfigurationError as error:
        raise ConfigurationError(f"--app {app}: {error}") from error
    except Exception as error:
        raise ConfigurationError(
            f"--app {app}: this is no container: {type(error).__name__}: {error}; name a class "
            "or an object with a DatabaseContainer, or a DatabaseSessionManager"
        ) from error
    return {name: provide() for name, provide in providers.items()}


def _import(app: str) -> Any:
    module, _, path = app.partition(":")
    if not path:
        raise ConfigurationError(
            f"--app {app}: name the module and the object in it, such as shop.container:Container"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--app {app}: {error}; it was looked for in {here} and in the environment of "
            f"{sys.executable}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"--app {app}: {module} has no {path}")
        found = getattr(found, name)
    return found


def managers_in_file(
    path: Path, *, section: str, env_prefix: str
) -> Mapping[str, DatabaseSessionManager]:
    """Return the manager of a settings file, by the name of its section.

    Variables of the environment override the file. Other sections are left alone.

    Raises:
        ConfigurationError: The file can't be read, or its settings can't work.
    """

    class OfFile(Settings):
        model_config = SettingsConfigDict(extra="ignore", env_prefix=env_prefix)

    fields: dict[str, Any] = {section: (DatabaseSettings, ...)}
    if section != "database":
        fields["database"] = (Any, None)
    settings = create_model("OfFile", __base__=OfFile, **fields).load(path)
    manager = DatabaseSessionManager(getattr(settings, section), metadata=MetaData())
    return {section: manager}
