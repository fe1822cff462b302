"""One way to each database: SQLite for one machine, PostgreSQL for many replicas, the same stores on both."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import msgspec
import psycopg
from alembic import command
from alembic.config import Config
from psycopg import conninfo, errors
from psycopg.abc import PQGen
from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Dialect,
    Engine,
    NullPool,
    QueuePool,
    Table,
    Text,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.types import TypeDecorator
from sqlmodel import SQLModel

from shared.errors import Misconfigured

P = ParamSpec("P")
Result = TypeVar("Result")

# No caller waits for longer; a batch of events comes again by itself.
BUSY_TIMEOUT_S = 2
# A command that works on whole tables does: its turn comes when those who answer people pause.
PATIENCE_S = 30
# No statement of ours takes a tenth of it. Longer, and the server ends it, or we give up a server that says nothing.
SILENCE_S_MAX = 8
# What libpq does about a link that is dead, unless the URL says otherwise.
_LINK = {
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": SILENCE_S_MAX * 1000,
}
# And the server, which would keep the locks of a client that it does not hear any more.
_SESSION = f"-c statement_timeout={SILENCE_S_MAX}s -c idle_in_transaction_session_timeout={SILENCE_S_MAX}s"
WRITERS = 4
READERS = 4
Rows = list[dict[str, Any]]
_EXACT, _WHOLE_SECOND = "2026-12-31T23:59:59.123456Z", "2026-12-31T23:59:59Z"
_texts: msgspec.json.Decoder[list[str | None]] = msgspec.json.Decoder(list[str | None])
_CLOCK = select(func.clock_timestamp(type_=DateTime(timezone=True)))


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database. SQLite keeps it as ISO 8601 text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return iso(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return _moment(value) if isinstance(value, str) else value.astimezone(UTC)


@lru_cache(maxsize=1024)
def iso(moment: datetime) -> str:
    """The rows of one transaction share their moments."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def isos(moments: Sequence[datetime | None]) -> list[str | None]:
    """Each as `iso` writes it, at a tenth of its price. Zones are whole minutes from UTC, as in RFC 3339."""
    written = _texts.decode(msgspec.json.encode(moments))
    return [
        text if moment is None or text is None or len(text) == len(_EXACT) else _exact(text, moment)
        for text, moment in zip(written, moments, strict=True)
    ]


def _exact(text: str, moment: datetime) -> str:
    return f"{text[:-1]}.000000Z" if len(text) == len(_WHOLE_SECOND) else iso(moment)


@lru_cache(maxsize=1024)
def _moment(text: str) -> datetime:
    """Those that are read again and again are the bounds of periods."""
    return datetime.fromisoformat(text).astimezone(UTC)


class CommitUnknown(OperationalError):
    """The link broke after the work was done, before its commit was confirmed: nobody knows whether it stands."""


