"""Statements that the driver runs: the same rows, and the same errors, as where SQLAlchemy runs them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, Column, Connection, MetaData, Table, Text, bindparam, func, make_url, select
from sqlalchemy.exc import DBAPIError

from shared.bulk import insert_last
from shared.database import Database, UtcDateTime, now
from shared.prepared import Prepared, execute, one_round_trip
from shared.settings import sqlite_url
from tests.fixtures import Postgres, eventually

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
things = Table(
    "things",
    MetaData(),
    Column("name", Text, primary_key=True, nullable=False),
    Column("at", UtcDateTime),
    Column("is_new", Boolean),
    Column("body", JSON(none_as_null=True)),
)
ROWS: list[tuple[Any, ...]] = [
    ("a", NOON, True, {"n": [1, None, "ü"]}),
    ("b", NOON + timedelta(microseconds=1), False, [1]),
    ("c", None, None, None),
]
since = select(things).where(things.c.at >= bindparam("since", type_=UtcDateTime)).order_by(things.c.name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield sqlite_url(tmp_path, "test.db")
        else:
            postgres: Postgres = request.getfixturevalue("postgres")
            yield stack.enter_context(postgres.new_database())


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.write(things.create)
    yield database
    await database.close()


def prepared_since(db: Connection, moment: datetime) -> list[tuple[Any, ...]]:
    return Prepared(db.dialect.name, since, tuple).send(db, since=moment)()


def insert(db: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    db.execute(things.insert(), [dict(zip(things.c.keys(), row, strict=True)) for row in rows])


async def test_rows_are_what_sqlalchemy_makes_of_them(database: Database) -> None:
    await database.write(insert, ROWS)
    everything = select(things).order_by(things.c.name)
    assert await database.read(lambda db: list(map(tuple, db.execute(everything)))) == ROWS
    assert await database.read(lambda db: Prepared(db.dialect.name, everything, tuple).send(db)()) == ROWS
    for moment, found in ((NOON, ROWS[:2]), (NOON + timedelta(microseconds=1), ROWS[1:2])):
        assert await database.read(prepared_since, moment) == found


async def test_of_rows_whose_key_is_there_the_first_stays(database: Database) -> None:
    for rows in ([("a", NOON)], [("a", NOON + timedelta(hours=1)), ("b", NOON)], [("c", None)], []):
        await database.write(insert_last, things, ("name", "at"), rows)
    everything = select(things.c.name, things.c.at).order_by(things.c.name)
    found = await database.read(lambda db: list(map(tuple, db.execute(everything))))
    assert found == [("a", NOON), ("b", NOON), ("c", None)]


async def test_what_comes_last_is_done_with_the_rest_of_its_transaction_or_not_at_all(database: Database) -> None:
    def two(db: Connection, *, name: str | None = "b", fails: bool = False) -> None:
        insert(db, ROWS[:1])
        insert_last(db, things, ("name", "at"), [(name, NOON)])
        if fails:
            raise LookupError

    async def names() -> list[str]:
        return await database.read(lambda db: sorted(db.execute(select(things.c.name)).scalars()))

    with pytest.raises(LookupError):
        await database.write(two, fails=True)
    assert await names() == []
    with pytest.raises(DBAPIError, match=r"(?i)not.null"):
        await database.write(two, name=None)
    assert await names() == []
    await database.write(two)
    assert await names() == ["a", "b"]


async def test_what_a_driver_raises_is_raised_as_sqlalchemy_would(database: Database) -> None:
    def mistaken(db: Connection, *, together: bool) -> None:
        if together:
            with one_round_trip(db):
                execute(db, "SELECT 1", ())
                execute(db, "SELECT nothing FROM nowhere", ())
        execute(db, "SELECT nothing FROM nowhere", ())

    for together in (True, False):
        with pytest.raises(DBAPIError, match="nowhere"):
            await database.write(mistaken, together=together)
    await database.write(insert, ROWS)
    assert await database.read(prepared_since, NOON) == ROWS[:2]


async def test_connections_that_the_server_closed_cost_nobody_an_error(postgres: Postgres) -> None:
    def together(db: Connection) -> int:
        with one_round_trip(db):
            cursor = execute(db, "SELECT 1", ())
        return int(cursor.fetchone()[0])

    def alone(db: Connection) -> int:
        return int(execute(db, "SELECT 1", ()).fetchone()[0])

    with postgres.new_database() as url:
        database, its = Database(url), f"datname = '{make_url(url).database}'"
        for work in (together, alone):
            assert await database.write(work) == 1
            postgres.execute(
                f"DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE {its}; END $$"
            )
            assert await database.write(work) == 1
        await database.close()


async def test_each_statement_of_a_round_trip_sees_what_was_done_while_the_one_before_it_waited(
    postgres: Postgres,
) -> None:
    is_locked, may_end = threading.Event(), threading.Event()
    lock, waiting = "SELECT pg_advisory_xact_lock(1)", "SELECT count(*) FROM pg_locks WHERE NOT granted"
    names_now = select(things.c.name, func.statement_timestamp())

    def inserting_under_the_lock(db: Connection) -> datetime:
        execute(db, lock, ())
        is_locked.set()
        may_end.wait(30)
        insert(db, ROWS[:1])
        return now(db)

    def looking_after_the_lock(db: Connection) -> list[tuple[Any, ...]]:
        with one_round_trip(db):
            execute(db, lock, ())
            names = Prepared(db.dialect.name, names_now, tuple).send(db)
        return names()

    with postgres.new_database() as url:
        database = Database(url)
        await database.write(things.create)
        inserting = asyncio.create_task(database.write(inserting_under_the_lock))
        await asyncio.to_thread(is_locked.wait, 30)
        looking = asyncio.create_task(database.write(looking_after_the_lock))

        async def is_waiting() -> bool:
            return await database.read(lambda db: bool(execute(db, waiting, ()).fetchone()[0]))

        await eventually(is_waiting)
        may_end.set()
        inserted_at = await inserting
        ((name, at),) = await looking
        assert name == "a"
        assert at > inserted_at
        await database.close()
