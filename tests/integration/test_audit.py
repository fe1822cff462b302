"""The audit finds what does not agree, names it, and finds nothing where all agrees."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.client import Client
from nats.js import JetStreamContext
from sqlalchemy import Connection, Table, text, update

from services.ledger import audit as auditing
from services.ledger import store as ledger_store
from services.ledger.audit import Databases, Evidence, audit
from services.ledger.checkpoint import Keys, checkpoint
from services.ledger.findings import Difference, Report, as_json, in_words
from services.ledger.handlers import Handlers as LedgerHandlers
from services.ledger.merkle import Head
from services.ledger.scope import Scope
from services.ledger.scratch import DAILY, Scratch, scratch
from services.ledger.seal_store import Damaged
from services.ledger.sealer import Sealer
from services.ledger.snapshots import snapshot
from services.ledger.verify_record import key_id
from services.quota import store as quota_store
from services.quota import totals as quota_totals
from services.quota.handlers import Handlers as QuotaHandlers
from shared import streams
from shared.consumer import Handler, apply
from shared.database import Database, iso, table_of
from shared.errors import Misconfigured
from shared.events import Event, encode, new_id
from shared.plans import Plans
from shared.quarantine import Poison, Quarantined, quarantine
from shared.settings import sqlite_url
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

DAY = timedelta(days=1)


@dataclass(slots=True)
class Found:
    """What an audit reported, with all differences: they are gone with the audit's scratch file."""

    report: Report
    agrees: bool
    differences: list[Difference]
    words: str
    document: dict[str, Any]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(difference.where, difference.kind) for difference in self.differences]


async def delivered(js: JetStreamContext, durable: str) -> int:
    """The sequence of the last message that it was given."""
    last = (await js.consumer_info(streams.STREAM, durable)).delivered
    assert last is not None
    return int(last.stream_seq)


class System:
    """A stream and the two databases that are made of it, by the services' own handlers."""

    def __init__(self, nats: Client, ledger_url: str, quota_url: str) -> None:
        self.nats, self.urls = nats, Databases(ledger_url, quota_url)
        self.ledger, self.quota = Database(ledger_url), Database(quota_url)
        self.plans = plans = Plans.load()
        self._handlers: dict[str, Handler] = {
            streams.LEDGER: LedgerHandlers(self.ledger, plans).on_usage,
            streams.QUOTA: QuotaHandlers(nats, self.quota, plans).on_usage,
        }

    async def deliver(self, *services: str, acknowledging: bool = True) -> None:
        """What the stream has and a service has not is handled by it."""
        for service in services or (streams.LEDGER, streams.QUOTA):
            js = self.nats.jetstream()
            pulling = await js.pull_subscribe("", durable=service, stream=streams.STREAM)
            newest = (await js.stream_info(streams.STREAM)).state.last_seq
            # A fetch may come back with less than there is; and what waits for a durable it may not know at once.
            while (handled := await delivered(js, service)) < newest:
                messages = await pulling.fetch(newest - handled, timeout=10)
                assert await apply(self._handlers[service], messages) == []
                for message in messages if acknowledging else []:
                    await message.ack_sync()
            await pulling.unsubscribe()

    async def audit(self, scope: Scope = Scope()) -> Found:  # noqa: B008 - frozen
        with scratch() as kept:
            return self._read(await audit(self.nats, self.urls, self.plans, scope, kept))

    @staticmethod
    def _read(report: Report) -> Found:
        differences = [
            d for group in report.found.groups() for d in report.found.differences(group.where, group.kind)
        ]
        words = "\n".join(in_words(report))
        document = json.loads("".join(as_json(report)))
        return Found(report, report.agrees, differences, words, document)

    async def ledger_does(self, statement: str) -> None:
        await self.ledger.write(_without_triggers(statement))

    async def quota_does(self, statement: str) -> None:
        await self.quota.write(_without_triggers(statement))

    async def close(self) -> None:
        await self.ledger.close()
        await self.quota.close()


def _without_triggers(statement: str) -> Callable[[Connection], None]:
    """What somebody does who may do everything, and leaves no trace of it in the schema."""

    def work(db: Connection) -> None:
        triggers = []
        if db.dialect.name == "sqlite":
            triggers = [*db.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))]
        else:
            db.execute(text("SET LOCAL session_replication_role = replica"))
        for name, _ in triggers:
            db.exec_driver_sql(f"DROP TRIGGER {name}")
        assert db.execute(text(statement)).rowcount
        for _, trigger in triggers:
            db.exec_driver_sql(trigger)

    return work


@pytest.fixture
async def system(nats: Client, ledger_url: str, quota_url: str) -> AsyncIterator[System]:
    system = System(nats, ledger_url, quota_url)
    yield system
    await system.close()


EVENTS: list[Event] = [
    generation_completed(metadata={"conversation": "überall 🛤", "tags": ["a", None, 1.5]}),
    generation_completed("user_2", cache_creation_input_tokens=3, cache_read_input_tokens=4, provider_request_id="r"),
    generation_completed(model="claude-opus-4-8", on_disconnect="drain", outcome="disconnected"),
    generation_completed("üser *.> 3", input_tokens=0, output_tokens=0, authorized=authorized()),
    generation_completed(started_at=datetime.fromisoformat("2026-11-30T23:59:59.999999-08:00")),
    generation_completed(started_at=NOON - 400 * DAY),
    usage_reported("user_2"),
    usage_adjusted(tokens_used=-94),
    topped_up(),
    topped_up("user_2", lasts=True),
    subscription_changed("user_2", changed_at=NOON),
    subscription_changed("user_2", "enterprise", changed_at=NOON + DAY),
    subscription_changed("user_2", "free", changed_at=NOON - DAY),
    subscription_changed("user_2", "enterprise", changed_at=NOON + 2 * DAY, time_zone="Asia/Kathmandu"),
]


