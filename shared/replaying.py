"""A service's tables, built anew from the stream beside the running service, and put in place in one transaction.

    built     in a schema (PostgreSQL) or a file (SQLite) of its own, where tables have their usual names: what counts
              an event there is the code that counts it every day
    compared  on SQLite: where every row in use is as it was built, nothing is left to do
    caught up with what arrived meanwhile, until little is left
    switched  writers wait while the rest of the stream is added and the tables change places

Until the switch is committed nothing of the present has changed, whatever becomes of the replay.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    FromClause,
    MetaData,
    Table,
    Text,
    and_,
    cast,
    false,
    func,
    make_url,
    not_,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import OperationalError

from shared.database import Database, patient_engine
from shared.errors import Misconfigured, Unavailable
from shared.events import Event
from shared.loading import Loads, by_the_book, load
from shared.quarantine import ANOTHER_BODY, Poison, alarm, quarantine
from shared.record import Record
from shared.recorded import Recorded, bounds
from shared.shadows import Shadow, is_busy, open_file, open_shadow
from shared.streams import LEDGER_SEALED, STREAM

# What is left for the switch to add, while others wait: a tenth of a millisecond each.
TAIL_MAX = 300
ROUNDS_MAX = 20
TAIL_WITHIN_S = 1.0
SWITCH_WITHIN_S = 60.0
AGAIN_S = 0.1
EXAMPLES_MAX = 20


class Rebuilt(Loads, Protocol):
    """What a service says of the tables that are built from the stream alone. All that it does, it does to them."""

    service: str
    durable: str
    migrations: Path
    # Replaced as a whole, in the order in which writers come to them.
    tables: tuple[Table, ...]
    # Of these, what is not summed up from others: a row for each event.
    kept: tuple[Table, ...]
    # A row of these may be absent: it follows from others whenever it is asked for.
    optional: tuple[Table, ...]
    # Indexes that `derive` needs.
    indexes: tuple[str, ...]

    def derive(self, db: Connection, live: str | None) -> None:
        """What follows from all that was loaded; `live` qualifies the tables that are in use."""
        ...

    def add(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        """As `load`, and with what follows from it, after `derive`."""
        ...

    def adopt(self, db: Connection, old: Callable[[str], str]) -> None:
        """In the switch: take over what the stream does not know. `old` is SQL's name of a table that was in use."""
        ...

    async def restore(self, nc: Client, url: str) -> None:
        """Beside the tables: what a database that was lost has lost with them, and can have back."""
        ...


@dataclass
class Told:
    """What a replay has read."""

    messages: int = 0
    poison: int = 0
    contradicting: int = 0
    # Of tables that were as they should be, none was exchanged.
    is_exchanged: bool = True
    locked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """What a replay would change in one table: how many rows, and the first of them, in words.

    What is `absent` is no loss: a row that follows from others whenever it is asked for.
    """

    table: str
    changed: int = 0
    missing: int = 0
    unknown: int = 0
    absent: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.changed + self.missing + self.unknown


async def replay(nc: Client, url: str, rebuilt: Rebuilt, *, archive: Path | None = None) -> Told:
    """Build the tables anew and switch to them. What the stream has no more is in the folder `archive`.

    Raises Misconfigured when that would lose something, or somebody else is at it; Unavailable when the broker or the
    database cannot be had for long enough.
    """
    record = Record(nc, archive)
    _, last = await record.bounds()
    _prepare(url, rebuilt.migrations)
    told = Told()
    with open_shadow(url, rebuilt.tables, rebuilt.migrations) as shadow:
        with shadow.begin() as db:
            in_use = (_in(shadow.live, table) for table in rebuilt.kept)
            if last == 0 and any(db.execute(select(table).limit(1)).first() for table in in_use):
                raise Misconfigured(f"The stream is empty, and the {rebuilt.service}'s database is not.")
        try:
            await _load(record, shadow, rebuilt, told, last=last, is_kept=True)
            shadow.index(rebuilt.indexes)
            await rebuilt.restore(nc, url)
            told.is_exchanged = not (shadow.is_copied and await _is_in_use(record, shadow, rebuilt, after=last))
            if told.is_exchanged:
                with shadow.begin() as db:
                    rebuilt.derive(db, shadow.live)
                await _catch_up(record, shadow, rebuilt, told, after=last)
        finally:
            await shadow.clean()
    return told


