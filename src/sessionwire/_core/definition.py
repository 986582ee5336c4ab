"""Propagation modes and transaction options, validated where they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any, TypedDict, cast

from sessionwire._config.keys import did_you_mean
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.transaction_settings import settings_as_text


class Propagation(Enum):
    """What a block does about the current transaction. Names and meanings are Spring's."""

    REQUIRED = auto()
    REQUIRES_NEW = auto()
    NESTED = auto()
    MANDATORY = auto()
    SUPPORTS = auto()
    NOT_SUPPORTED = auto()
    NEVER = auto()


class Action(Enum):
    """What a block does, by its propagation mode, with or without a current transaction."""

    JOIN = auto()
    BEGIN = auto()
    SAVEPOINT = auto()
    AUTOCOMMIT = auto()
    REJECT = auto()


# For each mode: the action inside a transaction, and the one outside of any.
ACTIONS = {
    Propagation.REQUIRED: (Action.JOIN, Action.BEGIN),
    Propagation.REQUIRES_NEW: (Action.BEGIN, Action.BEGIN),
    Propagation.NESTED: (Action.SAVEPOINT, Action.BEGIN),
    Propagation.MANDATORY: (Action.JOIN, Action.REJECT),
    Propagation.SUPPORTS: (Action.JOIN, Action.AUTOCOMMIT),
    Propagation.NOT_SUPPORTED: (Action.AUTOCOMMIT, Action.AUTOCOMMIT),
    Propagation.NEVER: (Action.REJECT, Action.AUTOCOMMIT),
}
NON_TRANSACTIONAL_MODES = (Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER)
ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
INSTEAD_OF = {  # what others call an option
    "isolation_level": "write isolation=…",
    "readonly": "write read_only=True",
    "retries": "only @transactional(retries=…) and run(function, retries=…) "
    "can call a function again",
    "retry_on": "only @transactional(retries=…, retry_on=…) and run(function, retries=…, "
    "retry_on=…) can call a function again",
    "of": "only @transactional and @read_only look for their TransactionManager",
    "nested": "write transaction(Propagation.NESTED)",
}
RESERVED_EXECUTION_OPTIONS = {
    "isolation_level": "ask with isolation=…, and for autocommit with Propagation.NOT_SUPPORTED",
    "postgresql_readonly": "ask with read_only=True",
}


class TransactionOptions(TypedDict, total=False):
    """The options of a block. `timeout` is in seconds."""

    isolation: str | None
    read_only: bool
    timeout: float | timedelta | None
    execution_options: Mapping[str, Any] | None
    settings: Mapping[str, object] | None
    durable: bool
    no_rollback_for: type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True)
class TransactionDefinition:
    """The validated propagation mode and options of a block."""

    propagation: Propagation
    action_inside: Action  # of a transaction
    action_outside: Action  # of any
    options: ConnectionOptions
    timeout: float | None  # seconds
    durable: bool  # refused inside another transaction
    no_rollback_for: tuple[type[Exception], ...]


def define(
    propagation: Propagation,
    *,
    isolation: str | None = None,
    read_only: bool = False,
    timeout: float | timedelta | None = None,
    execution_options: Mapping[str, Any] | None = None,
    settings: Mapping[str, object] | None = None,
    durable: bool = False,
    no_rollback_for: type[Exception] | tuple[type[Exception], ...] = (),
    **unknown: object,
) -> TransactionDefinition:
    """Validate the propagation mode and the options of a block.

    Raises:
        TypeError: An option is unknown, or of a wrong type.
        ValueError: An option has a value that is not allowed.
    """
    for name in unknown:
        raise _no_option(name)
    if propagation not in Propagation.__members__.values():
        raise _no_propagation(propagation)
    for name, instead in RESERVED_EXECUTION_OPTIONS.items():
        if name in (execution_options or {}):
            raise ValueError(f"execution_options: {name!r} cannot be set here: {instead}")
    if durable and propagation is Propagation.MANDATORY:
        raise ValueError(
            "durable=True is refused inside a transaction, and Propagation.MANDATORY without one: "
            "leave one of them out"
        )
    autocommit = propagation in NON_TRANSACTIONAL_MODES
    connection_options = ConnectionOptions(
        autocommit=autocommit,
        write_intent=not (read_only or autocommit),
        read_only=read_only,
        isolation=_normalize_isolation(isolation, propagation),
        execution_options=tuple(sorted((execution_options or {}).items())),
        settings=settings_as_text(settings or {}),
    )
    return TransactionDefinition(
        propagation,
        *ACTIONS[propagation],
        connection_options,
        None if timeout is None else _seconds(timeout),
        durable,
        exception_types(no_rollback_for, "no_rollback_for") if no_rollback_for else (),
    )


def exception_types(given: object, option: str) -> tuple[type[Exception], ...]:
    """Return the types that an option names. Raises `TypeError`."""
    types = cast("tuple[object, ...]", given) if isinstance(given, tuple) else (given,)
    for each in types:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise TypeError(
                f"{option}={given!r}: {each!r} is not an exception type: write one, or a tuple of "
                f"them, such as {option}=(LookupError,)"
            )
        if not issubclass(each, Exception):
            raise TypeError(
                f"{option}={given!r}: {each.__name__} is no error, but stops the task or the "
                "process: name subclasses of Exception"
            )
    return cast("tuple[type[Exception], ...]", types)


def _seconds(timeout: float | timedelta) -> float:
    if isinstance(timeout, timedelta):
        timeout = timeout.total_seconds()
    if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
        raise TypeError(
            f"timeout={timeout!r} is not a time: write seconds as a number, or a timedelta"
        )
    if not timeout >= 0:  # nor is NaN
        raise ValueError(
            f"timeout={timeout!r} is not a deadline: write the seconds from now on, 0 or more"
        )
    return float(timeout)


def _no_option(name: str) -> TypeError:
    known = list(TransactionOptions.__annotations__)
    instead = INSTEAD_OF.get(name) or did_you_mean(name, known) or f"there are {', '.join(known)}"
    return TypeError(f"a block has no option {name!r}: {instead}")


def _no_propagation(given: object) -> TypeError:
    name = str(given).upper()
    if name in Propagation.__members__:
        instead = f"write Propagation.{name}"
    elif name in ISOLATION_LEVELS:
        instead = f"write isolation={name!r}"
    else:
        hint = (
            did_you_mean(name, Propagation.__members__, form="Propagation.{}")
            if isinstance(given, str)
            else ""
        )
        instead = hint or f"there are Propagation.{', '.join(Propagation.__members__)}"
    return TypeError(f"{given!r} is not a Propagation: {instead}")


def _normalize_isolation(level: str | None, propagation: Propagation) -> str | None:
    if level is None:
        return None
    if str(level).upper() not in ISOLATION_LEVELS:
        raise ValueError(
            f"unknown isolation level {level!r}; choose one of {', '.join(ISOLATION_LEVELS)}"
        )
    if propagation in NON_TRANSACTIONAL_MODES:
        raise ValueError(
            f"Propagation.{propagation.name} may run without a transaction, so it cannot have an "
            "isolation level; for a consistent snapshot use REQUIRED, with read_only=True if it "
            "only reads"
        )
    return level.upper()
