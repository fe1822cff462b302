"""Both databases as auditors read them: each in one snapshot, with statements of their own, and never written to.

What is compared is what the driver gives, so that a record costs a few microseconds: an expected row is told in the
same terms (`Copy.row`).
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import date, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg
from pydantic_core import to_json
from sqlalchemy import URL, make_url

from services.ledger.scope import Scope
from shared.database import damaged, is_damaged, iso, shown, text_or_bytes
from shared.differences import canonical
from shared.errors import Misconfigured

Row = tuple[Any, ...]
MOMENTS = frozenset({"created_at", "completed_at", "changed_at", "started_at", "subscribed_at"})
BATCH_SIZE = 1000


class Layout(NamedTuple):
    """What of a table is compared: its key first, and the column that says when it happened."""

    service: str
    table: str
    columns: tuple[str, ...]
    moment: str

    @property
    def name(self) -> str:
        return f"{self.service}.{self.table}"


class Snapshot:
    """A database at one moment. What was committed before it was opened is in it, and nothing that came later."""

    def __init__(self, service: str, url: URL, connection: Any) -> None:
        self._service, self._url, self._connection = service, url, connection
        self.is_sqlite = url.get_backend_name() == "sqlite"

    def rows(self, statement: str, *values: Any) -> Iterator[Row]:
        """A `?` in the statement stands for a value. Rows come as they are asked for: there may be very many.

        Raises Misconfigured where they cannot be read; `find` does, too.
        """
        with _readable(self._service, self._url):
            if self.is_sqlite:
                yield from self._rows(statement, values)
            else:
                yield from self._stream(statement.replace("?", "%s"), values)

    def _rows(self, statement: str, values: Sequence[Any]) -> Iterator[Row]:
        seen = 0
        try:
            for row in self._connection.execute(statement, values):
                yield row
                seen += 1
        except sqlite3.OperationalError as error:
            self._take_any_text(error)
            yield from islice(self._connection.execute(statement, values), seen, None)

    def _take_any_text(self, error: sqlite3.OperationalError) -> None:
        """What is no UTF-8 comes as bytes from now on. To look at each text for itself would cost every audit.

        Raises the error when it is another.
        """
        if not str(error).startswith("Could not decode to UTF-8") or self._connection.text_factory is not str:
            raise error
        self._connection.text_factory = text_or_bytes

    def _stream(self, statement: str, values: Sequence[Any]) -> Iterator[Row]:
        with self._connection.cursor("audit", binary=True) as cursor:
            cursor.itersize = BATCH_SIZE
            cursor.execute(statement, values)
            yield from cursor

    def find(self, statement: str, keys: Sequence[str]) -> list[Row]:
        """What a statement finds that ends with `listed(key)`."""
        with _readable(self._service, self._url):
            if self.is_sqlite:
                return list(self._rows(statement, (json.dumps(keys),)))
            return list(self._connection.execute(statement, (list(keys),), binary=True).fetchall())

    def listed(self, key: str) -> str:
        """A condition: `key` is one of those that are handed to `find`."""
        return f'"{key}" IN (SELECT value FROM json_each(?))' if self.is_sqlite else f'"{key}" = ANY(%s)'  # noqa: S608

    def time(self, moment: datetime) -> Any:
        """As this database keeps it."""
        return iso(moment) if self.is_sqlite else moment

    def day(self, day: date) -> Any:
        """As this database keeps it."""
        return day.isoformat() if self.is_sqlite else day


@contextmanager
def snapshot(service: str, url: str, tables: Sequence[str]) -> Iterator[Snapshot]:
    """Raises Misconfigured where there is no such database, or not these tables in it."""
    parsed = make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    with _readable(service, parsed):
        connection: Any = _sqlite(service, Path(parsed.database or "")) if is_sqlite else _postgres(parsed)
    # Of what goes wrong while somebody reads it, another database may be the cause.
    with closing(connection):
        with _readable(service, parsed):
            (_begin_sqlite if is_sqlite else _begin_postgres)(connection, tables)
        yield Snapshot(service, parsed, connection)


@contextmanager
def _readable(service: str, parsed: URL) -> Iterator[None]:
    """Raises Misconfigured, naming this database, where it cannot be read."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.ProgrammingError, sqlite3.OperationalError) as error:
        raise Misconfigured(f"{service}'s database {shown(parsed)} cannot be read: {str(error).strip()}") from error
    except sqlite3.DatabaseError as error:
        if not is_damaged(error):
            raise
        raise damaged(parsed.database) from error


def _sqlite(service: str, file: Path) -> sqlite3.Connection:
    if not file.exists():
        raise Misconfigured(
            f"{service} has no database at {file}. ChatRail makes one when it starts on this data folder, and fills "
            "it from the stream. Start it, or try again in a moment where it is starting."
        )
    return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, isolation_level=None)


def _begin_sqlite(connection: sqlite3.Connection, tables: Sequence[str]) -> None:
    connection.execute("BEGIN")
    for table in tables:
        connection.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone()  # noqa: S608


def _postgres(url: URL) -> psycopg.Connection[Any]:
    return psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))


