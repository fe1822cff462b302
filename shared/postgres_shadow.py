"""Tables built anew in a PostgreSQL schema of their own, found before the usual one: the same statements count there.

They move over as they are, with their partitions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any

from sqlalchemy import Connection, Table, text

from shared.database import patient_engine
from shared.errors import Misconfigured
from shared.shadows import AT_IT, Adopt, Result

SCHEMA = "replay"
REPLAY_KEY = 6_124_007_311
# Whoever waits for longer gives way: behind it, all others wait.
LOCK_WITHIN_MS = 300
READERS_WITHIN_S = 0.3
LOOK_EVERY_S = 0.002


@contextmanager
def in_postgresql(url: str, tables: Sequence[Table]) -> Iterator["PostgresShadow"]:
    """Empty tables. Raises Misconfigured when somebody else replays the same database."""
    engine = patient_engine(url)
    try:
        with engine.connect() as building, engine.connect() as switching:
            with switching.begin():
                if not switching.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": REPLAY_KEY}).scalar_one():
                    raise Misconfigured(AT_IT)
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
            db.exec_driver_sql("SELECT 1")  # with which the snapshot begins
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
