"""A database that was put back from an older copy, or lost, has everything again before its service is ready."""

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import psycopg
import pytest
from nats.aio.client import Client
from psycopg import sql
from sqlalchemy import make_url, select, update

from services.ledger import store
from services.ledger.app import create_app
from services.ledger.settings import Settings
from shared import catchup, streams
from shared.catchup import Position, keep_position
from shared.database import Database, table_of
from shared.errors import Misconfigured
from shared.events import Event
from tests.builders import generation_completed, publish, publish_raw
from tests.fixtures import eventually


@pytest.fixture
def settings(own_nats_server: str, ledger_url: str) -> Settings:
    return Settings(nats_url=own_nats_server, ledger_database_url=ledger_url)


@asynccontextmanager
async def ledger(settings: Settings) -> AsyncIterator[None]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield


async def record(settings: Settings, nats: Client, events: list[Event]) -> None:
    """Published, recorded, acknowledged."""
    async with ledger(settings):
        await publish(nats, *events)
        await everything_is_acknowledged(nats)


async def everything_is_acknowledged(nats: Client) -> None:
    last = (await nats.jetstream().stream_info(streams.STREAM)).state.last_seq

    async def look() -> bool:
        consumer = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
        return consumer.ack_floor is not None and consumer.ack_floor.stream_seq >= last

    await eventually(look)


async def recorded_ids(settings: Settings) -> list[str]:
    database = Database(settings.database_url)
    try:
        return sorted(await database.read(lambda db: list(db.execute(select(store.usage.c.id)).scalars())))
    finally:
        await database.close()


class Copies:
    """Of a database that nobody uses just then."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._file = Path(self._url.database or "")

    def copy(self) -> None:
        if self._url.get_backend_name() == "sqlite":
            with closing(sqlite3.connect(self._file)) as database:
                database.execute("VACUUM INTO ?", [f"{self._file}.copy"])
        else:
            self._administer("CREATE DATABASE {} TEMPLATE {}", self._copy_name, self._url.database or "")

    def put_back(self) -> None:
        if self._url.get_backend_name() == "sqlite":
            shutil.copy(f"{self._file}.copy", self._file)
        else:
            self._administer("DROP DATABASE {}", self._url.database or "")
            self._administer("CREATE DATABASE {} TEMPLATE {}", self._url.database or "", self._copy_name)
            self._administer("DROP DATABASE {}", self._copy_name)

    @property
    def _copy_name(self) -> str:
        return f"{self._url.database}_copy"

    def _administer(self, statement: str, *names: str) -> None:
        url = self._url.set(database="postgres").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


async def test_an_older_copy_reads_again_what_it_does_not_have(settings: Settings, nats: Client) -> None:
    copies, events = Copies(settings.database_url), [generation_completed(f"user_{n}") for n in range(1_200)]
    await record(settings, nats, [*events[:3]])
    copies.copy()
    await record(settings, nats, [*events[3:]])
    copies.put_back()
    assert await recorded_ids(settings) == sorted(event.id for event in events[:3])
    async with ledger(settings):
        assert await recorded_ids(settings) == sorted(event.id for event in events)


async def test_what_was_acknowledged_before_its_turn_is_read_again_too(settings: Settings, nats: Client) -> None:
    """Two replicas had one event each; one of them died with its own, and then the database."""
    copies, events = Copies(settings.database_url), [generation_completed(f"user_{n}") for n in range(3)]
    await record(settings, nats, [*events[:1]])
    copies.copy()
    await publish(nats, *events[1:])
    js = nats.jetstream()
    pulling = await js.pull_subscribe_bind(streams.LEDGER, streams.STREAM)
    await pulling.fetch(1)
    (last,) = await pulling.fetch(1)
    database = Database(settings.database_url)
    await database.write(store.record, events[2:])
    await database.close()
    await last.ack_sync()
    await pulling.unsubscribe()
    copies.put_back()
    async with ledger(settings):
        assert {event.id for event in events} == {*await recorded_ids(settings)}


async def test_a_database_that_was_lost_is_rebuilt(
    settings: Settings, nats: Client, tmp_path: Path, ledger_url: str
) -> None:
    copies, events = Copies(ledger_url), [generation_completed() for _ in range(10)]
    copies.copy()
    await publish_raw(nats, b"no event")
    await record(settings, nats, [*events])
    copies.put_back()
    async with ledger(settings):
        assert await recorded_ids(settings) == sorted(event.id for event in events)


async def test_a_stream_that_was_made_anew_is_read_from_its_beginning(
    settings: Settings, nats: Client, own_nats_server: str
) -> None:
    """Its numbers begin at 1 again: what the database has of the old ones says nothing about it."""
    copies = Copies(settings.database_url)
    await record(settings, nats, [generation_completed() for _ in range(10)])
    copies.copy()
    js = nats.jetstream()
    await js.delete_stream(streams.STREAM)
    await streams.create(js, max_bytes=64 * 1024**2)
    anew = [generation_completed() for _ in range(20)]
    await record(settings, nats, [*anew])
    copies.put_back()
    async with ledger(settings):
        assert {event.id for event in anew} <= {*await recorded_ids(settings)}


async def test_a_copy_that_is_put_in_place_under_a_running_service_ends_it(
    settings: Settings, nats: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(catchup, "NOTE_EVERY_S", 0.01)
    monkeypatch.setattr(catchup, "end_process", ends.append)
    database, position = Database(settings.database_url), table_of(Position)
    keeping = asyncio.create_task(keep_position(nats, streams.LEDGER, database))

    async def noted() -> bool:
        notes = await database.read(lambda db: db.execute(select(position.c.notes)).scalar_one_or_none())
        return notes is not None

    await eventually(noted)
    assert not ends
    await database.write(lambda db: db.execute(update(position).values(notes=0)))
    await asyncio.wait_for(keeping, 10)
    await database.close()
    assert ends == ["the database is an older copy: what it has not is read again"]


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.usefixtures("nats")
async def test_no_service_starts_on_a_file_that_is_damaged(settings: Settings) -> None:
    file = Path(make_url(settings.database_url).database or "")
    await asyncio.to_thread(file.write_bytes, b"no database " * 1_000)
    with pytest.raises(Misconfigured, match=r"is damaged, or is none\. Move it away and start ChatRail"):
        async with asyncio.timeout(10), ledger(settings):
            pass