class Database:
    """`await write(work, ...)` runs `work(connection, ...)` in one transaction, in a thread; so does `read`.

    A transaction crosses to its thread once, not once a statement: that halves its cost. On SQLite one connection
    writes (BEGIN IMMEDIATE, fsync at commit) and others read beside it, so a reader never waits and two writers
    never race. On PostgreSQL both come from one pool.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            _make_folder(parsed.database)
            self._writer = _sqlite_engine(parsed.set(drivername="sqlite"), begin="BEGIN IMMEDIATE", connections=1)
            self._reader = _sqlite_engine(parsed.set(drivername="sqlite"), begin="BEGIN", connections=READERS)
            self._write_threads = ThreadPoolExecutor(1, "writer")
        else:
            self._writer = _postgres_engine(by_psycopg(parsed), connections=WRITERS + READERS)
            # One snapshot for all statements of a read, as SQLite gives it.
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ")
            self._write_threads = ThreadPoolExecutor(WRITERS, "writer")
        self._read_threads = ThreadPoolExecutor(READERS, "reader")

    @property
    def name(self) -> str | None:
        """Of SQLite the file."""
        return self._writer.url.database

    async def write(
        self, work: Callable[Concatenate[Connection, P], Result], *args: P.args, **kw: P.kwargs
    ) -> Result:
        """What `work` returns, once it is committed with fsync; rolled back when it raises.

        Raises CommitUnknown where it may be committed all the same, also once it was tried again.
        """
        return await _in_thread(self._write_threads, self._writer, lambda db: work(db, *args, **kw))

    async def read(self, work: Callable[Concatenate[Connection, P], Result], *args: P.args, **kw: P.kwargs) -> Result:
        return await _in_thread(self._read_threads, self._reader, lambda db: work(db, *args, **kw))

    async def close(self) -> None:
        self._write_threads.shutdown()
        self._read_threads.shutdown()
        self._reader.dispose()
        self._writer.dispose()

    def migrate(self, migrations: Path) -> None:
        """Bring the schema to the newest revision in `migrations`; does nothing when it is there already."""
        config = Config()
        config.set_main_option("script_location", str(migrations).replace("%", "%%"))
        # A change of the schema may take longer than any statement of a service.
        engine = self._writer if self._writer.dialect.name == "sqlite" else create_engine(self._writer.url)
        try:
            with usable(engine.url), engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        finally:
            engine.dispose()


@contextmanager
def usable(url: URL) -> Iterator[None]:
    """Raises Misconfigured where the database is not there, does not let us in, or is a file that is damaged."""
    try:
        yield
    except DatabaseError as error:
        if is_damaged(error.orig):
            raise damaged(url.database) from error
        if isinstance(error, OperationalError) or isinstance(error.orig, errors.InsufficientPrivilege):
            raise Misconfigured(f"The database {shown(url)} cannot be used: {error.orig}") from error
        raise


def by_psycopg(url: URL) -> URL:
    """Raises Misconfigured where it has an option that no connection has. Whether the value of one makes sense libpq
    itself says, when it connects."""
    options = {name: str(value) for name, value in url.query.items()}
    try:
        conninfo.timeout_from_conninfo(conninfo.conninfo_to_dict(conninfo.make_conninfo(**options)))
    except psycopg.ProgrammingError as error:
        raise Misconfigured(f"The database {shown(url)} cannot be used: {str(error).strip()}.") from error
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """Without what may be secret: among the options there can be a password, too."""
    return str(url.set(query={}))


def is_damaged(error: BaseException | None) -> bool:
    """Whether SQLite says that the file is no database, or a damaged one; for all else it has kinds below this."""
    return type(error) is sqlite3.DatabaseError


def damaged(file: str | Path | None) -> Misconfigured:
    return Misconfigured(
        f"The database {file} is damaged, or is none. Move it away and start ChatRail: "
        "it makes another from the stream."
    )


@contextmanager
def snapshot(url: str, *tables: Table) -> Iterator[Connection]:
    """A transaction that only reads, all of it as of one moment, for as long as it takes; no writer waits for it.

    Neither creates nor changes a database. Raises Misconfigured where there is none, or none that can be read.
    `tables` are those that will be read: until then nobody can put others in their place.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        file = Path(parsed.database or "").absolute()
        if not file.is_file():
            raise Misconfigured(f"There is no database {file}")
        read_only = URL.create("sqlite", database=file.as_uri(), query={"mode": "ro", "uri": "true"})
        engine = create_engine(read_only, poolclass=NullPool, connect_args={"isolation_level": None})
        begin = ["BEGIN"]
    else:
        parsed = by_psycopg(parsed)
        engine = create_engine(parsed, poolclass=NullPool, connect_args={**_LINK, **parsed.query})
        begin = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"]
        # Before the first SELECT, at which the snapshot begins: a table that takes the place later has no row in it.
        begin += [f"LOCK TABLE {table.name} IN ACCESS SHARE MODE" for table in tables]
    try:
        with engine.connect() as db:
            for statement in begin:
                db.exec_driver_sql(statement)
            yield db
    except DBAPIError as error:
        if is_damaged(error.orig):
            raise damaged(parsed.database) from error
        if _is_of_a_value(error.orig):
            raise changed(shown(parsed)) from error
        raise Misconfigured(f"The database {shown(parsed)} cannot be read: {error.orig}") from error


def changed(database: str) -> Misconfigured:
    return Misconfigured(
        f"The database {database} has a record that was changed, and cannot be read: make audit names it, and "
        "make replay puts it right."
    )


def _is_of_a_value(error: BaseException | None) -> bool:
    """Whether SQLite came upon what none of our statements has written. Its own words may repeat that."""
    if not isinstance(error, sqlite3.OperationalError):
        return False
    # A text that is no UTF-8 is the driver's to tell, and has no code.
    return not hasattr(error, "sqlite_errorcode") or "JSON" in str(error)


async def _in_thread(threads: Executor, engine: Engine, work: Callable[[Connection], Result]) -> Result:
    def transaction() -> Result:
        try:
            return once()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            cut = error
        # The server has closed it, perhaps hours ago: the pool is empty now. Work is idempotent, so also where the
        # commit got through and only its answer did not. A ping before each would cost every transaction.
        try:
            return once()
        except DBAPIError as error:
            if isinstance(cut, CommitUnknown):
                raise cut from error
            raise

    def once() -> Result:
        with engine.connect() as connection, connection.begin() as begun:
            result = work(connection)
            try:
                begun.commit()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                raise CommitUnknown(None, None, error.orig or error, connection_invalidated=True) from error
            return result

    return await asyncio.get_running_loop().run_in_executor(threads, transaction)


