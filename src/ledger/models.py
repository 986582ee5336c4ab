"""The books: accounts, and the transfers between them. The database itself refuses what would make them wrong."""

from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Dialect, ForeignKey, Integer, String, TypeDecorator
from sqlalchemy.orm import Mapped, mapped_column

from sessionwire import Base, DatabaseSessionManager

KEY_LENGTH = 200
CENT = Decimal("0.01")
# Far below what a BIGINT of cents holds, so that a balance of many such amounts still fits.
LARGEST_AMOUNT = Decimal("999_999_999_999.99")

# SQLite numbers its rows only where the primary key is called INTEGER; it has 64 bits there too.
AccountNumber = BigInteger().with_variant(Integer, "sqlite")


class Money(TypeDecorator[Decimal]):
    """An exact amount, kept as a whole number of cents: SQLite has no decimal type, and a float loses money."""

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
        # A sum comes back from PostgreSQL as a decimal, which may be written 1E+6.
        return None if value is None else Decimal(int(value)).scaleb(-2)


class Moment(TypeDecorator[datetime]):
    """A point in time, in UTC on every database: SQLite forgets the time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


class Account(Base):
    """Holds money. `opening` never changes, so the books can be checked from themselves alone."""

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("opening >= 0", name="opening_not_negative"),
        CheckConstraint("balance >= 0", name="no_overdraft"),
    )

    id: Mapped[int] = mapped_column(AccountNumber, primary_key=True)
    owner: Mapped[str]
    opening: Mapped[Decimal] = mapped_column(Money)
    balance: Mapped[Decimal] = mapped_column(Money)


class Transfer(Base):
    """Money that went from one account to another, once per key."""

    __tablename__ = "transfer"
    __table_args__ = (
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint("source_id <> target_id", name="two_accounts"),
    )

    id: Mapped[int] = mapped_column(AccountNumber, primary_key=True)
    key: Mapped[str] = mapped_column(String(KEY_LENGTH), unique=True)
    source_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    amount: Mapped[Decimal] = mapped_column(Money)
    booked_at: Mapped[datetime] = mapped_column(Moment, default=lambda: datetime.now(UTC))


async def create_tables(manager: DatabaseSessionManager) -> None:
    """Those that are not there yet."""
    async with manager.connect() as connection:
        await manager.create_all(connection)
