"""What a block asks for, checked where it is written down: its propagation mode and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any, TypedDict

from .terms import Terms


class Propagation(Enum):
    """What a block does about the current transaction. Names and meanings are Spring's."""

    REQUIRED = auto()
    REQUIRES_NEW = auto()
    NESTED = auto()
    MANDATORY = auto()
    SUPPORTS = auto()
    NOT_SUPPORTED = auto()
    NEVER = auto()


MAY_GO_WITHOUT = (Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER)
ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
REPLACED_OPTIONS = {
    "isolation_level": "ask with isolation=…, and for autocommit with Propagation.NOT_SUPPORTED",
    "postgresql_readonly": "ask with read_only=True",
}


class BlockOptions(TypedDict, total=False):
    """What a block may ask for. `timeout` is in seconds."""

    isolation: str | None
    read_only: bool
    timeout: float | timedelta | None
    execution_options: Mapping[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """What a block asks for."""

    propagation: Propagation
    terms: Terms
    timeout: float | None  # seconds


def plan(
    propagation: Propagation,
    *,
    isolation: str | None = None,
    read_only: bool = False,
    timeout: float | timedelta | None = None,
    execution_options: Mapping[str, Any] | None = None,
) -> Plan:
    """The same, checked. Raises `TypeError`, `ValueError`."""
    for name, instead in REPLACED_OPTIONS.items():
        if name in (execution_options or {}):
            raise ValueError(f"execution_options: {name!r} is not for a block to set: {instead}")
    goes_without = propagation in MAY_GO_WITHOUT
    terms = Terms(
        autocommit=goes_without,
        writes=not (read_only or goes_without),
        read_only=read_only,
        isolation=_isolation(isolation, propagation),
        execution_options=tuple(sorted((execution_options or {}).items())),
    )
    return Plan(propagation, terms, None if timeout is None else _seconds(timeout))


def attempts(retries: object) -> int:
    """Return how many attempts they allow. Raises `TypeError`, `ValueError`."""
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries={retries!r} is not a number of retries: write an int, such as retries=3")
    if retries < 0:
        raise ValueError(f"retries={retries} is less than none: write retries=0 for one attempt")
    return retries + 1


def _seconds(timeout: float | timedelta) -> float:
    if isinstance(timeout, timedelta):
        timeout = timeout.total_seconds()
    if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
        raise TypeError(f"timeout={timeout!r} is not a time: write seconds as a number, or a timedelta")
    if not timeout >= 0:  # nor is NaN
        raise ValueError(f"timeout={timeout!r} is not a deadline: write the seconds from now on, 0 or more")
    return float(timeout)


def _isolation(level: str | None, propagation: Propagation) -> str | None:
    if level is None:
        return None
    if level.upper() not in ISOLATION_LEVELS:
        raise ValueError(f"there is no isolation level {level!r}; there are {', '.join(ISOLATION_LEVELS)}")
    if propagation in MAY_GO_WITHOUT:
        raise ValueError(
            f"Propagation.{propagation.name} may go without a transaction, which alone has an isolation level: for one "
            "snapshot take REQUIRED, with read_only=True where it only reads"
        )
    return level.upper()
