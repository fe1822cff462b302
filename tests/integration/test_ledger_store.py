"""The ledger's store on SQLite and on PostgreSQL: the same behaviour, the same words."""

import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select, text, update
from sqlalchemy.exc import DatabaseError

from services.ledger import store
from shared.calls import Day, HistoryQuery, LogsQuery, Record
from shared.database import Database, table_of
from shared.errors import BadCall
from shared.events import Event, SubscriptionChanged, encode, new_id
from shared.plans import Plans
from shared.quarantine import ANOTHER_BODY, Poison, Quarantined, redrive
from tests.builders import (
    NOON,
    USER_IDS,
    authorized,
    generation_completed,
    subscription_changed,
    usage_adjusted,
    usage_reported,
)

DAY = timedelta(days=1)
TODAY = NOON.date()


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    database = Database(ledger_url)
    yield database
    await database.close()


async def record(database: Database, *events: Event) -> list[str]:
    return [event.id for event in (await database.write(store.record, events)).new]


async def history(
    database: Database, user_id: str = "user_1", *, from_date: date = date.min, to_date: date = date.max
) -> list[Day]:
    query = HistoryQuery(user_id=user_id, from_date=from_date, to_date=to_date)
    return (await database.read(store.history, Plans.load(), query)).days


async def all_records(database: Database, user_id: str = "user_1", *, limit: int = 1000) -> list[Record]:
    records: list[Record] = []
    cursor: str | None = None
    while True:
        page = await database.read(store.logs, LogsQuery(user_id=user_id, cursor=cursor, limit=limit))
        assert len(page.records) <= limit
        records += page.records
        if page.next_cursor is None:
            return records
        cursor = page.next_cursor


def do(statement: str) -> Callable[[Connection], None]:
    def work(db: Connection) -> None:
        db.execute(text(statement))

    return work


async def test_a_generation_is_kept_as_it_was_reported(database: Database) -> None:
    event = generation_completed(
        input_tokens=100,
        output_tokens=20,
        cache_creation_input_tokens=3,
        cache_read_input_tokens=4,
        outcome="disconnected",
        on_disconnect="drain",
        provider_request_id="req_1",
        authorized=authorized(resets_at=None),
        metadata={"conversation": "überall 🛤", "tags": ["a", None, 1.5]},
        started_at=datetime(2026, 11, 30, 23, 59, 59, 999_999, tzinfo=UTC),
        completed_at=datetime(2026, 12, 1, 0, 0, 7, tzinfo=UTC),
    )

    await record(database, event)

    kept = (await database.read(lambda db: db.execute(select(store.usage)).mappings().all()))[0]
    assert dict(kept) == {
        "id": event.id,
        "event_type": "generation.completed",
        "usage_date": date(2026, 11, 30),
        "created_at": event.data.started_at,
        **event.data.model_dump(exclude={"started_at", "authorized"}),
        "authorized": {
            "input_tokens_max": 4_000,
            "output_tokens_asked": 4_096,
            "output_tokens_granted": 4_096,
            "hold_tokens": 8_096,
            "tier": "free",
            "period": "month",
            "period_start": "2026-11-01T00:00:00.000000Z",
            "resets_at": None,
            "expires_at": "2026-11-22T12:15:00.000000Z",
        },
    }


async def test_a_record_of_which_nobody_knows_what_was_granted_says_nothing(database: Database) -> None:
    await record(database, usage_reported())
    is_null = select(store.usage.c.authorized.is_(None))
    assert await database.read(lambda db: db.execute(is_null).scalars().all()) == [True]


async def test_an_event_is_recorded_once_however_often_it_is_delivered(database: Database) -> None:
    events: list[Event] = [generation_completed(), usage_adjusted(), subscription_changed()]

    first = await record(database, *events)
    again = await record(database, *events, *events)

    assert sorted(first) == sorted(event.id for event in events)
    assert again == []
    assert len(await all_records(database)) == 2


async def test_an_event_twice_in_one_batch_is_recorded_once(database: Database) -> None:
    event = generation_completed()
    assert await record(database, event, event) == [event.id]
    assert [day.tokens_used for day in await history(database)] == [8_094]


def altered(event: Event, **data: object) -> Event:
    """The same id, another body."""
    return event.model_copy(update={"data": event.data.model_copy(update=data)})


