"""Tables built anew beside a SQLite database, in a file of its own: at full speed and in nobody's way.

Its rows are copied into the database a little at a time, since whoever writes there keeps all others from writing.
"""

import asyncio
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from sqlalchemy import Connection, Engine, Table, make_url

from shared.database import Database, patient_engine, text_or_bytes
from shared.differences import canonical
from shared.errors import Misconfigured
from shared.shadows import AT_IT, Adopt, Result

BUILDING, REPLACED = "replay_", "replaced_"
# Who writes keeps all others from writing: for so long, or for so many rows, and then they have their turn.
CHUNK_S = 0.025
CHUNK_ROWS, CHUNK_ROWS_MAX = 1000, 10_000
CACHE_KIB = 32 * 1024


@contextmanager
def beside_sqlite(url: str, tables: Sequence[Table], migrations: Path) -> Iterator["SqliteShadow"]:
    """Empty tables. Raises Misconfigured when somebody else replays the same database."""
    live = Path(make_url(url).database or "")
    file = live.with_name(f"{live.name}.replay")
    with _locked(file.with_name(f"{file.name}.lock")):
        try:
            _remove(file)
            with _sqlite(file, tables, migrations, live=live) as shadow:
                yield shadow
        finally:
            _remove(file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The file is gone afterwards."""
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Misconfigured(AT_IT) from None
            # Whoever had it took it away after we had opened it: another may have made the next one.
            if not _is_at(path, lock.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def open_file(file: Path, tables: Sequence[Table], migrations: Path) -> Iterator["SqliteShadow"]:
    """The tables of a new SQLite database, which has its name once all is in it; what a dead one has left is gone.

    Raises Misconfigured when the file exists, or somebody else builds it.
    """
    _make_folder(file)
    draft = file.with_name(f"{file.name}.replay")
    with _locked(draft.with_name(f"{draft.name}.lock")):
        if file.exists():
            raise Misconfigured(f"{file} exists: name another, or remove it.")
        try:
            _remove(draft)
            with _sqlite(draft, tables, migrations, live=None) as shadow:
                yield shadow
                shadow.restore()
            with draft.open("rb+") as built:
                os.fsync(built.fileno())
            draft.rename(file)
        finally:
            _remove(draft)


def _make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(f"The folder {file.parent} cannot be made: {error.strerror}.") from error
    if not os.access(file.parent, os.W_OK):
        raise Misconfigured(f"The folder {file.parent} cannot be written.")


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
        driver.create_function("canonical", 1, canonical, deterministic=True)
        driver.create_function("is_utf8", 1, lambda raw: isinstance(text_or_bytes(raw), str), deterministic=True)
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
