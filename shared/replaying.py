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
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Protocol

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError
from psycopg import errors
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection, Table, make_url, select
from sqlalchemy.exc import OperationalError

from shared.append_only import AppendOnly, guard, unguarded_in
from shared.database import Database, is_sqlite, patient_engine, shown, usable
from shared.differences import Difference, Pair, in_schema, key_of
from shared.errors import Misconfigured, Unavailable
from shared.events import Event
from shared.loading import Loads, by_the_book, load
from shared.postgres_shadow import in_postgresql
from shared.quarantine import ANOTHER_BODY, Poison, alarm, quarantine
from shared.record import Record
from shared.recorded import Recorded, bounds
from shared.shadows import Shadow
from shared.sqlite_shadow import beside_sqlite, open_file
from shared.streams import LEDGER_SEALED, reached

# What is left for the switch to add, while others wait: a tenth of a millisecond each.
TAIL_MAX = 300
ROUNDS_MAX = 20
TAIL_WITHIN_S = 1.0
SWITCH_WITHIN_S = 60.0
AGAIN_S = 0.1
GUARDED_WITHIN_S = 3


class Rebuilt(Loads, Protocol):
    """What a service says of the tables that are built from the stream alone. All that it does, it does to them."""

    service: str
    durable: str
    migrations: Path
    # Replaced as a whole, in the order in which writers come to them.
    tables: tuple[Table, ...]
    # Of these, what is not summed up from others: a row for each event.
    kept: tuple[Table, ...]
    # Whatever else: what nobody is to change.
    append_only: tuple[AppendOnly, ...]
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

    async def lost(self, record: Record, url: str) -> list[str]:
        """In words: what `restore` would give back, or why it cannot."""
        ...

    async def restore(self, record: Record, url: str) -> list[str]:
        """Beside the tables: give back what a database that was lost has lost with them. In words, what that was.

        Raises Misconfigured where the record itself was changed.
        """
        ...


@dataclass
class Told:
    """What a replay has read."""

    messages: int = 0
    # Sequences that the record should have and does not, and the first of them.
    lacking: int = 0
    first_lacking: int | None = None
    poison: int = 0
    contradicting: int = 0
    # Of tables that were as they should be, none was exchanged.
    is_exchanged: bool = True
    locked_s: float = 0.0
    # Of what is beside the tables, in words.
    beside: list[str] = field(default_factory=list)

    def lacks(self, sequences: range, *, but_for: Sequence[Recorded]) -> None:
        if (number := len(sequences) - len(but_for)) > 0:
            there = {message.sequence for message in but_for}
            self.lacking += number
            self.first_lacking = self.first_lacking or next(each for each in sequences if each not in there)


async def replay(
    nc: Client, url: str, rebuilt: Rebuilt, *, archive: Path | None = None, despite_gaps: bool = False
) -> Told:
    """Build the tables anew and switch to them. What the stream has no more is in the folder `archive`.

    Raises Misconfigured when that would lose something, or somebody else is at it; Unavailable when the broker or the
    database cannot be had for long enough. A stream never lacks a message that was on it: one that does is damaged.
    """
    record = Record(nc, archive)
    _, last = await record.bounds()
    _prepare(url, rebuilt)
    told = Told()
    with open_shadow(url, rebuilt.tables, rebuilt.migrations) as shadow:
        with shadow.begin() as db:
            in_use = (in_schema(shadow.live, table) for table in rebuilt.kept)
            if last == 0 and any(db.execute(select(table).limit(1)).first() for table in in_use):
                raise Misconfigured(f"The stream is empty, and the {rebuilt.service}'s database is not.")
        try:
            await _load(record, shadow, rebuilt, told, last=last, is_kept=True)
            if told.lacking and not despite_gaps:
                raise Misconfigured(
                    f"The stream lacks {told.lacking:,} of its messages, the first of them message "
                    f"{told.first_lacking:,}: a replay would lose what they say, and nothing was changed. "
                    "Restore the broker's store first; make audit names them. --despite-gaps replays what is left."
                )
            shadow.index(rebuilt.indexes)
            told.beside = await _restored(record, url, rebuilt, despite_damage=despite_gaps)
            told.beside += await asyncio.to_thread(_guarded_again, url, rebuilt)
            told.is_exchanged = not (shadow.is_copied and await _is_in_use(record, shadow, rebuilt, after=last))
            if told.is_exchanged:
                with shadow.begin() as db:
                    rebuilt.derive(db, shadow.live)
                await _catch_up(record, shadow, rebuilt, told, after=last)
        finally:
            await shadow.clean()
    return told