class PostgresConnection(psycopg.Connection[Any]):
    """Gives up when the server is silent for too long. By itself libpq waits for ever.

    Neither keepalives nor any setting of the server helps where the server is stopped, or where what stands in
    between still acknowledges our bytes.

    And `last`, a statement with its parameters, is sent along with the COMMIT, in one round trip.
    """

    last: tuple[str, Any] | None = None

    def commit(self) -> None:
        last, self.last = self.last, None
        if last is None:
            super().commit()
            return
        try:
            with self.pipeline():
                self.execute(*last)
                super().commit()
        except psycopg.Error:
            # The COMMIT behind a statement that failed was not even tried. Where the server is about to end, or the
            # pipeline stuck, nobody knows; a link that is closed says so.
            try:
                if not self.closed:
                    super().rollback()
            except psycopg.Error:
                self.close()
            raise

    def rollback(self) -> None:
        self.last = None
        super().rollback()

    def wait(self, gen: PQGen[Any], interval: float = 0.5, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, SILENCE_S_MAX + 1 if timeout is None else timeout)
        except errors._WaitTimeout as error:
            if timeout is not None:
                raise
            self.close()
            raise errors.OperationalError(f"the server said nothing for {SILENCE_S_MAX + 1} s") from error


def _postgres_engine(url: URL, *, connections: int) -> Engine:
    options = f"{url.query.get('options', '')} {_SESSION}".strip()
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_reset_on_return=None,
        connect_args={**_LINK, **url.query, "options": options},
    )
    engine.dialect.connect = PostgresConnection.connect  # type: ignore[method-assign, assignment]
    return engine


def patient_engine(url: str, *, begin: str = "BEGIN IMMEDIATE") -> Engine:
    """For one command that works on whole tables: it waits for others, and its statements may take long."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        _make_folder(parsed.database)
        return _sqlite_engine(parsed.set(drivername="sqlite"), begin=begin, connections=2, timeout_s=PATIENCE_S)
    return create_engine(by_psycopg(parsed), pool_reset_on_return=None)


def _sqlite_engine(url: URL, *, begin: str, connections: int, timeout_s: float = BUSY_TIMEOUT_S) -> Engine:
    # The driver must not begin transactions by itself: its BEGIN is deferred, and two connections that then
    # both want to write would each grant the same tokens.
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        poolclass=QueuePool,
        pool_reset_on_return=None,  # what is not committed is rolled back already
        connect_args={"isolation_level": None, "check_same_thread": False, "timeout": timeout_s},
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        record.info["file"] = _file_id(url)

    @event.listens_for(engine, "checkout")
    def checked_out(_connection: Any, record: Any, _proxy: Any) -> None:
        # A file that was deleted or replaced takes whatever is committed to it, and nobody ever sees it again.
        if record.info["file"] != _file_id(url):
            raise DisconnectionError

    def do_begin(connection: Any) -> None:
        connection.driver_connection.execute(begin)

    # A listener would do, too; but an engine that has one looks for others at every step of every statement.
    engine.dialect.do_begin = do_begin  # type: ignore[method-assign, assignment]
    return engine


def _file_id(url: URL) -> tuple[int, int]:
    found = os.stat(url.database or "")
    return found.st_dev, found.st_ino


def table_of(model: type[SQLModel]) -> Table:
    """The table behind a SQLModel row class, for statements that name columns."""
    return cast(Table, model.__table__)  # type: ignore[attr-defined]


def is_sqlite(db: Connection) -> bool:
    return db.dialect.name == "sqlite"


def text_or_bytes(raw: bytes) -> str | bytes:
    """What SQLite has for a text, whatever somebody put there: a `text_factory` of its driver."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def now(db: Connection) -> datetime:
    """The database's clock, the one clock that all replicas share. SQLite's is the clock of this process."""
    if is_sqlite(db):
        return datetime.now(UTC)
    return (db.execute(_CLOCK)).scalar_one()


def insert_new(db: Connection, table: Table, rows: Rows, *, returning: str | None = None) -> list[Any]:
    """Insert the rows whose primary key is new. Of those that were, the values of the column `returning`."""
    if not rows:
        return []
    result = db.execute(_insert_new(db.dialect.name, table, returning), rows)
    return list(result.scalars()) if returning else []


@cache
def _insert_new(dialect: str, table: Table, returning: str | None) -> Any:
    statement = _insert(dialect, table).on_conflict_do_nothing()
    return statement.returning(table.c[returning]) if returning else statement


def upsert(db: Connection, table: Table, rows: Rows) -> None:
    """Insert the rows, or overwrite those whose primary key exists."""
    if not rows:
        return
    keys = [column.name for column in table.primary_key]
    statement = _insert(db.dialect.name, table)
    values = {column.name: statement.excluded[column.name] for column in table.c if column.name not in keys}
    db.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), rows)


def _insert(dialect: str, table: Table) -> Any:
    return (sqlite if dialect == "sqlite" else postgresql).insert(table)


def _make_folder(database: str | None) -> None:
    try:
        Path(database or "").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(f"The data folder {Path(database or '').parent} cannot be written: {error}") from error
