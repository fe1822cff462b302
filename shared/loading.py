"""A window of the stream into tables that nobody else uses: in bulk what is plain, and all else event by event.

In bulk a row is written without looking for an earlier one of its id; the table's key tells that there is one. Then
the window is undone and read once more by the book: of two bodies under one id the first counts.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from psycopg.errors import UniqueViolation
from sqlalchemy import Connection, Table

from shared.database import is_sqlite
from shared.errors import PoisonMessage
from shared.events import Event, decode
from shared.plain import PlainGeneration, plain_generation
from shared.quarantine import ANOTHER_BODY, Poison
from shared.recorded import Recorded

Value = str | int | None


class PlainRows(NamedTuple):
    """The table that has a row for each generation, the columns that a row fills, and the row, as databases keep it.

    Moments, days and JSON are text; what a row does not name has a default.
    """

    table: Table
    columns: tuple[str, ...]
    row: Callable[[PlainGeneration], tuple[Value, ...]]


class Loads(Protocol):
    plain: PlainRows

    def load(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        """Keep a row for each event, once. Returns the events that contradict an earlier one of the same id."""
        ...


def load(db: Connection, into: Loads, messages: Sequence[Recorded]) -> list[Poison]:
    """Keep a row for each event, once. Returns what is none, and what contradicts an earlier one, with the reason."""
    others: list[Recorded] = []
    in_bulk = db.begin_nested()
    try:
        _insert(db, into.plain, (into.plain.row(each) for each in _plain(messages, others)))
    except (sqlite3.IntegrityError, UniqueViolation):
        in_bulk.rollback()
        return by_the_book(db, into.load, messages)
    refused = by_the_book(db, into.load, others)
    if any(poison.reason == ANOTHER_BODY for poison in refused):  # which of two came first is not known any more
        in_bulk.rollback()
        return by_the_book(db, into.load, messages)
    in_bulk.commit()
    return refused


def by_the_book(
    db: Connection, keep: Callable[[Connection, Sequence[Event]], list[Event]], messages: Sequence[Recorded]
) -> list[Poison]:
    """Hand all events to `keep`, and return what is to be set aside."""
    refused: list[Poison] = []
    came_as: dict[int, Recorded] = {}
    events: list[Event] = []
    for message in messages:
        try:
            event = decode(message.body)
        except PoisonMessage as problem:
            refused.append(Poison(message.subject, message.body, str(problem)))
        else:
            events.append(event)
            came_as[id(event)] = message
    contradicting = [came_as[id(event)] for event in keep(db, events)]
    return refused + [Poison(message.subject, message.body, ANOTHER_BODY) for message in contradicting]


def _plain(messages: Sequence[Recorded], others: list[Recorded]) -> Iterator[PlainGeneration]:
    for message in messages:
        if generation := plain_generation(message.body):
            yield generation
        else:
            others.append(message)


def _insert(db: Connection, into: PlainRows, rows: Iterator[tuple[Value, ...]]) -> None:
    """Raises the driver's error for a key that is there."""
    names = ", ".join(f'"{name}"' for name in into.columns)
    driver: Any = db.connection.driver_connection
    if is_sqlite(db):
        values = ", ".join("?" * len(into.columns))
        driver.executemany(f'INSERT INTO "{into.table.name}" ({names}) VALUES ({values})', rows)  # noqa: S608
        return
    # The server takes rows in while the next ones are read.
    with driver.cursor() as cursor, cursor.copy(f'COPY "{into.table.name}" ({names}) FROM STDIN') as copy:
        for row in rows:
            copy.write_row(row)
