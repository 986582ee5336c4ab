"""Helpers for the tests of applications, with any test framework."""

from .migrations import MigrationTests
from .null_transactions import NullTransactionManager
from .overriding import overriding
from .sandbox import sandbox
from .statements import SentStatement, count_statements
from .templates import DatabaseCopy, DatabaseTemplate

__all__ = [
    "DatabaseCopy",
    "DatabaseTemplate",
    "MigrationTests",
    "NullTransactionManager",
    "SentStatement",
    "count_statements",
    "overriding",
    "sandbox",
]