async def test_where_stream_ledger_and_totals_agree_nothing_is_found(system: System) -> None:
    await publish(system.nats, *EVENTS)
    await system.deliver()

    found = await system.audit()

    assert found.differences == []
    assert found.agrees
    # Totals of the months in which the test runs may join those of the events.
    assert found.report.compared["quota.usage_totals"] >= 5
    assert {**found.report.compared, "quota.usage_totals": 5} == {
        "ledger.leaves": 0,
        "ledger.seals": 0,
        "ledger.usage": 10,
        "ledger.subscription_changes": 4,
        "ledger.usage_daily": 7,
        "quota.settlements": 10,
        "quota.plan_changes": 4,
        "quota.subscriptions": 1,
        "quota.usage_totals": 5,
    }
    assert found.report.read.messages == 14
    assert "All agree." in found.words


async def test_tables_that_lack_what_refuses_changes_are_told_and_are_no_difference(system: System) -> None:
    assert "triggers" not in (await system.audit()).words
    for database, table in ((system.ledger, "leaves"), (system.ledger, "usage"), (system.quota, "settlements")):
        await database.write(_drop_a_trigger, table)

    found = await system.audit()

    assert found.agrees
    assert found.report.proven.unguarded == ["ledger.usage", "ledger.leaves", "quota.settlements"]
    assert f"Without the triggers that refuse changes: {', '.join(found.report.proven.unguarded)};" in found.words


def _drop_a_trigger(db: Connection, table: str) -> None:
    if db.dialect.name == "sqlite":
        db.execute(text(f"DROP TRIGGER {table}_refuses_delete"))
    else:
        db.execute(text(f"DROP TRIGGER {table}_is_append_only ON {table}"))


async def test_of_an_empty_stream_nothing_is_expected(system: System) -> None:
    found = await system.audit()
    assert (found.differences, found.report.read.messages) == ([], 0)


COUNTED = generation_completed("counted", authorized=authorized(output_tokens_granted=96))


@pytest.mark.parametrize(
    ("where", "column", "value", "expected", "told"),
    [
        ("ledger.usage", "tokens_used", "tokens_used + 1", 8_094, 8_095),
        ("ledger.usage", "model", "'claude-opus-4-8'", "claude-haiku-4-5", "claude-opus-4-8"),
        ("ledger.usage", "input_tokens", "NULL", 5_282, None),
        ("ledger.usage", "metadata", """'{"a": 1}'""", "{}", '{"a": 1}'),
        ("ledger.usage", "usage_date", "'2026-11-21'", "2026-11-22", "2026-11-21"),
        (
            "ledger.usage",
            "created_at",
            "'2026-11-22T12:00:00.000001Z'",
            "2026-11-22T12:00:00.000000Z",
            "2026-11-22T12:00:00.000001Z",
        ),
        ("quota.settlements", "output_tokens", "0", 2_812, 0),
    ],
)
async def test_a_changed_record_is_named_with_what_it_was_and_is(
    system: System, *, where: str, column: str, value: str, expected: Any, told: Any
) -> None:
    await publish(system.nats, COUNTED, generation_completed())
    await system.deliver()
    if where == "ledger.usage":
        await system.ledger_does(f"UPDATE usage SET {column} = {value} WHERE id = '{COUNTED.id}'")  # noqa: S608
    else:
        change = f"UPDATE settlements SET {column} = {value} WHERE event_id = '{COUNTED.id}'"  # noqa: S608
        await system.quota_does(change)

    found = await system.audit()

    difference = Difference(where, "changed", COUNTED.id, "counted", {column: expected}, {column: told})
    assert found.differences == [difference]
    assert COUNTED.id in found.words
    assert not found.document["agrees"]
    assert found.document["differences"] == [asdict(difference)]


