"""What quota granted and held for each generation, unknown of records from before; and leaves by their event."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("usage", sa.Column("authorized", sa.JSON))
    op.create_index("leaves_by_event", "leaves", ["event_id"])
