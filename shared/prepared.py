"""Statements that people wait for: SQLAlchemy writes each of them once, and the driver runs them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, TypeVar

from sqlalchemy import Connection, Dialect, Select
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from shared.database import PostgresConnection, is_sqlite

Row = TypeVar("Row")

_DIALECTS: Mapping[str, Dialect] = {
    "sqlite": SQLiteDialect_pysqlite(paramstyle="named"),
    "postgresql": PGDialect_psycopg(),  # type: ignore[no-untyped-call]
}


class Prepared(Generic[Row]):
    """A SELECT for one dialect. Parameters and values are converted as SQLAlchemy does it, and `row` makes the rows.

    Each time again SQLAlchemy takes longer from a statement to its rows than the database does for most of ours.
    """

    def __init__(self, dialect: str, select: Select[Any], row: Callable[[Sequence[Any]], Row]) -> None:
        of = _DIALECTS[dialect]
        compiled = select.compile(dialect=of)
        self._sql, self._row = str(compiled), row
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}
        types = {name: parameter.type.dialect_impl(of) for name, parameter in compiled.binds.items()}
        self._bind = {name: bind for name, kind in types.items() if (bind := kind.bind_processor(of))}
        kinds = [column.type.dialect_impl(of) for column in select.selected_columns]
        self._read = [(n, read) for n, kind in enumerate(kinds) if (read := kind.result_processor(of, None))]

    def send(self, db: Connection, **parameters: Any) -> Callable[[], list[Row]]:
        """The rows, which are there once this returns; within `one_round_trip`, at its end."""
        values = self._constants | parameters
        for name, bind in self._bind.items():
            values[name] = bind(values[name])
        cursor = execute(db, self._sql, values)
        return lambda: [self._made(row) for row in cursor.fetchall()]

    def _made(self, row: Sequence[Any]) -> Row:
        values = list(row)
        for n, read in self._read:
            if values[n] is not None:
                values[n] = read(values[n])
        return self._row(values)


def execute(db: Connection, sql: str, parameters: Any) -> Any:
    """The driver's cursor. Raises as SQLAlchemy does."""
    try:
        return db.connection.driver_connection.execute(sql, parameters)  # type: ignore[union-attr]
    except db.dialect.loaded_dbapi.Error as error:
        _fail(db, sql, error)


def execute_last(db: Connection, sql: str, parameters: Any) -> None:
    """The last of a transaction, whose rows nobody reads: PostgreSQL is sent it along with the COMMIT, which raises
    what it would."""
    driver = db.connection.driver_connection
    if isinstance(driver, PostgresConnection):
        driver.last = sql, parameters
    else:
        execute(db, sql, parameters)


def execute_many(db: Connection, sql: str, parameters: Sequence[Any]) -> None:
    """For each of them. Raises as SQLAlchemy does."""
    try:
        db.connection.driver_connection.cursor().executemany(sql, parameters)  # type: ignore[union-attr]
    except db.dialect.loaded_dbapi.Error as error:
        _fail(db, sql, error)


@contextmanager
def one_round_trip(db: Connection) -> Iterator[None]:
    """What is sent within reaches PostgreSQL together, and is done in this order, each statement with a snapshot of
    its own. Raises as SQLAlchemy does, at the end."""
    if is_sqlite(db):
        yield
        return
    try:
        with db.connection.driver_connection.pipeline():  # type: ignore[union-attr]
            yield
    except db.dialect.loaded_dbapi.Error as error:
        _fail(db, "several statements", error)


def _fail(db: Connection, sql: str, error: Exception) -> NoReturn:
    # Whoever retries, and the pool, go by what SQLAlchemy makes of a driver's errors.
    db._handle_dbapi_exception(error, sql, None, None, None)
