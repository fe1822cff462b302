"""How far the durable had come when this database was as it is: a copy that is put back reads on from there."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "stream_position",
        sa.Column("durable", sa.Text, primary_key=True),
        sa.Column("stream_created", UtcDateTime, nullable=False),
        sa.Column("acknowledged", sa.BigInteger, nullable=False),
        sa.Column("notes", sa.BigInteger, nullable=False),
    )
