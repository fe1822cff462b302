"""On PostgreSQL the ledger's records are in partitions, a month each, and nobody notices."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DatabaseError
from structlog.testing import capture_logs

from services.ledger import store
from services.ledger.__main__ import MIGRATIONS
from services.ledger.partitions import MONTHS_AHEAD, least_id, make_ahead, month_after, without_partition
from shared.calls import LogsQuery
from shared.database import Database, insert_new
from shared.events import Event, GenerationCompleted, new_id
from shared.postgres_shadow import REPLAY_KEY
from tests.builders import NOON, generation_completed, usage_reported
from tests.fixtures import Postgres
from tests.integration.test_ledger_history import migrate_to

MONTHS = st.dates(date(1970, 2, 1), date(9998, 12, 1)).map(lambda day: day.replace(day=1))
DAY = timedelta(days=1)


def uuid7_at(moment: datetime, rest: int = 0) -> str:
    """As RFC 9562 has it: 48 bits of milliseconds first."""
    milliseconds = int(moment.timestamp()) * 1000 + moment.microsecond // 1000
    digits = f"{(milliseconds << 80) | (7 << 76) | (2 << 62) | rest:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def midnight(month: date) -> datetime:
    return datetime(month.year, month.month, 1, tzinfo=UTC)


@given(MONTHS, st.integers(0, 2**62 - 1))
def test_a_month_begins_with_the_ids_of_its_first_millisecond(month: date, rest: int) -> None:
    first, last = midnight(month), midnight(month) - timedelta(milliseconds=1)
    assert uuid7_at(last, rest) < least_id(month) < uuid7_at(first, 0) <= uuid7_at(first, rest)
    assert least_id(month) < least_id(month_after(month))


def test_an_id_that_is_made_now_lies_in_the_month_of_now() -> None:
    today = datetime.now(UTC).date().replace(day=1)
    assert least_id(today) < new_id() < least_id(month_after(today))


@given(MONTHS, st.sets(st.integers(0, MONTHS_AHEAD)))
def test_the_months_that_have_no_partition_are_those_ahead_that_no_range_covers(month: date, made: set[int]) -> None:
    months = [month]
    for _ in range(MONTHS_AHEAD + 1):
        months.append(month_after(months[-1]))
    bounds = [f"FOR VALUES FROM ('{least_id(months[n])}') TO ('{least_id(months[n + 1])}')" for n in made]
    assert list(without_partition(["DEFAULT", *bounds], month)) == [
        months[n] for n in range(MONTHS_AHEAD + 1) if n not in made
    ]
    before = f"FOR VALUES FROM (MINVALUE) TO ('{least_id(months[1])}')"
    assert months[0] not in list(without_partition(["DEFAULT", before, *bounds], month))


@pytest.fixture
def backend() -> str:
    return "postgresql"


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    database = Database(ledger_url)
    await make_ahead(database)
    yield database
    await database.close()


def with_id(event_id: str, **data: object) -> GenerationCompleted:
    return generation_completed(**data).model_copy(update={"id": event_id})  # type: ignore[arg-type]


def do(*statements: str) -> Callable[[Connection], None]:
    def work(db: Connection) -> None:
        for statement in statements:
            db.execute(text(statement))

    return work


def unmade(month: date) -> Callable[[Connection], None]:
    return do(f"ALTER TABLE usage DETACH PARTITION usage_{month:%Y_%m}", f"DROP TABLE usage_{month:%Y_%m}")


async def placed(database: Database) -> dict[str, str]:
    """Of each record, the partition that it is in."""
    where = text("SELECT id, tableoid::regclass::text FROM usage")
    return {row[0]: row[1] for row in await database.read(lambda db: db.execute(where).all())}


async def partitions(database: Database) -> set[str]:
    of_usage = text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass")
    return set(await database.read(lambda db: db.execute(of_usage).scalars().all()))


def months_ahead() -> list[date]:
    month = month_after(datetime.now(UTC).date().replace(day=1))
    months = [month]
    for _ in range(MONTHS_AHEAD):
        months.append(month_after(months[-1]))
    return months


async def test_an_event_lies_in_the_partition_of_the_month_in_which_its_id_was_made(database: Database) -> None:
    first, second, _, beyond = months_ahead()
    before = f"usage_before_{first:%Y_%m}"
    expected = {
        new_id(): before,
        uuid7_at(NOON - 4000 * DAY): before,
        uuid7_at(midnight(first) - timedelta(milliseconds=1), 2**62 - 1): before,
        uuid7_at(midnight(first)): f"usage_{first:%Y_%m}",
        uuid7_at(midnight(second) - timedelta(milliseconds=1), 2**62 - 1): f"usage_{first:%Y_%m}",
        uuid7_at(midnight(second), 7): f"usage_{second:%Y_%m}",
        uuid7_at(midnight(beyond)): "usage_default",
        # Whatever else there is.
        "00000000-0000-0000-0000-000000000000": before,
        "ffffffff-ffff-ffff-ffff-ffffffffffff": "usage_default",
        "generation_1": "usage_default",
        "ABC": "usage_default",
        "🛤 of *.>": "usage_default",
        " ": before,
        "-": before,
    }
    await database.write(store.record, [with_id(event_id) for event_id in expected])
    assert await placed(database) == expected


async def test_ids_are_compared_byte_by_byte_whatever_the_language_of_the_database(database: Database) -> None:
    """In Danish "aa" comes behind "z", and in Welsh "ff" behind "f": months would begin in the wrong order."""
    collations = text(
        "SELECT attcollation::regcollation::text FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid"
        " WHERE attname = 'id' AND relkind IN ('r', 'p') AND relname LIKE 'usage%' AND relname <> 'usage_daily'"
        " UNION ALL SELECT unnest(partcollation)::regcollation::text FROM pg_partitioned_table"
    )
    found = await database.read(lambda db: db.execute(collations).scalars().all())
    assert found == ['"C"'] * (2 + len(await partitions(database)))


async def test_an_event_is_recorded_once_whichever_partition_it_is_in(database: Database) -> None:
    ids = [new_id(), *(uuid7_at(midnight(month)) for month in months_ahead()), "any text", "ÅÄ"]
    events: list[Event] = [with_id(event_id, input_tokens=n) for n, event_id in enumerate(ids)]
    assert len((await database.write(store.record, events)).new) == len(events)

    await asyncio.gather(*(database.write(store.record, [*events[n:], *events[:n]]) for n in range(6)))

    again = await database.write(store.record, [with_id(event_id, input_tokens=99) for event_id in ids])
    assert (again.new, [event.id for event in again.contradicting]) == ([], ids)
    page = await database.read(store.logs, LogsQuery(user_id="user_1"))
    assert [record.id for record in page.records] == sorted(ids, reverse=True)
    with pytest.raises(DatabaseError, match="duplicate key"):
        await database.write(do(f"INSERT INTO usage SELECT * FROM usage WHERE id = '{ids[-1]}'"))  # noqa: S608 - ours


async def test_what_is_made_ahead_is_made_once_by_however_many_replicas(database: Database) -> None:
    first, second, third, _ = months_ahead()
    made = {f"usage_{month:%Y_%m}" for month in (first, second, third)}
    assert await partitions(database) == {f"usage_before_{first:%Y_%m}", "usage_default", *made}
    await database.write(
        do(f"ALTER TABLE usage DETACH PARTITION usage_{third:%Y_%m}", f"DROP TABLE usage_{third:%Y_%m}")
    )
    with capture_logs() as logs:
        await asyncio.gather(*(make_ahead(database) for _ in range(6)))
        await make_ahead(database)
    assert [log["event"] for log in logs] == ["partition_made"]
    assert len(await partitions(database)) == 5


async def test_recording_goes_on_where_a_partition_cannot_be_made(database: Database, ledger_url: str) -> None:
    """What would lie in it is in the default partition already, or somebody reads for long."""
    first, second, _, _ = months_ahead()
    for month in (first, second):
        await database.write(unmade(month))
    early = with_id(uuid7_at(midnight(first)))
    await database.write(store.record, [early])
    with capture_logs() as logs, psycopg.connect(ledger_url) as reader:
        reader.execute("LOCK TABLE usage IN ACCESS SHARE MODE")
        await make_ahead(database)
        told = [(log["event"], log["partition"]) for log in logs]
        assert told == [("partition_not_made", f"usage_{month:%Y_%m}") for month in (first, second)]
        await database.write(store.record, [with_id(uuid7_at(midnight(second)))])
    await make_ahead(database)
    assert f"usage_{first:%Y_%m}" not in await partitions(database)
    assert (await database.write(store.record, [early])).new == []
    assert set((await placed(database)).values()) == {"usage_default"}


async def test_none_is_made_while_a_replay_is_at_work(database: Database, ledger_url: str) -> None:
    _, _, third, _ = months_ahead()
    name = f"usage_{third:%Y_%m}"
    await database.write(unmade(third))
    # Let go with the transaction: the server hears of a closed connection some time after it was closed.
    with psycopg.connect(ledger_url) as replaying:
        replaying.execute("SELECT pg_advisory_xact_lock(%s)", [REPLAY_KEY])
        assert not await make_ahead(database)
        assert name not in await partitions(database)
    assert await make_ahead(database)
    assert name in await partitions(database)


@pytest.mark.parametrize("verb", ["UPDATE {} SET tokens_used = 1", "DELETE FROM {}", "TRUNCATE {}"])
async def test_no_partition_lets_anybody_change_a_record_through_it(database: Database, verb: str) -> None:
    await database.write(store.record, [generation_completed(), with_id("any text"), with_id("0")])
    before, refused = await placed(database), verb.split(maxsplit=1)[0].lower()
    for table in ("usage", *await partitions(database)):
        # Those who run the tests may do everything, and still meet the triggers.
        with pytest.raises(DatabaseError, match=f"{table} is append-only: {refused} is refused"):
            await database.write(do(f"GRANT ALL ON {table} TO CURRENT_USER", verb.format(table)))
    assert await placed(database) == before


async def test_the_table_of_an_earlier_release_becomes_a_partition_with_all_that_it_has(
    database_url: str, postgres: Postgres
) -> None:
    await asyncio.to_thread(migrate_to, database_url, "0007")
    old = Database(database_url)
    events = [generation_completed(f"user_{n}", input_tokens=n) for n in range(20)]
    foreign = [with_id(event_id) for event_id in ("generation_1", "ffffffff", "Å", "0", "")]
    rows = store.usage_rows([*events, *foreign])
    await old.write(insert_new, store.usage, rows)
    await old.write(do("GRANT SELECT ON usage TO PUBLIC"))
    file_of = text("SELECT pg_relation_filenode(oid) FROM pg_class WHERE relname = :name")
    before = await old.read(lambda db: db.execute(select(store.usage).order_by(store.usage.c.id)).all())
    file = await old.read(lambda db: db.execute(file_of, {"name": "usage"}).scalar_one())

    await asyncio.to_thread(old.migrate, MIGRATIONS)

    name = f"usage_before_{months_ahead()[0]:%Y_%m}"
    assert await old.read(lambda db: db.execute(file_of, {"name": name}).scalar_one()) == file
    after = await old.read(lambda db: db.execute(select(store.usage)).all())
    assert sorted(after) == sorted(before)
    where = await placed(old)
    assert {where[event.id] for event in events} == {name}
    assert {event.id for event in foreign if where[event.id] == "usage_default"} == {"generation_1", "ffffffff", "Å"}
    rights = text("SELECT has_table_privilege('pg_monitor', 'usage', 'SELECT')")
    assert await old.read(lambda db: db.execute(rights).scalar_one())
    again = await old.write(store.record, [*events, *foreign, usage_reported()])
    assert len(again.new) == 1
    await old.close()


async def test_one_users_page_is_read_from_the_indexes_of_all_partitions(database: Database) -> None:
    """Newest first without sorting: a page costs the same however many records there are."""
    ids = [new_id(), *(uuid7_at(midnight(month)) for month in months_ahead())]
    await database.write(store.record, [with_id(event_id) for event_id in ids])

    def plan(db: Connection) -> str:
        db.execute(text("SET LOCAL enable_seqscan = off"))
        page = "SELECT * FROM usage WHERE user_id = 'user_1' ORDER BY created_at DESC, id DESC LIMIT 51"
        return "\n".join(db.execute(text(f"EXPLAIN {page}")).scalars())

    told = await database.read(plan)
    assert "Sort  " not in told
    assert "Merge Append" in told
    assert told.count("Index Scan Backward") == len(await partitions(database))


async def test_an_id_is_looked_for_in_its_partition_alone(database: Database) -> None:
    first, second, *_ = months_ahead()
    ids = [uuid7_at(midnight(month)) for month in (first, second)]

    def plan(db: Connection) -> str:
        # As audits ask, and as ingestion does when something came again.
        found = db.exec_driver_sql("EXPLAIN SELECT * FROM usage WHERE id = ANY(%s)", (ids,))
        return "\n".join(found.scalars())

    told = await database.read(plan)
    assert f"usage_{first:%Y_%m}" in told
    assert f"usage_{second:%Y_%m}" in told
    assert "usage_before" not in told
    assert "usage_default" not in told
