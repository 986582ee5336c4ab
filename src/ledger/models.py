"""The tables: accounts, and transfers. Constraints refuse inconsistent rows."""

from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    String,
    TypeDecorator,
)
from sqlalchemy.orm import Mapped, mapped_column

from sessionwire import Base

MAX_KEY_LENGTH = 200
CENT = Decimal("0.01")
# A BIGINT of cents holds far more, so a balance of many such amounts still fits.
MAX_AMOUNT = Decimal("999_999_999_999.99")

# SQLite generates a primary key only if its type is called INTEGER, which has 64 bits
# there too.
PrimaryKey = BigInteger().with_variant(Integer, "sqlite")


class Money(TypeDecorator[Decimal]):
    """An exact amount, stored as a whole number of cents.

    SQLite has no decimal type, and a float loses money.
    """

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        cents = value.scaleb(2)
        if cents != int(cents):
            raise ValueError(f"{value} is not a whole number of cents")
        return int(cents)

    def process_result_value(self, value: int | Decimal | None, dialect: Dialect) -> Decimal | None:
        # PostgreSQL returns a sum as a decimal, perhaps in the form 1E+6.
        return None if value is None else Decimal(int(value)).scaleb(-2)


class UTCDateTime(TypeDecorator[datetime]):
    """A point in time, always in UTC, because SQLite does not store a time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


class Account(Base):
    """An account with its balance.

    `opening` never changes, so an audit can compute each balance from the tables alone.
    """

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("opening >= 0", name="opening_not_negative"),
        CheckConstraint("balance >= 0", name="no_overdraft"),
    )

    id: Mapped[int] = mapped_column(PrimaryKey, primary_key=True)
    owner: Mapped[str]
    opening: Mapped[Decimal] = mapped_column(Money)
    balance: Mapped[Decimal] = mapped_column(Money)


class Transfer(Base):
    """A transfer from one account to another. The key is unique."""

    __tablename__ = "transfer"
    __table_args__ = (
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint("source_id <> target_id", name="two_accounts"),
    )

    id: Mapped[int] = mapped_column(PrimaryKey, primary_key=True)
    key: Mapped[str] = mapped_column(String(MAX_KEY_LENGTH), unique=True)
    source_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    amount: Mapped[Decimal] = mapped_column(Money)
    booked_at: Mapped[datetime] = mapped_column(UTCDateTime, default=lambda: datetime.now(UTC))
