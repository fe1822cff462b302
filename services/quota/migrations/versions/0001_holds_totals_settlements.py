"""Subscriptions, totals, settlements, holds, quarantine."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0001"
down_revision = None


def _counts() -> list[sa.Column[int]]:
    names = (
        "tokens_used",
        "input_tokens",
        "output_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    )
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def upgrade() -> None:
    op.create_table(
        "subscriptions",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("time_zone", sa.Text),
        sa.Column("changed_at", UtcDateTime, nullable=False),
        sa.Column("event_id", sa.Text, nullable=False),
    )
    op.create_table(
        "usage_totals",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("period_start", UtcDateTime, primary_key=True),
        sa.Column("period_end", UtcDateTime, primary_key=True),
        *_counts(),
    )
    op.create_table(
        "settlements",
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        *_counts(),
    )
    op.create_index("settlements_by_user", "settlements", ["user_id", "started_at"])
    op.create_table(
        "holds",
        sa.Column("generation_id", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("period_start", UtcDateTime, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("expires_at", UtcDateTime, nullable=False),
        sa.Column("reported_at", UtcDateTime),
    )
    op.create_index("holds_by_user", "holds", ["user_id", "expires_at"])
    op.create_index("holds_by_expiry", "holds", ["expires_at"])
    op.create_table(
        "quarantine",
        sa.Column("body_sha256", sa.Text, primary_key=True),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False),
    )
