"""The bare limits of ingesting: the least that a consumer of the stream can do, to measure the real ones against.

    python -m tests.bench.bare_ingest fetch NATS_URL EVENTS                  fetch and acknowledge, keep nothing
    python -m tests.bench.bare_ingest insert NATS_URL EVENTS DATABASE_URL    insert the same rows, fetched before
    python -m tests.bench.bare_ingest pipeline NATS_URL EVENTS DATABASE_URL  fetch, insert, acknowledge after commit

Batches of 500, the next one fetched while one is committed with its fsync. A row has the columns of an event and its
id as primary key, so that an event counts once; nothing is checked, and there is no other index. Prints as JSON the
seconds that it took, and the CPU seconds that this process spent.
"""

import asyncio
import json
import sqlite3
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from time import perf_counter, process_time
from typing import Any

import msgspec
import nats
import psycopg
import uvloop
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from sqlalchemy import make_url

from shared.streams import GENERATION_COMPLETED, STREAM

DURABLE = "bare"
BATCH_SIZE = 500
FETCH_TIMEOUT_S = 5


class Data(msgspec.Struct):
    generation_id: str
    user_id: str
    action_type: str
    model: str | None
    tokens_used: int
    input_tokens: int | None
    output_tokens: int | None
    cache_creation_input_tokens: int | None
    cache_read_input_tokens: int | None
    outcome: str
    usage_source: str
    provider_request_id: str | None
    started_at: datetime
    completed_at: datetime
    metadata: msgspec.Raw


class Event(msgspec.Struct):
    id: str
    data: Data


COLUMNS = ("id", *Data.__struct_fields__)
TYPES: dict[object, str] = {int: "bigint", int | None: "bigint", datetime: "timestamptz"}
NAMES_AND_TYPES = ", ".join(f"{name} {TYPES.get(Data.__annotations__.get(name), 'text')}" for name in COLUMNS)
CREATE = f"CREATE TABLE bare ({NAMES_AND_TYPES}, PRIMARY KEY (id))"
INSERT_SQLITE = f"INSERT INTO bare VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT DO NOTHING"  # noqa: S608
# One parameter of JSON costs this process less than COPY, which could not pass over an event that is there already.
INSERT_POSTGRESQL = (
    f"INSERT INTO bare SELECT * FROM json_to_recordset(%s::json) AS r ({NAMES_AND_TYPES}) ON CONFLICT DO NOTHING"  # noqa: S608
)
COPY_POSTGRESQL = "COPY bare FROM STDIN (FORMAT BINARY)"

Row = tuple[Any, ...]
_event = msgspec.json.Decoder(Event)


def rows(messages: Sequence[Msg]) -> list[Row]:
    """What the ledger itself has published meanwhile is left out."""
    return [_row(message.data) for message in messages if message.subject == GENERATION_COMPLETED]


def _row(body: bytes) -> Row:
    event = _event.decode(body)
    return (event.id, *msgspec.structs.astuple(event.data)[:-1], bytes(event.data.metadata).decode())


def inserting(database_url: str) -> Callable[[Sequence[Row]], None]:
    """Commits the rows, each once."""
    if database_url.startswith("sqlite"):
        return _inserting_into_sqlite(database_url)
    postgresql = psycopg.connect(database_url, autocommit=True)
    postgresql.execute(CREATE)

    def insert(rows: Sequence[Row]) -> None:
        records = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        postgresql.execute(INSERT_POSTGRESQL, [msgspec.json.encode(records).decode()])

    return insert


def copying(database_url: str) -> Callable[[Sequence[Row]], None]:
    """Commits the rows in the fastest way that there is, which need not know of repeated ones."""
    if database_url.startswith("sqlite"):
        return _inserting_into_sqlite(database_url)
    postgresql = psycopg.connect(database_url, autocommit=True)
    postgresql.execute(CREATE)
    types = [TYPES.get(Data.__annotations__.get(name), "text") for name in COLUMNS]

    def insert(rows: Sequence[Row]) -> None:
        with postgresql.cursor() as cursor, cursor.copy(COPY_POSTGRESQL) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    return insert


def _inserting_into_sqlite(database_url: str) -> Callable[[Sequence[Row]], None]:
    file = make_url(database_url).database or ""
    sqlite = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        sqlite.execute(f"PRAGMA {pragma}")
    sqlite.execute(CREATE)

    def insert(rows: Sequence[Row]) -> None:
        texts = [(*row[:-3], row[-3].isoformat(), row[-2].isoformat(), row[-1]) for row in rows]
        sqlite.execute("BEGIN IMMEDIATE")
        sqlite.executemany(INSERT_SQLITE, texts)
        sqlite.execute("COMMIT")

    return insert


Settle = Callable[[Sequence[Msg]], Any]


async def pull(events: JetStreamContext.PullSubscription, number: int, settle: Settle | None) -> None:
    """Every event once, acknowledged after `settle` is done with its batch."""
    messages = await events.fetch(BATCH_SIZE, timeout=FETCH_TIMEOUT_S)
    while messages:
        number -= len(messages)
        settling = asyncio.create_task(_settle(messages, settle))
        messages = await events.fetch(BATCH_SIZE, timeout=FETCH_TIMEOUT_S) if number > 0 else []
        await settling


async def _settle(messages: Sequence[Msg], settle: Settle | None) -> None:
    if settle:
        await asyncio.to_thread(settle, messages)
    for message in messages:
        await message.ack()


async def main(what: str, nats_url: str, number: int, database_url: str = "") -> None:
    nc = await nats.connect(nats_url)
    events = await nc.jetstream().pull_subscribe_bind(DURABLE, STREAM)
    kept: list[Row] = []
    settle: Settle | None = None
    if what == "pipeline":
        insert = inserting(database_url)
        settle = lambda messages: insert(rows(messages))  # noqa: E731
    elif what == "insert":
        copy = copying(database_url)
        await pull(events, number, lambda messages: kept.extend(rows(messages)))
    begun, cpu_begun = perf_counter(), process_time()
    if what == "insert":
        for first in range(0, len(kept), BATCH_SIZE):
            copy(kept[first : first + BATCH_SIZE])
    else:
        await pull(events, number, settle)
    await nc.flush()
    told = {"seconds": perf_counter() - begun, "cpu_s": process_time() - cpu_begun}
    sys.stdout.write(json.dumps(told))
    await nc.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