async def dry_run(
    nc: Client, url: str, rebuilt: Rebuilt, *, archive: Path | None = None
) -> tuple[Told, list[Difference]]:
    """What a replay would change, of what the service has had time to do; nothing is changed."""
    record = Record(nc, archive)
    await record.bounds()
    _prepare(url, rebuilt.migrations)
    told = Told()
    # All of it is committed by now; of what comes after it, only what the database has can be compared.
    acknowledged = await _acknowledged(nc, rebuilt.durable)
    with open_shadow(url, rebuilt.tables, rebuilt.migrations) as shadow:
        await _load(record, shadow, rebuilt, told, last=acknowledged, is_kept=False)
        shadow.index(rebuilt.indexes)
        with shadow.snapshot() as db:
            _, last = await bounds(nc)
            async for messages in _messages(record, acknowledged + 1, last, told):
                by_the_book(
                    db, lambda db, events: rebuilt.load(db, _known(db, shadow.live, rebuilt, events)), messages
                )
            rebuilt.derive(db, shadow.live)
            differences = [
                _Pair(db, shadow.live, table).difference(may_lack_rows=table in rebuilt.optional)
                for table in rebuilt.tables
            ]
    return told, differences


async def rebuild_into(
    nc: Client, file: Path, rebuilt: Rebuilt, *, until: datetime | None = None, archive: Path | None = None
) -> Told:
    """Build a SQLite database in `file` with what the stream had at `until`. Raises Misconfigured when it exists."""
    record = Record(nc, archive)
    _, last = await record.bounds()
    if await asyncio.to_thread(file.exists):
        raise Misconfigured(f"{file} exists: name another, or remove it.")
    told = Told()
    with open_file(file, rebuilt.tables, rebuilt.migrations) as shadow:
        await _load(record, shadow, rebuilt, told, last=last, is_kept=False, until=until)
        shadow.index(rebuilt.indexes)
        with shadow.begin() as db:
            rebuilt.derive(db, None)
    return told


def _prepare(url: str, migrations: Path) -> None:
    """An empty database gets its tables. Raises Misconfigured when those of another release are there."""
    with _connection(url) as db:
        found = MigrationContext.configure(db).get_current_revision()
    head = ScriptDirectory(str(migrations)).get_current_head()
    if found is None:
        Database(url).migrate(migrations)
    elif found != head:
        raise Misconfigured(f"The database {make_url(url)!r} is of another release: migrate it first.")


@contextmanager
def _connection(url: str) -> Iterator[Connection]:
    engine = patient_engine(url)
    try:
        with engine.begin() as db:
            yield db
    except OperationalError as error:
        raise Misconfigured(f"The database {engine.url!r} cannot be used: {error.orig}") from error
    finally:
        engine.dispose()


async def _load(
    record: Record,
    shadow: Shadow,
    rebuilt: Rebuilt,
    told: Told,
    *,
    last: int,
    is_kept: bool,
    until: datetime | None = None,
) -> None:
    with _progress(rebuilt.service, last) as advance:
        async for messages in _messages(record, 1, last, told):
            arrived = [each for each in messages if until is None or each.stored_at <= until]
            with shadow.begin() as db:
                refused = load(db, rebuilt, arrived)
            _set_aside(shadow, refused, told, is_kept=is_kept)
            advance(len(messages))
            if len(arrived) < len(messages):
                break


async def _load_known(
    record: Record, shadow: Shadow, rebuilt: Rebuilt, db: Connection, *, after: int, told: Told
) -> None:
    """Of what comes `after`, what the tables in use had in the snapshot: it is older than the end of the stream."""
    _, last = await bounds(record.nc)
    async for messages in _messages(record, after + 1, last, told):
        by_the_book(db, lambda db, events: rebuilt.load(db, _known(db, shadow.live, rebuilt, events)), messages)


