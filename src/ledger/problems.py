"""What the HTTP API says when it can't do what was asked: problem details (RFC 9457), and nothing of its insides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from asyncpg import PostgresError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from sessionwire import CommitOutcomeUnknownError, NotInitializedError, SessionwireError, is_retryable

from .errors import (
    Busy,
    IdempotencyConflict,
    InsufficientFunds,
    InvalidAmount,
    InvalidTransfer,
    LedgerError,
    UnknownAccount,
)

MEDIA_TYPE = "application/problem+json"
NO_ROOM = "53"  # the class of SQLSTATEs of a server that has no memory, disk or connection left

logger = logging.getLogger("ledger.api")


class Problem(BaseModel):
    type: str = Field(description="which problem this is: what a program decides by")
    title: str = Field(description="the same for people")
    status: int
    detail: str = Field(description="what happened to this request, and what to do")
    instance: str = Field(description="the path that was asked for")


@dataclass(frozen=True)
class Kind:
    type: str
    status: int
    title: str
    detail: str | None = None  # none: the error was written for the caller
    retry_after: int | None = None  # seconds


UNAVAILABLE = Kind(
    "/problems/unavailable", 503, "The database is away or busy", "Nothing was done: send it again later.", 5
)
INVALID_REQUEST = Kind("/problems/invalid-request", 422, "The request is incomplete or malformed")
INTERNAL = Kind(
    "about:blank",
    500,
    "Internal Server Error",
    "This is a fault of the service, which has kept a record of it. "
    "A transfer may be sent again with the same Idempotency-Key: it is booked once.",
)
OUTCOME_UNKNOWN = Kind(
    "/problems/outcome-unknown",
    503,
    "It is not known whether this was done",
    "It was interrupted before the database had confirmed it. "
    "A transfer may be sent again with the same Idempotency-Key: it is booked once.",
    1,
)

KINDS: dict[type[Exception], Kind] = {
    UnknownAccount: Kind("/problems/unknown-account", 404, "There is no such account"),
    InsufficientFunds: Kind("/problems/insufficient-funds", 409, "The payer holds less than the amount"),
    InvalidAmount: Kind("/problems/invalid-amount", 422, "This amount can't be booked"),
    InvalidTransfer: Kind("/problems/invalid-transfer", 422, "This is not a transfer"),
    IdempotencyConflict: Kind("/problems/idempotency-conflict", 422, "The key belongs to another transfer"),
    Busy: Kind("/problems/busy", 503, "Too many others at the same accounts", retry_after=1),
    CommitOutcomeUnknownError: OUTCOME_UNKNOWN,
    NotInitializedError: UNAVAILABLE,  # the service is being stopped
    OperationalError: UNAVAILABLE,
    InterfaceError: UNAVAILABLE,
    PoolTimeout: UNAVAILABLE,
    OSError: UNAVAILABLE,  # connection refused, or no answer in time
}


def kind_of(error: Exception) -> Kind:
    for base in type(error).__mro__:
        if base in KINDS:
            return KINDS[base]
    state = getattr(getattr(error, "orig", error), "sqlstate", None) or ""
    return UNAVAILABLE if is_retryable(error) or state.startswith(NO_ROOM) else INTERNAL


def described(*errors: type[Exception]) -> dict[int | str, dict[str, Any]]:
    """The problems of an endpoint, for OpenAPI: these, and those that each has."""
    titles: dict[int | str, list[str]] = {}
    for kind in [*(KINDS[error] for error in errors), INVALID_REQUEST, UNAVAILABLE, INTERNAL]:
        titles.setdefault(kind.status, []).append(kind.title)
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": "; or ".join(said), "content": content} for status, said in titles.items()}


def add_problems(app: FastAPI) -> None:
    """Let the app answer every error with a problem."""
    for root in (LedgerError, SessionwireError, SQLAlchemyError, PostgresError, OSError):
        app.add_exception_handler(root, _answer_known)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unknown)


def cut_off(request: Request) -> JSONResponse:
    """The answer to what was cancelled, wherever it was."""
    return _problem(request, OUTCOME_UNKNOWN, OUTCOME_UNKNOWN.detail or "")


async def _answer_known(request: Request, error: Exception) -> JSONResponse:
    kind = kind_of(error)
    if kind is INTERNAL:
        raise error  # for `_answer_unknown`, and for the server's log
    if kind.status >= 500:
        cause = getattr(error, "orig", None) or error
        logger.warning("%s %s: %s: %s", request.method, request.url.path, type(cause).__name__, cause)
    return _problem(request, kind, kind.detail or str(error))


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong: Sequence[dict[str, Any]] = error.errors()
    detail = "; ".join(f"{' '.join(map(str, problem['loc']))}: {problem['msg']}" for problem in wrong)
    return _problem(request, INVALID_REQUEST, detail)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = Kind("about:blank", error.status_code, HTTPStatus(error.status_code).phrase)
    return _problem(request, kind, error.detail, error.headers)


async def _answer_unknown(request: Request, error: Exception) -> JSONResponse:
    return _problem(request, INTERNAL, INTERNAL.detail or "")


def _problem(request: Request, kind: Kind, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    problem = Problem(type=kind.type, title=kind.title, status=kind.status, detail=detail, instance=request.url.path)
    also = dict(headers or {})
    if kind.retry_after is not None:
        also["Retry-After"] = str(kind.retry_after)
    return JSONResponse(problem.model_dump(), kind.status, also, MEDIA_TYPE)
