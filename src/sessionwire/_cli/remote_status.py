"""Ask a running service for its status, over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sessionwire.errors import ConfigurationError, ConnectionFailedError

TIMEOUT = 10.0  # seconds


async def fetch_status(address: str, headers: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the JSON of a `StatusPage`.

    Args:
        address: Of the page, or of its `status.json`.
        headers: For the request, as `name: value`.

    Raises:
        ConfigurationError: The address or a header can't be used.
        ConnectionFailedError: There is no such page.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigurationError(f"{address}: write http:// or https:// before it")
    url = address if address.endswith(".json") else f"{address.rstrip('/')}/status.json"
    named = dict(_split(header) for header in headers)
    return await asyncio.to_thread(_get, Request(url, headers=named))


def _split(header: str) -> tuple[str, str]:
    name, separator, value = header.partition(":")
    if not separator:
        raise ConfigurationError(f"--header {name!r}: write it as 'Name: value'")
    return name.strip(), value.strip()


def _get(request: Request) -> Mapping[str, Any]:
    url = request.full_url
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            found: Any = json.load(response)
    except HTTPError as error:
        error.close()
        raise ConnectionFailedError(
            f"{url} answers {error.code} {error.reason}: is the StatusPage mounted there, and does "
            "it need a --header?"
        ) from error
    except (URLError, TimeoutError, OSError) as error:
        raise ConnectionFailedError(
            f"{url} does not answer: {getattr(error, 'reason', error)}"
        ) from error
    except ValueError as error:
        raise ConnectionFailedError(f"{url} is no status page: its answer is no JSON") from error
    if not isinstance(found, dict) or "databases" not in found:
        raise ConnectionFailedError(f"{url} is no status page: its answer names no databases")
    return found  # pyright: ignore[reportUnknownVariableType]
