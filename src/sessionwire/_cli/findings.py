"""`Finding`: what a check has found, in a plain sentence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        subject: What was looked at, such as `pool`.
        level: How bad it is.
        message: A sentence that says what is so, and what to write instead.
    """

    subject: str
    level: Level
    message: str


def ok(subject: str, message: str) -> Finding:
    return Finding(subject, Level.OK, message)


def warning(subject: str, message: str) -> Finding:
    return Finding(subject, Level.WARNING, message)


def error(subject: str, message: str) -> Finding:
    return Finding(subject, Level.ERROR, message)