SECOND_BODIES = [
    {"tokens_used": 8_095, "output_tokens": 2_813},
    {"model": "claude-opus-4-1"},
    {"outcome": "interrupted"},
    {"started_at": NOON + DAY},
    {"completed_at": NOON + DAY},
    {"metadata": {"conversation": "another"}},
    {"provider_request_id": "req_2"},
    {"authorized": authorized(hold_tokens=8_095)},
    {"authorized": None},
]


@pytest.mark.parametrize("data", SECOND_BODIES)
async def test_of_two_bodies_under_one_id_the_first_is_kept_and_the_second_is_told(
    database: Database, data: dict[str, object]
) -> None:
    first = generation_completed(metadata={"a": [1.5, None, "ü"]}, authorized=authorized())
    second = altered(first, **data)
    together, later = generation_completed(authorized=authorized()), generation_completed()

    recorded = await database.write(store.record, [first, together, altered(together, **data), together])
    assert (recorded.new, recorded.contradicting) == ([first, together], [altered(together, **data)])
    recorded = await database.write(store.record, [second, later, first])
    assert (recorded.new, recorded.contradicting) == ([later], [second])

    kept = {record.id: record for record in await all_records(database)}
    assert kept.keys() == {first.id, together.id, later.id}
    assert (kept[first.id].tokens_used, kept[first.id].metadata) == (8_094, first.data.metadata)


async def test_of_two_changes_under_one_id_the_first_is_kept_and_the_second_is_told(database: Database) -> None:
    first = subscription_changed(tier="pro")
    second = altered(first, tier="enterprise")
    assert (await database.write(store.record, [first, first])).contradicting == []
    assert (await database.write(store.record, [second])).contradicting == [second]
    tiers = await database.read(lambda db: db.execute(select(store.subscription_changes.c.tier)).scalars().all())
    assert tiers == ["pro"]


async def test_what_contradicts_stays_in_quarantine_however_often_it_is_handed_over_again(database: Database) -> None:
    first = generation_completed()
    second = Poison("generation.completed", encode(altered(first, model="claude-opus-4-1")), "older words")
    await database.write(store.record, [first], [second])

    def apply(db: Connection, event: Event) -> list[Event]:
        return store.record(db, [event]).contradicting

    assert await database.write(redrive, apply, {sha256_of(second.body)}) == (0, 0)
    (left,) = await database.read(lambda db: db.execute(select(table_of(Quarantined))).all())
    assert (bytes(left.body), left.reason) == (second.body, ANOTHER_BODY)


@given(subject=st.text(), body=st.binary(), reason=st.text())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_subject_bytes_and_reason_can_be_put_into_quarantine(
    database: Database, subject: str, body: bytes, reason: str
) -> None:
    await database.write(store.record, [], [Poison(subject, body, reason)])
    bodies = select(table_of(Quarantined).c.body)
    assert body in await database.read(lambda db: list(map(bytes, db.execute(bodies).scalars())))


async def test_a_batch_is_recorded_whole_or_not_at_all(database: Database) -> None:
    unstorable = generation_completed().model_copy(update={"type": None})

    with pytest.raises(DatabaseError):
        await record(database, generation_completed(), unstorable)

    assert await all_records(database) == []


async def test_poison_is_kept_once_with_the_batch_it_came_in(database: Database) -> None:
    poison = Poison("generation.completed", b"\x00 not JSON \xff", "body: Invalid JSON")

    for _ in range(2):
        await database.write(store.record, [generation_completed()], [poison])

    kept = await database.read(lambda db: db.execute(select(table_of(Quarantined))).mappings().all())
    assert [(row["subject"], row["body"], row["reason"]) for row in kept] == [
        ("generation.completed", b"\x00 not JSON \xff", "body: Invalid JSON")
    ]
    assert len(await all_records(database)) == 2


