"""The one way to each database, where the stores do not already show it."""

import asyncio
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Connection, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from shared import database as settings
from shared.database import CommitUnknown, Database, snapshot
from shared.errors import Misconfigured
from shared.prepared import execute_last
from shared.settings import sqlite_url
from tests.fixtures import Postgres, eventually
from tests.proxy import Mode, Proxy


@dataclass(frozen=True, slots=True)
class Behind:
    """A database whose clients come by TCP, through a proxy; and its address without one."""

    proxy: Proxy
    database: Database
    direct_url: str


def one(db: Connection) -> int:
    return int(db.execute(select(1)).scalar_one())


@pytest.mark.parametrize("option", ["foo=bar", "sslmod=require", "connect_timeout=soon"])
def test_an_option_that_no_connection_has_is_told_before_anybody_connects(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(Misconfigured, match=rf"u:\*\*\*@host/x cannot be used: .*{name}"):
        Database(f"postgresql://u:secret@host/x?{option}")


def test_a_password_among_the_options_is_not_told() -> None:
    with (
        pytest.raises(Misconfigured, match=r"The database postgresql\+psycopg://u@127.0.0.1:1/x cannot be read"),
        snapshot("postgresql://u@127.0.0.1:1/x?password=secret"),
    ):
        pass


async def test_connections_that_the_server_closed_cost_nobody_an_error(postgres: Postgres) -> None:
    with postgres.new_database() as url:
        database = Database(url)
        assert (await database.read(one), await database.write(one)) == (1, 1)
        name = make_url(url).database
        postgres.execute(
            f"DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'; END $$"
        )
        assert (await database.read(one), await database.write(one)) == (1, 1)
        await database.close()


@pytest.fixture
async def behind(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Behind]:
    """PostgreSQL by TCP, with patience for a second."""
    monkeypatch.setattr(settings, "SILENCE_S_MAX", 1)
    monkeypatch.setattr(settings, "_SESSION", "-c statement_timeout=1s -c idle_in_transaction_session_timeout=1s")
    with postgres.new_database() as url:
        async with Proxy(postgres.socket, 0) as proxy:
            by_tcp = make_url(url).set(host="127.0.0.1", port=proxy.port, query={})
            database = Database(by_tcp.render_as_string(hide_password=False))
            assert await database.write(one) == 1
            yield Behind(proxy, database, url)
            proxy.set("pass")
            await database.close()


async def test_a_server_that_is_not_heard_any_more_is_given_up(
    behind: Behind,
) -> None:
    proxy, database = behind.proxy, behind.database
    proxy.set("half_open")
    begun = time.monotonic()
    with pytest.raises(DBAPIError):
        await database.write(one)
    # A second of silence, once more on what the pool still has, and three seconds for a new connection.
    assert time.monotonic() - begun < 9
    proxy.set("pass")
    assert (await database.read(one), await database.write(one)) == (1, 1)


async def test_a_link_that_was_cut_costs_an_error_at_once_and_none_when_it_is_back(
    behind: Behind,
) -> None:
    proxy, database = behind.proxy, behind.database
    proxy.set("cut")
    begun = time.monotonic()
    with pytest.raises(OperationalError):
        await database.write(one)
    assert time.monotonic() - begun < 1
    proxy.set("pass")
    assert (await database.read(one), await database.write(one)) == (1, 1)


@pytest.mark.parametrize("how", ["cut", "half_open"])
async def test_who_loses_the_link_before_the_commit_is_confirmed_does_not_say_that_nothing_was_done(
    behind: Behind, how: Mode
) -> None:
    def done(db: Connection) -> None:
        one(db)
        loop.call_soon_threadsafe(behind.proxy.set, how)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()

    loop = asyncio.get_running_loop()
    with pytest.raises(CommitUnknown):
        await behind.database.write(done)
    with pytest.raises(DBAPIError) as never_begun:
        await behind.database.write(one)
    assert not isinstance(never_begun.value, CommitUnknown)


async def test_a_slow_link_is_not_given_up(behind: Behind) -> None:
    proxy, database = behind.proxy, behind.database
    proxy.delay_s = 0.1
    proxy.set("slow")
    assert await database.write(lambda db: [one(db) for _ in range(10)]) == [1] * 10


async def test_the_server_lets_go_of_the_locks_of_a_client_that_it_does_not_hear(
    behind: Behind,
) -> None:
    proxy, database = behind.proxy, behind.database
    locked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def lock(db: Connection) -> None:
        db.execute(text("SELECT pg_advisory_xact_lock(7)"))
        loop.call_soon_threadsafe(locked.set)
        while proxy.mode != "half_open":
            time.sleep(0.01)
        one(db)

    def is_free(db: Connection) -> bool:
        return bool(db.execute(text("SELECT pg_try_advisory_xact_lock(7)")).scalar_one())

    writing = asyncio.create_task(database.write(lock))
    await locked.wait()
    proxy.set("half_open")
    # Another client, whose link is whole: the server still believes in ours.
    beside = Database(behind.direct_url)

    async def lock_is_free() -> bool:
        return await beside.write(is_free)

    assert not await lock_is_free()
    await eventually(lock_is_free, deadline_s=5)
    await beside.close()
    with pytest.raises(DBAPIError):
        await writing


def add(db: Connection) -> None:
    db.execute(text("INSERT INTO t VALUES (1)"))


def in_file(file: Path) -> list[tuple[int]]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute("SELECT count(*) FROM t").fetchall()
    finally:
        connection.close()


@pytest.fixture
async def with_copy(tmp_path: Path) -> AsyncIterator[tuple[Database, Path, Path]]:
    """A database with a row, its file, and a copy of that."""
    database = Database(sqlite_url(tmp_path, "test.db"))
    file, copy = tmp_path / "test.db", tmp_path / "copy.db"
    await database.write(lambda db: db.execute(text("CREATE TABLE t (a)")))
    await database.write(add)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    shutil.copy(file, copy)
    yield database, file, copy
    await database.close()


async def test_nothing_is_committed_to_a_sqlite_file_that_was_deleted_and_a_restored_one_is_used(
    with_copy: tuple[Database, Path, Path],
) -> None:
    database, file, copy = with_copy
    file.unlink()
    for use in (database.write, database.read):
        with pytest.raises((OSError, OperationalError)):
            await use(add)
    for leftover in (file, file.with_name("test.db-wal"), file.with_name("test.db-shm")):
        leftover.unlink(missing_ok=True)
    copy.rename(file)
    await database.write(add)
    assert in_file(file) == [(2,)]


async def test_a_sqlite_file_that_was_replaced_is_used_from_then_on(with_copy: tuple[Database, Path, Path]) -> None:
    database, file, copy = with_copy
    for leftover in (file.with_name("test.db-wal"), file.with_name("test.db-shm")):
        leftover.unlink()
    copy.rename(file)
    await database.write(add)
    assert in_file(file) == [(2,)]


async def test_a_sqlite_file_that_another_process_keeps_locked_costs_two_seconds_and_an_error(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path, "test.db"))
    assert await database.write(one) == 1
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert await database.read(one) == 1
    with pytest.raises(OperationalError, match="locked"):
        await database.write(one)
    other.execute("ROLLBACK")
    other.close()
    assert await database.write(one) == 1
    await database.close()


async def test_a_link_that_is_stuck_in_the_middle_of_a_commit_leaves_it_unknown_whether_it_stands(
    postgres: Postgres,
) -> None:
    """As a server leaves it that is ended by force and has not closed it yet; or a COPY, which no pipeline can do."""
    with postgres.new_database() as url:
        database = Database(url)
        with pytest.raises(CommitUnknown):
            await database.write(execute_last, "COPY (SELECT 1) TO STDOUT", None)
        assert await database.write(one) == 1
        await database.close()
