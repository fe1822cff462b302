"""What a reader's going away did to the answer: stop or drain. Unknown of records from before."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("usage", sa.Column("on_disconnect", sa.Text))