@pytest.mark.parametrize("table", ["usage", "subscription_changes"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET user_id = 'other'", "DELETE FROM {}"])
async def test_the_database_itself_refuses_to_change_or_delete_what_is_recorded(
    database: Database, table: str, statement: str
) -> None:
    await record(database, generation_completed(), subscription_changed())

    with pytest.raises(DatabaseError, match=f"{table} is append-only: {statement[:6].lower()} is refused"):
        await database.write(do(statement.format(table)))

    assert len(await all_records(database)) == 1
    assert [day.cost_usd for day in await history(database)] == ["0.08"]


@pytest.mark.parametrize("table", ["usage", "subscription_changes"])
@pytest.mark.parametrize("backend", ["postgresql"])
async def test_postgresql_refuses_to_truncate_what_is_recorded(database: Database, table: str) -> None:
    with pytest.raises(DatabaseError, match=f"{table} is append-only: truncate is refused"):
        await database.write(do(f"TRUNCATE {table}"))


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_replacing_a_record_on_sqlite_keeps_the_record(database: Database) -> None:
    await record(database, generation_completed(), subscription_changed())

    columns = ", ".join(column.name for column in store.usage.c if column.name != "tokens_used")
    await database.write(
        do(f"INSERT OR REPLACE INTO usage (tokens_used, {columns}) SELECT 1, {columns} FROM usage")  # noqa: S608
    )
    await database.write(
        do(
            "INSERT OR REPLACE INTO subscription_changes SELECT event_id, user_id, 'free', changed_at, actor"
            " FROM subscription_changes"
        )
    )

    assert [(day.tokens_used, day.cost_usd) for day in await history(database)] == [(8_094, "0.08")]


async def test_the_history_has_a_row_for_each_day_with_usage_newest_first(database: Database) -> None:
    await record(
        database,
        generation_completed(started_at=NOON - 3 * DAY),
        generation_completed(),
        generation_completed(
            input_tokens=100, output_tokens=20, cache_creation_input_tokens=3, cache_read_input_tokens=4
        ),
    )

    assert await history(database) == [
        Day(date=TODAY, tokens_used=8_221, input_tokens=5_389, output_tokens=2_832, generations=2, cost_usd="0.00"),
        Day(
            date=TODAY - 3 * DAY,
            tokens_used=8_094,
            input_tokens=5_282,
            output_tokens=2_812,
            generations=1,
            cost_usd="0.00",
        ),
    ]


async def test_the_history_includes_both_its_first_and_its_last_day(database: Database) -> None:
    await record(database, *(generation_completed(started_at=NOON + n * DAY) for n in range(-2, 3)))
    days = await history(database, from_date=TODAY - DAY, to_date=TODAY + DAY)
    assert [day.date for day in days] == [TODAY + DAY, TODAY, TODAY - DAY]


async def test_a_day_ends_at_midnight_in_utc_wherever_the_event_was_written(database: Database) -> None:
    late_in_new_york = datetime.fromisoformat("2026-11-21T23:30:00-05:00")
    await record(database, generation_completed(started_at=late_in_new_york))
    assert [day.date for day in await history(database)] == [date(2026, 11, 22)]


async def test_tokens_that_a_report_does_not_split_count_in_the_total_alone(database: Database) -> None:
    await record(database, usage_reported(tokens_used=500), generation_completed(input_tokens=2, output_tokens=1))
    (day,) = await history(database)
    assert (day.tokens_used, day.input_tokens, day.output_tokens, day.generations) == (503, 2, 1, 2)


async def test_usage_costs_what_the_plan_of_its_moment_costs(database: Database) -> None:
    hour = timedelta(hours=1)
    await record(
        database,
        generation_completed(started_at=NOON - hour),
        generation_completed(started_at=NOON),
        generation_completed(started_at=NOON + hour),
        generation_completed(started_at=NOON + 3 * hour),
        generation_completed(started_at=NOON + DAY),
        # Arrived last, and out of order.
        subscription_changed(tier="enterprise", changed_at=NOON + 2 * hour),
        subscription_changed(tier="pro", changed_at=NOON),
        subscription_changed(tier="pro", changed_at=NOON + DAY),
    )
    days = await history(database)
    assert [(day.tokens_used, day.cost_usd) for day in days] == [(8_094, "0.08"), (4 * 8_094, "0.16")]


async def test_another_users_plan_is_not_mine(database: Database) -> None:
    await record(database, generation_completed("me"), subscription_changed("somebody else", changed_at=NOON - DAY))
    assert [day.cost_usd for day in await history(database, "me")] == ["0.00"]


async def test_an_adjustment_is_signed_and_is_not_a_generation(database: Database) -> None:
    adjustment = usage_adjusted(tokens_used=-94, reason="counted twice", actor="finance")
    await record(database, generation_completed(), adjustment)

    (day,) = await history(database)
    (kept,) = [r for r in await all_records(database) if r.id == adjustment.id]

    assert (day.tokens_used, day.generations) == (8_000, 1)
    assert (kept.action_type, kept.tokens_used) == ("adjustment", -94)
    assert kept.metadata == {"reason": "counted twice", "actor": "finance"}
    assert (kept.model, kept.input_tokens, kept.outcome, kept.usage_source) == (None, None, None, None)


async def test_a_top_up_is_in_the_logs_and_used_nothing(database: Database) -> None:
    correction = usage_adjusted(tokens_used=0, reason="invoice 7", actor="billing")
    data = correction.data.model_copy(update={"top_up_tokens": 50_000, "outlives_period": True})
    await record(database, correction.model_copy(update={"data": data}))

    (kept,) = await all_records(database)
    assert (kept.action_type, kept.tokens_used) == ("top_up", 0)
    assert kept.metadata == {"reason": "invoice 7", "actor": "billing", "topUpTokens": 50_000, "outlivesPeriod": True}
    assert await history(database) == []


@pytest.mark.parametrize(("tier", "cost_usd"), [("free", "0.00"), ("pro", "-1.00")])
async def test_a_day_of_corrections_alone_costs_less_than_nothing_and_never_minus_zero(
    database: Database, tier: str, cost_usd: str
) -> None:
    await record(database, subscription_changed(tier=tier), usage_adjusted(tokens_used=-100_000))
    (day,) = await history(database)
    assert (day.tokens_used, day.generations, day.cost_usd) == (-100_000, 0, cost_usd)


async def test_a_generation_that_claude_was_never_asked_for_is_in_the_logs_and_not_in_the_history(
    database: Database,
) -> None:
    refused = usage_reported(tokens_used=0)
    await record(database, refused)
    assert await history(database) == []
    await record(database, usage_reported(tokens_used=5))
    (day,) = await history(database)
    assert (day.tokens_used, day.generations) == (5, 1)
    assert refused.id in [record.id for record in await all_records(database)]


async def test_a_user_never_seen_has_an_empty_history_and_empty_logs(database: Database) -> None:
    assert await history(database, "nobody") == []
    assert await all_records(database, "nobody") == []


@pytest.mark.parametrize("limit", [1, 3, 4, 12, 1000])
async def test_page_after_page_gives_every_record_exactly_once_newest_first(database: Database, limit: int) -> None:
    # Several at the same moment: their ids decide.
    events = [generation_completed(started_at=NOON + timedelta(seconds=n // 4)) for n in range(12)]
    await record(database, *events)

    records = await all_records(database, limit=limit)

    newest_first = sorted(events, key=lambda event: (event.data.started_at, event.id), reverse=True)
    assert [r.id for r in records] == [event.id for event in newest_first]
    assert records[0].time == newest_first[0].data.started_at


async def test_the_last_page_has_no_cursor_also_when_it_is_full(database: Database) -> None:
    await record(database, generation_completed(), generation_completed())
    page = await database.read(store.logs, LogsQuery(user_id="user_1", limit=2))
    assert (len(page.records), page.next_cursor) == (2, None)


async def test_a_record_that_arrives_while_somebody_pages_moves_none_of_the_others(database: Database) -> None:
    old = [generation_completed(started_at=NOON + timedelta(seconds=n)) for n in range(4)]
    await record(database, *old)
    first = await database.read(store.logs, LogsQuery(user_id="user_1", limit=2))
    await record(database, generation_completed(started_at=NOON + DAY))

    second = await database.read(store.logs, LogsQuery(user_id="user_1", limit=2, cursor=first.next_cursor))

    assert [r.id for r in first.records + second.records] == [event.id for event in reversed(old)]


async def test_a_page_of_large_records_ends_early_and_goes_on_at_its_cursor(database: Database) -> None:
    events = [generation_completed(metadata={"note": "x" * 4_000}) for _ in range(300)]
    await record(database, *events)

    page = await database.read(store.logs, LogsQuery(user_id="user_1", limit=1000))

    assert len(page.model_dump_json()) < 1024**2  # what one message may carry
    assert page.next_cursor is not None
    assert {r.id for r in await all_records(database)} == {event.id for event in events}


async def test_the_longest_id_there_can_be_fits_into_a_cursor(database: Database) -> None:
    events = [generation_completed().model_copy(update={"id": f"{n}{'🛤' * 127}"}) for n in range(3)]
    await record(database, *events)
    assert len(await all_records(database, limit=1)) == 3


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "?", "ü", "AAAA", "bm90IEpTT04="),
        *(
            base64.urlsafe_b64encode(position).decode()
            for position in (
                b'["2026-11-22T12:00:00", "naive"]',
                b'["0001-01-01T00:00:00+23:59", "before the calendar"]',
                rb'["2026-11-22T12:00:00Z", "no \u0000 text"]',
            )
        ),
    ],
)
async def test_a_cursor_that_is_not_ours_is_refused_in_words(database: Database, cursor: str) -> None:
    with pytest.raises(BadCall, match="cursor is not one of ours"):
        await database.read(store.logs, LogsQuery(user_id="user_1", cursor=cursor))


LOOKALIKES = [
    "a",
    "A",
    "a ",
    " a",
    "a.b",
    "a.*",
    "a.>",
    "*",
    ">",
    "%",
    "_",
    "a/b",
    "../a",
    "'",
    '"',
    "ä",
    "a\u0308",
    "🛤",
]


async def test_users_are_kept_apart_whatever_their_names_look_like(database: Database) -> None:
    await record(database, *(usage_reported(user_id, tokens_used=n) for n, user_id in enumerate(LOOKALIKES, start=1)))
    for n, user_id in enumerate(LOOKALIKES, start=1):
        assert [day.tokens_used for day in await history(database, user_id)] == [n]
        assert [r.tokens_used for r in await all_records(database, user_id)] == [n]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Event], list[list[Event]]]:
    """Events of two users, and batches in which each of them comes at least once, in any order."""
    users = [f"{draw(USER_IDS)[:90]}{new_id()}" for _ in range(2)]  # nobody that an earlier example has used
    moments = st.datetimes(datetime(2026, 2, 27), datetime(2026, 3, 2)).map(lambda moment: moment.replace(tzinfo=UTC))  # noqa: DTZ001
    event = st.one_of(
        st.builds(generation_completed, st.sampled_from(users), input_tokens=st.integers(0, 9), started_at=moments),
        st.builds(usage_reported, st.sampled_from(users), tokens_used=st.integers(0, 9), started_at=moments),
        st.builds(usage_adjusted, st.sampled_from(users), st.integers(-9, 9), effective_at=moments),
        st.builds(subscription_changed, st.sampled_from(users), st.sampled_from(["free", "pro"]), changed_at=moments),
    )
    events = draw(st.lists(event, max_size=8))
    again = draw(st.lists(st.sampled_from(events), max_size=8)) if events else []
    order = draw(st.permutations(events + again))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    batches = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    return events, batches