async def test_of_what_was_granted_and_held_what_was_changed_is_named(system: System) -> None:
    forgotten = generation_completed(authorized=authorized())
    altered = generation_completed(authorized=authorized(output_tokens_granted=97))
    await publish(system.nats, COUNTED, forgotten)
    await system.deliver()
    changed = json.dumps(ledger_store.usage_rows([altered])[0]["authorized"]).replace(":", "\\:")
    await system.ledger_does(f"UPDATE usage SET authorized = '{changed}' WHERE id = '{COUNTED.id}'")  # noqa: S608
    await system.ledger_does(f"UPDATE usage SET authorized = NULL WHERE id = '{forgotten.id}'")  # noqa: S608

    found = {difference.id: difference for difference in (await system.audit()).differences}

    assert found.keys() == {COUNTED.id, forgotten.id}
    assert found[COUNTED.id].expected == {"authorized.output_tokens_granted": 96}
    assert found[COUNTED.id].found == {"authorized.output_tokens_granted": 97}
    assert found[forgotten.id].found == {"authorized": None}
    assert '"hold_tokens"' in (found[forgotten.id].expected or {})["authorized"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_json_that_says_something_else_is_named_however_alike_it_is(system: System) -> None:
    """Python takes true for 1, forgets a member that is named again, and does not follow what is nested too deep."""
    noted = generation_completed(metadata={"a": 1, "b": [2]})
    await publish(system.nats, noted)
    await system.deliver()
    too_deep = "[" * 5_000 + "]" * 5_000
    for told in ('{"a": true, "b": [2]}', '{"a": 7, "a": 1, "b": [2]}', '{"a": 1, "b": [2.0]}', too_deep):
        escaped = told.replace(":", "\\:")
        await system.ledger_does(f"UPDATE usage SET metadata = '{escaped}' WHERE id = '{noted.id}'")  # noqa: S608
        (found,) = (await system.audit()).differences
        assert (found.id, found.kind) == (noted.id, "changed")
        assert json.dumps(found.expected) != json.dumps(found.found)
    await system.ledger_does('UPDATE usage SET metadata = \'{"b"\\: [2], "a"\\: 1}\'')
    assert (await system.audit()).differences == []
    await system.quota_does(f"UPDATE usage_totals SET models = '{too_deep}'")  # noqa: S608
    assert {found.where for found in (await system.audit()).differences} == {"quota.usage_totals"}


@pytest.mark.parametrize(
    ("table", "key"),
    [("ledger.usage", "id"), ("quota.settlements", "event_id")],
)
async def test_deleted_records_are_named_each(system: System, table: str, key: str) -> None:
    events = [generation_completed(f"user_{n}") for n in range(10)]
    await publish(system.nats, *events)
    await system.deliver()
    service, _, name = table.partition(".")
    delete = system.ledger_does if service == "ledger" else system.quota_does
    await delete(f"DELETE FROM {name} WHERE user_id IN ('user_4', 'user_7', 'user_8', 'user_9')")  # noqa: S608

    found = await system.audit()

    gone = [events[n] for n in (4, 7, 8, 9)]
    assert [(d.where, d.kind, d.id, d.user_id) for d in found.differences] == [
        (table, "missing", event.id, event.subject) for event in gone
    ]
    assert found.differences[0].expected is not None
    assert found.differences[0].expected[key] == gone[0].id
    assert f"{table}: 4 on the stream, and not here" in found.words
    assert "make replay" in found.words


@pytest.mark.parametrize("table", [ledger_store.usage, quota_totals.settlements])
async def test_a_record_that_no_event_explains_is_named(system: System, table: Table) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    key, *others = (column.name for column in table.c)
    copied = ", ".join(others)
    insert = system.ledger_does if table is ledger_store.usage else system.quota_does
    await insert(f"INSERT INTO {table} ({key}, {copied}) SELECT 'forged', {copied} FROM {table}")  # noqa: S608

    (difference,) = (await system.audit()).differences

    assert (difference.kind, difference.id, difference.user_id) == ("unexplained", "forged", "counted")
    assert difference.expected is None
    assert difference.found is not None
    assert difference.found["tokens_used"] == 8_094


async def test_a_record_that_was_given_to_another_user_does_not_hide_one_that_was_added(system: System) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    key, *others = (column.name for column in ledger_store.usage.c)
    copied = ", ".join(others)
    await system.ledger_does(f"INSERT INTO usage ({key}, {copied}) SELECT 'forged', {copied} FROM usage")  # noqa: S608
    await system.ledger_does(f"UPDATE usage SET user_id = 'other' WHERE id = '{COUNTED.id}'")  # noqa: S608
    found = await system.audit(Scope("counted"))
    assert [(d.kind, d.id) for d in found.differences] == [("changed", COUNTED.id), ("unexplained", "forged")]


async def test_what_is_settled_after_a_snapshot_was_opened_is_not_in_it(system: System) -> None:
    """Else the stream, which is read up to an end that was asked for in between, could not explain it."""
    await publish(system.nats, COUNTED)
    with snapshot(streams.QUOTA, system.urls.quota_url, ("settlements",)) as opened:
        await system.deliver()
        assert list(opened.rows("SELECT event_id FROM settlements")) == []
    with snapshot(streams.QUOTA, system.urls.quota_url, ("settlements",)) as opened:
        assert list(opened.rows("SELECT event_id FROM settlements")) == [(COUNTED.id,)]


async def test_a_time_that_never_comes_is_named_wherever_somebody_wrote_it(system: System) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    await system.ledger_does("UPDATE usage SET created_at = 'infinity', usage_date = 'infinity'")
    await system.quota_does("UPDATE settlements SET started_at = 'infinity'")
    await system.quota_does("UPDATE usage_totals SET period_end = 'infinity' WHERE tokens_used != 0")
    found = await system.audit()
    assert {(d.where, d.kind) for d in found.differences} >= {
        ("ledger.usage", "changed"),
        ("quota.settlements", "changed"),
        ("quota.usage_totals", "unexplained"),
        ("quota.usage_totals", "missing"),
    }


async def test_a_hold_that_cannot_be_is_named(system: System) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    asked = [asking(new_id(), user_id=user_id) for user_id in ("user_1", "user_2", "user_3")]
    await system.quota.write(quota_store.authorize, system.plans, asked)
    assert (await system.audit()).differences == []
    settled = f"UPDATE holds SET generation_id = '{COUNTED.id}' WHERE user_id = 'user_1'"  # noqa: S608
    await system.quota_does(settled)
    await system.quota_does("UPDATE holds SET expires_at = '9999-01-01T00:00:00.000000Z' WHERE user_id = 'user_2'")
    found = await system.audit()
    assert {(d.where, d.kind, d.user_id) for d in found.differences} == {
        ("quota.holds", "held", "user_1"),
        ("quota.holds", "held", "user_2"),
    }
    assert "make replay ends it" in found.words
    assert (await system.audit(Scope(user_id="user_3"))).agrees


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("service", "table"),
    [
        *((streams.LEDGER, name) for name in ("usage", "subscription_changes", "usage_daily", "leaves", "seals")),
        *((streams.QUOTA, name) for name in ("settlements", "plan_changes", "subscriptions", "usage_totals")),
    ],
)
async def test_what_is_no_text_and_no_number_is_named_in_whichever_column_somebody_put_it(
    system: System, service: str, table: str
) -> None:
    """SQLite takes them."""
    await publish(system.nats, *EVENTS)
    await system.deliver()
    await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()
    await system.deliver()
    assert (await system.audit()).differences == []
    does = system.ledger_does if service == streams.LEDGER else system.quota_does
    database = system.ledger if service == streams.LEDGER else system.quota
    columns = await database.read(lambda db: list(db.execute(text(f"SELECT * FROM {table} LIMIT 1")).keys()))  # noqa: S608
    # A total of nothing may be kept of anybody.
    which = " WHERE tokens_used != 0" if table == "usage_totals" else ""
    one = f"(SELECT min(rowid) FROM {table}{which})"  # noqa: S608
    await does(f"CREATE TABLE before AS SELECT * FROM {table}")  # noqa: S608
    for column in columns:
        # A rowid takes numbers alone, and what is late is of its moment, and not of the stream.
        if column in ("stream_sequence", "tree_size", "is_late"):
            continue
        for nonsense in ("x'ff00'", "'?'"):
            await does(f"UPDATE {table} SET {column} = {nonsense} WHERE rowid = {one}")  # noqa: S608
            found = await system.audit()
            assert found.differences, (column, nonsense)
            assert found.document["differences"], (column, nonsense)
            assert "difference" in found.words, (column, nonsense)
            await does(f"DELETE FROM {table}")  # noqa: S608
            await does(f"INSERT INTO {table} SELECT * FROM before")  # noqa: S608
    assert (await system.audit()).differences == []


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_text_that_is_none_is_named_with_its_record(system: System) -> None:
    """SQLite takes any bytes for text, where somebody says so."""
    await publish(system.nats, *EVENTS)
    await system.deliver()
    await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()
    no_text = "CAST(x'ff00' AS TEXT)"
    for does, table, column in (
        (system.ledger_does, "usage", "model"),
        (system.ledger_does, "usage_daily", "model"),
        (system.ledger_does, "subscription_changes", "actor"),
        (system.ledger_does, "leaves", "event_id"),
        (system.ledger_does, "seals", "key_id"),
        (system.quota_does, "settlements", "event_id"),
        (system.quota_does, "plan_changes", "time_zone"),
        (system.quota_does, "subscriptions", "tier"),
        (system.quota_does, "usage_totals", "models"),
    ):
        one = f"(SELECT max(rowid) FROM {table})"  # noqa: S608
        await does(f"UPDATE {table} SET {column} = {no_text} WHERE rowid = {one}")  # noqa: S608

    found = await system.audit()

    assert {where for where, _ in found.kinds} == {
        "ledger.usage",
        "ledger.usage_daily",
        "ledger.subscription_changes",
        "evidence, leaf edited",
        "evidence, seal on the stream that differs from the ledger's",
        "quota.settlements",
        "quota.plan_changes",
        "quota.subscriptions",
        "quota.usage_totals",
    }
    assert ("ledger.usage", "changed") in found.kinds
    assert "model x'ff00'" in found.words