async def _is_in_use(record: Record, shadow: Shadow, rebuilt: Rebuilt, *, after: int) -> bool:
    """Whether the tables in use say what was built, and nothing else; optional rows may be absent.

    What the service has handled `after` counts, too, and goes on being handled by it.
    """
    with shadow.snapshot() as db, db.begin_nested() as trial:
        await _load_known(record, shadow, rebuilt, db, after=after, told=Told())
        is_same = all(_Pair(db, shadow.live, table).is_same() for table in rebuilt.kept)
        if is_same:
            rebuilt.derive(db, shadow.live)
            derived = [table for table in rebuilt.tables if table not in rebuilt.kept]
            is_same = all(
                _Pair(db, shadow.live, table).is_same(may_lack_rows=table in rebuilt.optional) for table in derived
            )
        trial.rollback()
    return is_same


async def _messages(record: Record, first: int, last: int, told: Told) -> AsyncIterator[list[Recorded]]:
    async for batch in record.read(first=first, last=last):
        # Seals say something of the record, and are no part of what it says.
        yield [message for message in batch if message.subject != LEDGER_SEALED]
        told.messages += len(batch)


def _set_aside(shadow: Shadow, refused: Sequence[Poison], told: Told, *, is_kept: bool) -> None:
    """Into quarantine, where a deleted database has lost it."""
    contradicting = [poison for poison in refused if poison.reason == ANOTHER_BODY]
    told.contradicting += len(contradicting)
    told.poison += len(refused) - len(contradicting)
    if refused and is_kept:
        shadow.write_live(lambda db: quarantine(db, refused))
        alarm(contradicting)


async def _catch_up(record: Record, shadow: Shadow, rebuilt: Rebuilt, told: Told, *, after: int) -> None:
    """Add what arrives, until so little is left that the switch can add it."""
    deadline = perf_counter() + SWITCH_WITHIN_S
    for nth in range(ROUNDS_MAX):
        _, last = await bounds(record.nc)
        if nth > 0 and last - after <= TAIL_MAX:
            break
        async for messages in _messages(record, after + 1, last, told):
            with shadow.begin() as db:
                refused = by_the_book(db, rebuilt.add, messages)
            _set_aside(shadow, refused, told, is_kept=True)
        after = last
        await shadow.publish(rebuilt.kept)
    await shadow.publish([table for table in rebuilt.tables if table not in rebuilt.kept])
    while True:
        try:
            told.locked_s = await _switch(record, shadow, rebuilt, told, after=after)
            return
        except (OperationalError, TimeoutError, NatsError, APIError, OSError, Unavailable) as error:
            if isinstance(error, OperationalError) and not is_busy(error):
                raise
            if perf_counter() > deadline:
                raise Unavailable("The tables cannot be switched right now; nothing was changed.") from error
            await asyncio.sleep(AGAIN_S)


async def _switch(record: Record, shadow: Shadow, rebuilt: Rebuilt, told: Told, *, after: int) -> float:
    """How long writers were kept waiting, in seconds."""
    with shadow.locked() as lock:
        async with asyncio.timeout(TAIL_WITHIN_S):
            _, last = await bounds(record.nc)
            # What the service has is on the stream by now; what it handles later is known to be counted already.
            tail = [each async for messages in _messages(record, after + 1, last, Told()) for each in messages]
        refused = lock.exchange(lambda db: by_the_book(db, rebuilt.add, tail), rebuilt.adopt)
    told.messages += len(tail)
    _set_aside(shadow, refused, told, is_kept=True)
    return lock.held_s


async def _acknowledged(nc: Client, durable: str) -> int:
    """Up to where the service has committed all of the stream."""
    js = nc.jetstream()
    stream, consumer = await js.stream_info(STREAM), await js.consumer_info(STREAM, durable)
    return min(consumer.ack_floor.stream_seq if consumer.ack_floor else 0, stream.state.last_seq)


def _in(schema: str, table: Table) -> Table:
    return table.to_metadata(MetaData(), schema=schema)


def _key(table: Table) -> list[str]:
    return [column.name for column in table.primary_key]


def _known(db: Connection, live: str, rebuilt: Rebuilt, events: Sequence[Event]) -> list[Event]:
    """Of these events, those that the tables in use have."""
    ids = {event.id for event in events}
    known: set[str] = set()
    for table in rebuilt.kept:
        key = _in(live, table).c[_key(table)[0]]
        known |= set(db.execute(select(key).where(key.in_(ids))).scalars())
    return [event for event in events if event.id in known]


