"""How a table in use differs from one that was built anew."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Date,
    FromClause,
    LargeBinary,
    MetaData,
    Table,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    not_,
    or_,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import NullType

from shared.database import UtcDateTime, is_sqlite, text_or_bytes

EXAMPLES_MAX = 20
# Facts of the moment at which an event was settled.
_NOT_OF_THE_STREAM = ("is_late",)
_JSON_AS_TEXT = ("models",)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a replay would change in one table: how many rows, and the first of them, in words."""

    table: str
    changed: int
    missing: int
    unknown: int
    examples: list[str]

    @property
    def rows(self) -> int:
        return self.changed + self.missing + self.unknown


class Pair:
    """A table in use, and the one that was built."""

    def __init__(self, db: Connection, live: str, table: Table) -> None:
        self._db, self._table = db, table
        self.found, self.expected = in_schema(live, table), table.alias("expected")
        self.same_key = and_(*(self.found.c[name] == self.expected.c[name] for name in key_of(table)))
        self.others = [column.name for column in table.c if column.name not in (*key_of(table), *_NOT_OF_THE_STREAM)]
        self.differs = or_(*(_differs(db, self.found.c[name], self.expected.c[name]) for name in self.others))

    def is_same(self) -> bool:
        """Looks up each row once."""
        found, expected = self._number(self.found), self._number(self.expected)
        if found != expected:
            return False
        return self._number(self.found.join(self.expected, self.same_key), not_(self.differs)) == found

    def _number(self, rows: FromClause, *where: ColumnElement[bool]) -> int:
        return self._db.execute(select(func.count()).select_from(rows).where(*where)).scalar_one()

    def difference(self) -> Difference:
        found, expected, key = self.found, self.expected, key_of(self._table)[0]
        if is_sqlite(self._db):
            driver: Any = self._db.connection.driver_connection
            driver.text_factory = text_or_bytes
        there = [_as_it_is(self._db, column) for column in found.c]
        wanted = [_as_it_is(self._db, expected.c[name], f"expected_{name}") for name in self.others]
        changed = select(*there, *wanted).join(expected, self.same_key).where(self.differs)
        missing = (
            select(*(_as_it_is(self._db, column) for column in expected.c))
            .outerjoin(found, self.same_key)
            .where(found.c[key].is_(None))
        )
        unknown = select(*there).outerjoin(expected, self.same_key).where(expected.c[key].is_(None))
        return _Listing(self._db, self._table).of(changed, missing, unknown, self.others)


def _as_it_is(db: Connection, column: ColumnElement[Any], name: str | None = None) -> ColumnElement[Any]:
    """As the database has it: what somebody wrote into a table in use may be no moment, and no JSON."""
    is_time = isinstance(column.type, UtcDateTime | Date) and db.dialect.name != "sqlite"
    told = cast(column, Text) if is_time else type_coerce(column, NullType())
    return told.label(name or str(column.key))


def _differs(db: Connection, found: Any, expected: Any) -> Any:
    is_another = found.is_distinct_from(expected)
    if not _is_json(found):
        return is_another
    given, found, expected = found, cast(found, Text), cast(expected, Text)
    is_another = found.is_distinct_from(expected)
    if db.dialect.name == "sqlite":
        # As bytes: SQLite hands no text to a function that is no UTF-8.
        says_another = func.canonical(cast(found, LargeBinary)) != func.canonical(cast(expected, LargeBinary))
        return case((~is_another, false()), (func.typeof(given) == "blob", true()), else_=says_another)
    says_another = cast(found, JSONB).is_distinct_from(cast(expected, JSONB))
    return case((~is_another, false()), (func.pg_input_is_valid(found, "jsonb"), says_another), else_=true())


def _is_json(column: Any) -> bool:
    return isinstance(column.type, JSON) or column.name in _JSON_AS_TEXT


def canonical(told: str | bytes | None) -> str | bytes:
    """JSON that is the same where it says the same; what is no JSON, too deep to be read, or names a member twice,
    as it is. None is like nothing else as bytes."""
    if told is None:
        return ""
    try:
        text = told.decode() if isinstance(told, bytes) else told
        return json.dumps(json.loads(text, object_pairs_hook=_members), sort_keys=True)
    except (ValueError, RecursionError):
        return told


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a member is named twice")
    return told


class _Listing:
    """Counts, and the first few rows in words."""

    def __init__(self, db: Connection, table: Table) -> None:
        self._db, self._table = db, table
        self._examples: list[str] = []

    def of(self, changed: Any, missing: Any, unknown: Any, others: Sequence[str]) -> Difference:
        return Difference(
            self._table.name,
            changed=self._count(changed, lambda row: self._changes(row, others)),
            missing=self._count(missing, lambda row: f"{self._name(row)} is missing"),
            unknown=self._count(unknown, lambda row: f"{self._name(row)} is not on the stream"),
            examples=self._examples,
        )

    def _count(self, statement: Any, words: Callable[[Any], str]) -> int:
        number: int = self._db.execute(select(func.count()).select_from(statement.subquery())).scalar_one()
        if number:
            self._examples += [words(row) for row in self._db.execute(statement.limit(EXAMPLES_MAX)).mappings()]
        return number

    def _changes(self, row: Any, others: Sequence[str]) -> str:
        told = [
            f"{name} {_words(row[name])} becomes {_words(row[f'expected_{name}'])}"
            for name in others
            if not self._is_same(name, row[name], row[f"expected_{name}"])
        ]
        return f"{self._name(row)}: {', '.join(told)}"

    def _is_same(self, name: str, found: Any, expected: Any) -> bool:
        if _is_json(self._table.c[name]) and isinstance(found, str) and isinstance(expected, str):
            return canonical(found) == canonical(expected)
        return bool(found == expected)

    def _name(self, row: Any) -> str:
        names = dict.fromkeys([*key_of(self._table), *(name for name in ("user_id",) if name in row)])
        return ", ".join(f"{name} {_words(row[name])}" for name in names)


def _words(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def in_schema(schema: str, table: Table) -> Table:
    return table.to_metadata(MetaData(), schema=schema)


def key_of(table: Table) -> list[str]:
    return [column.name for column in table.primary_key]
