"""Error responses as problem details (RFC 9457), without internals."""

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

from sessionwire import (
    CommitOutcomeUnknownError,
    NotInitializedError,
    SessionwireError,
    is_retryable,
)

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
# The class of SQLSTATEs for a server that has no memory, disk space or connection left.
INSUFFICIENT_RESOURCES = "53"

logger = logging.getLogger("ledger.api")


class Problem(BaseModel):
    """The body of an error response."""

    type: str = Field(description="the problem type, for programs")
    title: str = Field(description="the problem type, for people")
    status: int
    detail: str = Field(description="the problem of this request, and a remedy")
    instance: str = Field(description="the path of the request")


@dataclass(frozen=True)
class ProblemType:
    """A problem type, as RFC 9457 calls it.

    If `detail` is None, the message of the error is the detail. `retry_after` is in
    seconds.
    """

    type: str
    status: int
    title: str
    detail: str | None = None
    retry_after: int | None = None


UNAVAILABLE = ProblemType(
    "/problems/unavailable",
    503,
    "The database is away or busy",
    "Nothing was done: send it again later.",
    5,
)
INVALID_REQUEST = ProblemType(
    "/problems/invalid-request", 422, "The request is incomplete or malformed"
)
INTERNAL = ProblemType(
    "about:blank",
    500,
    "Internal Server Error",
    "This is a fault of the service, which has kept a record of it. "
    "A transfer may be sent again with the same Idempotency-Key: it is booked once.",
)
OUTCOME_UNKNOWN = ProblemType(
    "/problems/outcome-unknown",
    503,
    "It is not known whether this was done",
    "It was interrupted before the database had confirmed it. "
    "A transfer may be sent again with the same Idempotency-Key: it is booked once.",
    1,
)

PROBLEM_TYPES: dict[type[Exception], ProblemType] = {
    UnknownAccount: ProblemType("/problems/unknown-account", 404, "There is no such account"),
    InsufficientFunds: ProblemType(
        "/problems/insufficient-funds", 409, "The payer holds less than the amount"
    ),
    InvalidAmount: ProblemType("/problems/invalid-amount", 422, "This amount can't be booked"),
    InvalidTransfer: ProblemType("/problems/invalid-transfer", 422, "This is not a transfer"),
    IdempotencyConflict: ProblemType(
        "/problems/idempotency-conflict", 422, "The key belongs to another transfer"
    ),
    Busy: ProblemType(
        "/problems/busy", 503, "Too many concurrent transfers at the same accounts", retry_after=1
    ),
    CommitOutcomeUnknownError: OUTCOME_UNKNOWN,
    NotInitializedError: UNAVAILABLE,  # the service is stopping
    OperationalError: UNAVAILABLE,
    InterfaceError: UNAVAILABLE,
    PoolTimeout: UNAVAILABLE,
    OSError: UNAVAILABLE,  # connection refused, or no answer in time
}


def problem_type_of(error: Exception) -> ProblemType:
    """Return the problem type of an error: INTERNAL unless the error is known."""
    for base in type(error).__mro__:
        if base in PROBLEM_TYPES:
            return PROBLEM_TYPES[base]
    state = getattr(getattr(error, "orig", error), "sqlstate", None) or ""
    return (
        UNAVAILABLE if is_retryable(error) or state.startswith(INSUFFICIENT_RESOURCES) else INTERNAL
    )


def problem_responses(*errors: type[Exception]) -> dict[int | str, dict[str, Any]]:
    """Describe the problems of an endpoint for OpenAPI, with those of every endpoint."""
    titles: dict[int | str, list[str]] = {}
    for problem_type in [
        *(PROBLEM_TYPES[error] for error in errors),
        INVALID_REQUEST,
        UNAVAILABLE,
        INTERNAL,
    ]:
        titles.setdefault(problem_type.status, []).append(problem_type.title)
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {
        status: {"description": "; or ".join(alternatives), "content": content}
        for status, alternatives in titles.items()
    }


def install_error_handlers(app: FastAPI) -> None:
    """Make the app answer every error with a problem."""
    for root in (LedgerError, SessionwireError, SQLAlchemyError, PostgresError, OSError):
        app.add_exception_handler(root, _handle_known_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid_request)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(Exception, _handle_unexpected_error)


def cancelled_response(request: Request) -> JSONResponse:
    """Build the response to a request that was cancelled at an unknown point."""
    return _problem_response(request, OUTCOME_UNKNOWN, OUTCOME_UNKNOWN.detail or "")


async def _handle_known_error(request: Request, error: Exception) -> JSONResponse:
    problem_type = problem_type_of(error)
    if problem_type is INTERNAL:
        raise error  # `_handle_unexpected_error` answers it, and the server logs it
    if problem_type.status >= 500:
        cause = getattr(error, "orig", None) or error
        logger.warning(
            "%s %s: %s: %s", request.method, request.url.path, type(cause).__name__, cause
        )
    return _problem_response(request, problem_type, problem_type.detail or str(error))


async def _handle_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors: Sequence[dict[str, Any]] = error.errors()
    detail = "; ".join(f"{' '.join(map(str, each['loc']))}: {each['msg']}" for each in errors)
    return _problem_response(request, INVALID_REQUEST, detail)


async def _handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    problem_type = ProblemType(
        "about:blank", error.status_code, HTTPStatus(error.status_code).phrase
    )
    return _problem_response(request, problem_type, error.detail, error.headers)


async def _handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return _problem_response(request, INTERNAL, INTERNAL.detail or "")


def _problem_response(
    request: Request,
    problem_type: ProblemType,
    detail: str,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        type=problem_type.type,
        title=problem_type.title,
        status=problem_type.status,
        detail=detail,
        instance=request.url.path,
    )
    all_headers = dict(headers or {})
    if problem_type.retry_after is not None:
        all_headers["Retry-After"] = str(problem_type.retry_after)
    return JSONResponse(problem.model_dump(), problem_type.status, all_headers, MEDIA_TYPE)
