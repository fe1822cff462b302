"""Holds remember what was asked and which limit decided: a question that is repeated gets the same answer."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # A hold of the release before lives for minutes, and does not know.
    op.add_column("holds", sa.Column("input_tokens_max", sa.BigInteger))
    op.add_column("holds", sa.Column("output_tokens_asked", sa.BigInteger))
    op.add_column("holds", sa.Column("tier", sa.Text))
    op.add_column("holds", sa.Column("period", sa.Text))
    op.add_column("holds", sa.Column("resets_at", UtcDateTime))
