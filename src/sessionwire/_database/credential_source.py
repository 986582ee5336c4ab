"""`CredentialSource`: ask for the credentials of new connections, once for all at a time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sqlalchemy.util import await_only

from sessionwire._config.url_parts import read_password
from sessionwire.credentials import Credentials, CredentialsFunction
from sessionwire.errors import ConfigurationError
from sessionwire.settings import DatabaseSettings


class CredentialsError(Exception):
    """Names the function that failed. It is the cause of the driver's error."""


class CredentialSource:
    """The credentials of new connections, kept as long as they say.

    Args:
        function: Returns them, or an awaitable of them.
        name: The function's name in errors.
        timeout: Seconds that it may take.
    """

    def __init__(self, function: CredentialsFunction, name: str, timeout: float) -> None:
        self._function = function
        self._name = name
        self._timeout = timeout
        self._kept: Credentials | None = None
        self._expires_at = 0.0
        self._question: _Question | None = None

    def add_to(self, parameters: dict[str, Any], dbapi: Any) -> None:
        """Put the credentials among the arguments of `connect()`.

        It is called in a greenlet of SQLAlchemy's.

        Raises:
            dbapi.OperationalError: The function has failed.
        """
        try:
            credentials = await_only(self._get())
        except Exception as error:
            why = f"no answer within {self._timeout:g} s" if type(error) is TimeoutError else error
            failure = CredentialsError(f"{self._name} failed: {type(error).__name__}: {why}")
            failure.__cause__ = error
            raise dbapi.OperationalError(f"could not connect: {failure}") from failure
        parameters["password"] = credentials.password
        if credentials.username is not None:
            parameters["user"] = credentials.username

    def forget(self) -> None:
        """Ask again for the next connection, because the server has refused this one."""
        self._kept = None

    async def _get(self) -> Credentials:
        if self._kept is not None and monotonic() < self._expires_at:
            return self._kept
        question = self._question
        if question is None or question.task.get_loop() is not asyncio.get_running_loop():
            asked_at = monotonic()
            answer = self._function()
            if not inspect.isawaitable(answer):
                return self._keep(answer, asked_at)
            task = asyncio.ensure_future(self._ask(answer, asked_at))
            question = self._question = _Question(task)
        question.waiting += 1
        try:
            return await asyncio.shield(question.task)
        finally:
            question.waiting -= 1
            if not question.waiting:  # Nobody needs an answer that has not come yet.
                question.task.cancel()
                if self._question is question:
                    self._question = None

    async def _ask(self, answer: Awaitable[str | Credentials], asked_at: float) -> Credentials:
        async with asyncio.timeout(self._timeout):
            return self._keep(await answer, asked_at)

    def _keep(self, answer: Any, asked_at: float) -> Credentials:
        password: Any = answer.password if isinstance(answer, Credentials) else answer
        if not isinstance(password, str) or not password:
            raise TypeError(
                "it must return a password that is not empty, or Credentials(password=…), and "
                f"returned {type(answer).__name__} with {type(password).__name__}"
            )
        credentials = answer if isinstance(answer, Credentials) else Credentials(password=password)
        if credentials.expires_in is not None:
            self._kept, self._expires_at = credentials, asked_at + credentials.expires_in
        return credentials


@dataclass
class _Question:
    """A call of the function, and how many connections wait for its answer."""

    task: asyncio.Task[Credentials]
    waiting: int = 0


def credential_source(
    settings: DatabaseSettings, function: CredentialsFunction | None, *, is_server: bool
) -> CredentialSource | None:
    """Return the source that the settings or the manager name, or None.

    Raises:
        ConfigurationError: They contradict each other.
    """
    # The other half is for the connection itself.
    file, timeout = settings.password_file, settings.connect_timeout / 2
    if function is None:
        if file is None:
            return None
        return CredentialSource(lambda: read_password(file), "password_file", timeout)
    if not is_server:
        raise ConfigurationError(
            "credentials: only a server has any, and this url names none: give the manager "
            "credentials=None there, or override the container's provider with None"
        )
    for key in ("password", "password_file"):
        if getattr(settings, key) is not None:
            raise ConfigurationError(f"credentials: {key} is set too: leave out one of them")
    if settings.pool.max_lifetime is None:
        raise ConfigurationError(
            "credentials: set pool.max_lifetime too, such as 900 seconds: without it a "
            "connection would be used for good after its password has expired"
        )
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return CredentialSource(function, f"credentials={name}", timeout)
