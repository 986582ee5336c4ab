"""Accounts and transfers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# Types are spelled out: a migration must not change with the models.
key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
cents = sa.BigInteger()


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("id", key, nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("opening", cents, nullable=False),
        sa.Column("balance", cents, nullable=False),
        sa.CheckConstraint("opening >= 0", name=op.f("ck_account_opening_not_negative")),
        sa.CheckConstraint("balance >= 0", name=op.f("ck_account_no_overdraft")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
    )
    op.create_table(
        "transfer",
        sa.Column("id", key, nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("source_id", key, nullable=False),
        sa.Column("target_id", key, nullable=False),
        sa.Column("amount", cents, nullable=False),
        sa.Column("booked_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("amount > 0", name=op.f("ck_transfer_amount_positive")),
        sa.CheckConstraint("source_id <> target_id", name=op.f("ck_transfer_two_accounts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transfer")),
        sa.UniqueConstraint("key", name=op.f("uq_transfer_key")),
        *(
            sa.ForeignKeyConstraint(
                [column], ["account.id"], name=op.f(f"fk_transfer_{column}_account")
            )
            for column in ("source_id", "target_id")
        ),
    )
    for column in ("source_id", "target_id"):
        op.create_index(op.f(f"ix_transfer_{column}"), "transfer", [column])


def downgrade() -> None:
    op.drop_table("transfer")
    op.drop_table("account")
