"""Replaying the stream into both services' databases, on SQLite and on PostgreSQL."""

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from sqlalchemy import Connection, Table, make_url, select, text

from services.ledger import store as ledger_store
from services.ledger.partitions import make_ahead
from services.ledger.replay import RebuiltLedger
from services.quota import store as quota_store
from services.quota import totals as quota_totals
from services.quota.replay import RebuiltQuota, periods_used, standing_at, under, used_once
from shared.database import Database, patient_engine, table_of
from shared.errors import Misconfigured
from shared.events import Event, GenerationCompleted, encode, new_id
from shared.plain import plain_generation
from shared.plans import Plans
from shared.quarantine import Quarantined
from shared.record import Record
from shared.recorded import BATCH_SIZE, bounds
from shared.replaying import Rebuilt, Told, dry_run, open_shadow, rebuild_into, replay
from shared.streams import ALERTS, LEDGER_SEALED, STREAM
from tests import forked
from tests.builders import (
    NOON,
    asking,
    authorized,
    generation_completed,
    publish,
    publish_raw,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)
from tests.fixtures import eventually, new_database
from tests.integration.test_audit import delivered
from tests.stack import environment

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
PLANS_FILE = """
default = "free"
[plans.free]
limit_tokens = 108_000
period = "month"
[plans.pro]
limit_tokens = 500_000
period = "month"
price_per_1k_usd = "0.01"
[plans.daily]
limit_tokens = 50_000
period = "day"
[plans.anchored]
limit_tokens = 108_000
period = "month"
anchor = "subscription"
[plans.team]
limits = [{ limit_tokens = 40_000, period = "day" }, { limit_tokens = 108_000, period = "none" }]
[plans.weighted]
limit_tokens = 108_000
period = "month"
weights.models = { "claude-haiku" = "3" }
"""
DEARER_OUTPUT = PLANS_FILE.replace("[plans.daily]", 'weights = { output = "5" }\n[plans.daily]')
TIERS = ["free", "pro", "daily", "anchored", "team", "weighted"]
ZONES = [None, "Pacific/Auckland", "Asia/Kolkata", "America/New_York"]


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return load_plans(tmp_path_factory.mktemp("plans"), PLANS_FILE)


def load_plans(folder: Path, content: str) -> Plans:
    path = folder / "plans.toml"
    path.write_text(content)
    return Plans.load(path)


