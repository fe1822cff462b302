"""What is settled and what was changed stays as it is: the database itself refuses to change or delete it.

That a settlement came late is noted afterwards, and is the one thing of it that may change.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

MAY_CHANGE = {"settlements": {"is_late"}, "plan_changes": set[str]()}
KEY = "event_id"


def upgrade() -> None:
    connection = op.get_bind()
    is_sqlite = connection.dialect.name == "sqlite"
    if not is_sqlite:
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, lower(TG_OP); END $$"
        )
    for table, may_change in MAY_CHANGE.items():
        columns = {column["name"] for column in sa.inspect(connection).get_columns(table)}
        update = f"UPDATE OF {', '.join(sorted(columns - may_change))}"
        if is_sqlite:
            _append_only_on_sqlite(table, update)
        else:
            _append_only_on_postgresql(
                table, update, rights="DELETE, TRUNCATE" if may_change else "UPDATE, DELETE, TRUNCATE"
            )


def _append_only_on_sqlite(table: str, update: str) -> None:
    for verb, event in (("update", update), ("delete", "DELETE")):
        op.execute(
            f"CREATE TRIGGER {table}_refuses_{verb} BEFORE {event} ON {table}"
            f" BEGIN SELECT RAISE(ABORT, '{table} is append-only: {verb} is refused'); END"
        )
    # INSERT OR REPLACE deletes without firing the trigger above. A key that exists is passed over instead.
    op.execute(
        f"CREATE TRIGGER {table}_refuses_replace BEFORE INSERT ON {table}"  # noqa: S608 - names from above
        f" WHEN EXISTS (SELECT 1 FROM {table} WHERE {KEY} = NEW.{KEY})"
        " BEGIN SELECT RAISE(IGNORE); END"
    )


def _append_only_on_postgresql(table: str, update: str, rights: str) -> None:
    op.execute(
        f"CREATE TRIGGER {table}_is_append_only BEFORE {update} OR DELETE OR TRUNCATE ON {table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
    # Before 17 who may do none of these may not lock a table either, and a replay has to.
    if (op.get_bind().dialect.server_version_info or ()) >= (17,):
        op.execute(f"REVOKE {rights} ON {table} FROM CURRENT_USER")
