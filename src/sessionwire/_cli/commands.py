"""The commands of `sessionwire`: check, wait, migrate, status."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from sqlalchemy.exc import SQLAlchemyError

from sessionwire.errors import SessionwireError
from sessionwire.manager import DatabaseSessionManager

from .checks import check as check_database
from .findings import Finding, Level
from .output import print_findings, print_status
from .remote_status import fetch_status
from .server_status import sessions_of
from .targets import managers_in_app, managers_in_file

F = TypeVar("F", bound=Callable[..., Any])
Managers = Mapping[str, DatabaseSessionManager]
Look = Callable[[], Coroutine[Any, Any, Mapping[str, Any]]]

FAILED, IMPOSSIBLE = 1, 2  # exit codes


def _takes_databases(command: F) -> F:
    """Add the options that say which databases a command is for."""
    for option in (
        click.option(
            "--env-prefix",
            default="",
            metavar="PREFIX",
            help="of the variables that override the file, such as SHOP_",
        ),
        click.option(
            "--section",
            default="database",
            metavar="NAME",
            show_default=True,
            help="of the file, with the settings of the database",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="a YAML file with the settings",
        ),
        click.option(
            "--app",
            metavar="MODULE:NAME",
            help="a container or a manager, such as shop.container:Container",
        ),
    ):
        command = option(command)
    return command


def _find(app: str | None, config: Path | None, section: str, env_prefix: str) -> Managers:
    if app is not None and config is not None:
        raise click.UsageError("--app and --config name two things: give one of them")
    if app is not None:
        return managers_in_app(app)
    if config is not None:
        return managers_in_file(config, section=section, env_prefix=env_prefix)
    raise click.UsageError("which database? Give --app shop.container:Container or --config")


def _run(main: Coroutine[Any, Any, int]) -> None:
    try:
        sys.exit(asyncio.run(main))
    except BrokenPipeError:
        sys.exit(FAILED)


def _explained(command: F) -> F:
    """Print the errors that a user can do something about without a traceback."""

    @wraps(command)
    def explained(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (SessionwireError, SQLAlchemyError, OSError, ImportError) as error:
            click.echo(f"sessionwire: {getattr(error, 'orig', None) or error}", err=True)
            for note in getattr(error, "__notes__", ()):
                click.echo(f"  {note}", err=True)
            sys.exit(IMPOSSIBLE)

    return explained  # type: ignore[return-value]


as_json = click.option("--json", "as_json", is_flag=True, help="print JSON")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sessionwire")
def commands() -> None:
    """Look at a database as its service would, and migrate it."""


@commands.command()
@_takes_databases
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    show_default=True,
    help="of the service, for the count of connections",
)
@click.option("--strict", is_flag=True, help="fail for a warning too")
@as_json
@_explained
def check(processes: int, strict: bool, as_json: bool, **target: Any) -> None:
    """Connect as the service would, and look for what goes wrong in production.

    The exit code is 0 if nothing is wrong, 1 if something is, and 2 if the settings
    can't work.
    """
    _run(_check(_find(**target), processes, strict, as_json))


async def _check(managers: Managers, processes: int, strict: bool, as_json: bool) -> int:
    found: dict[str, list[Finding]] = {
        name: [finding async for finding in check_database(manager, processes)]
        for name, manager in managers.items()
    }
    if as_json:
        databases = {name: [asdict(each) for each in all_] for name, all_ in found.items()}
        click.echo(json.dumps({"databases": databases}, indent=2))
    else:
        print_findings(found)
    wrong = {Level.ERROR, Level.WARNING} if strict else {Level.ERROR}
    return FAILED if any(each.level in wrong for all_ in found.values() for each in all_) else 0


@commands.command()
@_takes_databases
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    metavar="SECONDS",
    show_default=True,
    help="how long to wait",
)
@_explained
def wait(timeout: float, **target: Any) -> None:
    """Wait until each database answers.

    The exit code is 0 if all of them do, and 2 if one does not in time. A wrong password
    fails at once.
    """
    _run(_wait(_find(**target), timeout))


async def _wait(managers: Managers, timeout: float) -> int:
    for name, manager in managers.items():
        manager.init(manager.settings.model_copy(update={"wait_for_database": timeout}))
        async with manager:
            click.echo(f"{name}: {manager.status().name} answers")
    return 0


@commands.command()
@_takes_databases
@click.option("--revision", default="heads", show_default=True, help="to reach")
@click.option(
    "--migrations",
    metavar="DIRECTORY",
    help="Alembic's scripts, or package:directory; needed beside --config",
)
@click.option(
    "--lock-timeout",
    type=click.FloatRange(0, min_open=True),
    default=5,
    metavar="SECONDS",
    show_default=True,
    help="how long a statement may wait for a lock",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="for all of it, the wait for other processes included",
)
@_explained
def migrate(
    revision: str,
    migrations: str | None,
    lock_timeout: float,
    timeout: float | None,
    **target: Any,
) -> None:
    """Upgrade each database, one process at a time."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)
    _run(_migrate(_find(**target), revision, migrations, lock_timeout, timeout))


async def _migrate(
    managers: Managers,
    revision: str,
    migrations: str | None,
    lock_timeout: float,
    timeout: float | None,
) -> int:
    for name, manager in managers.items():
        if migrations is not None:
            manager.migrations = migrations
        async with manager:
            state = await manager.migrate(revision, lock_timeout=lock_timeout, timeout=timeout)
        if state.pending:
            click.echo(f"{name}: ran {', '.join(state.pending)}")
        elif state.is_ahead:
            click.echo(f"{name}: ahead of this build, at {', '.join(state.current)}")
        else:
            click.echo(f"{name}: up to date, at {', '.join(state.current)}")
    return 0


@commands.command()
@click.argument("address", required=False, metavar="[URL]")
@_takes_databases
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    help="for the request, such as 'Authorization: Bearer …'; may be repeated",
)
@click.option(
    "--watch",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="print it again and again, with this pause",
)
@as_json
@_explained
def status(
    address: str | None,
    headers: tuple[str, ...],
    watch: float | None,
    as_json: bool,
    **target: Any,
) -> None:
    """Show what a running service does with its databases.

    URL is the address of its StatusPage, such as http://localhost:8000/status. Without
    it, --app or --config name the database, and its server tells of the sessions of this
    role: PostgreSQL only.
    """
    if address is not None and (target["app"] or target["config"]):
        raise click.UsageError("a URL asks the service, --app or --config the server: give one")
    if address is None:
        look: Look = partial(sessions_of, _find(**target))
    else:
        look = partial(fetch_status, address, headers)
    _run(_status(look, watch, as_json))


async def _status(look: Look, watch: float | None, as_json: bool) -> int:
    while True:
        found = await look()
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            print_status(found, clears=watch is not None)
        if watch is None:
            return 0
        await asyncio.sleep(watch)
