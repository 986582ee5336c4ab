"""What all three services write: payments, and who has paid before."""

from pydantic import BaseModel
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCOUNTS = range(1, 6)  # there are no others
DEPOSIT = 1_000_000  # what each regular payer has paid before the first request
RETRIES = 20  # of a refund that others got in the way of


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)


class Payer(Base):
    """Who has paid before."""

    __tablename__ = "payer"

    name: Mapped[str] = mapped_column(primary_key=True)


class Payment(Base):
    """A refund is a negative one."""

    __tablename__ = "payment"

    key: Mapped[str] = mapped_column(primary_key=True)
    payer: Mapped[str]
    account: Mapped[int] = mapped_column(ForeignKey(Account.id, deferrable=True, initially="DEFERRED"))
    amount: Mapped[int]


class Order(BaseModel):
    """The body of a request."""

    key: str
    payer: str
    account: int
    amount: int