async def _restored(record: Record, url: str, rebuilt: Rebuilt, *, despite_damage: bool) -> list[str]:
    try:
        return await rebuilt.restore(record, url)
    except Misconfigured as problem:
        if not despite_damage:
            raise
        return [str(problem)]


def _guarded_again(url: str, rebuilt: Rebuilt) -> list[str]:
    """In words, which tables lacked what refuses a change, and have it again."""
    told = []
    for each in rebuilt.append_only:
        with _connection(url) as db:
            for name in unguarded_in(db, each.table):
                if not is_sqlite(db):
                    db.exec_driver_sql(f"SET LOCAL lock_timeout = '{GUARDED_WITHIN_S}s'")
                guard(db, each, name)
                told.append(f"{name} lacked triggers that refuse changes, and has them again")
    return told


async def dry_run(
    nc: Client, url: str, rebuilt: Rebuilt, *, archive: Path | None = None
) -> tuple[Told, list[Difference]]:
    """What a replay would change, of what the service has had time to do; nothing is changed."""
    record = Record(nc, archive)
    await record.bounds()
    with _looked_at(url, rebuilt) as there:
        return await _dry_run(record, there, rebuilt)


async def _dry_run(record: Record, url: str, rebuilt: Rebuilt) -> tuple[Told, list[Difference]]:
    nc, told = record.nc, Told()
    # All of it is committed by now; of what comes after it, only what the database has can be compared.
    acknowledged = (await reached(nc, rebuilt.durable)).acknowledged
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
            differences = [Pair(db, shadow.live, table).difference() for table in rebuilt.tables]
        told.beside = await rebuilt.lost(record, url)
    with _connection(url) as db:
        unguarded = [name for each in rebuilt.append_only for name in unguarded_in(db, each.table)]
    told.beside += [f"{name} lacks triggers that refuse changes, and would get them back" for name in unguarded]
    return told, differences


async def rebuild_into(
    nc: Client, file: Path, rebuilt: Rebuilt, *, until: datetime | None = None, archive: Path | None = None
) -> Told:
    """Build a SQLite database in `file` with what the stream had at `until`. It is there once it is whole.

    Raises Misconfigured when it exists.
    """
    record = Record(nc, archive)
    _, last = await record.bounds()
    told = Told()
    with open_file(file, rebuilt.tables, rebuilt.migrations) as shadow:
        await _load(record, shadow, rebuilt, told, last=last, is_kept=False, until=until)
        shadow.index(rebuilt.indexes)
        with shadow.begin() as db:
            rebuilt.derive(db, None)
    return told


@contextmanager
def open_shadow(url: str, tables: Sequence[Table], migrations: Path) -> Iterator[Shadow]:
    """Empty tables. Raises Misconfigured when somebody else replays the same database, and within its context where
    the database cannot be used."""
    database = make_url(url)
    is_sqlite = database.get_backend_name() == "sqlite"
    with (
        usable(database),
        beside_sqlite(url, tables, migrations) if is_sqlite else in_postgresql(url, tables) as shadow,
    ):
        yield shadow


@contextmanager
def _looked_at(url: str, rebuilt: Rebuilt) -> Iterator[str]:
    """The database. Where it has no tables, another that is empty, so that nothing of the look is left."""
    if _revision(url) is not None:
        _prepare(url, rebuilt)
        yield url
        return
    with tempfile.TemporaryDirectory("-chatrail-replay") as folder:
        empty = f"sqlite:///{folder}/{rebuilt.service}.db"
        _prepare(empty, rebuilt)
        yield empty


