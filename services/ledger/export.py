"""Every record of the ledger, written down for others to read: as CSV, NDJSON or Parquet.

The columns are those of the table `usage`, whichever it has. Batch by batch: memory does not grow with the ledger.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Date,
    Integer,
    Text,
    cast,
    func,
    inspect,
    literal,
    select,
)

from services.ledger.scope import Scope
from services.ledger.store import usage
from shared.database import UtcDateTime, changed, is_sqlite
from shared.errors import Misconfigured
from shared.spreadsheet import cell

BATCH_ROWS = 1000
# What a row group takes while it is gathered is most of this program's memory: 40 MiB.
ROW_GROUP_ROWS = 64 * BATCH_ROWS
_RFC_3339 = 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'

Rows = Sequence[Sequence[Any]]
OnRows = Callable[[int], object]


class Format(StrEnum):
    CSV = "csv"
    NDJSON = "ndjson"
    PARQUET = "parquet"


def check(db: Connection) -> None:
    """Raises Misconfigured when the database has not all that this release would export."""
    found = inspect(db)
    names = {column["name"] for column in found.get_columns(usage.name)} if found.has_table(usage.name) else set()
    if not names.issuperset(usage.c.keys()):
        raise Misconfigured(
            "The database of the ledger is not one of this release: start ChatRail once,"
            " or bring it there with `python -m services.ledger migrate`"
        )


def count(db: Connection, scope: Scope) -> int:
    return db.execute(select(func.count()).select_from(usage).where(*_conditions(scope))).scalar_one()


def export(db: Connection, scope: Scope, file_format: Format, out: BinaryIO, on_rows: OnRows) -> None:
    """Write the records, ordered by created_at and id; `on_rows` hears how many each batch had."""
    _WRITERS[file_format](db, scope, out, on_rows)


def _csv(db: Connection, scope: Scope, out: BinaryIO, on_rows: OnRows) -> None:
    """As RFC 4180 has it, in UTF-8. A text is a cell as `spreadsheet.cell` makes it, and null an empty one."""
    out.write(_lines([usage.c.keys()]))
    for rows in _batches(db, scope, _values(db)):
        columns = zip(usage.c, zip(*rows, strict=True), strict=True)
        cells = [_cells(values) if isinstance(column.type, Text) else values for column, values in columns]
        out.write(_lines(zip(*cells, strict=True)))
        on_rows(len(rows))


def _lines(rows: Any) -> bytes:
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(rows)
    return lines.getvalue().encode()


def _cells(texts: Sequence[str | None]) -> list[str | None]:
    return [text and cell(text) for text in texts]


def _ndjson(db: Connection, scope: Scope, out: BinaryIO, on_rows: OnRows) -> None:
    """An object a line, made by the database, which takes half the time; `metadata` is an object in it."""
    is_json = [isinstance(column.type, JSON) for column in usage.c]
    values = [
        (func.json(column) if is_sqlite(db) else column) if is_json else value
        for column, value, is_json in zip(usage.c, _values(db), is_json, strict=True)
    ]
    names_and_values = [
        part for name, value in zip(usage.c.keys(), values, strict=True) for part in (literal(name, Text), value)
    ]
    make = func.json_object if is_sqlite(db) else func.json_build_object
    for rows in _batches(db, scope, [cast(make(*names_and_values), Text)]):
        # Inside of strings JSON escapes it; between them it is a space like any other, and would end the line.
        out.write("".join([line.replace("\n", " ") + "\n" for (line,) in rows]).encode())
        on_rows(len(rows))


def _parquet(db: Connection, scope: Scope, out: BinaryIO, on_rows: OnRows) -> None:
    """Moments are timestamps in UTC, days dates, `metadata` its JSON as text: every reader has functions for that."""
    # Nobody else should wait for it to load, nor keep it in memory.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow.parquet import ParquetWriter  # noqa: PLC0415

    def arrow_type(column: Column[Any]) -> Any:
        if isinstance(column.type, Integer):
            return pa.int64()
        if isinstance(column.type, UtcDateTime):
            return pa.timestamp("us", tz="UTC")
        return pa.date32() if isinstance(column.type, Date) else pa.string()

    def arrow(rows: Rows) -> Any:
        columns = zip(schema, zip(*rows, strict=True), strict=True)
        try:
            arrays = [pa.array(values, read_as(field.type)).cast(field.type) for field, values in columns]
            return pa.RecordBatch.from_arrays(arrays, schema=schema)
        except pa.ArrowException as error:
            raise changed("of the ledger") from error

    def read_as(arrow_type: Any) -> Any:
        return arrow_type if arrow_type == pa.int64() else pa.string()

    schema = pa.schema([pa.field(c.name, arrow_type(c), nullable=bool(c.nullable)) for c in usage.c])
    gathered: list[Any] = []
    with ParquetWriter(out, schema, compression="zstd") as writer:
        for rows in _batches(db, scope, _values(db)):
            gathered.append(arrow(rows))
            on_rows(len(rows))
            if len(gathered) * BATCH_ROWS >= ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(gathered))
                gathered.clear()
        if gathered:
            writer.write_table(pa.Table.from_batches(gathered))


_WRITERS = {Format.CSV: _csv, Format.NDJSON: _ndjson, Format.PARQUET: _parquet}


def _conditions(scope: Scope) -> Iterator[ColumnElement[bool]]:
    if scope.user_id is not None:
        yield usage.c.user_id == scope.user_id
    if scope.first is not None:
        yield usage.c.created_at >= scope.first
    if scope.last is not None:
        yield usage.c.created_at <= scope.last


def _batches(db: Connection, scope: Scope, values: Sequence[ColumnElement[Any]]) -> Iterator[Rows]:
    """The cursor stays with the database, which hands out a batch at a time."""
    statement = select(*values).where(*_conditions(scope)).order_by(usage.c.created_at, usage.c.id)
    return db.execute(statement, execution_options={"yield_per": BATCH_ROWS}).partitions()


def _values(db: Connection) -> list[ColumnElement[Any]]:
    """Counts as numbers; all else as text, made by the database and not by Python for each value."""

    def value(column: Column[Any]) -> ColumnElement[Any]:
        if isinstance(column.type, Integer):
            return column
        if isinstance(column.type, UtcDateTime) and not is_sqlite(db):  # where it is text already
            return func.to_char(func.timezone("UTC", column), _RFC_3339)
        return cast(column, Text)

    return [value(column) for column in usage.c]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` once it is whole and on disk. Whatever breaks off leaves `path` as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise Misconfigured(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # where it could never be made, there is none
            partial.unlink(missing_ok=True)
