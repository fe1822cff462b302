"""The ledger as a service: on the real broker, with the bad days it has to live through."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

import httpx2
import pytest
from nats.aio.client import Client
from sqlalchemy import make_url, select, text
from starlette.applications import Starlette

from services.ledger import store
from services.ledger.app import create_app
from services.ledger.partitions import without_partition
from services.ledger.settings import Settings
from shared import broker, calls, streams
from shared.calls import History, HistoryQuery, Logs, LogsQuery
from shared.database import Database, table_of
from shared.errors import BadCall
from shared.events import decode, encode
from shared.quarantine import ANOTHER_BODY, Poison, Quarantined
from tests import forked
from tests.builders import generation_completed, publish, publish_raw, subscription_changed, usage_adjusted
from tests.fixtures import Postgres, eventually
from tests.stack import environment, free_port


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    """The ledger's own, seen from outside the service."""
    database = Database(ledger_url)
    yield database
    await database.close()


@pytest.fixture
def settings(own_nats_server: str, ledger_url: str) -> Settings:
    return Settings(nats_url=own_nats_server, ledger_database_url=ledger_url)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Starlette]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def ledger(settings: Settings, database: Database, nats: Client) -> AsyncIterator[Starlette]:
    async with serving(settings) as app:
        yield app


async def everything_is_acknowledged(nats: Client) -> None:
    # Counted from the stream's end: a consumer learns of a new event a moment after its publisher does.
    last = (await nats.jetstream().stream_info(streams.STREAM)).state.last_seq

    async def look() -> bool:
        consumer = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
        return consumer.ack_floor is not None and consumer.ack_floor.stream_seq >= last

    await eventually(look, deadline_s=60)


async def nobody_is_waiting(nats: Client) -> None:
    """The broker has noticed that the service is gone: what comes now is not sent to it any more."""

    async def look() -> bool:
        return not (await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)).num_waiting

    await eventually(look)


async def recorded_ids(database: Database) -> list[str]:
    return await database.read(lambda db: list(db.execute(select(store.usage.c.id)).scalars()))


async def quarantined(database: Database) -> list[bytes]:
    return await database.read(lambda db: list(db.execute(select(table_of(Quarantined).c.body)).scalars()))