def _begin_postgres(connection: psycopg.Connection[Any], tables: Sequence[str]) -> None:
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    # Before the first SELECT, with which the snapshot begins: whoever exchanges tables waits for us.
    connection.execute(f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE")
    connection.execute("SELECT 1")


class Copy:
    """A table that should say what the stream says, in a snapshot."""

    def __init__(self, snapshot: Snapshot, layout: Layout) -> None:
        self.snapshot, self.layout = snapshot, layout
        self.key, *_ = layout.columns
        columns = ", ".join(_column(name, is_sqlite=snapshot.is_sqlite) for name in layout.columns)
        self._select = f'SELECT {columns} FROM "{layout.table}"'  # noqa: S608 - names from the code
        self._find = f"{self._select} WHERE {snapshot.listed(self.key)}"
        told = _AS_SQLITE_HAS_IT if snapshot.is_sqlite else _AS_POSTGRESQL_HAS_IT
        self._told = [(n, told[_kind(name)]) for n, name in enumerate(layout.columns) if _kind(name) in told]

    def row(self, record: Mapping[str, Any]) -> Row:
        """The row that the record should be."""
        values = [record[name] for name in self.layout.columns]
        for n, told in self._told:
            if values[n] is not None:
                values[n] = told(values[n])
        return tuple(values)

    def find(self, keys: Sequence[str]) -> dict[str, Row]:
        return {row[0]: row for row in self.snapshot.find(self._find, keys)}

    def differing(self, expected: Row, found: Row) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The columns that differ, as they should be and as they are; None where the rows say the same.

        Of an object with the same members it is the members that differ: `authorized.hold_tokens`.
        """
        names = [
            name
            for name, ours, theirs in zip(self.layout.columns, expected, found, strict=True)
            if ours != theirs and not (_kind(name) == "json" and _same_json(ours, theirs))
        ]
        if not names:
            return None
        ours, theirs = _part(self.told(expected), names), _part(self.told(found), names)
        for name in names:
            if _kind(name) == "json":
                _narrow_down(name, ours, theirs)
        return ours, theirs

    def told(self, row: Row) -> dict[str, Any]:
        """The row by its columns, for people and for JSON."""
        return {name: _plain(value) for name, value in zip(self.layout.columns, row, strict=True)}

    def number(self, scope: Scope) -> int:
        """How many rows there are."""
        where, values = self._within(scope)
        ((number,),) = self.snapshot.rows(f'SELECT count(*) FROM "{self.layout.table}"{where}', *values)  # noqa: S608
        return int(number)

    def is_within(self, scope: Scope, row: Row) -> bool:
        """By the row's own moment, whatever somebody made of it."""
        moment = row[self.layout.columns.index(self.layout.moment)]
        if not isinstance(moment, str | datetime):
            return False
        first, last = (None if end is None else self.snapshot.time(end) for end in (scope.first, scope.last))
        return (first is None or first <= moment) and (last is None or moment <= last)

    def batches(self, scope: Scope) -> Iterator[list[Row]]:
        where, values = self._within(scope)
        rows = self.snapshot.rows(self._select + where, *values)
        while batch := list(islice(rows, BATCH_SIZE)):
            yield batch

    def _within(self, scope: Scope) -> tuple[str, list[Any]]:
        moment, time = self.layout.moment, self.snapshot.time
        conditions = {
            '"user_id" = ?': scope.user_id,
            f'"{moment}" >= ?': scope.first and time(scope.first),
            f'"{moment}" <= ?': scope.last and time(scope.last),
        }
        asked = {condition: value for condition, value in conditions.items() if value is not None}
        return (f" WHERE {' AND '.join(asked)}" if asked else ""), list(asked.values())


@lru_cache(maxsize=4096)
def as_sqlite_has_it(moment: datetime) -> str:
    """`iso`, at a fraction of the price: it is UTC already, and the moment of one event is told several times."""
    text = moment.isoformat(timespec="microseconds")
    return f"{text[:-6]}Z" if text.endswith("+00:00") else iso(moment)


_AS_POSTGRESQL_HAS_IT: dict[str, Callable[[Any], Any]] = {"json": lambda value: to_json(value).decode()}
_AS_SQLITE_HAS_IT: dict[str, Callable[[Any], Any]] = {
    **_AS_POSTGRESQL_HAS_IT,
    "moment": as_sqlite_has_it,
    "date": date.isoformat,
}


def _kind(column: str) -> str:
    if column in MOMENTS:
        return "moment"
    return {"usage_date": "date", "metadata": "json", "authorized": "json"}.get(column, "")


def _column(name: str, *, is_sqlite: bool) -> str:
    if is_sqlite:
        return f'"{name}"'
    kind = _kind(name)
    if kind == "json":  # as text: SQLite has nothing else, and decoding each would cost more than all the rest
        return f'CAST("{name}" AS text)'
    return finite(name) if kind in ("moment", "date") else f'"{name}"'


def finite(column: str) -> str:
    """In PostgreSQL, where a time may be infinite or in a year that Python has no word for: then it is null."""
    return f'CASE WHEN extract(year FROM "{column}") BETWEEN 1 AND 9999 THEN "{column}" END'


def _same_json(ours: str, theirs: str) -> bool:
    """Releases write JSON with other spaces; it says the same. To Python `true` and 1 are equal: to a reader not."""
    return isinstance(ours, str) and isinstance(theirs, str) and canonical(ours) == canonical(theirs)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _narrow_down(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    try:
        expected, found = json.loads(ours[name]), json.loads(theirs[name])
    except (TypeError, ValueError, RecursionError):
        return
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        differing = [each for each in expected if _canonical(expected[each]) != _canonical(found[each])]
        if not differing:
            return
        del ours[name], theirs[name]
        ours |= {f"{name}.{member}": expected[member] for member in differing}
        theirs |= {f"{name}.{member}": found[member] for member in differing}


def _part(told: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: told[name] for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(value)
    return value.isoformat() if isinstance(value, date) else value
