"""`Credentials`: what a function of the user's returns for a new connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Say who connects, and for how long this may be used.

    Args:
        password: A password or token. It is in no `repr`.
        username: The user, if it is another than the URL's.
        expires_in: Seconds for which new connections use this, counted from the call
            that returned it. None: each new connection asks again.

    Example:
        ```python
        async def lease() -> Credentials:
            secret = await vault.read("database/creds/shop")
            return Credentials(
                username=secret["username"],
                password=secret["password"],
                expires_in=secret["lease_duration"] / 2,
            )
        ```
    """

    password: str = field(repr=False)
    username: str | None = None
    expires_in: float | None = None


# Sync or async; asked for each new connection.
CredentialsFunction: TypeAlias = "Callable[[], str | Credentials | Awaitable[str | Credentials]]"
