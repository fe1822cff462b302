"""Days are found by the moments that they begin and end: an index by date would be paid for by every event."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.drop_index("usage_by_date", "usage")
