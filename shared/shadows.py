"""Where tables are built anew, and how they change places with those in use.

On PostgreSQL a schema of its own holds them, found before the usual one: the same statements count there. They move
over as they are, with their partitions. On SQLite it is a file of its own, written at full speed and in nobody's way;
its rows are copied into the database a little at a time, since whoever writes there keeps all others from writing.
"""

import asyncio
import fcntl
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Protocol, TypeVar

from psycopg import errors
from sqlalchemy import Connection, Engine, Table, make_url, text
from sqlalchemy.exc import OperationalError

from shared.database import Database, patient_engine
from shared.errors import Misconfigured

Result = TypeVar("Result")
# SQL's name of a table that was in use, once another has taken its place.
Old = Callable[[str], str]
Adopt = Callable[[Connection, Old], None]

SCHEMA = "replay"
REPLAY_KEY = 6_124_007_311
BUILDING, REPLACED = "replay_", "replaced_"
# Who writes to SQLite keeps all others from writing: for so long, or for so many rows, and then they have their turn.
CHUNK_S = 0.025
CHUNK_ROWS, CHUNK_ROWS_MAX = 1000, 10_000
CACHE_KIB = 32 * 1024
# Whoever waits for longer gives way: behind it, all others wait.
LOCK_WITHIN_MS = 300
READERS_WITHIN_S = 0.3
LOOK_EVERY_S = 0.002

_AT_IT = "Another replay of this database is at work."


class Lock(Protocol):
    """Nobody else writes to the tables. Committed at the end of its context, or nothing has happened."""

    # How long that was, in seconds, once it is over.
    held_s: float

    def exchange(self, add: Callable[[Connection], Result], adopt: Adopt) -> Result:
        """Put the new tables in place, with what `add` adds and `adopt` takes over from the old ones."""
        ...


class Shadow(Protocol):
    """Tables under construction. In each of its transactions the names of tables are theirs."""

    # What qualifies the tables in use.
    live: str
    # Whether to put the tables in place every row is written a second time.
    is_copied: bool

    def begin(self) -> AbstractContextManager[Connection]: ...

    def snapshot(self) -> AbstractContextManager[Connection]:
        """The same, and the tables in use as they were at its beginning."""
        ...

    def index(self, names: Sequence[str]) -> None:
        """To be called once everything is loaded: `names` are those that are needed from now on."""
        ...

    def write_live(self, work: Callable[[Connection], None]) -> None:
        """Beside the replay, in the database that is in use."""
        ...

    async def publish(self, tables: Sequence[Table]) -> None:
        """Bring what these tables have got since the last time to where it can be put in place."""
        ...

    def locked(self) -> AbstractContextManager[Lock]: ...

    async def clean(self) -> None:
        """Take away what was replaced, or left by a replay that died."""
        ...


@contextmanager
def open_shadow(url: str, tables: Sequence[Table], migrations: Path) -> Iterator[Shadow]:
    """Empty tables. Raises Misconfigured when somebody else replays the same database."""
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    with _beside_sqlite(url, tables, migrations) if is_sqlite else _in_postgresql(url, tables) as shadow:
        yield shadow


@contextmanager
def open_file(file: Path, tables: Sequence[Table], migrations: Path) -> Iterator["SqliteShadow"]:
    """The tables of a new SQLite database that stays."""
    with _sqlite(file, tables, migrations, live=None) as shadow:
        yield shadow
        shadow.restore()


def is_busy(error: OperationalError) -> bool:
    """Somebody else has what we wait for."""
    return isinstance(error.orig, errors.LockNotAvailable | errors.DeadlockDetected) or "locked" in str(error.orig)


# SQLite


@contextmanager
def _beside_sqlite(url: str, tables: Sequence[Table], migrations: Path) -> Iterator["SqliteShadow"]:
    live = Path(make_url(url).database or "")
    file = live.with_name(f"{live.name}.replay")
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Misconfigured(_AT_IT) from None
        try:
            _remove(file)
            with _sqlite(file, tables, migrations, live=live) as shadow:
                yield shadow
        finally:
            _remove(file)


@contextmanager
def _sqlite(file: Path, tables: Sequence[Table], migrations: Path, *, live: Path | None) -> Iterator["SqliteShadow"]:
    url = f"sqlite:///{file}"
    Database(url).migrate(migrations)
    building, using = patient_engine(url, begin="BEGIN"), patient_engine(f"sqlite:///{live or file}")
    try:
        with building.connect() as connection:
            yield SqliteShadow(connection, using, tables, live)
    finally:
        building.dispose()
        using.dispose()