class _Pair:
    """A table in use, and the one that was built."""

    def __init__(self, db: Connection, live: str, table: Table) -> None:
        self._db, self._table = db, table
        self.found, self.expected = _in(live, table), table.alias("expected")
        self.same_key = and_(*(self.found.c[name] == self.expected.c[name] for name in _key(table)))
        self.others = [column.name for column in table.c if column.name not in (*_key(table), *_NOT_OF_THE_STREAM)]
        self.differs = or_(*(_differs(db, self.found.c[name], self.expected.c[name]) for name in self.others))

    def is_same(self, *, may_lack_rows: bool = False) -> bool:
        """Looks up each row once."""
        found, expected = self._number(self.found), self._number(self.expected)
        if found > expected or (found < expected and not may_lack_rows):
            return False
        return self._number(self.found.join(self.expected, self.same_key), not_(self.differs)) == found

    def _number(self, rows: FromClause, *where: ColumnElement[bool]) -> int:
        return self._db.execute(select(func.count()).select_from(rows).where(*where)).scalar_one()

    def difference(self, *, may_lack_rows: bool) -> Difference:
        found, expected, key = self.found, self.expected, _key(self._table)[0]
        wanted = (expected.c[name].label(f"expected_{name}") for name in self.others)
        changed = select(found, *wanted).join(expected, self.same_key).where(self.differs)
        missing = select(expected).outerjoin(found, self.same_key).where(found.c[key].is_(None))
        unknown = select(found).outerjoin(expected, self.same_key).where(expected.c[key].is_(None))
        listing = _Listing(self._db, self._table)
        if may_lack_rows:
            return listing.of(changed, missing.where(false()), unknown, self.others, absent=missing)
        return listing.of(changed, missing, unknown, self.others, absent=missing.where(false()))


# Facts of the moment at which an event was settled.
_NOT_OF_THE_STREAM = ("is_late",)
_JSON_AS_TEXT = ("models",)


def _differs(db: Connection, found: Any, expected: Any) -> Any:
    is_another = found.is_distinct_from(expected)
    if not isinstance(found.type, JSON) and found.name not in _JSON_AS_TEXT:
        return is_another
    found, expected = cast(found, Text), cast(expected, Text)
    if db.dialect.name == "sqlite":
        return and_(found.is_distinct_from(expected), func.canonical(found) != func.canonical(expected))
    return cast(found, JSONB).is_distinct_from(cast(expected, JSONB))


class _Listing:
    """Counts, and the first few rows in words."""

    def __init__(self, db: Connection, table: Table) -> None:
        self._db, self._table = db, table
        self._examples: list[str] = []

    def of(self, changed: Any, missing: Any, unknown: Any, others: Sequence[str], *, absent: Any) -> Difference:
        return Difference(
            self._table.name,
            changed=self._count(changed, lambda row: self._changes(row, others)),
            missing=self._count(missing, lambda row: f"{self._name(row)} is missing"),
            unknown=self._count(unknown, lambda row: f"{self._name(row)} is not on the stream"),
            absent=self._count(absent),
            examples=self._examples,
        )

    def _count(self, statement: Any, words: Callable[[Any], str] | None = None) -> int:
        number: int = self._db.execute(select(func.count()).select_from(statement.subquery())).scalar_one()
        if number and words:
            self._examples += [words(row) for row in self._db.execute(statement.limit(EXAMPLES_MAX)).mappings()]
        return number

    def _changes(self, row: Any, others: Sequence[str]) -> str:
        told = [
            f"{name} {_words(row[name])} becomes {_words(row[f'expected_{name}'])}"
            for name in others
            if row[name] != row[f"expected_{name}"]
        ]
        return f"{self._name(row)}: {', '.join(told)}"

    def _name(self, row: Any) -> str:
        names = dict.fromkeys([*_key(self._table), *(name for name in ("user_id",) if name in row)])
        return ", ".join(f"{name} {_words(row[name])}" for name in names)


def _words(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@contextmanager
def _progress(service: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(service), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(service, total=total)
        yield lambda number: progress.advance(task, number)