def _prepare(url: str, rebuilt: Rebuilt) -> None:
    """An empty database gets its tables. Raises Misconfigured when those of another release are there."""
    found = _revision(url)
    newest, *before = [each.revision for each in ScriptDirectory(str(rebuilt.migrations)).walk_revisions()]
    if found is None:
        Database(url).migrate(rebuilt.migrations)
    elif found in before:
        raise Misconfigured(
            f"The database {shown(make_url(url))} is of an earlier release, and was not changed. Start ChatRail on "
            f"it, or run python -m services.{rebuilt.service} migrate; then replay."
        )
    elif found != newest:
        raise Misconfigured(f"The database {shown(make_url(url))} is of a later release: replay it with that one.")


def _revision(url: str) -> str | None:
    """None where there are no tables."""
    database = make_url(url)
    if database.get_backend_name() == "sqlite":
        # To connect would make the file.
        file = Path(database.database or "")
        if not file.exists() or file.stat().st_size == 0:
            return None
    with _connection(url) as db:
        return MigrationContext.configure(db).get_current_revision()


@contextmanager
def _connection(url: str) -> Iterator[Connection]:
    engine = patient_engine(url)
    try:
        with usable(engine.url), engine.begin() as db:
            yield db
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
        async for messages in _messages(record, 1, last, told, until=until):
            with shadow.begin() as db:
                refused = load(db, rebuilt, messages)
            _set_aside(shadow, refused, told, is_kept=is_kept)
            advance(len(messages))


async def _load_known(
    record: Record, shadow: Shadow, rebuilt: Rebuilt, db: Connection, *, after: int, told: Told
) -> None:
    """Of what comes `after`, what the tables in use had in the snapshot: it is older than the end of the stream."""
    _, last = await bounds(record.nc)
    async for messages in _messages(record, after + 1, last, told):
        by_the_book(db, lambda db, events: rebuilt.load(db, _known(db, shadow.live, rebuilt, events)), messages)


async def _is_in_use(record: Record, shadow: Shadow, rebuilt: Rebuilt, *, after: int) -> bool:
    """Whether the tables in use say what was built, and nothing else.

    What the service has handled `after` counts, too, and goes on being handled by it.
    """
    with shadow.snapshot() as db, db.begin_nested() as trial:
        await _load_known(record, shadow, rebuilt, db, after=after, told=Told())
        is_same = all(Pair(db, shadow.live, table).is_same() for table in rebuilt.kept)
        if is_same:
            rebuilt.derive(db, shadow.live)
            derived = [table for table in rebuilt.tables if table not in rebuilt.kept]
            is_same = all(Pair(db, shadow.live, table).is_same() for table in derived)
        trial.rollback()
    return is_same


async def _messages(
    record: Record, first: int, last: int, told: Told, *, until: datetime | None = None
) -> AsyncIterator[list[Recorded]]:
    async for batch in record.read(first=first, last=last):
        told.lacks(range(first, batch[-1].sequence + 1), but_for=batch)
        first = batch[-1].sequence + 1
        stored = [message for message in batch if until is None or message.stored_at <= until]
        told.messages += len(stored)
        # Seals say something of the record, and are no part of what it says.
        yield [message for message in stored if message.subject != LEDGER_SEALED]
        if len(stored) < len(batch):
            return
    told.lacks(range(first, last + 1), but_for=())


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
            if isinstance(error, OperationalError) and not _is_busy(error):
                raise
            if perf_counter() > deadline:
                raise Unavailable("The tables cannot be switched right now; nothing was changed.") from error
            await asyncio.sleep(AGAIN_S)


def _is_busy(error: OperationalError) -> bool:
    """Somebody else has what we wait for."""
    return isinstance(error.orig, errors.LockNotAvailable | errors.DeadlockDetected) or "locked" in str(error.orig)


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


def _known(db: Connection, live: str, rebuilt: Rebuilt, events: Sequence[Event]) -> list[Event]:
    """Of these events, those that the tables in use have."""
    ids = {event.id for event in events}
    known: set[str] = set()
    for table in rebuilt.kept:
        key = in_schema(live, table).c[key_of(table)[0]]
        known |= set(db.execute(select(key).where(key.in_(ids))).scalars())
    return [event for event in events if event.id in known]


@contextmanager
def _progress(service: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(service), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(service, total=total)
        yield lambda number: progress.advance(task, number)
