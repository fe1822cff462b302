"""Many rows at the price of few: inserted, each once, updated, or added up."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from pydantic_core import to_json
from sqlalchemy import JSON, Connection, Date, FromClause, Table, Text, bindparam, cast, func, select
from sqlalchemy.dialects import postgresql

from shared.database import Rows, UtcDateTime, is_sqlite, iso, isos
from shared.prepared import execute_last, execute_many

Item = TypeVar("Item")
_POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]


class Outcome(Enum):
    """What became of a row whose primary key decides whether it is new."""

    NEW = "new"
    REPEATED = "repeated"
    # The key is there with other values, which stay.
    CONTRADICTING = "contradicting"


def insert_once(db: Connection, table: Table, rows: Rows) -> list[Outcome]:
    """Insert each row whose key, one column of text, is new; of several with the same key, the first.

    The rows name the same columns; values are what JSON has, and moments. What a row does not name may differ.
    """
    if not rows:
        return []
    key = _key(table)
    firsts: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        firsts.setdefault(row[key], row)
    # Sorted: two replicas that were handed the same rows wait for each other instead of deadlocking.
    insert = _insert_into_sqlite if is_sqlite(db) else _insert_into_postgresql
    new = insert(db, table, [firsts[value] for value in sorted(firsts)])
    if len(new) == len(rows):
        return [Outcome.NEW] * len(rows)
    known = select(table).where(table.c[key].in_(firsts.keys() - new))
    there = firsts | {row[key]: dict(row) for row in db.execute(known).mappings()}
    return [_outcome(row, there[row[key]], is_new=row[key] in new) for row in rows]


def insert_last(db: Connection, table: Table, columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert those whose key is new, for somebody who waits, as the last of a transaction. A row has its values in
    the order of `columns`: texts, numbers and moments."""
    if not rows:
        return
    if is_sqlite(db):
        insert = f"{_sqlite_statements(table, columns)[1]} ON CONFLICT DO NOTHING"
        values = [[iso(value) if isinstance(value, datetime) else value for value in row] for row in rows]
        execute_many(db, insert, values)
    else:
        arrays = [to_json(of_column).decode() for of_column in zip(*rows, strict=True)]
        execute_last(db, _postgresql_statement(table, columns), arrays)


def sorted_out(items: Sequence[Item], outcomes: Sequence[Outcome]) -> tuple[list[Item], list[Item]]:
    """Those that were new, and those that contradict an earlier one."""
    told = list(zip(items, outcomes, strict=True))
    new = [item for item, outcome in told if outcome is Outcome.NEW]
    return new, [item for item, outcome in told if outcome is Outcome.CONTRADICTING]


def _outcome(row: Mapping[str, Any], there: Mapping[str, Any], *, is_new: bool) -> Outcome:
    if is_new and row is there:
        return Outcome.NEW
    is_same = all(there[name] == value for name, value in row.items())
    return Outcome.REPEATED if is_same else Outcome.CONTRADICTING


def update_each(
    db: Connection,
    table: Table,
    key: tuple[str, ...],
    *,
    adding: tuple[str, ...],
    setting: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
) -> None:
    """Each row is a key, what is added to the columns `adding`, and what the columns `setting` become."""
    columns = (*key, *adding, *setting)
    if is_sqlite(db):
        statement = _sqlite_update(table, key, adding, setting)
        # Its parameters are in another order: what is set, then the key.
        by_column = [_sqlite_column(table, name, [row[n] for row in rows]) for n, name in enumerate(columns)]
        ordered = [*by_column[len(key) :], *by_column[: len(key)]]
        db.exec_driver_sql(statement, list(zip(*ordered, strict=True)))
    else:
        arrays = [to_json([row[n] for row in rows]).decode() for n in range(len(columns))]
        db.exec_driver_sql(_postgresql_update(table, key, adding, setting), tuple(arrays))