def _remove(file: Path) -> None:
    for each in (file, *(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm", "-journal"))):
        each.unlink(missing_ok=True)


class SqliteShadow:
    live = "live"
    is_copied = True

    def __init__(self, connection: Connection, using: Engine, tables: Sequence[Table], live: Path | None) -> None:
        self._db, self._using, self._tables, self._live = connection, using, tables, live
        self._copied: dict[str, int] = {}
        driver = connection.connection.driver_connection
        assert driver is not None  # noqa: S101 - it is open
        # What a crash leaves of this file is thrown away.
        driver.create_function("canonical", 1, _canonical, deterministic=True)
        for pragma in ("journal_mode=MEMORY", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            driver.execute(f"PRAGMA {pragma}")
        if live is not None:
            driver.execute("ATTACH ? AS live", (str(live),))
            for pragma in ("synchronous=NORMAL", f"cache_size=-{CACHE_KIB}"):
                driver.execute(f"PRAGMA live.{pragma}")
        with self.begin() as db:
            self._parts = _sqlite_parts(db, [table.name for table in tables])
            for kind, name, _, _ in self._parts:
                if kind != "table":
                    db.exec_driver_sql(f'DROP {kind} "{name}"')

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._db.begin():
            yield self._db

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        with self.begin() as db:
            db.exec_driver_sql("SELECT 1 FROM live.sqlite_master LIMIT 1").all()
            yield db

    def index(self, names: Sequence[str]) -> None:
        with self.begin() as db:
            for kind, name, _, sql in self._parts:
                if kind == "index" and name in names:
                    db.exec_driver_sql(sql)
        self._parts = [part for part in self._parts if part[1] not in names]

    def restore(self) -> None:
        """The indexes and triggers that loading had no use for."""
        with self.begin() as db:
            for kind, _, _, sql in self._parts:
                if kind != "table":
                    db.exec_driver_sql(sql)

    def write_live(self, work: Callable[[Connection], None]) -> None:
        with self._using.begin() as db:
            work(db)

    async def publish(self, tables: Sequence[Table]) -> None:
        if not self._copied:
            await self.clean()
            with self._using.begin() as db:
                _create_sqlite_copies(db, [table.name for table in self._tables])
        for table in tables:
            await self._copy(table.name)

    async def _copy(self, table: str) -> None:
        after = self._copied.get(table, 0)
        with self.begin() as db:
            last = db.exec_driver_sql(f'SELECT max(rowid) FROM "{table}"').scalar_one() or 0  # noqa: S608
            names = ", ".join(f'"{row[1]}"' for row in db.exec_driver_sql(f'PRAGMA table_info("{table}")'))
        copy = (
            f'INSERT INTO live."{BUILDING}{table}" ({names}) SELECT {names} FROM "{table}"'  # noqa: S608
            " WHERE rowid > ? AND rowid <= ?"
        )
        chunks = _Chunks()
        while after < last:
            async with chunks:
                with self.begin() as db:
                    db.exec_driver_sql(copy, (after, after + chunks.rows))
                after += chunks.rows
        self._copied[table] = last

    @contextmanager
    def locked(self) -> Iterator["_SqliteLock"]:
        with self._using.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # noqa: S101 - it is open
            # What refers to a table by its name goes on doing so.
            driver.execute("PRAGMA legacy_alter_table=ON")
            with connection.begin():
                begun = perf_counter()
                lock = _SqliteLock(connection, [table.name for table in self._tables])
                yield lock
            lock.held_s = perf_counter() - begun
            connection.detach()  # its settings are its own

    async def clean(self) -> None:
        for table in self._tables:
            for prefix in (BUILDING, REPLACED):
                await self._take_away(f"{prefix}{table.name}")

    async def _take_away(self, table: str) -> None:
        """Row by row: to drop a large table keeps others from writing for as long as it has pages."""
        with self._using.begin() as db:
            is_there = db.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).first()
        if not is_there:
            return
        clean = f'DELETE FROM "{table}" WHERE rowid <= (SELECT min(rowid) FROM "{table}") + ?'  # noqa: S608
        chunks, deleted = _Chunks(), 1
        while deleted:
            async with chunks:
                with self._using.begin() as db:
                    deleted = db.exec_driver_sql(clean, (chunks.rows,)).rowcount
        with self._using.begin() as db:
            db.exec_driver_sql(f'DROP TABLE "{table}"')


class _Chunks:
    """How many rows to write at once. Behind each chunk others have half as long as it took."""

    rows = CHUNK_ROWS

    async def __aenter__(self) -> None:
        self._begun = perf_counter()

    async def __aexit__(self, *_: object) -> None:
        took_s = perf_counter() - self._begun
        self.rows = max(CHUNK_ROWS, min(CHUNK_ROWS_MAX, int(self.rows * CHUNK_S / took_s)))
        await asyncio.sleep(took_s / 2)


def _canonical(text: str | None) -> str:
    """JSON that is the same where it says the same."""
    return "" if text is None else json.dumps(json.loads(text), sort_keys=True)


_Part = tuple[str, str, str, str]


def _sqlite_parts(db: Connection, tables: Sequence[str]) -> list[_Part]:
    """(kind, name, table, SQL) of the tables, their indexes and triggers, as they were created."""
    found = db.exec_driver_sql("SELECT type, name, tbl_name, sql FROM main.sqlite_master WHERE sql IS NOT NULL").all()
    return [(kind, name, table, sql) for kind, name, table, sql in found if table in tables]


def _create_sqlite_copies(db: Connection, tables: Sequence[str]) -> None:
    """Of the tables and their indexes, without a row, under names of their own. Triggers follow with the exchange."""
    for wanted in ("table", "index"):
        for kind, name, table, sql in _sqlite_parts(db, tables):
            if kind == wanted:
                new = _renamed(sql, name, f"{BUILDING}{name}")
                db.exec_driver_sql(new if kind == "table" else _on(new, table, f"{BUILDING}{table}"))


def _renamed(sql: str, name: str, new: str) -> str:
    """The CREATE statement with another name for what it creates."""
    named = rf'(CREATE\s+(?:UNIQUE\s+)?\w+\s+)"?{re.escape(name)}"?(?=[\s(])'
    changed, number = re.subn(named, rf'\1"{new}"', sql, count=1)
    assert number == 1, sql  # noqa: S101 - SQLite keeps statements in this form
    return changed


def _on(sql: str, table: str, new: str) -> str:
    named = rf'(\sON\s+)"?{re.escape(table)}"?(?=[\s(])'
    changed, number = re.subn(named, rf'\1"{new}"', sql, count=1)
    assert number == 1, sql  # noqa: S101 - as above
    return changed


class _SqliteLock:
    held_s = 0.0

    def __init__(self, db: Connection, tables: Sequence[str]) -> None:
        self._db, self._tables = db, tables

    def exchange(self, add: Callable[[Connection], Result], adopt: Adopt) -> Result:
        db, parts = self._db, _sqlite_parts(self._db, self._tables)
        for kind, name, _, _ in parts:
            if kind == "trigger":
                db.exec_driver_sql(f'DROP TRIGGER "{name}"')
        for table in self._tables:
            db.exec_driver_sql(f'ALTER TABLE "{table}" RENAME TO "{REPLACED}{table}"')
            db.exec_driver_sql(f'ALTER TABLE "{BUILDING}{table}" RENAME TO "{table}"')
        # SQLite has no statement for it: the names and the text of indexes are in this table, and nowhere else.
        db.exec_driver_sql("PRAGMA writable_schema=ON")
        rename = "UPDATE sqlite_master SET name = ?, sql = ? WHERE name = ? AND type = ?"
        for kind, name, table, sql in parts:
            if kind == "index":
                replaced = _on(_renamed(sql, name, f"{REPLACED}{name}"), table, f"{REPLACED}{table}")
                db.exec_driver_sql(rename, (f"{REPLACED}{name}", replaced, name, kind))
                db.exec_driver_sql(rename, (name, sql, f"{BUILDING}{name}", kind))
            elif kind == "table":
                db.exec_driver_sql(rename, (name, sql, name, kind))
        db.exec_driver_sql("PRAGMA writable_schema=RESET")
        for kind, _, _, sql in parts:
            if kind == "trigger":
                db.exec_driver_sql(sql)
        added = add(db)
        adopt(db, lambda table: f'"{REPLACED}{table}"')
        return added


# PostgreSQL


@contextmanager
def _in_postgresql(url: str, tables: Sequence[Table]) -> Iterator["PostgresShadow"]:
    engine = patient_engine(url)
    try:
        with engine.connect() as building, engine.connect() as switching:
            with switching.begin():
                if not switching.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": REPLAY_KEY}).scalar_one():
                    raise Misconfigured(_AT_IT)
                live = switching.execute(text("SELECT current_schema()")).scalar_one()
            shadow = PostgresShadow(building, switching, tables, live)
            try:
                yield shadow
            finally:
                shadow.drop()
    finally:
        engine.dispose()


class PostgresShadow:
    is_copied = False

    def __init__(self, building: Connection, switching: Connection, tables: Sequence[Table], live: str) -> None:
        self._db, self._switching, self.live = building, switching, live
        self._tables = [table.name for table in tables]
        for connection in (building, switching):
            with connection.begin():
                connection.exec_driver_sql(f'SET search_path = "{SCHEMA}", "{live}"')
        with self.begin() as db:
            # Lost with a crash of the server, it is built again. The switch itself waits for the disk.
            db.exec_driver_sql("SET synchronous_commit = off")
            db.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{SCHEMA}" CASCADE')
            db.exec_driver_sql(f'CREATE SCHEMA "{SCHEMA}"')
            for table in self._tables:
                self._create(db, table)
            self.partitions = {table: _partitions(db, self.live, table) for table in self._tables}

    def _create(self, db: Connection, table: str) -> None:
        """With its partitions. Its key comes last, and takes theirs for its own."""
        named = {"table": f'"{self.live}"."{table}"'}
        kind, parted_by, options = db.execute(_POSTGRES_KIND, named).one()
        if kind not in ("r", "p"):
            raise Misconfigured(f"The table {table} is none of this release: it cannot be replayed.")
        db.exec_driver_sql(
            f'CREATE TABLE "{SCHEMA}"."{table}" (LIKE "{self.live}"."{table}" INCLUDING ALL EXCLUDING INDEXES)'
            f" {parted_by} {options}"
        )
        for partition, bounds in _partitions(db, self.live, table).items():
            self._create(db, partition)
            db.exec_driver_sql(f'ALTER TABLE "{SCHEMA}"."{table}" ATTACH PARTITION "{SCHEMA}"."{partition}" {bounds}')
        for name, definition in db.execute(_POSTGRES_KEYS, named).all():
            db.exec_driver_sql(f'ALTER TABLE "{SCHEMA}"."{table}" ADD CONSTRAINT "{name}" {definition}')

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._db.begin():
            yield self._db

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        with self.begin() as db:
            db.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield db

    def index(self, names: Sequence[str]) -> None:
        """All of them: they cost least when the rows are there."""
        with self.begin() as db:
            for table in self._tables:
                # An index of a partitioned table takes those of its partitions for its own.
                for each in (*self.partitions[table], table):
                    for definition in _all(db, _POSTGRES_INDEXES, self.live, each):
                        db.exec_driver_sql(_in_schema(definition))
            self._analyze(db, self._tables)

    def write_live(self, work: Callable[[Connection], None]) -> None:
        with self.begin() as db:
            work(db)

    async def publish(self, tables: Sequence[Table]) -> None:
        """They are where they should be."""
        with self.begin() as db:
            self._analyze(db, [table.name for table in tables])

    def _analyze(self, db: Connection, tables: Sequence[str]) -> None:
        """Once they have rows: to know the columns that they are searched by helps to plan what reads them."""
        for table in _all(db, _POSTGRES_UNKNOWN, SCHEMA, *tables):
            columns = ", ".join(f'"{name}"' for name in _all(db, _POSTGRES_INDEXED, SCHEMA, table))
            db.exec_driver_sql(f'ANALYZE "{SCHEMA}"."{table}" ({columns})')

    @contextmanager
    def locked(self) -> Iterator["_PostgresLock"]:
        with self._switching.begin():
            self._switching.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WITHIN_MS}ms'")
            for table in self._tables:
                self._switching.exec_driver_sql(f'LOCK TABLE "{self.live}"."{table}" IN SHARE ROW EXCLUSIVE MODE')
            begun = perf_counter()
            lock = _PostgresLock(self)
            yield lock
        lock.held_s = perf_counter() - begun

    async def clean(self) -> None:
        """The replaced tables went with the exchange."""

    def drop(self) -> None:
        self._db.rollback()
        with self.begin() as db:
            db.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{SCHEMA}" CASCADE')


class _PostgresLock:
    held_s = 0.0

    def __init__(self, shadow: PostgresShadow) -> None:
        self._shadow = shadow

    def exchange(self, add: Callable[[Connection], Result], adopt: Adopt) -> Result:
        """Readers go on reading what there was until the very end."""
        live, tables, db = self._shadow.live, self._shadow._tables, self._shadow._switching
        # Committed first: a reader whose snapshot is older than the exchange would see the new tables without it.
        with self._shadow.begin() as building:
            added = add(building)
        self._older_readers_are_done()
        partitions = self._shadow.partitions
        if partitions != {table: _partitions(db, live, table) for table in tables}:
            raise Misconfigured("The tables have other partitions by now: replay once more.")
        parts = [each for table in tables for each in (table, *partitions[table])]
        guards = [*_all(db, _POSTGRES_TRIGGERS, live, *parts), *_all(db, _POSTGRES_GRANTS, live, *parts)]
        # In the order in which statements of ours come to them.
        for table in reversed(tables):
            db.exec_driver_sql(f'LOCK TABLE "{live}"."{table}" IN ACCESS EXCLUSIVE MODE')
        adopt(db, lambda table: f'"{live}"."{table}"')
        dropped = [f'DROP TABLE "{live}"."{table}"' for table in tables]
        moved = [f'ALTER TABLE "{SCHEMA}"."{part}" SET SCHEMA "{live}"' for part in parts]
        # All at once: a table may have dozens of partitions, and others wait.
        db.exec_driver_sql("; ".join((*dropped, *moved, *guards)))
        return added

    def _older_readers_are_done(self) -> None:
        """Those who wait for a lock wait for us, and look at the tables afterwards."""
        deadline = perf_counter() + READERS_WITHIN_S
        older = readers = self._readers()
        while older & readers:
            if perf_counter() > deadline:
                raise TimeoutError("somebody reads for too long")
            sleep(LOOK_EVERY_S)
            readers = self._readers()

    def _readers(self) -> set[tuple[Any, ...]]:
        with self._shadow.begin() as db:  # what a transaction is told of others stays as it was
            return {tuple(row) for row in db.execute(_POSTGRES_READERS)}


def _all(db: Connection, statement: Any, live: str, *tables: str) -> list[str]:
    return list(db.execute(statement, {"tables": [f'"{live}"."{table}"' for table in tables]}).scalars())


def _partitions(db: Connection, live: str, table: str) -> dict[str, str]:
    """Their names and bounds; none of a table that is not partitioned."""
    found = db.execute(_POSTGRES_PARTITIONS, {"table": f'"{live}"."{table}"'})
    return {row.relname: row.bounds for row in found}


def _in_schema(definition: str) -> str:
    """The index, on the table under construction and all of its partitions."""
    changed, number = re.subn(r" ON (?:ONLY )?\S+?\.(\S+ USING )", rf' ON "{SCHEMA}".\1', definition, count=1)
    assert number == 1, definition  # noqa: S101 - as PostgreSQL writes it
    return changed


_POSTGRES_KIND = text(
    "SELECT relkind, coalesce('PARTITION BY ' || pg_get_partkeydef(oid), ''),"
    " coalesce('WITH (' || array_to_string(reloptions, ', ') || ')', '')"
    " FROM pg_class WHERE oid = CAST(:table AS regclass)"
)
_POSTGRES_PARTITIONS = text(
    "SELECT relname, pg_get_expr(relpartbound, pg_class.oid) AS bounds FROM pg_inherits"
    " JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = CAST(:table AS regclass) ORDER BY relname"
)
_POSTGRES_KEYS = text(
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE conrelid = CAST(:table AS regclass) AND contype IN ('p', 'u')"
)
_POSTGRES_INDEXES = text(
    "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = ANY(CAST(:tables AS regclass[]))"
    " AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)"
)
_POSTGRES_UNKNOWN = text(
    "SELECT relname FROM pg_class WHERE oid = ANY(CAST(:tables AS regclass[])) AND reltuples <= 0 ORDER BY relname"
)
_POSTGRES_INDEXED = text(
    "SELECT DISTINCT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)"
    " WHERE indrelid = ANY(CAST(:tables AS regclass[]))"
)
_POSTGRES_TRIGGERS = text(
    "SELECT pg_get_triggerdef(oid) FROM pg_trigger"
    " WHERE tgrelid = ANY(CAST(:tables AS regclass[])) AND NOT tgisinternal"
)
# From nothing: where nobody was ever granted anything, the owner has all rights, and the list is empty.
_POSTGRES_GRANTS = text(
    "SELECT format('REVOKE ALL ON %s FROM %I', oid::regclass, pg_get_userbyid(relowner)) FROM pg_class"
    " WHERE oid = ANY(CAST(:tables AS regclass[])) AND relacl IS NOT NULL"
    " UNION ALL SELECT format('GRANT %s ON %s TO %s%s', privilege_type, class.oid::regclass,"
    " CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,"
    " CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)"
    " FROM pg_class class, aclexplode(relacl) WHERE class.oid = ANY(CAST(:tables AS regclass[]))"
)
_POSTGRES_READERS = text(
    "SELECT pid, xact_start FROM pg_stat_activity WHERE datname = current_database() AND backend_xmin IS NOT NULL"
    " AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND wait_event_type IS DISTINCT FROM 'Lock'"
)
