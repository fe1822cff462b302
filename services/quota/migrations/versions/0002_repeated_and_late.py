"""Holds remember what was granted and when; settlements, whether they came after their hold had expired."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("holds", sa.Column("output_tokens", sa.BigInteger, nullable=False, server_default="0"))
    # A hold of the release before lives for minutes, and counts in the period that it names.
    op.add_column(
        "holds", sa.Column("started_at", UtcDateTime, nullable=False, server_default="1970-01-01T00:00:00Z")
    )
    op.execute("UPDATE holds SET started_at = period_start")
    op.add_column("settlements", sa.Column("is_late", sa.Boolean, nullable=False, server_default=sa.false()))