async def test_a_record_is_named_where_it_should_be_and_where_somebody_put_it(system: System) -> None:
    """Another moment, or another user: whoever looks there sees that it is not as the stream has it."""
    moved, given = generation_completed("moved"), generation_completed("given")
    await publish(system.nats, moved, given)
    await system.deliver()
    there = NOON - 90 * DAY
    await system.ledger_does(f"UPDATE usage SET created_at = '{iso(there)}' WHERE id = '{moved.id}'")  # noqa: S608
    await system.ledger_does(f"UPDATE usage SET user_id = 'taker' WHERE id = '{given.id}'")  # noqa: S608
    for scope, changed in (
        (Scope(first=there - DAY, last=there + DAY), moved.id),
        (Scope("moved"), moved.id),
        (Scope("taker"), given.id),
        (Scope("given"), given.id),
    ):
        records = [d for d in (await system.audit(scope)).differences if d.where == "ledger.usage"]
        assert [(d.kind, d.id) for d in records] == [("changed", changed)]
    (taken,) = [d for d in (await system.audit(Scope("taker"))).differences if d.where == "ledger.usage"]
    assert (taken.expected, taken.found) == ({"user_id": "given"}, {"user_id": "taker"})
    assert (await system.audit(Scope(first=there - DAY, last=there - DAY))).differences == []


async def test_a_total_that_is_not_the_sum_of_its_events_is_named_by_user_and_period(system: System) -> None:
    await publish(system.nats, *EVENTS)
    await system.deliver()
    month = "user_id = 'user_2' AND period_start = '2026-10-31T18:15:00.000000Z'"
    await system.quota_does(f"UPDATE usage_totals SET tokens_used = tokens_used + 5 WHERE {month}")  # noqa: S608

    (difference,) = (await system.audit()).differences

    assert difference == Difference(
        "quota.usage_totals",
        "differs",
        None,
        "user_2",
        # The month of one who is in Kathmandu.
        {
            "period_start": "2026-10-31T18:15:00.000000Z",
            "period_end": "2026-11-30T18:15:00.000000Z",
            "tokens_used": 16_195,
        },
        {"tokens_used": 16_200},
    )


