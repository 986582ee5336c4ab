"""The HTTP API. Amounts are strings such as "10.00"."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sessionwire import CommitOutcomeUnknownError, Lifespan
from sessionwire.asgi import HealthApp, StatusPage
from sessionwire.fastapi import Provide, inject

from .container import Container
from .errors import InvalidAmount, LedgerError, UnknownAccount
from .models import Account, Transfer
from .problems import install_error_handlers, problem_responses
from .services import AccountService, TransferService

# Strings, because many JSON libraries read and write a number as a float.
Amount = Annotated[str, StringConstraints(pattern=r"^-?[0-9]+(\.[0-9]+)?$", max_length=40)]
Owner = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=200)]
RowId = Annotated[int, Field(ge=0, le=2**63 - 1)]  # a BIGINT

Accounts = Annotated[AccountService, Provide[Container.accounts]]
Transfers = Annotated[TransferService, Provide[Container.transfers]]


class RequestBody(BaseModel):
    # Strict: `true` must not be read as account 1.
    model_config = ConfigDict(extra="forbid", strict=True)


class NewAccount(RequestBody):
    owner: Owner
    opening: Amount


class NewTransfer(RequestBody):
    source: RowId
    target: RowId
    amount: Amount


class OpenedAccount(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    owner: str
    opening: Decimal


class Balance(BaseModel):
    account: int
    balance: Decimal


class BookedTransfer(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    key: str
    source_id: int
    target_id: int
    amount: Decimal
    booked_at: datetime


class Statement(BaseModel):
    transfers: list[BookedTransfer]
    next: str | None


router = APIRouter()


@router.post(
    "/accounts",
    status_code=201,
    response_model=OpenedAccount,
    responses=problem_responses(InvalidAmount, CommitOutcomeUnknownError),
)
@inject
async def open_account(new: NewAccount, response: Response, accounts: Accounts) -> Account:
    account = await accounts.open(new.owner, Decimal(new.opening))
    response.headers["Location"] = router.url_path_for("balance", account=account.id)
    return account


@router.get("/accounts/{account}/balance", responses=problem_responses(UnknownAccount))
@inject
async def balance(account: RowId, accounts: Accounts) -> Balance:
    return Balance(account=account, balance=await accounts.balance(account))


@router.get("/accounts/{account}/statement", responses=problem_responses(UnknownAccount))
@inject
async def statement(
    account: RowId,
    accounts: Accounts,
    before: RowId | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Statement:
    """Return one page, the newest transfer first, and the path of the next page."""
    found = await accounts.statement(account, before=before, limit=limit + 1)
    page = [BookedTransfer.model_validate(transfer) for transfer in found[:limit]]
    path = router.url_path_for("statement", account=account)
    return Statement(
        transfers=page,
        next=f"{path}?before={page[-1].id}&limit={limit}" if len(found) > limit else None,
    )


@router.post(
    "/transfers",
    status_code=201,
    response_model=BookedTransfer,
    responses=problem_responses(*LedgerError.__subclasses__(), CommitOutcomeUnknownError),
)
@inject
async def transfer(
    new: NewTransfer, idempotency_key: Annotated[str, Header()], transfers: Transfers
) -> Transfer:
    """Move money, once per Idempotency-Key.

    A repeated request gets the first transfer as its answer.
    """
    return await transfers.transfer(new.source, new.target, Decimal(new.amount), idempotency_key)


def create_app(container: Container) -> FastAPI:
    """Build the app, which opens and closes the container.

    A process can run one app at a time, because wiring changes this module.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with Lifespan(container, migrations="upgrade"):
            container.wire(modules=[__name__])
            try:
                yield
            finally:
                container.unwire()

    app = FastAPI(title="Ledger", lifespan=lifespan)
    app.include_router(router)
    app.mount("/health", HealthApp(container, reasons=False))
    app.mount("/status", StatusPage(container))  # a proxy keeps it from the clients
    install_error_handlers(app)
    return app
