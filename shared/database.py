"""One way to each database: SQLite for one machine, PostgreSQL for many replicas, the same stores on both."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import DateTime, Dialect, Text, event, literal_column, select
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.types import TypeDecorator

from shared.errors import Misconfigured

BUSY_TIMEOUT_S = 5


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database. SQLite keeps it as ISO 8601 text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment.astimezone(UTC)


class Database:
    """`write()` and `read()` are sessions in one transaction each.

    On SQLite one connection writes (BEGIN IMMEDIATE, fsync at commit) and others read beside it, so a reader
    never waits and two writers never race. On PostgreSQL both come from one pool.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _make_folder(parsed.database)
            parsed = parsed.set(drivername="sqlite+aiosqlite")
            self._writer = create_async_engine(parsed, pool_size=1, max_overflow=0, pool_timeout=60)
            self._reader = create_async_engine(parsed, pool_size=4, max_overflow=0, pool_timeout=60)
            _prepare_sqlite(self._writer.sync_engine, begin="BEGIN IMMEDIATE")
            _prepare_sqlite(self._reader.sync_engine, begin="BEGIN")
        else:
            parsed = parsed.set(drivername="postgresql+asyncpg")
            self._writer = self._reader = create_async_engine(
                parsed, pool_size=10, max_overflow=0, pool_pre_ping=True
            )
        self._write = async_sessionmaker(self._writer, expire_on_commit=False)
        self._read = async_sessionmaker(self._reader, expire_on_commit=False)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """Commits at the end, with fsync; rolls back when the block raises."""
        async with self._write.begin() as session:
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        async with self._read() as session:
            yield session

    async def close(self) -> None:
        await self._reader.dispose()
        await self._writer.dispose()

    async def migrate(self, migrations: Path) -> None:
        """Bring the schema to the newest revision in `migrations`; does nothing when it is there already."""
        config = Config()
        config.set_main_option("script_location", str(migrations))

        def upgrade(connection: Connection) -> None:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

        async with self._writer.begin() as connection:
            await connection.run_sync(upgrade)


async def now(session: AsyncSession) -> datetime:
    """The database's clock: the one clock that all replicas share."""
    if session.get_bind().dialect.name == "sqlite":
        clock = literal_column("strftime('%Y-%m-%dT%H:%M:%fZ', 'now')", UtcDateTime())
    else:
        clock = literal_column("clock_timestamp()", UtcDateTime())
    return (await session.execute(select(clock))).scalar_one()


def sqlite_url(data: Path, name: str) -> str:
    return f"sqlite+aiosqlite:///{data.absolute() / name}"


def _make_folder(database: str | None) -> None:
    try:
        Path(database or "").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(f"The data folder {Path(database or '').parent} cannot be written: {error}") from error


def _prepare_sqlite(engine: Any, *, begin: str) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself: its BEGIN is deferred, and two readers that then
        # both want to write would each grant the same tokens.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={BUSY_TIMEOUT_S * 1000}",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def beginning(connection: Connection) -> None:
        connection.exec_driver_sql(begin)
