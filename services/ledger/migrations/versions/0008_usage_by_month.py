"""On PostgreSQL `usage` is partitioned by month. What there is becomes its first partition, as it is."""

from datetime import UTC, date, datetime

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

INDEXES = {"usage_by_time": "user_id, created_at, id", "usage_by_date": "user_id, usage_date"}
# From nothing: where nobody was ever granted anything, the owner has all rights, and the list is empty.
GRANTS = (
    "SELECT format('REVOKE ALL ON usage FROM %I', pg_get_userbyid(relowner)) FROM pg_class"
    " WHERE oid = CAST('usage' AS regclass) AND relacl IS NOT NULL"
    " UNION ALL SELECT format('GRANT %s ON usage TO %s%s', privilege_type,"
    " CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,"
    " CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)"
    " FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = CAST('usage' AS regclass)"
)


def upgrade() -> None:
    db = op.get_bind()
    if db.dialect.name == "sqlite":
        return
    op.execute("LOCK TABLE usage IN ACCESS EXCLUSIVE MODE")
    grants = list(db.execute(sa.text(GRANTS)).scalars())
    # Byte by byte ids sort by time, whatever language the database is of. Only indexes are built anew.
    op.execute('ALTER TABLE usage ALTER COLUMN id TYPE text COLLATE "C"')
    month = _next_month(db)
    before = f"usage_before_{month:%Y_%m}"
    op.execute(f"ALTER TABLE usage RENAME TO {before}")
    op.execute(f"ALTER TABLE {before} RENAME CONSTRAINT usage_pkey TO {before}_pkey")
    for index in INDEXES:
        op.execute(f"ALTER INDEX {index} RENAME TO {index.replace('usage', before)}")
    op.execute(f"CREATE TABLE usage (LIKE {before} INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (id)")
    op.execute("CREATE TABLE usage_default (LIKE usage INCLUDING ALL)")
    _move_what_lies_beyond(db, before, _least_id(month))
    op.execute(f"ALTER TABLE usage ATTACH PARTITION {before} FOR VALUES FROM (MINVALUE) TO ('{_least_id(month)}')")
    op.execute("ALTER TABLE usage ATTACH PARTITION usage_default DEFAULT")
    op.execute("ALTER TABLE usage ADD CONSTRAINT usage_pkey PRIMARY KEY (id)")
    for index, columns in INDEXES.items():
        op.execute(f"CREATE INDEX {index} ON usage ({columns})")
    for table in ("usage", "usage_default"):
        op.execute(
            f"CREATE TRIGGER usage_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
    for grant in grants:
        op.execute(grant)
    if (db.dialect.server_version_info or ()) >= (17,):
        op.execute("REVOKE UPDATE, DELETE, TRUNCATE ON usage_default FROM CURRENT_USER")


def _next_month(db: sa.Connection) -> date:
    now: datetime = db.execute(sa.text("SELECT now()")).scalar_one()
    today = now.astimezone(UTC).date()
    return date(today.year + today.month // 12, today.month % 12 + 1, 1)


def _least_id(month: date) -> str:
    """The first 13 characters of a UUIDv7 are its millisecond."""
    milliseconds = int(datetime(month.year, month.month, 1, tzinfo=UTC).timestamp() * 1000)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}"


def _move_what_lies_beyond(db: sa.Connection, before: str, least_id: str) -> None:
    """Ids that are no UUIDv7, if there are any."""
    beyond = f"FROM {before} WHERE id >= '{least_id}'"
    if db.execute(sa.text(f"SELECT 1 {beyond} LIMIT 1")).first():
        op.execute(f"GRANT DELETE ON {before} TO CURRENT_USER")
        op.execute(f"ALTER TABLE {before} DISABLE TRIGGER USER")
        op.execute(f"INSERT INTO usage_default SELECT * {beyond}")
        op.execute(f"DELETE {beyond}")
        op.execute(f"ALTER TABLE {before} ENABLE TRIGGER USER")
        op.execute(f"REVOKE DELETE ON {before} FROM CURRENT_USER")
