"""On PostgreSQL the table `usage` is in parts: a month each, by the moment at which the id of an event was made.

Ids are UUIDv7: as text, byte by byte (collation "C"), they sort by time, and the first 13 characters are the
millisecond. So an id alone decides its partition, and the primary key, which is the id, holds over all of them. Any
other id is legal, too, and lies before all months, within one, or in the default partition: that is where everything
goes which has no other, and nothing is ever refused for want of one.
"""

import asyncio
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from shared.append_only import AppendOnly, guard
from shared.database import Database, is_sqlite, now
from shared.postgres_shadow import REPLAY_KEY

log = structlog.get_logger()

USAGE_ONLY_GROWS = AppendOnly("usage", "id")
MONTHS_AHEAD = 3
LOOK_EVERY_S = 3600
LOOK_AGAIN_S = 5
# Who reads the default partition makes us wait, and who comes after us waits for us.
LOCK_WITHIN_MS = 300
# What is in the default partition is looked at before another is made.
MADE_WITHIN_MS = 1000

_RANGE = re.compile(r"FOR VALUES FROM \((?:'([^']*)'|MINVALUE)\) TO \((?:'([^']*)'|MAXVALUE)\)")
_BOUNDS = text(
    "SELECT pg_get_expr(relpartbound, pg_class.oid) FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
    " WHERE inhparent = CAST('usage' AS regclass)"
)


def least_id(month: date) -> str:
    """What no id of a month is less than, and every earlier UUIDv7 is."""
    milliseconds = int(datetime(month.year, month.month, 1, tzinfo=UTC).timestamp() * 1000)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}"


def month_after(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def without_partition(bounds: Iterable[str], today: date) -> Iterator[date]:
    """Of this month and those ahead, which no partition has; `bounds` are as PostgreSQL tells them."""
    ranges = [(found[1] or "", found[2]) for found in map(_RANGE.fullmatch, bounds) if found]
    month = today.replace(day=1)
    for _ in range(1 + MONTHS_AHEAD):
        least = least_id(month)
        if not any(first <= least and (end is None or least < end) for first, end in ranges):
            yield month
        month = month_after(month)


async def keep_ahead(database: Database) -> None:
    """Make partitions ahead of time, for ever."""
    while True:
        was_free = await make_ahead(database)
        await asyncio.sleep(LOOK_EVERY_S if was_free else LOOK_AGAIN_S)


async def make_ahead(database: Database) -> bool:
    """Those that this month and the next ones lack. One that cannot be made is told, and tried again next time.

    False where others were at it, a replay of a database that was lost, say. Then it is soon to be tried again: what
    comes to a month before it has a partition keeps it from having one.
    """
    was_free = True
    try:
        for month in await database.read(_missing):
            was_free &= await _make_one(database, month)
    except (SQLAlchemyError, OSError) as error:
        log.warning("partitions_not_seen", error=repr(error))
    return was_free


async def _make_one(database: Database, month: date) -> bool:
    name = _name(month)
    try:
        if not await database.write(make, month):
            return False
        log.info("partition_made", partition=name)
    except SQLAlchemyError as error:
        log.warning("partition_not_made", partition=name, error=repr(error))
    return True


def _missing(db: Connection) -> list[date]:
    if is_sqlite(db):
        return []
    return list(without_partition(db.execute(_BOUNDS).scalars(), now(db).astimezone(UTC).date()))


def make(db: Connection, month: date) -> bool:
    """False when somebody else has made it, or is about to, or a replay has its own idea of what there is."""
    free = text("SELECT pg_try_advisory_xact_lock(:key)")
    if not db.execute(free, {"key": REPLAY_KEY}).scalar_one():
        return False
    if month not in without_partition(db.execute(_BOUNDS).scalars(), month):
        return False
    name, first, end = _name(month), least_id(month), least_id(month_after(month))
    db.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WITHIN_MS}ms'")
    db.exec_driver_sql(f"SET LOCAL statement_timeout = '{MADE_WITHIN_MS}ms'")
    db.exec_driver_sql(f"CREATE TABLE {name} (LIKE usage INCLUDING ALL)")
    # As `usage` itself: whoever names a partition changes nothing in it, either.
    guard(db, USAGE_ONLY_GROWS, name)
    # Unlike CREATE TABLE ... PARTITION OF, it lets others read and write the table meanwhile.
    db.exec_driver_sql(f"ALTER TABLE usage ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{end}')")
    return True


def _name(month: date) -> str:
    return f"usage_{month:%Y_%m}"