@given(delivered=deliveries())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_order_batching_and_repetition_leaves_the_same_ledger(
    database: Database, delivered: tuple[list[Event], list[list[Event]]]
) -> None:
    events, batches = delivered

    recorded = [event_id for batch in batches for event_id in await record(database, *batch)]

    assert sorted(recorded) == sorted(event.id for event in events)
    for user_id in {event.subject for event in events}:
        used = [e for e in events if not isinstance(e, SubscriptionChanged) and e.subject == user_id]
        records = await all_records(database, user_id, limit=3)
        assert sorted((r.id, r.tokens_used) for r in records) == sorted((e.id, e.data.tokens_used) for e in used)
        assert sum(day.tokens_used for day in await history(database, user_id)) == sum(
            e.data.tokens_used for e in used
        )


async def test_what_can_be_read_after_a_fix_is_recorded_and_leaves_the_quarantine(database: Database) -> None:
    fixed, broken = generation_completed(), b"\xff no event"
    poison = [Poison("generation.completed", body, "a mistake of last week") for body in (encode(fixed), broken)]
    await database.write(store.record, [], poison)

    def apply(db: Connection, event: Event) -> list[Event]:
        return store.record(db, [event]).contradicting

    assert await database.write(redrive, apply, {sha256_of(each.body) for each in poison}) == (1, 0)
    assert [record.id for record in await all_records(database)] == [fixed.id]
    left = await database.read(lambda db: db.execute(select(table_of(Quarantined))).all())
    assert [bytes(row.body) for row in left] == [broken]
    assert left[0].reason != "a mistake of last week"
    assert await database.write(redrive, apply, {sha256_of(broken)}) == (0, 0)


async def test_what_is_not_on_the_stream_is_never_counted_and_stays_in_quarantine(database: Database) -> None:
    sent, forged = b"\xff no event", encode(usage_adjusted(tokens_used=-5_000))
    poison = [Poison("usage.adjusted", body, "no event") for body in (sent, encode(generation_completed()))]
    await database.write(store.record, [], poison)
    table = table_of(Quarantined)
    change = update(table).where(table.c.body_sha256 == sha256_of(sent)).values(body=forged)
    await database.write(lambda db: db.execute(change))

    def apply(db: Connection, event: Event) -> list[Event]:
        return store.record(db, [event]).contradicting

    assert await database.write(redrive, apply, {sha256_of(sent)}) == (0, 2)
    assert await all_records(database) == []


def sha256_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
