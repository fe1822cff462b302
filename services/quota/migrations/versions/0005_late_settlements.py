"""Late settlements are found without looking at all: the stream does not know them, and a replay keeps them."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    is_late = sa.text("is_late")
    op.create_index("late_settlements", "settlements", ["event_id"], sqlite_where=is_late, postgresql_where=is_late)