# Quota could not add to it.
AS_TEXT = '{"claude-haiku-4-5":["8094","5282","2812","0","0"]}'


@pytest.mark.parametrize(
    ("change", "expected", "told"),
    [
        ("models = '{}'", {"models.claude-haiku-4-5": [8_094, 5_282, 2_812, 0, 0]}, {"models.claude-haiku-4-5": 0}),
        (
            f"models = '{AS_TEXT}'",
            {"models.claude-haiku-4-5": [8_094, 5_282, 2_812, 0, 0]},
            {"models.claude-haiku-4-5": 0, "models.": [AS_TEXT]},
        ),
        ("top_up_tokens = 7", {"top_up_tokens": 0}, {"top_up_tokens": 7}),
        ("lasting_top_up_tokens = 7", {"lasting_top_up_tokens": 0}, {"lasting_top_up_tokens": 7}),
        ("cache_read_input_tokens = 7", {"cache_read_input_tokens": 0}, {"cache_read_input_tokens": 7}),
    ],
)
async def test_every_count_of_a_total_is_compared(
    system: System, change: str, expected: dict[str, Any], told: dict[str, Any]
) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    await system.quota_does(f"UPDATE usage_totals SET {change} WHERE tokens_used != 0")  # noqa: S608
    (difference,) = (await system.audit()).differences
    assert difference.expected is not None
    assert expected.items() <= difference.expected.items()
    assert difference.found == told


@pytest.mark.parametrize("models", ["", '{"m":[]}', '{"m":[0]}', '{"m":["0","0","0","0","0"]}', '{"m":"00000"}'])
async def test_what_quota_cannot_read_of_a_total_is_named_also_where_it_tells_of_no_token(
    system: System, models: str
) -> None:
    await publish(system.nats, usage_adjusted())
    await system.deliver()
    await system.quota_does(f"UPDATE usage_totals SET models = '{models}'")  # noqa: S608
    (difference,) = (await system.audit()).differences
    assert (difference.where, difference.found) == ("quota.usage_totals", {"models.": [models or "nothing"]})


