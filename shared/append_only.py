"""Tables that only ever grow: the database itself refuses to change what is in them, by triggers.

Migrations make these triggers. Whoever has all rights can take them away, by mistake or for a repair: an audit tells
of it, and a replay puts them back.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, inspect

from shared.database import is_sqlite

# What a statement finds; a `?` in it stands for a value.
Rows = Callable[..., Iterable[tuple[Any, ...]]]


class AppendOnly(NamedTuple):
    """A table, of which only these columns may change. On SQLite an insert that would replace a row is passed over,
    or aborted."""

    table: str
    key: str
    may_change: Collection[str] = ()
    on_replace: Literal["ignore", "abort"] = "ignore"


def unguarded(rows: Rows, table: str, *, on_sqlite: bool) -> list[str]:
    """The table, and each of its partitions, that lacks what refuses a change."""
    if not on_sqlite:
        return [str(name) for (name,) in rows(_UNGUARDED, table, table, f"{table}_is_append_only")]
    there = {name for (name,) in rows(_GUARDS_ON_SQLITE, table)}
    return [] if {f"{table}_refuses_{verb}" for verb in ("update", "delete", "replace")} <= there else [table]


def unguarded_in(db: Connection, table: str) -> list[str]:
    """As `unguarded`, by a connection that also writes."""
    mark = "?" if is_sqlite(db) else "%s"

    def rows(statement: str, *values: str) -> Iterator[tuple[Any, ...]]:
        yield from (tuple(row) for row in db.exec_driver_sql(statement.replace("?", mark), values))

    return unguarded(rows, table, on_sqlite=is_sqlite(db))


def guard(db: Connection, guarded: AppendOnly, name: str) -> None:
    """From now on the database refuses to change the table, or its partition of this name."""
    for statement in _on_sqlite(db, guarded) if is_sqlite(db) else _on_postgresql(db, guarded, name):
        db.exec_driver_sql(statement)


def _on_sqlite(db: Connection, guarded: AppendOnly) -> Iterator[str]:
    table, key, told = guarded.table, guarded.key, f"{guarded.table} is append-only"
    for verb, event in (("update", _update(db, guarded)), ("delete", "DELETE")):
        yield f"DROP TRIGGER IF EXISTS {table}_refuses_{verb}"
        yield (
            f"CREATE TRIGGER {table}_refuses_{verb} BEFORE {event} ON {table}"
            f" BEGIN SELECT RAISE(ABORT, '{told}: {verb} is refused'); END"
        )
    # INSERT OR REPLACE deletes without firing the trigger above.
    passed_over = guarded.on_replace == "ignore"
    refused = "RAISE(IGNORE)" if passed_over else f"RAISE(ABORT, '{told}: replace is refused')"
    yield f"DROP TRIGGER IF EXISTS {table}_refuses_replace"
    yield (
        f"CREATE TRIGGER {table}_refuses_replace BEFORE INSERT ON {table}"  # noqa: S608 - names from the code
        f" WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key}) BEGIN SELECT {refused}; END"
    )


def _on_postgresql(db: Connection, guarded: AppendOnly, table: str) -> Iterator[str]:
    trigger = f"{guarded.table}_is_append_only"
    yield f'DROP TRIGGER IF EXISTS {trigger} ON "{table}"'
    yield (
        f'CREATE TRIGGER {trigger} BEFORE {_update(db, guarded)} OR DELETE OR TRUNCATE ON "{table}"'
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
    # Before 17 who may do none of these may not lock a table either, and a replay has to.
    if (db.dialect.server_version_info or ()) >= (17,):
        rights = "DELETE, TRUNCATE" if guarded.may_change else "UPDATE, DELETE, TRUNCATE"
        yield f'REVOKE {rights} ON "{table}" FROM CURRENT_USER'


def _update(db: Connection, guarded: AppendOnly) -> str:
    if not guarded.may_change:
        return "UPDATE"
    columns = {column["name"] for column in inspect(db).get_columns(guarded.table)}
    return f"UPDATE OF {', '.join(sorted(columns - set(guarded.may_change)))}"


_GUARDS_ON_SQLITE = (
    "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? AND instr(sql, 'RAISE(') > 0"
)
_UNGUARDED = (
    "SELECT relname FROM pg_class WHERE oid IN"
    " (SELECT CAST(? AS regclass) UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = CAST(? AS regclass))"
    " AND NOT EXISTS (SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid WHERE tgrelid = pg_class.oid"
    " AND tgname = ? AND tgenabled IN ('O', 'A') AND position('RAISE EXCEPTION' IN prosrc) > 0) ORDER BY relname"
)
