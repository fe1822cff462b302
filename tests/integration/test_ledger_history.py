"""History reads the sums of days, and says what the records themselves would say, to the character."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import groupby
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Row, Select, func, select

from services.ledger import store
from services.ledger.__main__ import MIGRATIONS
from shared.calls import Day, History, HistoryQuery
from shared.database import Database, insert_new, patient_engine
from shared.events import Event, GenerationCompleted, UsageAdjusted, new_id
from shared.plans import COUNTS, Counts, Plans, weighted_tokens
from tests.builders import (
    NOON,
    generation_completed,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
TIERS = ["free", "pro", "weighted", "gone"]
FIRST = datetime(2026, 2, 27, tzinfo=UTC)
EVER = (date.min, date.max)
MODELS = [None, "claude-haiku-4-5", "claude-opus-4-8"]
PLANS = """
default = "free"
[plans.free]
limit_tokens = 108_000
period = "month"
[plans.pro]
limit_tokens = 500_000
period = "month"
price_per_1k_usd = "7.77"
[plans.weighted]
limit_tokens = 500_000
period = "month"
price_per_1k_usd = "3.33"
weights = { output = "4.5", cache_read = "0.1", models = { "claude-opus" = "5.1" } }
"""


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    path = tmp_path_factory.mktemp("plans") / "plans.toml"
    path.write_text(PLANS)
    return Plans.load(path)


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    database = Database(ledger_url)
    yield database
    await database.close()


def from_records(db: Connection, plans: Plans, query: HistoryQuery) -> History:
    """The model: every record is looked at, with the plan that the user had at its moment."""
    usage, changes = store.usage, store.subscription_changes
    tier = (
        select(changes.c.tier)
        .where(changes.c.user_id == usage.c.user_id, changes.c.changed_at <= usage.c.created_at)
        .order_by(changes.c.changed_at.desc(), changes.c.event_id.desc())
        .limit(1)
        .scalar_subquery()
    )
    used: Select[Any] = select(usage, tier.label("tier")).where(
        usage.c.user_id == query.user_id,
        usage.c.usage_date.between(query.from_date, query.to_date),
        usage.c.tokens_used != 0,
    )
    rows = db.execute(used.order_by(usage.c.usage_date.desc())).all()
    return History(days=[day_of(plans, day, list(of_day)) for day, of_day in groupby(rows, lambda r: r.usage_date)])


def day_of(plans: Plans, day: date, records: Sequence[Row[Any]]) -> Day:
    tiers = {record.tier for record in records}
    costs = [
        plan.cost_usd(weighted_tokens(plan.weights, [(r.model, counts_of(r)) for r in records if r.tier == tier]))
        for tier in tiers
        for plan in [plans.of(tier)]
    ]
    used = sum((counts_of(record) for record in records), start=Counts())
    return Day(
        date=day,
        tokens_used=used.tokens_used,
        input_tokens=used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens,
        output_tokens=used.output_tokens,
        generations=sum(record.event_type == "generation.completed" for record in records),
        cost_usd=str(sum(costs, start=Decimal("0.00"))),
    )


def counts_of(record: Row[Any]) -> Counts:
    return Counts(*(getattr(record, name) or 0 for name in COUNTS))


def sums_of_records(db: Connection) -> dict[tuple[Any, ...], tuple[int, ...]]:
    sums: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for record in db.execute(select(store.usage).where(store.usage.c.tokens_used != 0)):
        key = (record.user_id, record.usage_date, record.model or "")
        added = (*counts_of(record).as_tuple, int(record.event_type == "generation.completed"))
        sums[key] = tuple(map(sum, zip(sums.get(key, (0,) * len(added)), added, strict=True)))
    return sums


def kept_sums(db: Connection) -> dict[tuple[Any, ...], tuple[int, ...]]:
    rows = db.execute(select(store.usage_daily)).all()
    return {tuple(row[:3]): tuple(row[3:]) for row in rows}


# At midnight, a microsecond before it, and in between: a change counts from its very moment.
WITHIN_A_DAY = [timedelta(), 9 * HOUR, 9 * HOUR + timedelta.resolution, DAY - timedelta.resolution]
MOMENTS = st.builds(lambda nth, within: FIRST + nth * DAY + within, st.integers(0, 3), st.sampled_from(WITHIN_A_DAY))
DAYS = MOMENTS.map(datetime.date)


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[list[Event]]]:
    """A user whom no earlier example has used, and what happened to them and to another, some of it twice."""
    user_id = f"user_{new_id()}"
    who, few, model = st.sampled_from([user_id, f"{user_id}a"]), st.integers(0, 999), st.sampled_from(MODELS)
    event = st.one_of(
        st.builds(
            generation_completed,
            who,
            input_tokens=few,
            output_tokens=few,
            cache_creation_input_tokens=few,
            cache_read_input_tokens=few,
            model=model,
            started_at=MOMENTS,
        ),
        st.builds(usage_reported, who, tokens_used=few, model=model, started_at=MOMENTS),
        st.builds(usage_adjusted, who, st.integers(-999, 999), effective_at=MOMENTS),
        st.builds(topped_up, who, effective_at=MOMENTS),
        st.builds(subscription_changed, who, st.sampled_from(TIERS), changed_at=MOMENTS),
    )
    events = draw(st.lists(event, min_size=1, max_size=16))
    order = draw(st.permutations(events + draw(st.lists(st.sampled_from(events), max_size=4))))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    return user_id, [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]


@given(happened=batches(), days=st.just(EVER) | st.tuples(DAYS, DAYS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_history_is_what_the_records_say_whatever_came_in_whatever_order(
    database: Database, plans: Plans, happened: tuple[str, list[list[Event]]], days: tuple[date, date]
) -> None:
    user_id, delivered = happened
    for batch in delivered:
        await database.write(store.record, batch)
    query = HistoryQuery(user_id=user_id, from_date=days[0], to_date=days[1])

    answer = await database.read(store.history, plans, query)

    assert answer.model_dump_json() == (await database.read(from_records, plans, query)).model_dump_json()
    assert await database.read(kept_sums) == await database.read(sums_of_records)


async def test_a_day_that_comes_to_nothing_by_corrections_is_a_day_and_one_of_no_tokens_is_none(
    database: Database, plans: Plans
) -> None:
    await database.write(
        store.record,
        [
            usage_reported(tokens_used=5),
            usage_adjusted(tokens_used=-5),
            usage_reported(tokens_used=0, started_at=NOON - DAY),
            topped_up(effective_at=NOON - DAY),
        ],
    )
    query = HistoryQuery(user_id="user_1", from_date=date.min, to_date=date.max)
    (day,) = (await database.read(store.history, plans, query)).days
    assert (day.date, day.tokens_used, day.generations, day.cost_usd) == (NOON.date(), 0, 1, "0.00")


async def test_a_day_costs_what_the_plan_of_that_day_costs_however_late_the_change_arrives(
    database: Database, plans: Plans
) -> None:
    days = [NOON + n * DAY for n in range(6)]
    await database.write(store.record, [usage_reported(tokens_used=1000, started_at=day) for day in days])
    later, sooner = (subscription_changed(tier=tier, changed_at=days[n]) for tier, n in (("free", 4), ("pro", 1)))
    for change in (later, sooner):
        await database.write(store.record, [change])
    query = HistoryQuery(user_id="user_1", from_date=date.min, to_date=date.max)
    costs = [day.cost_usd for day in (await database.read(store.history, plans, query)).days]
    assert costs == ["0.00", "0.00", "7.77", "7.77", "7.77", "0.00"]


async def test_replicas_that_add_to_the_same_days_at_once_lose_nothing(database: Database) -> None:
    def batch(nth: int) -> list[Event]:
        days = [NOON + n % 3 * DAY for n in range(40)]
        events: list[Event] = [generation_completed(f"user_{n % 7}", started_at=day) for n, day in enumerate(days)]
        return events if nth % 2 else events[::-1]

    await asyncio.gather(*(database.write(store.record, batch(nth)) for nth in range(16)))

    assert await database.read(kept_sums) == await database.read(sums_of_records)
    (sums,) = await database.read(
        lambda db: db.execute(select(func.sum(store.usage_daily.c.generations))).scalars().all()
    )
    assert sums == 16 * 40


async def test_a_batch_that_is_not_recorded_is_in_no_sum(database: Database) -> None:
    await database.write(store.record, [generation_completed()])
    before = await database.read(kept_sums)
    unstorable = generation_completed().model_copy(update={"type": None})
    with pytest.raises(Exception, match="event_type"):
        await database.write(store.record, [generation_completed(), unstorable])
    assert await database.read(kept_sums) == before


def migrate_to(url: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = patient_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


async def test_a_ledger_of_an_earlier_release_is_summed_up_when_it_is_migrated(database_url: str) -> None:
    events: list[GenerationCompleted | UsageAdjusted] = [
        generation_completed(cache_read_input_tokens=4),
        generation_completed(started_at=NOON - 400 * DAY),
        generation_completed("user_2", model="claude-opus-4-8"),
        usage_reported("user_2"),
        usage_reported("user_3", tokens_used=0),
        usage_adjusted("user_2"),
        topped_up("user_3"),
    ]
    await asyncio.to_thread(migrate_to, database_url, "0006")
    database = Database(database_url)
    await database.write(insert_new, store.usage, store.usage_rows(events))

    await asyncio.to_thread(database.migrate, MIGRATIONS)

    kept = await database.read(kept_sums)
    assert kept == await database.read(sums_of_records)
    assert len(kept) == 4
    await database.write(store.record, [*events, generation_completed()])
    assert await database.read(kept_sums) == await database.read(sums_of_records)
    await database.close()
