"""A database that was put back from an older copy, or lost: it reads again what its durable has acknowledged.

A durable never delivers again what was acknowledged, whatever became of the effect. So the database itself keeps up
to where all of the stream was acknowledged. What lies between that and the last message that was delivered, which may
be acknowledged although one before it is not, is read from the stream once more, and counted once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from sqlalchemy import BigInteger, Connection, Text, select
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlmodel import Field, SQLModel

from shared.broker import end_process
from shared.database import Database, UtcDateTime, damaged, is_damaged, table_of, upsert
from shared.errors import Unavailable
from shared.record import Record
from shared.recorded import Recorded
from shared.streams import STREAM, Reached, reached

log = structlog.get_logger()

# Applies messages, all of them or none. Returns those that it could not apply.
Apply = Callable[[list[Msg]], Awaitable[Sequence[Msg]]]
Note = Callable[[int], Awaitable[int]]

# What every start reads again is what came within this, and it is what a copy must be older than to be recognised.
NOTE_EVERY_S = 3.0
NOTE_READING_EVERY_S = 0.5
RETRY_S = 1.0
BATCH_SIZE = 500


class Position(SQLModel, table=True):
    """Up to `acknowledged` of the stream that was made at `stream_created`, this database has everything."""

    __tablename__ = "stream_position"

    durable: str = Field(primary_key=True, sa_type=Text)
    stream_created: datetime = Field(sa_type=UtcDateTime)
    acknowledged: int = Field(sa_type=BigInteger)
    # It only grows: a database in which it is smaller than it was is another one.
    notes: int = Field(sa_type=BigInteger)


_table = table_of(Position)


class Restored(Exception):
    """The database is an older copy of what it was a moment ago."""


async def catch_up(
    nc: Client, durable: str, database: Database, apply: Apply, *, archive: Path | None = None
) -> None:
    """Returns once the database has all that the durable does not deliver any more. To be called before anything is
    answered.

    What the stream has no more is read from the folder `archive`; raises Misconfigured where it is not there, and
    where the database is a file that is damaged. Waits for as long as the stream or the database cannot be had.
    """
    while True:
        try:
            return await _catch_up(Record(nc, archive), durable, database, apply)
        except (Unavailable, SQLAlchemyError, NatsError, OSError) as error:
            if isinstance(error, DatabaseError) and is_damaged(error.orig):
                raise damaged(database.name) from error
            log.warning("not_caught_up", durable=durable, error=repr(error))
            await asyncio.sleep(RETRY_S)


async def _catch_up(record: Record, durable: str, database: Database, apply: Apply) -> None:
    created, begins, _, acknowledged, delivered = await _reached(record.nc, durable)
    kept = await database.read(_kept, durable)
    # A stream that was made anew counts from the beginning, and so does one that was cut back.
    known = kept.acknowledged if kept and kept.stream_created == created else 0
    # Also then, what was trimmed is there; a durable that was made anew says that it has acknowledged so much.
    after = known if known <= acknowledged else begins - 1
    if after < delivered:
        log.info("reading_again", durable=durable, after=after, up_to=delivered)
        await _read_again(
            record, after, delivered, apply, lambda place: database.write(_note, durable, created, place)
        )
    await database.write(_note, durable, created, acknowledged)


async def keep_position(nc: Client, durable: str, database: Database) -> None:
    """Note how far the durable has come, for ever. An older copy that was put in place under us ends the process."""
    notes = 0
    while True:
        try:
            # Asked first, noted afterwards: what is acknowledged by now is committed.
            place = await _reached(nc, durable)
            notes = await database.write(_note, durable, place.created, place.acknowledged, at_least=notes)
        except Restored:
            return end_process("the database is an older copy: what it has not is read again")
        except (Unavailable, SQLAlchemyError, OSError) as error:
            log.warning("position_not_noted", durable=durable, error=repr(error))
        await asyncio.sleep(NOTE_EVERY_S)


async def _reached(nc: Client, durable: str) -> Reached:
    try:
        return await reached(nc, durable)
    except (NatsError, OSError) as error:
        raise Unavailable(f"The stream {STREAM} cannot be asked: {error!r}") from error


async def _read_again(record: Record, after: int, up_to: int, apply: Apply, note: Note) -> None:
    """What was read again is noted on the way, for whoever waits for it and for the next start."""
    await note(after)
    noted = monotonic()
    async for batch in record.read(first=after + 1, last=up_to):
        for start in range(0, len(batch), BATCH_SIZE):
            messages = [_delivered(record.nc, each) for each in batch[start : start + BATCH_SIZE]]
            if again := await apply(messages):
                raise Unavailable(f"{len(again)} events cannot be applied")
        if monotonic() > noted + NOTE_READING_EVERY_S:
            await note(batch[-1].sequence)
            noted = monotonic()


def _delivered(nc: Client, message: Recorded) -> Msg:
    """As a durable would deliver it for the first time."""
    reply = f"$JS.ACK.{STREAM}.again.1.{message.sequence}.{message.sequence}.0.0"
    return Msg(nc, message.subject, reply, message.body, dict(message.headers or {}))


def _kept(db: Connection, durable: str) -> Position | None:
    row = db.execute(select(_table).where(_table.c.durable == durable)).one_or_none()
    return Position(**row._mapping) if row else None


def _note(db: Connection, durable: str, created: datetime, acknowledged: int, *, at_least: int = 0) -> int:
    """How often it was noted by now. Raises Restored when that is less often than was seen before."""
    kept = _kept(db, durable)
    notes = kept.notes if kept else 0
    if notes < at_least:
        raise Restored
    row = {"durable": durable, "stream_created": created, "acknowledged": acknowledged}
    if kept and row == kept.model_dump(exclude={"notes"}):
        return notes  # nobody used anything: nor need the disk
    upsert(db, _table, [{**row, "notes": notes + 1}])
    return notes + 1