def add_up(db: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert each row, or add its counts to those of the row that is there. Counts are what is not in the key.

    Each key comes once; a row has all columns in the table's order, its key first.
    """
    if not rows:
        return
    # Sorted: replicas that add to the same rows wait for each other instead of deadlocking.
    columns = list(zip(table.c, zip(*sorted(rows), strict=True), strict=True))
    if is_sqlite(db):
        values = [_sqlite_column(table, column.name, list(of_column)) for column, of_column in columns]
        db.exec_driver_sql(_sqlite_sum(table), list(zip(*values, strict=True)))
    else:
        db.exec_driver_sql(_postgresql_sum(table), tuple(to_json(of_column).decode() for _, of_column in columns))


@cache
def _sqlite_sum(table: Table) -> str:
    columns = tuple(column.name for column in table.c)
    insert = f'INSERT INTO "{table.name}" ({_names(columns)}) VALUES ({", ".join("?" * len(columns))})'  # noqa: S608
    return f"{insert} {_or_add(table)}"


@cache
def _postgresql_sum(table: Table) -> str:
    columns = tuple(column.name for column in table.c)
    arrived = f"SELECT {_casts(table, columns)} FROM {_arrays(columns)}"  # noqa: S608
    return f'INSERT INTO "{table.name}" ({_names(columns)}) {arrived} {_or_add(table)}'


def _or_add(table: Table) -> str:
    key = tuple(column.name for column in table.primary_key)
    sums = [f'"{c.name}" = "{table.name}"."{c.name}" + excluded."{c.name}"' for c in table.c if c.name not in key]
    return f"ON CONFLICT ({_names(key)}) DO UPDATE SET {', '.join(sums)}"


@cache
def _sqlite_update(table: Table, key: tuple[str, ...], adding: tuple[str, ...], setting: tuple[str, ...]) -> str:
    changes = [f'"{name}" = "{name}" + ?' for name in adding] + [f'"{name}" = ?' for name in setting]
    which = " AND ".join(f'"{name}" = ?' for name in key)
    return f'UPDATE "{table.name}" SET {", ".join(changes)} WHERE {which}'  # noqa: S608


@cache
def _postgresql_update(table: Table, key: tuple[str, ...], adding: tuple[str, ...], setting: tuple[str, ...]) -> str:
    columns = (*key, *adding, *setting)
    changes = [f'"{name}" = t."{name}" + a."{name}"' for name in adding]
    changes += [f'"{name}" = a."{name}"' for name in setting]
    which = " AND ".join(f't."{name}" = a."{name}"' for name in key)
    arrived = f"(SELECT {_casts(table, columns)} FROM {_arrays(columns)})"  # noqa: S608
    return f'UPDATE "{table.name}" AS t SET {", ".join(changes)} FROM {arrived} AS a WHERE {which}'  # noqa: S608


def _casts(table: Table, columns: tuple[str, ...]) -> str:
    types = [table.c[name].type.compile(_POSTGRESQL) for name in columns]
    return ", ".join(f'CAST("{name}" AS {kind}) AS "{name}"' for name, kind in zip(columns, types, strict=True))


def _arrays(columns: tuple[str, ...]) -> str:
    """One parameter a column, a JSON array, as rows."""
    arrays = ", ".join(["json_array_elements_text(CAST(%s AS json))"] * len(columns))
    return f"ROWS FROM ({arrays}) AS arrived ({_names(columns)})"


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def listed(dialect: str, parameter: str) -> FromClause:
    """A parameter that is a JSON array of texts, as rows of `item`: one statement asks about one or five hundred."""
    items = bindparam(parameter, type_=Text)
    if dialect == "sqlite":
        return select(func.json_each(items).table_valued("value").c.value.label("item")).subquery("listed")
    return select(func.json_array_elements_text(cast(items, JSON)).column_valued("item")).subquery("listed")


def _key(table: Table) -> str:
    (column,) = table.primary_key
    return str(column.name)


def _insert_into_sqlite(db: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    # Nobody else writes meanwhile. RETURNING would cost a statement a row, or one with a parameter for each value.
    columns = tuple(rows[0])
    find, insert = _sqlite_statements(table, columns)
    key = _key(table)
    known = set(db.exec_driver_sql(find, (json.dumps([row[key] for row in rows]),)).scalars())
    arriving = [row for row in rows if row[key] not in known] if known else rows
    if arriving:
        values = [_sqlite_column(table, name, [row[name] for row in arriving]) for name in columns]
        db.exec_driver_sql(insert, list(zip(*values, strict=True)))
    return {row[key] for row in arriving}


@cache
def _sqlite_statements(table: Table, columns: tuple[str, ...]) -> tuple[str, str]:
    key, names = _key(table), _names(columns)
    listed = f'SELECT value FROM json_each(?) WHERE EXISTS (SELECT 1 FROM "{table.name}" WHERE "{key}" = value)'  # noqa: S608
    return listed, f'INSERT INTO "{table.name}" ({names}) VALUES ({", ".join("?" * len(columns))})'  # noqa: S608


def _sqlite_column(table: Table, name: str, values: list[Any]) -> Iterable[Any]:
    """As SQLAlchemy writes them, without asking it about each."""
    kind = table.c[name].type
    if isinstance(kind, UtcDateTime):
        return isos(values)
    if isinstance(kind, Date):
        return [None if value is None else value.isoformat() for value in values]
    if isinstance(kind, JSON):
        return [None if value is None else to_json(value).decode() for value in values]
    return values


def _insert_into_postgresql(db: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    # A JSON array a column costs this process a tenth of a parameter a value, and the server less than JSON objects.
    columns = tuple(rows[0])
    arrays = [to_json([row[name] for row in rows]).decode() for name in columns]
    return set(db.exec_driver_sql(_postgresql_statement(table, columns), tuple(arrays)).scalars())


@cache
def _postgresql_statement(table: Table, columns: tuple[str, ...]) -> str:
    return (
        f'INSERT INTO "{table.name}" ({_names(columns)}) SELECT {_casts(table, columns)} FROM {_arrays(columns)}'  # noqa: S608
        f' ON CONFLICT DO NOTHING RETURNING "{_key(table)}"'
    )