async def get(app: Starlette, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://ledger") as client:
        return await client.get(path)


@pytest.mark.parametrize("backend", ["postgresql"])
async def test_while_it_serves_there_are_partitions_for_the_months_to_come(
    ledger: Starlette, database: Database
) -> None:
    async def made() -> bool:
        of_usage = text("SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r'")
        bounds = await database.read(lambda db: db.execute(of_usage).scalars().all())
        return not list(without_partition(bounds, datetime.now(UTC).date()))

    await eventually(made)


async def test_what_is_published_is_recorded_and_can_be_asked_for(ledger: Starlette, nats: Client) -> None:
    user_id = "a.user with *, / and 🛤"
    generation = generation_completed(user_id)
    adjustment = usage_adjusted(user_id, tokens_used=-94)
    await publish(nats, subscription_changed(user_id), generation, adjustment)
    await everything_is_acknowledged(nats)

    days = await broker.call(nats, calls.HISTORY, HistoryQuery(user_id=user_id, from_date=date.min, to_date=date.max))
    page = await broker.call(nats, calls.LOGS, LogsQuery(user_id=user_id))

    (day,) = History.model_validate_json(days).days
    assert (day.tokens_used, day.generations, day.cost_usd) == (8_000, 1, "0.08")
    assert {r.id for r in Logs.model_validate_json(page).records} == {generation.id, adjustment.id}
    assert b'"tokensUsed":8000' in days
    assert b'"nextCursor":null' in page


async def test_a_bad_cursor_is_answered_with_words_and_not_with_a_timeout(ledger: Starlette, nats: Client) -> None:
    with pytest.raises(BadCall, match="nextCursor of the page before"):
        await broker.call(nats, calls.LOGS, LogsQuery(user_id="user_1", cursor="nonsense"))


async def test_poison_is_quarantined_and_holds_up_nothing(
    ledger: Starlette, nats: Client, database: Database
) -> None:
    good = [generation_completed() for _ in range(3)]
    negative = encode(good[0]).replace(b'"tokens_used":8094', b'"tokens_used":-1')
    without_id = encode(good[0]).replace(b'"id":', b'"idea":')
    poison = [b"", b"not JSON", b'{"type": "unheard.of"}', negative, without_id]

    await publish(nats, good[0])
    for body in poison:
        await publish_raw(nats, body)
    await publish(nats, *good[1:])
    await everything_is_acknowledged(nats)

    assert sorted(await recorded_ids(database)) == sorted(event.id for event in good)
    assert sorted(await quarantined(database)) == sorted(poison)


async def test_what_was_published_while_no_ledger_ran_is_recorded_when_one_does(
    settings: Settings, nats: Client, database: Database
) -> None:
    before, between = generation_completed(), generation_completed()
    async with serving(settings):
        await publish(nats, before)
        await everything_is_acknowledged(nats)
    await nobody_is_waiting(nats)
    await publish(nats, between)
    async with serving(settings):
        await everything_is_acknowledged(nats)
    assert sorted(await recorded_ids(database)) == sorted([before.id, between.id])


async def test_a_crash_between_commit_and_acknowledgement_counts_nothing_twice(
    settings: Settings, nats: Client, database: Database
) -> None:
    events = [generation_completed() for _ in range(5)]
    await publish(nats, *events)
    crashing = await nats.jetstream().pull_subscribe_bind(streams.LEDGER, streams.STREAM)
    delivered = await crashing.fetch(5, timeout=5)
    await database.write(store.record, [decode(message.data) for message in delivered])
    for message in delivered:
        await message.nak()  # as if ack_wait were over
    await crashing.unsubscribe()

    async with serving(settings):
        await everything_is_acknowledged(nats)

    assert sorted(await recorded_ids(database)) == sorted(event.id for event in events)
    assert await quarantined(database) == []


async def test_replicas_share_the_work_and_record_each_event_once(
    settings: Settings, nats: Client, database: Database
) -> None:
    events = [generation_completed() for _ in range(200)]
    async with serving(settings), serving(settings):
        await asyncio.gather(*(publish(nats, event) for event in events))
        await everything_is_acknowledged(nats)
    assert sorted(await recorded_ids(database)) == sorted(event.id for event in events)


@contextmanager
def locked_sqlite(url: str) -> Iterator[None]:
    """Somebody else writes, for longer than a writer waits."""
    other = sqlite3.connect(make_url(url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@contextmanager
def closed_postgresql(postgres: Postgres, url: str) -> Iterator[None]:
    """The database lets nobody in, and those who were in are out."""
    name = make_url(url).database or ""
    postgres.execute("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
    postgres.execute(
        f"DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'; END $$"
    )
    try:
        yield
    finally:
        postgres.execute("ALTER DATABASE {} ALLOW_CONNECTIONS true", name)


@pytest.fixture
def away(ledger_url: str, request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """Within this context the ledger's database cannot be written."""
    if ledger_url.startswith("sqlite"):
        return locked_sqlite(ledger_url)
    return closed_postgresql(request.getfixturevalue("postgres"), ledger_url)


async def test_a_database_that_is_away_for_a_while_costs_no_event(
    ledger: Starlette, nats: Client, database: Database, away: AbstractContextManager[None]
) -> None:
    events = [generation_completed() for _ in range(20)]

    async def came_again() -> bool:
        consumer = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
        return bool(consumer.num_redelivered)

    with away:
        await publish(nats, *events)
        await eventually(came_again)
    await everything_is_acknowledged(nats)

    assert sorted(await recorded_ids(database)) == sorted(event.id for event in events)


@pytest.mark.parametrize("backend", ["postgresql"])
async def test_the_ledger_says_that_it_is_not_ready_while_its_database_is_away(
    ledger: Starlette, away: AbstractContextManager[None]
) -> None:
    assert (await get(ledger, "/readyz")).status_code == 200
    with away:
        answer = await get(ledger, "/readyz")
        assert (answer.status_code, answer.json()["missing"]) == (503, {"database": "OperationalError"})
        assert (await get(ledger, "/healthz")).status_code == 200
    assert (await get(ledger, "/readyz")).status_code == 200


async def test_metrics_count_what_is_new_and_not_what_came_again(ledger: Starlette, nats: Client) -> None:
    async def tokens() -> float:
        return _sample((await get(ledger, "/metrics")).text, "chatrail_ledger_tokens_total")

    before = await tokens()
    event = generation_completed()
    await publish(nats, event)
    await publish_raw(nats, encode(event))
    await everything_is_acknowledged(nats)

    assert await tokens() - before == event.data.tokens_used


def _sample(metrics: str, name: str) -> float:
    (value,) = [line.split()[1] for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(value)


@contextmanager
def process(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, "-m", "services.ledger", *command],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_without_its_stream_the_ledger_refuses_to_start_with_a_sentence(
    bare_nats: Client, own_nats_server: str, ledger_url: str
) -> None:
    variables = environment(CHATRAIL_NATS_URL=own_nats_server, CHATRAIL_LEDGER_DATABASE_URL=ledger_url)
    status, said, sentence = await forked.run("services.ledger", "serve", env=variables, apart=True)

    assert status == 1
    assert sentence == "The broker has no stream USAGE. Run: python -m shared.streams\n"
    assert "Traceback" not in said


@pytest.mark.parametrize("backend", ["postgresql"])  # every stack does it on SQLite
async def test_the_process_migrates_serves_and_ends_in_order(
    nats: Client, own_nats_server: str, database_url: str
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = {
        "CHATRAIL_NATS_URL": own_nats_server,
        "CHATRAIL_LEDGER_DATABASE_URL": database_url,
        "CHATRAIL_PORT": str(port),
    }
    for _ in range(2):
        with process("migrate", **variables) as migration:
            assert await asyncio.to_thread(migration.wait, 30) == 0

    async with httpx2.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
        with process("serve", **variables) as ledger:

            async def ready() -> bool:
                try:
                    return (await client.get("/readyz")).is_success
                except httpx2.TransportError:
                    return False

            await eventually(ready)
            await publish(nats, generation_completed())
            await everything_is_acknowledged(nats)
            metrics = (await client.get("/metrics")).text
            ledger.terminate()
            said, complaints = await asyncio.to_thread(ledger.communicate, timeout=30)

    assert 'chatrail_ledger_events_total{outcome="completed",type="generation.completed"} 1.0' in metrics
    lines = [json.loads(line) for line in said.splitlines()]
    (told,) = [line for line in lines if line["event"] == "usage_recorded"]
    assert (told["received"], told["recorded"], told["service"]) == (1, 1, "ledger")
    assert (ledger.returncode, complaints) == (-signal.SIGTERM, "")


async def test_a_quarantine_is_listed_and_handed_over_again_after_a_fix(
    ledger: Starlette, nats: Client, database: Database, ledger_url: str, own_nats_server: str
) -> None:
    first = generation_completed()
    second = first.model_copy(update={"data": first.data.model_copy(update={"model": "another"})})
    fixed = generation_completed()
    await publish(nats, first)
    await everything_is_acknowledged(nats)
    await publish_raw(nats, encode(second))
    await publish_raw(nats, b"not JSON")
    await everything_is_acknowledged(nats)
    # Where the ledger passes it over, as if a mistake of last week had kept it from being recorded.
    await publish_raw(nats, encode(fixed), subject=streams.LEDGER_SEALED)
    aside = [Poison("generation.completed", encode(each), "a mistake") for each in (fixed, generation_completed())]
    await database.write(store.record, [], aside)

    variables = environment(CHATRAIL_LEDGER_DATABASE_URL=ledger_url, CHATRAIL_NATS_URL=own_nats_server)
    listing = ("services.ledger", "quarantine", "--redrive")
    status, said, complaints = await forked.run(*listing, env=variables, apart=True)

    assert (status, complaints) == (0, "")
    assert "ledger: 1 messages are counted now" in said
    assert "ledger: 1 are not what the stream has, and stay: make audit names them" in said
    assert "ledger: 3 messages in quarantine" in said
    assert ANOTHER_BODY.split()[0] in said
    assert "Invalid" in said
    assert first.id not in said
    assert sorted(await recorded_ids(database)) == sorted([first.id, fixed.id])


async def test_the_quarantine_of_a_folder_without_data_is_a_sentence_and_leaves_nothing_there(
    tmp_path: Path,
) -> None:
    variables = environment(CHATRAIL_DATA=str(tmp_path / "data"))
    status, _, sentence = await forked.run("services.ledger", "quarantine", env=variables, apart=True)
    assert status == 1
    assert sentence == f"ledger has no database yet at {tmp_path / 'data' / 'ledger.db'}\n"
    assert os.listdir(tmp_path) == []