# Of each table, by primary key.
Rows = dict[str, dict[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Service:
    """A service's database, changed as the service does it."""

    rebuilt: Rebuilt
    url: str
    database: Database
    settle: Callable[[Connection, Sequence[Event]], Any]

    async def handles(self, *events: Event) -> None:
        await self.database.write(self.settle, events)

    async def does(self, *statements: str) -> None:
        """What no part of ChatRail does."""

        def work(db: Connection) -> None:
            for statement in statements:
                db.execute(text(statement))

        await self.database.write(work)

    async def rows(self) -> Rows:
        """Of the tables that are rebuilt."""

        def read(db: Connection) -> Rows:
            return {table.name: rows_of(db, table) for table in self.rebuilt.tables}

        return await self.database.read(read)

    async def has(self, before: Rows) -> bool:
        """All that there was, and nothing else; a total of nothing may be kept or not."""
        return _without_empty_totals(await self.rows()) == _without_empty_totals(before)

    async def replays(self, nats: Client) -> Told:
        return await replay(nats, self.url, self.rebuilt)


def _without_empty_totals(rows: Rows) -> Rows:
    totals = rows.get("usage_totals", {})
    kept = {key: total for key, total in totals.items() if any(total[name] for name in quota_totals.SUMS)}
    return {**rows, "usage_totals": kept}


def rows_of(db: Connection, table: Table) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = {}
    for row in db.execute(select(table)).mappings():
        values = {name: json.loads(row[name]) if name == "models" else row[name] for name in row}
        found[tuple(values[column.name] for column in table.primary_key)] = values
    return found


def quota_on(url: str, plans: Plans) -> Service:
    rebuilt, database = RebuiltQuota(plans), Database(url)
    return Service(rebuilt, url, database, lambda db, events: quota_store.settle(db, plans, events))


async def ledger_on(url: str) -> Service:
    rebuilt, database = RebuiltLedger(), Database(url)
    await make_ahead(database)
    return Service(rebuilt, url, database, ledger_store.record)


@pytest.fixture
async def quota(quota_url: str, plans: Plans) -> AsyncIterator[Service]:
    service = quota_on(quota_url, plans)
    yield service
    await service.database.close()


@pytest.fixture(params=["ledger", "quota"])
async def service(
    request: pytest.FixtureRequest, backend: str, tmp_path: Path, plans: Plans
) -> AsyncIterator[Service]:
    with new_database(request, backend, tmp_path, request.param) as url:
        service = await ledger_on(url) if request.param == "ledger" else quota_on(url, plans)
        yield service
        await service.database.close()


def one_of_each() -> list[Event]:
    return [
        generation_completed(metadata={"tags": ["a", None, 1.5], "wo": "überall 🛤"}),
        usage_reported(),
        usage_adjusted(),
        topped_up(lasts=True),
        subscription_changed(),
        generation_completed("user_2", started_at=NOON - 30 * DAY, authorized=authorized()),
        subscription_changed("user_2", "daily", time_zone="Asia/Kolkata"),
    ]


def settled_generation(user_id: str = "user_1", **data: Any) -> GenerationCompleted:
    """As chat makes them: the event has the id of its generation."""
    event = generation_completed(user_id, **data)
    return event.model_copy(update={"id": event.data.generation_id})


async def test_a_replay_leaves_every_row_as_it_was(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before = await service.rows()

    await service.replays(nats)
    assert await service.has(before)
    again = await service.rows()
    await service.replays(nats)
    assert await service.rows() == again


async def test_an_empty_database_gets_what_it_lost(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.replays(nats)
    rebuilt = await service.rows()
    assert all(rebuilt.values())

    await service.handles(*events)
    assert await service.has(rebuilt)


DAMAGE = {
    "ledger": [
        "UPDATE usage SET tokens_used = tokens_used + 1 WHERE user_id = 'user_2'",
        "UPDATE usage SET authorized = NULL WHERE authorized IS NOT NULL",
        "DELETE FROM usage WHERE event_type = 'usage.adjusted'",
        "UPDATE subscription_changes SET tier = 'enterprise'",
        "UPDATE usage_daily SET tokens_used = tokens_used + 5 WHERE user_id = 'user_1'",
        "DELETE FROM usage_daily WHERE user_id = 'user_2'",
    ],
    "quota": [
        "UPDATE usage_totals SET tokens_used = tokens_used + 5, models = replace(models, ':', ' : ')",
        "DELETE FROM usage_totals WHERE user_id = 'user_2'",
        "DELETE FROM settlements WHERE user_id = 'user_1'",
        "UPDATE settlements SET tokens_used = 7",
        "UPDATE subscriptions SET tier = 'enterprise'",
        "DELETE FROM plan_changes WHERE user_id = 'user_2'",
    ],
}


# JSON that Python's own parser does not follow to its end.
TOO_DEEP = "[" * 5_000 + "]" * 5_000

# What SQLite takes for JSON and for moments. PostgreSQL takes only what is text by agreement, and infinity.
NONSENSE = {
    "ledger": [
        "UPDATE usage SET metadata = '{', authorized = 'x'",
        "UPDATE usage SET metadata = x'ff00', authorized = x'fe'",
        "UPDATE usage SET authorized = '' WHERE authorized IS NULL",
        f"UPDATE usage SET metadata = '{TOO_DEEP}'",  # noqa: S608
        "UPDATE usage SET model = CAST(x'ff00' AS TEXT), metadata = CAST(x'ff00' AS TEXT)",
        "UPDATE usage SET created_at = 'never', usage_date = 'never'",
        "UPDATE usage SET created_at = 'infinity', usage_date = 'infinity', completed_at = '-infinity'",
        "UPDATE usage_daily SET usage_date = 'infinity'",
        "UPDATE usage_daily SET usage_date = 'never'",
        "UPDATE subscription_changes SET changed_at = 7",
    ],
    "quota": [
        "UPDATE usage_totals SET models = 'x'",
        "UPDATE usage_totals SET models = x'ff'",
        f"UPDATE usage_totals SET models = '{TOO_DEEP}'",  # noqa: S608
        "UPDATE usage_totals SET models = CAST(x'ff' AS TEXT), user_id = CAST(x'ff' AS TEXT)",
        "UPDATE usage_totals SET period_start = 'never'",
        "UPDATE usage_totals SET period_end = 'infinity'",
        "UPDATE settlements SET started_at = 'infinity'",
        "UPDATE usage_totals SET period_end = '2026-11-30'",
        "UPDATE settlements SET started_at = ''",
        "UPDATE subscriptions SET changed_at = 'never', subscribed_at = 'never'",
    ],
}

ADDED = {
    "ledger": "INSERT INTO usage_daily SELECT 'nobody', usage_date, model, 1, 1, 0, 0, 0, 1 FROM usage_daily LIMIT 1",
    "quota": "INSERT INTO usage_totals (user_id, period_start, period_end, tokens_used, input_tokens, output_tokens,"
    " cache_creation_input_tokens, cache_read_input_tokens, top_up_tokens, lasting_top_up_tokens, models)"
    " SELECT 'nobody', period_start, period_end, 1, 1, 0, 0, 0, 0, 0, '{}' FROM usage_totals LIMIT 1",
}


def damage(service: Service) -> list[str]:
    return by_hand(service, *DAMAGE[service.rebuilt.service])


def by_hand(service: Service, *statements: str) -> list[str]:
    """Where triggers stand in the way, somebody takes them away and puts them back."""
    if service.url.startswith("sqlite"):
        triggers = sqlite(service.url, "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        return [*(f"DROP TRIGGER {name}" for name, _ in triggers), *statements, *(sql for _, sql in triggers)]
    tables = [table.name for table in service.rebuilt.tables]
    off, on = ([f"ALTER TABLE {table} {verb} TRIGGER USER" for table in tables] for verb in ("DISABLE", "ENABLE"))
    return [*off, *statements, *on]


def everything(service: Service) -> list[str]:
    return by_hand(service, *(f"DELETE FROM {table.name}" for table in service.rebuilt.tables))  # noqa: S608


def sqlite(url: str, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(make_url(url).database or "")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_what_was_changed_and_deleted_by_hand_is_as_it_was(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before = await service.rows()
    await service.does(*damage(service))
    assert not await service.has(before)

    await service.replays(nats)
    assert await service.has(before)


async def test_on_sqlite_tables_that_are_as_they_should_be_stay_where_they_are(
    nats: Client, service: Service
) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before, schema = await service.rows(), schema_of(service.url)

    told = await service.replays(nats)

    assert told.is_exchanged is service.url.startswith("postgresql")
    assert await service.has(before)
    assert schema_of(service.url) == schema


@pytest.mark.parametrize("nth", range(7))
async def test_whatever_was_changed_is_noticed_and_put_right(nats: Client, service: Service, nth: int) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before = await service.rows()
    wrong = [*DAMAGE[service.rebuilt.service], ADDED[service.rebuilt.service]][nth]
    await service.does(*by_hand(service, wrong))
    assert await service.rows() != before

    told = await service.replays(nats)

    assert told.is_exchanged
    assert await service.has(before)


async def test_what_makes_no_sense_is_named_and_put_right(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before = await service.rows()
    for wrong in NONSENSE[service.rebuilt.service]:
        if service.url.startswith("postgresql") and "models = 'x'" not in wrong and "infinity" not in wrong:
            continue
        await service.does(*by_hand(service, wrong))
        _, differences = await dry_run(nats, service.url, service.rebuilt)
        assert any(difference.rows and difference.examples for difference in differences), wrong
        await service.replays(nats)
        assert await service.has(before), wrong


def _damage_pages(file: Path) -> None:
    """Its schema can be read: whoever only opens it finds nothing."""
    with file.open("r+b") as opened:
        half = opened.seek(0, 2) // 2
        opened.seek(half)
        opened.write(b"x" * half)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_file_with_damaged_pages_is_named_with_what_to_do(nats: Client, service: Service) -> None:
    events = [usage_reported() for _ in range(300)]
    await publish(nats, *events)
    await service.handles(*events)
    await acknowledge(nats, service)
    await service.database.close()
    _damage_pages(Path(make_url(service.url).database or ""))
    for asked in (replay, dry_run):
        with pytest.raises(Misconfigured, match=r"is damaged, or is none\. Move it away and start ChatRail"):
            await asked(nats, service.url, service.rebuilt)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_database_of_another_release_is_left_to_it(nats: Client, service: Service) -> None:
    for revision, told in (("0001", rf"earlier .* services\.{service.rebuilt.service} migrate"), ("9999", "later")):
        await service.does(f"UPDATE alembic_version SET version_num = '{revision}'")  # noqa: S608
        for asked in (replay, dry_run):
            with pytest.raises(Misconfigured, match=f"is of an? {told}"):
                await asked(nats, service.url, service.rebuilt)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_dry_run_makes_no_database_where_there_is_none(
    nats: Client, service: Service, tmp_path: Path
) -> None:
    await publish(nats, *(events := one_of_each()))
    await acknowledge(nats, service)
    gone, empty = tmp_path / "gone.db", tmp_path / "empty.db"
    empty.touch()
    for file in (gone, empty):
        told, differences = await dry_run(nats, f"sqlite:///{file}", service.rebuilt)
        assert told.messages == len(events)
        assert any(difference.missing for difference in differences)
    assert not gone.exists()
    assert empty.stat().st_size == 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_bytes_are_named_and_put_right_in_whichever_column_somebody_put_them(
    nats: Client, service: Service
) -> None:
    """SQLite takes them for text."""
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    before = await service.rows()
    # Of each table the nth, at a time; whether an event came late is of the moment, and not of the stream.
    columns = [
        [(table.name, each.name) for each in table.c if each.name != "is_late"] for table in service.rebuilt.tables
    ]
    for nth in zip_longest(*columns):
        places = [place for place in nth if place]
        wrong = [
            f"UPDATE {table} SET {column} = x'ff00' WHERE rowid = (SELECT min(rowid) FROM {table})"  # noqa: S608
            for table, column in places
        ]
        await service.does(*by_hand(service, *wrong))
        _, differences = await dry_run(nats, service.url, service.rebuilt)
        named = {difference.table for difference in differences if difference.rows and difference.examples}
        assert named == {table for table, _ in places}, places
        await service.replays(nats)
        assert await service.has(before), places
        assert "xff" not in repr(await service.rows()), places


@pytest.mark.parametrize("nth", [2, 4])
async def test_a_stream_that_lacks_messages_is_replayed_only_where_somebody_says_so(
    nats: Client, service: Service, nth: int
) -> None:
    js = nats.jetstream()
    config = (await js.stream_info(STREAM)).config
    await js.delete_stream(STREAM)
    await js.add_stream(replace(config, deny_delete=False))
    events = [usage_reported(tokens_used=tokens) for tokens in (1, 20, 300, 4_000)]
    await publish(nats, *events)
    await service.handles(*events)
    await js.delete_msg(STREAM, nth)  # as a store does that finds it damaged
    before = await service.rows()

    with pytest.raises(Misconfigured, match=rf"lacks 1 of its messages, the first of them message {nth}:"):
        await service.replays(nats)

    assert await service.rows() == before
    told = await replay(nats, service.url, service.rebuilt, despite_gaps=True)
    assert (told.lacking, told.messages) == (1, 3)
    kept = (await service.rows())["usage" if service.rebuilt.service == "ledger" else "settlements"]
    assert sum(row["tokens_used"] for row in kept.values()) == 4_321 - events[nth - 1].data.tokens_used


async def test_what_a_service_handles_during_a_replay_makes_no_difference(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    handled, on_its_way = usage_reported(), usage_reported()

    async def meanwhile(record: Record, url: str) -> list[str]:
        await publish(nats, on_its_way, handled)
        await service.handles(handled)
        return []

    service.rebuilt.restore = meanwhile  # type: ignore[method-assign]
    told = await service.replays(nats)
    del service.rebuilt.restore
    assert told.is_exchanged is service.url.startswith("postgresql")
    await service.handles(on_its_way)

    kept = await service.rows()
    assert {(handled.id,), (on_its_way.id,)} <= (kept.get("usage") or kept["settlements"]).keys()
    assert not (await service.replays(nats)).contradicting
    assert await service.has(kept)


async def acknowledge(nats: Client, service: Service) -> None:
    """As the service does, once it has committed."""
    js, durable = nats.jetstream(), service.rebuilt.durable
    pulling = await js.pull_subscribe_bind(durable, STREAM)
    newest = (await js.stream_info(STREAM)).state.last_seq
    while await delivered(js, durable) < newest:
        for message in await pulling.fetch(100):
            await message.ack_sync()
    await pulling.unsubscribe()


async def test_a_dry_run_names_what_it_would_change_and_changes_nothing(nats: Client, service: Service) -> None:
    events = one_of_each()
    await publish(nats, *events)
    await service.handles(*events)
    await acknowledge(nats, service)
    _, differences = await dry_run(nats, service.url, service.rebuilt)
    assert [difference.rows for difference in differences] == [0] * len(service.rebuilt.tables)

    await service.does(*damage(service))
    before, schema = await service.rows(), schema_of(service.url)
    _, differences = await dry_run(nats, service.url, service.rebuilt)

    found = {each.table: (each.changed, each.missing, each.unknown) for each in differences}
    if service.rebuilt.service == "ledger":
        assert found == {"usage": (1, 2, 0), "subscription_changes": (2, 0, 0), "usage_daily": (2, 1, 0)}
        assert any("user_2" in line and "tokens_used 8095 becomes 8094" in line for line in differences[0].examples)
        assert any("authorized None becomes {" in line for line in differences[0].examples)
    else:
        assert found["settlements"] == (1, 4, 0)
        assert found["subscriptions"] == (2, 0, 0)
        assert found["plan_changes"] == (0, 1, 0)
        assert found["usage_totals"][0] == len(before["usage_totals"])
        # Of JSON that is only written in another way nothing is to be told.
        assert not any("models" in line for each in differences for line in each.examples)
    assert await service.rows() == before
    assert schema_of(service.url) == schema


async def test_a_dry_run_forgives_what_there_was_no_time_for(nats: Client, service: Service) -> None:
    known, handled, waiting = usage_reported(), usage_reported(), usage_reported()
    await publish(nats, known)
    await service.handles(known)
    await acknowledge(nats, service)
    await publish(nats, waiting, handled)
    await service.handles(handled)

    _, differences = await dry_run(nats, service.url, service.rebuilt)
    assert [difference.rows for difference in differences] == [0] * len(service.rebuilt.tables)

    await service.handles(usage_reported())  # which is on no stream
    _, differences = await dry_run(nats, service.url, service.rebuilt)
    assert sum(difference.unknown for difference in differences) == 1


def schema_of(url: str) -> set[tuple[Any, ...]]:
    """Every table, column, index, constraint, partition, trigger and right, by name and definition."""
    if url.startswith("sqlite"):
        return set(sqlite(url, "SELECT type, name, tbl_name, sql FROM sqlite_master"))
    with psycopg.connect(url) as postgres:
        queries = (
            "SELECT relname, relkind::text, relacl::text, relowner, reloptions::text,"
            " pg_get_expr(relpartbound, oid),"
            " (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = oid),"
            " pg_get_partkeydef(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace",
            "SELECT attrelid::regclass::text, attnum, attname, format_type(atttypid, atttypmod), attcollation,"
            " attnotnull"
            " FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid"
            " WHERE relnamespace = 'public'::regnamespace AND attnum > 0",
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace",
            "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'",
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger",
            "SELECT table_name, column_name, column_default FROM information_schema.columns"
            " WHERE table_schema = 'public'",
            "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'",
        )
        return {row for query in queries for row in postgres.execute(query)}


async def test_a_dry_run_forgives_what_is_handled_while_it_looks(
    nats: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, late = usage_reported(), usage_reported()
    await publish(nats, known)
    await service.handles(known)
    await acknowledge(nats, service)

    async def then_one_is_handled(nc: Client) -> tuple[int, int]:
        ends = await bounds(nc)
        await publish(nats, late)
        await service.handles(late)
        return ends

    monkeypatch.setattr("shared.replaying.bounds", then_one_is_handled)
    _, differences = await dry_run(nats, service.url, service.rebuilt)
    assert [difference.rows for difference in differences] == [0] * len(service.rebuilt.tables)


async def test_after_a_replay_the_schema_is_what_the_migrations_made(nats: Client, service: Service) -> None:
    if service.url.startswith("postgresql"):
        table = service.rebuilt.tables[0].name
        await service.does(f"GRANT SELECT ON {table} TO PUBLIC", f"REVOKE DELETE ON {table} FROM CURRENT_USER")
    before = schema_of(service.url)
    await publish(nats, *one_of_each())
    await service.replays(nats)
    assert schema_of(service.url) == before
    await service.replays(nats)
    assert schema_of(service.url) == before
    if service.url.startswith("sqlite"):
        assert sqlite(service.url, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("backend", ["postgresql"])
@pytest.mark.parametrize("service", ["ledger"], indirect=True)
async def test_a_replay_that_does_not_know_all_partitions_changes_nothing(nats: Client, service: Service) -> None:
    await service.handles(usage_reported())
    before = await service.rows()
    tables, migrations = service.rebuilt.tables, service.rebuilt.migrations
    with open_shadow(service.url, tables, migrations) as shadow:
        await service.does("ALTER TABLE usage DETACH PARTITION usage_default")
        with pytest.raises(Misconfigured, match="other partitions by now"), shadow.locked() as lock:
            lock.exchange(lambda db: None, lambda db, old: None)
    assert await service.rows() == before
    await service.does("ALTER TABLE usage ATTACH PARTITION usage_default DEFAULT")


async def test_connections_that_knew_the_tables_before_know_them_afterwards(nats: Client, service: Service) -> None:
    for _ in range(10):  # often enough that the driver prepares the statements
        await service.handles(usage_reported())
        await service.rows()
    first, second = usage_reported(), usage_reported()
    await publish(nats, first)
    await service.replays(nats)

    await service.handles(first, second)

    kept = service.rebuilt.kept[-1] if service.rebuilt.service == "quota" else service.rebuilt.kept[0]
    assert set((await service.rows())[kept.name]) == {(first.id,), (second.id,)}


async def test_of_two_bodies_under_one_id_the_first_counts_and_the_other_is_in_quarantine(
    nats: Client, service: Service
) -> None:
    first = usage_reported(tokens_used=1)
    second = usage_reported(tokens_used=2).model_copy(update={"id": first.id})
    for event in (first, first, second, first):
        await publish_raw(nats, encode(event), subject=event.type)
    await publish_raw(nats, b"no event")
    await publish_raw(nats, b"a seal", subject=LEDGER_SEALED)  # tells of the record, and is none

    await service.replays(nats)

    kept = await service.rows()
    assert [row["tokens_used"] for row in (kept.get("usage") or kept["settlements"]).values()] == [1]
    found = await service.database.read(lambda db: db.execute(select(table_of(Quarantined))).all())
    assert {bytes(row.body) for row in found} == {encode(second), b"no event"}


@pytest.mark.parametrize("distance", [0, BATCH_SIZE], ids=["in one batch", "in two"])
@pytest.mark.parametrize("is_plain_first", [True, False])
async def test_the_first_of_two_bodies_counts_also_where_only_one_of_them_can_be_read_in_bulk(
    nats: Client, service: Service, is_plain_first: bool, distance: int
) -> None:
    plain = usage_reported(tokens_used=1)
    unusual = usage_reported(tokens_used=2, provider_request_id='a "quoted" id').model_copy(update={"id": plain.id})
    assert plain_generation(encode(plain))
    assert not plain_generation(encode(unusual))
    first, second = (plain, unusual) if is_plain_first else (unusual, plain)
    between = [usage_reported() for _ in range(distance)]
    await publish_raw(nats, encode(first), subject=first.type)
    await publish(nats, *between)
    await publish_raw(nats, encode(second), subject=second.type)

    await service.replays(nats)

    kept = await service.rows()
    rows = kept.get("usage") or kept["settlements"]
    assert rows[(plain.id,)]["tokens_used"] == first.data.tokens_used
    assert len(rows) == 1 + distance
    found = await service.database.read(lambda db: db.execute(select(table_of(Quarantined))).all())
    assert {bytes(row.body) for row in found} == {encode(second)}


async def test_several_batches_are_replayed_in_order(nats: Client, service: Service) -> None:
    first = usage_reported(tokens_used=1)
    others = [usage_reported(f"user_{nth % 7}", tokens_used=nth) for nth in range(BATCH_SIZE + 100)]
    last = usage_reported(tokens_used=2).model_copy(update={"id": first.id})
    await publish(nats, first, *others)
    await publish_raw(nats, encode(last), subject=last.type)

    await service.replays(nats)

    kept = await service.rows()
    rows = kept.get("usage") or kept["settlements"]
    assert len(rows) == len(others) + 1
    assert rows[(first.id,)]["tokens_used"] == 1


async def test_a_second_replay_says_that_there_is_one_and_the_first_leaves_no_file(
    nats: Client, service: Service, tmp_path: Path
) -> None:
    await publish(nats, usage_reported())
    with (
        open_shadow(service.url, service.rebuilt.tables, service.rebuilt.migrations),
        pytest.raises(Misconfigured, match="Another replay"),
    ):
        await service.replays(nats)
    await service.replays(nats)
    assert not await asyncio.to_thread(lambda: list(tmp_path.glob("*.replay*")))


async def test_an_empty_stream_takes_nothing_away(nats: Client, service: Service) -> None:
    await service.handles(usage_reported())
    before = await service.rows()
    with pytest.raises(Misconfigured, match="stream is empty"):
        await service.replays(nats)
    assert await service.rows() == before


async def test_a_replay_that_is_killed_has_changed_nothing_and_the_next_one_ends_the_same(
    nats: Client, own_nats_server: str, service: Service, tmp_path: Path
) -> None:
    events = [generation_completed(f"user_{nth % 50}", output_tokens=nth) for nth in range(BATCH_SIZE + 200)]
    await asyncio.gather(*(publish(nats, event) for event in events))
    await service.handles(*events)
    before, schema = await service.rows(), schema_of(service.url)
    await service.does(*damage(service))
    damaged = await service.rows()

    name = service.rebuilt.service
    variables = environment(
        **{f"CHATRAIL_{name.upper()}_DATABASE_URL": service.url}, CHATRAIL_NATS_URL=own_nats_server
    )
    # At every step a little later, until one is through before it is killed.
    for nth in range(100):
        with (tmp_path / "said").open("wb") as said:
            process = forked.start(f"services.{name}", "replay", env=variables, output=said)
        try:
            async with asyncio.timeout(0.05 * 1.4**nth):
                assert await process.ended() == 0
            break
        except TimeoutError:
            process.kill()
            await process.ended()
        if await service.has(before):
            break  # killed after the switch, with something left to clean
        assert await service.rows() == damaged
    assert nth > 0
    await service.replays(nats)
    assert await service.has(before)
    assert schema_of(service.url) == schema


async def test_holds_stay_but_for_generations_that_are_settled(nats: Client, quota: Service, plans: Plans) -> None:
    ids = [new_id() for _ in range(3)]
    asked = [asking(each) for each in ids]
    await quota.database.write(quota_store.authorize, plans, asked)
    settled, waiting = (settled_generation(generation_id=each) for each in ids[:2])
    await publish(nats, settled, waiting)
    await quota.handles(settled)

    await quota.replays(nats)

    left = await quota.database.read(lambda db: set(db.execute(select(quota_store.holds.c.generation_id)).scalars()))
    assert left == {ids[2]}
    before = await quota.rows()
    await quota.handles(waiting)  # delivered after all
    assert await quota.rows() == before


async def test_holds_that_cannot_be_are_let_go_where_all_else_is_as_it_should_be_too(
    nats: Client, quota: Service, plans: Plans
) -> None:
    ids = [new_id() for _ in range(4)]
    settled, *_ = (settled_generation(generation_id=each) for each in ids)
    await publish(nats, settled)
    await quota.handles(settled)
    await quota.database.write(quota_store.authorize, plans, [asking(each) for each in ids[1:]])
    await quota.does(
        f"UPDATE holds SET generation_id = '{ids[0]}' WHERE generation_id = '{ids[1]}'",  # noqa: S608
        f"UPDATE holds SET started_at = '2026-01-01T00:00:00.000000Z' WHERE generation_id = '{ids[2]}'",  # noqa: S608
    )
    told, _ = await dry_run(nats, quota.url, quota.rebuilt)
    assert told.beside == ["2 holds of settled generations, or for longer than any, would be let go"]

    assert (await quota.replays(nats)).beside == [
        "2 holds of settled generations, or for longer than any, are let go"
    ]

    left = await quota.database.read(lambda db: set(db.execute(select(quota_store.holds.c.generation_id)).scalars()))
    assert left == {ids[3]}
    assert (await quota.replays(nats)).beside == []


async def test_what_came_too_late_stays_late(nats: Client, quota: Service, plans: Plans) -> None:
    ids = [new_id() for _ in range(3)]
    asked = [asking(each) for each in ids]
    await quota.database.write(quota_store.authorize, plans, asked)
    in_time, late, later = (settled_generation(generation_id=each) for each in ids)
    await quota.handles(in_time)
    await quota.does("UPDATE holds SET expires_at = started_at")
    await quota.handles(late)
    await publish(nats, in_time, late, later)  # the last one has not been handled yet

    await quota.replays(nats)

    rows = (await quota.rows())["settlements"]
    assert {ids.index(key) for (key,), row in rows.items() if row["is_late"]} == {1, 2}


async def test_what_was_announced_is_not_announced_again_by_a_database_that_was_lost(
    nats: Client, quota: Service, plans: Plans
) -> None:
    spent = [usage_reported(tokens_used=90_000, started_at=datetime.now(UTC)) for _ in range(2)]
    await publish(nats, *spent)
    await quota.handles(*spent)
    announced = await quota.database.read(quota_store.alerts_to_publish)
    assert len(announced) == 2
    for _, body in announced:
        await publish_raw(nats, body, subject="quota.threshold.reached")
    await quota.does("DELETE FROM alerts", *everything(quota))

    await quota.replays(nats)
    more = usage_reported(tokens_used=1, started_at=datetime.now(UTC))
    await quota.handles(more)

    assert await quota.database.read(quota_store.alerts_to_publish) == []
    assert (await nats.jetstream().stream_info(ALERTS)).state.messages == 2


async def test_what_a_top_up_left_is_carried_as_before_by_a_database_that_was_lost(
    nats: Client, quota: Service, plans: Plans
) -> None:
    """October ended under a plan whose months begin elsewhere than those of today's plan."""
    october = NOON - 30 * DAY
    events: list[Event] = [
        topped_up(tokens=5_000, lasts=True, effective_at=october - DAY),
        usage_reported(tokens_used=110_000, started_at=october),
        subscription_changed(tier="pro", time_zone="America/New_York"),
    ]
    await publish(nats, *events)
    for event in events:
        await quota.handles(event)

    async def limit_tokens() -> int | None:
        found = await quota.database.read(quota_store.accounts, plans, {"user_1"}, at=NOON + HOUR)
        return found["user_1"].tightest.limit_tokens

    assert await limit_tokens() == 503_000
    await quota.does(*everything(quota))
    await quota.replays(nats)
    assert await limit_tokens() == 503_000


async def test_a_total_that_a_replay_makes_the_service_made_too(nats: Client, quota: Service) -> None:
    """Of usage beside a plan of one day, before and after it, when nothing in one of its periods was used as yet."""
    day = NOON.replace(hour=0)
    events: list[Event] = [
        subscription_changed(tier="daily", changed_at=day + 10 * HOUR, time_zone="America/New_York"),
        subscription_changed(tier="free", changed_at=day + 20 * HOUR),
        usage_reported(started_at=day + 3 * HOUR),
        usage_reported(started_at=day + 26 * HOUR),
    ]
    await publish(nats, *events)
    for event in events:
        await quota.handles(event)
    before = await quota.rows()

    await quota.does(*everything(quota))
    await quota.replays(nats)

    assert await quota.has(before)


@st.composite
def happenings(draw: st.DrawFn) -> tuple[list[Event], list[list[Event]]]:
    """Events of two users in the order of the stream, some of them twice, and batches in which they were handled."""
    users = [f"user_{new_id()}" for _ in range(2)]  # nobody that an earlier example has used
    moments = st.integers(0, 75 * 24 * 60).map(lambda minutes: NOON - 60 * DAY + timedelta(minutes=minutes))
    who, few = st.sampled_from(users), st.integers(0, 60_000)
    event = st.one_of(
        st.builds(generation_completed, who, input_tokens=few, started_at=moments),
        st.builds(usage_reported, who, tokens_used=few, started_at=moments),
        st.builds(usage_adjusted, who, st.integers(-9_000, 9_000), effective_at=moments),
        st.builds(topped_up, who, st.integers(1, 9_000), lasts=st.booleans(), effective_at=moments),
        st.builds(
            subscription_changed,
            who,
            st.sampled_from(TIERS),
            changed_at=moments,
            time_zone=st.sampled_from(ZONES),
        ),
    )
    events = draw(st.lists(event, min_size=1, max_size=12))
    again = draw(st.lists(st.sampled_from(events), max_size=4))
    order = draw(st.permutations(events + again))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    batches = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    return draw(st.permutations(events + again)), batches


@given(happened=happenings())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_happened_in_whatever_order_a_replay_comes_to_the_same(
    nats: Client, service: Service, happened: tuple[list[Event], list[list[Event]]]
) -> None:
    stream, batches = happened
    for event in stream:
        await publish_raw(nats, encode(event), subject=event.type)
    for batch in batches:
        await service.handles(*batch)
    before = await service.rows()

    await service.replays(nats)

    assert await service.has(before)
    after = await service.rows()
    for (user_id, start, end), row in after.get("usage_totals", {}).items():
        covered = [
            settled
            for settled in after["settlements"].values()
            if settled["user_id"] == user_id and start <= settled["started_at"] < end
        ]
        assert all(row[name] == sum(settled[name] for settled in covered) for name in quota_totals.SUMS)


@given(happened=happenings())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_everybody_stands_as_before_in_a_database_that_was_lost(
    nats: Client, quota: Service, plans: Plans, happened: tuple[list[Event], list[list[Event]]]
) -> None:
    stream, batches = happened
    users = {event.subject for event in stream}
    for event in stream:
        await publish_raw(nats, encode(event), subject=event.type)
    for batch in batches:
        await quota.handles(*batch)
    moments = [NOON + days * DAY for days in (-60, -31, 0, 5, 12)]

    async def standing() -> list[Any]:
        return [
            await quota.database.read(lambda db, at=at: quota_store.accounts(db, plans, users, at=at))  # type: ignore[misc]
            for at in moments
        ]

    before = await standing()
    await quota.does(*everything(quota))
    await quota.replays(nats)
    assert await standing() == before


async def test_the_past_is_what_the_stream_had_then(nats: Client, tmp_path: Path, plans: Plans) -> None:
    await publish(nats, usage_reported(tokens_used=100), usage_reported("user_2", tokens_used=7))
    await eventually(lambda: _time_has_passed(nats))
    then = datetime.now(UTC)
    await publish(nats, usage_reported(tokens_used=100), subscription_changed())

    class Killed(RebuiltQuota):
        def derive(self, db: Connection, live: str | None) -> None:
            shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await rebuild_into(nats, tmp_path / "stopped" / "then.db", Killed(plans), until=then)
    assert list((tmp_path / "stopped").iterdir()) == []
    file = tmp_path / "killed" / "then.db"
    await rebuild_into(nats, file, RebuiltQuota(plans), until=then)
    assert list((tmp_path / "killed").iterdir()) == [file]

    engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
    with engine.begin() as db:
        used = {user.user_id: (user.plan.tier, user.tightest.used_tokens) for user in standing_at(db, plans, NOON)}
    engine.dispose()
    assert used == {"user_1": ("free", 100), "user_2": ("free", 7)}
    with pytest.raises(Misconfigured, match="exists"):
        await rebuild_into(nats, file, RebuiltQuota(plans), until=then)
    # It is a database like any other: what happened since can be counted on it.
    await (later := Database(f"sqlite:///{file}")).write(quota_store.settle, plans, [usage_reported(tokens_used=1)])
    await later.close()


async def _time_has_passed(nats: Client) -> bool:
    """The stream's clock is this machine's: what is published from now on is stored later."""
    last = (await nats.jetstream().get_last_msg("USAGE", "generation.completed")).time
    return last is not None and datetime.now(UTC) > last


async def test_what_usage_costs_in_all_has_each_token_once(nats: Client, tmp_path: Path, plans: Plans) -> None:
    """Also of a plan with two limits, and where a plan of days follows one of months, or the other way round."""
    spent = partial(usage_reported, tokens_used=10_000)
    await publish(
        nats,
        subscription_changed("two limits", "team", changed_at=NOON - 20 * DAY),
        spent("two limits", started_at=NOON - 2 * DAY),
        *(spent("both ways", started_at=NOON - days * DAY) for days in (18, 8, 2)),
        subscription_changed("both ways", "daily", changed_at=NOON - 10 * DAY),
        subscription_changed("both ways", "pro", changed_at=NOON - 5 * DAY),
    )
    file = tmp_path / "all.db"
    await rebuild_into(nats, file, RebuiltQuota(plans))
    engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
    with engine.begin() as db:
        used = [(plan.tier, under(plan, totals)[0]) for plan, totals in used_once(db, plans)]
    engine.dispose()
    assert used == [("free", 10_000), ("daily", 10_000), ("pro", 10_000), ("team", 10_000)]


async def test_other_weights_are_compared_period_by_period(nats: Client, tmp_path: Path, plans: Plans) -> None:
    october, november = NOON - 30 * DAY, NOON
    await publish(
        nats,
        generation_completed(input_tokens=1_000, output_tokens=100, started_at=october),
        subscription_changed(changed_at=NOON - HOUR),
        generation_completed(input_tokens=1_000, output_tokens=100, started_at=november),
        usage_reported(tokens_used=400, started_at=november),
    )
    file = tmp_path / "all.db"
    await rebuild_into(nats, file, RebuiltQuota(plans))

    others = load_plans(tmp_path, DEARER_OUTPUT)
    engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
    with engine.begin() as db:
        used = [
            (each.period.start.month, each.plan.tier, *map(str, each.under(each.plan)), *map(str, each.under(other)))
            for each in periods_used(db, plans)
            for other in [others.of(each.plan.tier)]
        ]
    engine.dispose()
    assert used == [
        (10, "free", "1100", "0.00", "1100", "0.00"),
        (11, "pro", "1500", "0.02", "1900", "0.02"),
    ]
