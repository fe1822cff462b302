"""On PostgreSQL the service's role has no right to change or delete a record, beside the trigger that refuses it."""

from alembic import op

revision = "0005"
down_revision = "0004"

APPEND_ONLY = ("usage", "subscription_changes", "leaves", "seals")


def upgrade() -> None:
    dialect = op.get_bind().dialect
    # Before 17 who may do none of these may not lock a table either, and a replay has to.
    if dialect.name == "postgresql" and (dialect.server_version_info or ()) >= (17,):
        for table in APPEND_ONLY:
            op.execute(f"REVOKE UPDATE, DELETE, TRUNCATE ON {table} FROM CURRENT_USER")
