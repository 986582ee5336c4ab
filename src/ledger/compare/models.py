"""The tables of the three services: payments, and the payers known so far."""

from pydantic import BaseModel
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCOUNT_IDS = range(1, 6)  # all accounts that exist
DEPOSIT = 1_000_000  # paid by each known payer before the first request
RETRIES = 20  # of a refund, after a conflict


class Base(DeclarativeBase):
    """The base of the tables."""


class Account(Base):
    """An account that receives payments."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)


class Payer(Base):
    """A payer who has paid before."""

    __tablename__ = "payer"

    name: Mapped[str] = mapped_column(primary_key=True)


class Payment(Base):
    """A payment. A refund has a negative amount."""

    __tablename__ = "payment"

    key: Mapped[str] = mapped_column(primary_key=True)
    payer: Mapped[str]
    account: Mapped[int] = mapped_column(
        ForeignKey(Account.id, deferrable=True, initially="DEFERRED")
    )
    amount: Mapped[int]


class Order(BaseModel):
    """The body of a request."""

    key: str
    payer: str
    account: int
    amount: int
