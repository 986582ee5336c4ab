"""The ledger over HTTP. Amounts are texts such as "10.00", and every refusal is a problem (see `problems`)."""
# pyright: reportUnknownMemberType=false
# The providers of a nested container have no types in dependency-injector.

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Annotated, cast

from fastapi import APIRouter, FastAPI, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import text

from sessionwire import CommitOutcomeUnknownError, DatabaseSessionManager, Lifespan, Propagation
from sessionwire.fastapi import Provide, inject

from .container import Container
from .errors import InvalidAmount, LedgerError, UnknownAccount
from .models import Account, Transfer, create_tables
from .problems import add_problems, described
from .services import AccountService, TransferService

READY_WITHIN = 2.0  # seconds

# A JSON number would reach us as a float, or leave the caller as one.
Amount = Annotated[str, StringConstraints(pattern=r"^-?[0-9]+(\.[0-9]+)?$", max_length=40)]
Owner = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=200)]
Number = Annotated[int, Field(ge=0, le=2**63 - 1)]  # as large as a database has room for

Accounts = Annotated[AccountService, Provide[Container.accounts]]
Transfers = Annotated[TransferService, Provide[Container.transfers]]
Manager = Annotated[DatabaseSessionManager, Provide[Container.db.sessionmanager]]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # where money moves, true is not account 1


class NewAccount(Request):
    owner: Owner
    opening: Amount


class NewTransfer(Request):
    source: Number
    target: Number
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


class Health(BaseModel):
    status: str


router = APIRouter()


@router.post(
    "/accounts",
    status_code=201,
    response_model=OpenedAccount,
    responses=described(InvalidAmount, CommitOutcomeUnknownError),
)
@inject
async def open_account(new: NewAccount, response: Response, accounts: Accounts) -> Account:
    account = await accounts.open(new.owner, Decimal(new.opening))
    response.headers["Location"] = router.url_path_for("balance", account=account.id)
    return account


@router.get("/accounts/{account}/balance", responses=described(UnknownAccount))
@inject
async def balance(account: Number, accounts: Accounts) -> Balance:
    return Balance(account=account, balance=await accounts.balance(account))


@router.get("/accounts/{account}/statement", responses=described(UnknownAccount))
@inject
async def statement(
    account: Number,
    accounts: Accounts,
    before: Number | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Statement:
    """A page, the newest transfer first; `next` is where the following one is."""
    found = await accounts.statement(account, before=before, limit=limit + 1)
    page = [BookedTransfer.model_validate(transfer) for transfer in found[:limit]]
    path = router.url_path_for("statement", account=account)
    return Statement(transfers=page, next=f"{path}?before={page[-1].id}&limit={limit}" if len(found) > limit else None)


@router.post(
    "/transfers",
    status_code=201,
    response_model=BookedTransfer,
    responses=described(*LedgerError.__subclasses__(), CommitOutcomeUnknownError),
)
@inject
async def transfer(new: NewTransfer, idempotency_key: Annotated[str, Header()], transfers: Transfers) -> Transfer:
    """Money is moved once per Idempotency-Key: the same sent again is answered with the same transfer."""
    return await transfers.transfer(new.source, new.target, Decimal(new.amount), idempotency_key)


@router.get("/health/live")
async def live() -> Health:
    """Whether the process answers, whatever the database does."""
    return Health(status="live")


@router.get("/health/ready", responses=described())
@inject
async def ready(manager: Manager) -> Health:
    """Whether the database answers, and a connection to it is to be had."""
    async with asyncio.timeout(READY_WITHIN), manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
        await session.execute(text("SELECT 1"))
    return Health(status="ready")


def create_app(container: Container) -> FastAPI:
    """The app, which opens and closes the container. In one process one app at a time: wiring is the module's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with Lifespan(container):
            await create_tables(cast(DatabaseSessionManager, container.db.sessionmanager()))
            container.wire(modules=[__name__])
            try:
                yield
            finally:
                container.unwire()

    app = FastAPI(title="Ledger", lifespan=lifespan)
    app.include_router(router)
    add_problems(app)
    return app