@pytest.mark.parametrize(
    ("statement", "kind", "expected", "told"),
    [
        ("UPDATE usage_daily SET tokens_used = 7", "differs", {"tokens_used": 16_188}, {"tokens_used": 7}),
        ("UPDATE usage_daily SET generations = 3", "differs", {"generations": 2}, {"generations": 3}),
        (
            "UPDATE usage_daily SET cache_creation_input_tokens = 1, cache_read_input_tokens = 2",
            "differs",
            {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
            {"cache_creation_input_tokens": 1, "cache_read_input_tokens": 2},
        ),
        ("DELETE FROM usage_daily", "missing", {"tokens_used": 16_188, "generations": 2}, None),
    ],
)
async def test_a_day_that_is_not_the_sum_of_its_events_is_named_by_user_and_day(
    system: System, statement: str, kind: str, expected: dict[str, Any], told: dict[str, Any] | None
) -> None:
    await publish(system.nats, COUNTED, generation_completed("counted"), *EVENTS)
    await system.deliver()
    await system.ledger_does(f"{statement} WHERE user_id = 'counted'")

    (difference,) = (await system.audit(Scope("counted"))).differences

    assert (difference.where, difference.kind, difference.user_id) == ("ledger.usage_daily", kind, "counted")
    which = {"usage_date": "2026-11-22", "model": "claude-haiku-4-5"}
    assert difference.expected is not None
    assert (which | expected).items() <= difference.expected.items()
    assert difference.found == told
    for scope, differences in (
        (Scope(), [difference]),
        (Scope(first=NOON, last=NOON), [difference]),
        (Scope(last=NOON - DAY), []),
        (Scope(first=NOON + DAY), []),
        (Scope("user_2"), []),
    ):
        assert (await system.audit(scope)).differences == differences


async def test_a_day_that_no_event_explains_is_named(system: System) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    await system.ledger_does("UPDATE usage_daily SET user_id = 'other'")
    missing, unexplained = (await system.audit()).differences
    assert (missing.kind, missing.user_id, missing.found) == ("missing", "counted", None)
    assert (unexplained.kind, unexplained.user_id, unexplained.expected) == ("unexplained", "other", None)
    assert unexplained.found == missing.expected


@pytest.mark.parametrize("day", ["infinity", "-infinity", "20000-01-01"])
async def test_what_stands_for_a_day_and_is_none_is_named(system: System, day: str) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    counts = ", ".join(DAILY)
    await system.ledger_does(f"INSERT INTO usage_daily SELECT user_id, '{day}', model, {counts} FROM usage_daily")  # noqa: S608
    (difference,) = (await system.audit(Scope("counted"))).differences
    assert (difference.where, difference.kind) == ("ledger.usage_daily", "unexplained")
    assert difference.found is not None
    assert difference.found["usage_date"] == day


async def test_a_total_that_is_gone_is_named_by_user_and_period(system: System) -> None:
    await publish(system.nats, COUNTED, generation_completed())
    await system.deliver()
    await system.quota_does("DELETE FROM usage_totals WHERE user_id = 'counted'")
    (difference,) = (await system.audit()).differences
    assert (difference.where, difference.kind, difference.user_id) == ("quota.usage_totals", "missing", "counted")
    november = {"period_start": "2026-11-01T00:00:00.000000Z", "period_end": "2026-12-01T00:00:00.000000Z"}
    assert difference.expected is not None
    assert (november | {"tokens_used": 8_094, "input_tokens": 5_282}).items() <= difference.expected.items()


async def test_a_total_that_is_gone_is_named_also_where_another_one_covers_its_events(system: System) -> None:
    """As of a month that began elsewhere, before its user moved, and of which something is carried."""
    await publish(system.nats, *EVENTS)
    await system.deliver()
    totals = "SELECT period_start, period_end FROM usage_totals WHERE user_id = 'user_2' AND tokens_used != 0"
    periods = await system.quota.read(lambda db: db.execute(text(totals)).all())
    assert len(periods) == 2
    for start, end in periods:
        moments = [each if isinstance(each, str) else iso(each) for each in (start, end)]
        period = f"user_id = 'user_2' AND period_start = '{moments[0]}' AND period_end = '{moments[1]}'"
        await system.quota_does(f"UPDATE usage_totals SET user_id = 'x' WHERE {period}")  # noqa: S608
        expected = {"period_start": moments[0], "period_end": moments[1], "tokens_used": 16_195}
        for scope in (Scope(), Scope("user_2"), Scope(first=NOON, last=NOON)):
            (missing,) = [d for d in (await system.audit(scope)).differences if d.kind == "missing"]
            assert (missing.where, missing.user_id) == ("quota.usage_totals", "user_2")
            assert missing.expected is not None
            assert expected.items() <= missing.expected.items()
        assert (await system.audit(Scope("user_2", last=NOON - 300 * DAY))).differences == []
        back = period.replace("'user_2'", "'x'")
        await system.quota_does(f"UPDATE usage_totals SET user_id = 'user_2' WHERE {back}")  # noqa: S608
    assert (await system.audit()).differences == []


@pytest.mark.parametrize(
    ("statement", "where", "kind"),
    [
        ("UPDATE subscriptions SET tier = 'free'", "quota.subscriptions", "changed"),
        ("UPDATE subscriptions SET subscribed_at = changed_at", "quota.subscriptions", "changed"),
        ("DELETE FROM subscriptions", "quota.subscriptions", "missing"),
        ("UPDATE subscriptions SET user_id = 'user_1'", "quota.subscriptions", "unexplained"),
        ("UPDATE plan_changes SET tier = 'pro' WHERE tier = 'free'", "quota.plan_changes", "changed"),
        ("DELETE FROM plan_changes WHERE tier = 'free'", "quota.plan_changes", "missing"),
    ],
)
async def test_a_plan_that_is_not_what_its_changes_come_to_is_named(
    system: System, statement: str, where: str, kind: str
) -> None:
    await publish(system.nats, *EVENTS)
    await system.deliver()
    await system.quota_does(statement)
    assert (where, kind) in (await system.audit()).kinds


async def test_a_deleted_change_of_plan_is_missing_in_the_ledger(system: System) -> None:
    await publish(system.nats, *EVENTS)
    await system.deliver()
    await system.ledger_does("DELETE FROM subscription_changes WHERE tier = 'free'")
    (difference,) = (await system.audit()).differences
    assert (difference.where, difference.kind) == ("ledger.subscription_changes", "missing")
    assert difference.expected is not None
    assert difference.expected["tier"] == "free"


async def test_what_cannot_be_read_is_no_difference_while_it_is_in_both_quarantines(system: System) -> None:
    await publish(system.nats, COUNTED)
    await publish_raw(system.nats, b"no event \xff\nof ours")
    await system.deliver()

    found = await system.audit()
    assert (found.differences, found.report.read.unreadable) == ([], 1)

    await system.quota_does("DELETE FROM quarantine")
    (difference,) = (await system.audit()).differences
    assert (difference.where, difference.kind) == ("quota.quarantine", "unreadable")
    assert difference.expected is not None
    assert difference.expected["sequence"] == 2


async def test_a_body_in_quarantine_that_is_not_the_streams_is_named(system: System) -> None:
    await publish_raw(system.nats, b"no event")
    await system.deliver()
    await system.ledger.write(lambda db: db.execute(update(table_of(Quarantined)).values(body=encode(COUNTED))))
    await system.quota.write(quarantine, [Poison("usage.adjusted", encode(COUNTED), "of nobody")])
    found = await system.audit()
    assert found.kinds == [("ledger.quarantine", "forged"), ("quota.quarantine", "forged")]
    assert "it is never counted" in found.words


async def test_an_event_that_is_in_quarantine_and_can_be_read_is_told_and_in_no_sum(system: System) -> None:
    await publish(system.nats, COUNTED)
    await system.deliver()
    for database in (system.ledger, system.quota):
        poison = [Poison(COUNTED.type, encode(COUNTED), "a mistake of last week")]
        await database.write(quarantine, poison)
    await system.ledger_does("DELETE FROM usage")
    await system.ledger_does("DELETE FROM usage_daily")
    await system.quota_does("DELETE FROM settlements")
    await system.quota_does("DELETE FROM usage_totals")
    found = await system.audit()
    assert found.kinds == [("ledger.usage", "quarantined"), ("quota.settlements", "quarantined")]
    assert "--redrive" in found.words


async def test_an_event_that_came_twice_counts_once_and_is_no_difference(system: System) -> None:
    body = encode(COUNTED)
    for _ in range(2):
        await publish_raw(system.nats, body)
    await system.deliver()
    await publish_raw(system.nats, body)
    await system.deliver()
    found = await system.audit()
    assert (found.differences, found.report.read.repeated) == ([], 2)
    assert found.report.compared["ledger.usage"] == 1


@pytest.mark.parametrize("same_batch", [True, False])
async def test_another_content_under_the_same_id_is_named_and_the_first_counts(
    system: System, same_batch: bool
) -> None:
    second = COUNTED.model_copy(update={"data": COUNTED.data.model_copy(update={"action_type": "other"})})
    await publish_raw(system.nats, encode(COUNTED))
    if not same_batch:
        await publish(system.nats, *(generation_completed(f"user_{n}", input_tokens=n) for n in range(1000)))
    await publish_raw(system.nats, encode(second))
    await system.deliver()
    found = await system.audit()
    assert found.differences == [
        Difference(
            "stream USAGE",
            "contradicting",
            COUNTED.id,
            "counted",
            {"action_type": "chat_generation"},
            {"sequence": 2 if same_batch else 1002, "action_type": "other"},
        )
    ]
    assert found.report.read.repeated == 0


async def test_what_is_on_its_way_is_no_difference_whatever_of_it_is_there_already(system: System) -> None:
    await publish(system.nats, *EVENTS)
    await system.deliver()
    await publish(system.nats, generation_completed(), subscription_changed("user_2", changed_at=NOON + 5 * DAY))
    assert (await system.audit()).differences == []  # neither has them

    await system.deliver(streams.QUOTA, acknowledging=False)
    found = await system.audit()  # quota has them, and has not said so
    assert found.differences == []
    assert found.report.read.waiting == {"ledger": 2, "quota": 2}
    assert "On their way to ledger, and not compared where they are not there yet: 2" in found.words

    await system.quota_does(f"UPDATE settlements SET tokens_used = 1 WHERE event_id = '{EVENTS[0].id}'")  # noqa: S608
    assert (await system.audit()).kinds == [("quota.settlements", "changed")]


async def test_a_stream_that_lost_its_end_does_not_explain_what_was_in_it(system: System) -> None:
    await publish(system.nats, *(generation_completed(f"user_{n}") for n in range(5)))
    await system.deliver()
    lost = [generation_completed("lost") for _ in range(3)]
    await system.ledger.write(ledger_store.record, lost)
    await system.quota.write(quota_store.settle, Plans.load(), lost)
    found = await system.audit()
    assert {(d.where, d.id) for d in found.differences if d.kind == "unexplained"} == {
        ("ledger.usage_daily", None),
        *((table, event.id) for table in ("ledger.usage", "quota.settlements") for event in lost),
    }
    assert [d.user_id for d in found.differences if d.kind == "differs"] == ["lost"]


@pytest.mark.parametrize(
    ("scope", "records", "changed", "differs"),
    [
        (Scope(), 4, {"user_1", "user_2"}, {"user_1", "user_2"}),
        (Scope("user_1"), 2, {"user_1"}, {"user_1"}),
        (Scope("user_3"), 1, set(), set()),
        (Scope(first=NOON - DAY), 3, {"user_1"}, {"user_1"}),
        (Scope(last=NOON - 40 * DAY), 1, {"user_2"}, {"user_2"}),
        (Scope(first=NOON, last=NOON), 2, {"user_1"}, {"user_1"}),
        # Its month has something of these days, and the record is of another.
        (Scope(first=NOON - 2 * DAY, last=NOON - DAY), 0, set(), {"user_1"}),
        (Scope("nobody"), 0, set(), set()),
    ],
)
async def test_an_audit_can_be_of_one_user_and_of_some_days(
    system: System, scope: Scope, records: int, changed: set[str], differs: set[str]
) -> None:
    await publish(
        system.nats,
        generation_completed("user_1"),
        generation_completed("user_1", started_at=NOON + 30 * DAY),
        generation_completed("user_2", started_at=NOON - 60 * DAY),
        generation_completed("user_3"),
    )
    await system.deliver()
    where = f"created_at <= '{(NOON + DAY).isoformat()}' AND user_id != 'user_3'"
    await system.ledger_does(f"UPDATE usage SET outcome = 'interrupted' WHERE {where}")  # noqa: S608
    where = f"period_start <= '{(NOON + DAY).isoformat()}' AND user_id != 'user_3' AND tokens_used != 0"
    await system.quota_does(f"UPDATE usage_totals SET tokens_used = 5 WHERE {where}")  # noqa: S608

    found = await system.audit(scope)

    assert found.report.compared["ledger.usage"] == records
    assert {d.user_id for d in found.differences if d.kind == "changed"} == changed
    assert {d.user_id for d in found.differences if d.kind == "differs"} == differs
    assert set(found.kinds) <= {("ledger.usage", "changed"), ("quota.usage_totals", "differs")}


async def test_more_differences_than_fit_on_a_screen_are_counted_and_all_in_the_document(system: System) -> None:
    await publish(system.nats, *(generation_completed(f"user_{n}") for n in range(30)))
    await system.deliver()
    await system.ledger_does("DELETE FROM usage")
    found = await system.audit()
    assert "ledger.usage: 30 on the stream, and not here" in found.words
    assert "and 10 more" in found.words
    assert "30 differences." in found.words
    assert len(found.document["differences"]) == 30
    assert found.document["groups"][0]["number"] == 30


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_without_a_database_the_audit_says_so(system: System, tmp_path: Path) -> None:
    system.urls = Databases(system.urls.ledger_url, sqlite_url(tmp_path, "none.db"))
    with pytest.raises(Misconfigured, match=r"quota has no database at .*none\.db"):
        await system.audit()
    assert not (tmp_path / "none.db").exists()


async def test_without_its_tables_the_audit_says_so(system: System) -> None:
    system.urls = Databases(system.urls.ledger_url, system.urls.ledger_url)
    with pytest.raises(Misconfigured, match=r"quota's database .* cannot be read: .*settlements"):
        await system.audit()


async def test_of_several_databases_the_one_that_cannot_be_read_is_named(system: System) -> None:
    with (
        pytest.raises(Misconfigured, match=r"ledger's database .* cannot be read: .*nothing"),
        snapshot(streams.LEDGER, system.urls.ledger_url, ("usage",)) as ledger,
        snapshot(streams.QUOTA, system.urls.quota_url, ("holds",)),
    ):
        list(ledger.rows("SELECT nothing FROM usage"))


def test_an_audit_without_room_for_what_it_keeps_says_where() -> None:
    difference = Difference("ledger.usage", "missing", "x" * 1_000_000, None, None, None)
    with pytest.raises(Misconfigured, match=r"cannot be kept in .*is full.*TMPDIR"), _full_scratch() as kept:
        kept.add(difference)


@contextmanager
def _full_scratch() -> Iterator[Scratch]:
    with scratch() as kept:
        kept._connection.execute("PRAGMA max_page_count = 50").fetchone()
        yield kept


async def test_a_file_outside_that_was_cut_is_named_and_how_far_the_evidence_goes_is_told(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, seals_file = Ed25519PrivateKey.generate(), tmp_path / "seals.txt"
    name = key_id(key.public_key().public_bytes_raw())
    keys = Keys(key, {name: key.public_key()})
    sealer = Sealer(system.nats, system.ledger, keys=keys, seals_file=seals_file, every_s=1e-9)
    for _ in range(3):
        await publish(system.nats, generation_completed())
        await system.deliver()
        await sealer.seal()
    whole = seals_file.read_text()

    async def audited(evidence: Evidence) -> Found:
        with scratch() as kept:
            return system._read(await audit(system.nats, system.urls, system.plans, Scope(), kept, evidence=evidence))

    found = await audited(Evidence(keys, seals_file))
    assert found.differences == []
    assert f"Of 3 seals, 3 are rightly signed, by the keys believed: {name}" in found.words
    assert "In the file outside: 3 heads, up to message 5\n" in found.words
    assert found.document["evidence"] == {
        "seals": 3,
        "signed": 3,
        "keys": [name],
        "outside": 3,
        "sealed_up_to": 5,
        "outside_up_to": 5,
        "is_outside_torn": False,
        "archives": 0,
        "archives_signed": 0,
        "unguarded": [],
    }
    found = await audited(Evidence())
    assert "No signature of 3 seals was checked: CHATRAIL_SEAL_KEY_FILE names no key" in found.words
    assert "No file outside was compared: CHATRAIL_SEALS_FILE names none" in found.words

    notes = [f"chatrail/usage\n{note}" for note in whole.split("chatrail/usage\n")[1:]]
    for cut, lacking in (("", 3), ("".join(notes[1:]), 1), (notes[0], 1)):
        seals_file.write_text(cut)
        found = await audited(Evidence(keys, seals_file))
        assert found.kinds == [("evidence, seal that the file outside lacks", "outside")] * lacking
        assert f"{lacking} made, and not written down there" in found.words
        assert "a ledger that runs writes it down" not in found.words

    another = Head(size=3, root=bytes(32))
    seals_file.write_text(whole.replace(notes[1], checkpoint(another, None)))
    found = await audited(Evidence(keys, seals_file))
    assert ("evidence, seal of the file outside that does not fit", "elsewhere") in found.kinds
    assert "or it is another stack's" in found.words

    # A process that dies leaves its newest head unwritten, or only begun.
    monkeypatch.setattr(auditing, "WRITTEN_WITHIN_S", 0.0)
    for begun in ("", notes[2][:40]):
        seals_file.write_text("".join([*notes[:2], begun]))
        found = await audited(Evidence(keys, seals_file))
        assert found.differences == []
        assert "2 heads, up to message 3; what is sealed behind it, up to 5, is not there yet" in found.words
        assert ("Its last line is torn" in found.words) == bool(begun)

    seals_file.unlink()
    await sealer.seal()
    assert seals_file.read_text() == whole
    assert (await audited(Evidence(keys, seals_file))).agrees


async def test_a_seal_with_which_nothing_can_be_sealed_is_named_and_is_made_anew_once_it_is_deleted(
    system: System,
) -> None:
    sealer = Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9)
    await publish(system.nats, *(generation_completed() for _ in range(3)))
    await system.deliver()
    await sealer.seal()
    await publish(system.nats, generation_completed())
    await system.deliver()
    await system.ledger_does("UPDATE seals SET subtrees = root_hash")
    with pytest.raises(Damaged, match="contradicts itself"):
        await sealer.seal()

    found = await system.audit()

    assert found.kinds == [("evidence, seal whose subtrees are not those of its tree", "subtrees")]
    assert "nothing is sealed on top of it" in found.words
    await system.ledger_does("DELETE FROM seals")
    await sealer.seal()
    assert (await system.audit()).agrees
    assert (await system.audit()).report.compared["ledger.seals"] == 2
