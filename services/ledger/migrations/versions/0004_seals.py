"""A leaf for each message of the stream and the sealed heads of the tree over them, both append-only."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0004"
down_revision = "0003"

APPEND_ONLY = {"leaves": "stream_sequence", "seals": "tree_size"}
# On SQLite this spelling alone makes the key the row's own number, instead of an index beside it.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "leaves",
        sa.Column("stream_sequence", KEY, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.Text),
        sa.Column("leaf_hash", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "seals",
        sa.Column("tree_size", KEY, primary_key=True, autoincrement=False),
        sa.Column("root_hash", sa.LargeBinary, nullable=False),
        sa.Column("subtrees", sa.LargeBinary, nullable=False),
        sa.Column("sealed_at", UtcDateTime, nullable=False),
        sa.Column("signature", sa.LargeBinary),
        sa.Column("key_id", sa.Text),
    )
    for table, key in APPEND_ONLY.items():
        if op.get_bind().dialect.name == "sqlite":
            _append_only_on_sqlite(table, key)
        else:
            op.execute(
                f"CREATE TRIGGER {table}_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
            )


def _append_only_on_sqlite(table: str, key: str) -> None:
    for verb in ("update", "delete"):
        op.execute(
            f"CREATE TRIGGER {table}_refuses_{verb} BEFORE {verb.upper()} ON {table}"
            f" BEGIN SELECT RAISE(ABORT, '{table} is append-only: {verb} is refused'); END"
        )
    # INSERT OR REPLACE deletes without firing the trigger above.
    op.execute(
        f"CREATE TRIGGER {table}_refuses_replace BEFORE INSERT ON {table}"  # noqa: S608 - names from above
        f" WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key})"
        f" BEGIN SELECT RAISE(ABORT, '{table} is append-only: replace is refused'); END"
    )
