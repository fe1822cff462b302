"""Quota's store on SQLite and on PostgreSQL: each event counts once, and used + held never passes the limit."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import permutations
from math import ceil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection, RowMapping, select, update
from sqlalchemy.exc import DatabaseError

from services.quota import store
from services.quota import totals as quota_totals
from services.quota.domain import Account, LimitStanding, Refusal
from services.quota.standing import Grant
from shared.calls import HOLD_TTL, Authorize, Pending, UsageQuery
from shared.database import Database, table_of
from shared.events import Event, GenerationCompleted, SubscriptionChanged, UsageAdjusted, new_id
from shared.plans import COUNTS, FOR_EVER, Period, Plans
from shared.quarantine import Poison, Quarantined
from tests.builders import (
    NOON,
    USER_IDS,
    generation_completed,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
OCTOBER, NOVEMBER = NOON - 30 * DAY, NOON
TICK = timedelta(microseconds=1)
LIMIT = 108_000

PLANS_FILE = """
default = "free"
[plans.free]
limit_tokens = 108_000
period = "month"
upgrade_to = "daily"
[plans.daily]
limit_tokens = 50_000
period = "day"
upgrade_to = "lifetime"
[plans.lifetime]
limit_tokens = 1_000_000
period = "none"
[plans.unlimited]
period = "month"
[plans.weighted]
limit_tokens = 108_000
period = "month"
weights = { input = "0.5", cache_creation = "1.25", cache_read = "0.1", output = "5" }
[plans.team]
limits = [{ limit_tokens = 40_000, period = "day" }, { limit_tokens = 108_000, period = "none" }]
[plans.dear]
limit_tokens = 108_000
period = "month"
weights.models = { "claude-haiku" = "3" }
[plans.single]
limit_tokens = 108_000
period = "month"
concurrent_generations_max = 1
[plans.anchored]
limit_tokens = 108_000
period = "month"
anchor = "subscription"
"""


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    path = tmp_path_factory.mktemp("plans") / "plans.toml"
    path.write_text(PLANS_FILE)
    return Plans.load(path)


@pytest.fixture
async def database(quota_url: str) -> AsyncIterator[Database]:
    database = Database(quota_url)
    yield database
    await database.close()


@pytest.fixture
async def replicas(database: Database, quota_url: str) -> AsyncIterator[list[Database]]:
    """Several processes' views of one database: connections and threads of their own."""
    others = [Database(quota_url) for _ in range(3)]
    yield [database, *others]
    for other in others:
        await other.close()


class Quota:
    """The store's functions, each in a transaction of its own, as the service calls them."""

    def __init__(self, database: Database, plans: Plans) -> None:
        self.database, self.plans = database, plans

    async def authorize(self, *requests: Authorize) -> list[int | None]:
        """The output granted to each."""
        return list(map(output_tokens, await self.ask(*requests)))

    async def ask(self, *requests: Authorize) -> list[Grant | store.Taken | Refusal]:
        return (await self.database.write(store.authorize, self.plans, requests))[0]

    async def settle(self, *events: Event) -> None:
        await self.database.write(store.settle, self.plans, events)

    async def account(self, user_id: str = "user_1", *pending: Pending) -> Account:
        query = UsageQuery(user_id=user_id, pending=pending)
        return (await self.database.read(store.look_up, self.plans, [query]))[0][0]

    async def account_at(self, moment: datetime, user_id: str = "user_1") -> Account:
        def work(db: Connection) -> Account:
            return store.accounts(db, self.plans, {user_id}, at=moment)[user_id]

        return await self.database.read(work)

    async def expired_holds(self) -> list[tuple[str, str, int]]:
        return await self.database.write(store.expired_holds)

    async def let_expire(self, *generation_ids: str) -> None:
        """As if their time were over."""
        await self.expire_in(-SECOND, *generation_ids)

    async def expire_in(self, time: timedelta, *generation_ids: str) -> None:
        which = store.holds.c.generation_id.in_(generation_ids)
        await self.database.write(
            lambda db: db.execute(update(store.holds).where(which).values(expires_at=datetime.now(UTC) + time))
        )

    async def move(self, request: Authorize, moment: datetime) -> None:
        """As if it had been authorized then."""
        which = store.holds.c.generation_id == request.generation_id
        times = {"started_at": moment, "expires_at": moment + HOLD_TTL}
        await self.database.write(lambda db: db.execute(update(store.holds).where(which).values(times)))

    async def totals(self, user_id: str = "user_1") -> dict[tuple[datetime, datetime], int]:
        """What is kept for each period."""
        kept = select(quota_totals.totals).where(quota_totals.totals.c.user_id == user_id)
        rows = await self.database.read(lambda db: db.execute(kept).all())
        return {(row.period_start, row.period_end): row.tokens_used for row in rows}

    async def wrong_totals(self, user_id: str = "user_1") -> list[Any]:
        """Totals that are not, in every count, the sum of the settlements in their period."""

        def work(db: Connection) -> list[Any]:
            kept, settled = (
                db.execute(select(table).where(table.c.user_id == user_id)).mappings().all()
                for table in (quota_totals.totals, quota_totals.settlements)
            )
            return [total for total in kept if any(total[name] != _sum(name, total, settled) for name in COUNTS)]

        return await self.database.read(work)


def output_tokens(answer: Grant | store.Taken | Refusal) -> int | None:
    assert not isinstance(answer, store.Taken)
    return answer.output_tokens if isinstance(answer, Grant) else None


def _sum(name: str, total: RowMapping, settled: Sequence[RowMapping]) -> int:
    return sum(row[name] for row in settled if total["period_start"] <= row["started_at"] < total["period_end"])


@pytest.fixture
def quota(database: Database, plans: Plans) -> Quota:
    return Quota(database, plans)


def asking(
    user_id: str = "user_1",
    *,
    beside: int = 1_000,
    asked: int = 1_000,
    least: int = 1,
    pending: tuple[Pending, ...] = (),
) -> Authorize:
    """A generation that wants 1,000 tokens of output beside 1,000 of input, unless told."""
    return Authorize(
        generation_id=new_id(),
        user_id=user_id,
        model="claude-haiku-4-5",
        input_tokens_max=beside,
        output_tokens_min=least,
        output_tokens_max=asked,
        pending=pending,
    )


def ending(request: Authorize, **counts: int) -> GenerationCompleted:
    """The generation's event; it began now."""
    used = {"input_tokens": request.input_tokens_max, "output_tokens": 0, **counts}
    return generation_completed(
        request.user_id,
        generation_id=request.generation_id,
        started_at=datetime.now(UTC),
        **used,
    ).model_copy(update={"id": request.generation_id})


def spent(tokens: int, user_id: str = "user_1") -> GenerationCompleted:
    return usage_reported(user_id, tokens_used=tokens, started_at=datetime.now(UTC))


def pending_of(event: GenerationCompleted) -> Pending:
    return Pending.of(event.id, event.data)


async def test_a_user_never_seen_has_the_default_plan_and_zeros(quota: Quota) -> None:
    usage = (await quota.account("nobody")).usage
    assert (usage.tier, usage.tokens_used, usage.tokens_held, usage.tokens_remaining) == ("free", 0, 0, LIMIT)


async def test_an_authorization_holds_the_whole_input_and_the_output_that_is_granted(quota: Quota) -> None:
    assert await quota.authorize(asking(beside=5_000, asked=4_096)) == [4_096]
    assert (await quota.account()).usage.tokens_held == 9_096


async def test_a_hold_lasts_longer_than_any_generation_by_the_databases_clock(quota: Quota) -> None:
    _, _, at = await quota.database.write(store.authorize, quota.plans, [asking()])
    expires_at = await quota.database.read(lambda db: db.execute(select(store.holds.c.expires_at)).scalar_one())
    assert expires_at - at == HOLD_TTL


async def test_near_the_limit_the_output_is_clamped_and_beyond_it_nothing_is_held(quota: Quota) -> None:
    await quota.settle(spent(LIMIT - 1_300))
    first, second = await quota.authorize(asking()), await quota.authorize(asking(beside=1))
    assert (first, second) == ([300], [None])
    assert (await quota.account()).tightest.available_tokens == 0


async def test_of_many_that_arrive_together_those_that_fit_are_granted_in_order(quota: Quota) -> None:
    large, small = asking(beside=60_000, asked=20_000, least=20_000), asking(beside=5_000, asked=5_000)
    other = asking("user_2", beside=60_000, asked=20_000)
    assert await quota.authorize(large, large.model_copy(update={"generation_id": "x"}), small, other) == [
        20_000,
        None,
        5_000,
        20_000,
    ]
    assert (await quota.account()).tightest.held_tokens == 90_000


async def test_asked_twice_for_one_generation_the_answer_and_the_hold_are_the_same(quota: Quota) -> None:
    await quota.settle(spent(LIMIT - 1_300))
    request = asking()
    first = await quota.ask(request)
    assert await quota.ask(request, request) == first * 2
    twice = asking("user_2")
    one, other = await quota.ask(twice, twice)
    assert one == other
    assert [(await quota.account(user)).tightest.held_tokens for user in ("user_1", "user_2")] == [1_300, 2_000]


async def test_nothing_is_held_for_a_generation_that_is_over_or_another_users(quota: Quota) -> None:
    over, expired, theirs = asking(), asking(), asking("user_2")
    await quota.ask(expired, theirs)
    await quota.settle(ending(over))  # it was never authorized here, or its authorization comes late
    await quota.let_expire(expired.generation_id)
    mine = theirs.model_copy(update={"user_id": "user_1"})
    answers = await quota.ask(over, expired, mine, over)
    assert all(isinstance(answer, store.Taken) for answer in answers)
    assert (await quota.account()).tightest.held_tokens == 0
    assert (await quota.account("user_2")).tightest.held_tokens == 2_000


async def test_a_settlement_after_its_holds_time_counts_and_is_marked_late(quota: Quota) -> None:
    in_time, late = asking(), asking()
    await quota.ask(in_time, late)
    await quota.let_expire(late.generation_id)
    report = spent(500)
    await quota.settle(ending(late), ending(in_time), report)
    await quota.settle(ending(late))

    marks = select(*quota_totals.settlements.c["event_id", "is_late"])
    rows = await quota.database.read(lambda db: db.execute(marks).all())
    assert {row.event_id: row.is_late for row in rows} == {
        in_time.generation_id: False,
        late.generation_id: True,
        report.id: False,
    }
    assert (await quota.account()).tightest.used_tokens == 2_500


async def test_a_hold_counts_in_the_period_in_which_it_was_authorized(quota: Quota) -> None:
    before, after = asking(), asking(beside=5_000)
    await quota.ask(before, after)
    end = (await quota.account()).tightest.period.end
    assert end is not None
    await quota.move(before, end - TICK)
    await quota.move(after, end)

    assert (
        await quota.account_at(end - TICK)
    ).tightest.held_tokens == 8_000  # both are open: a clock may be a tick behind
    assert (await quota.account_at(end)).tightest.held_tokens == 6_000


async def test_an_unlimited_plan_never_refuses(quota: Quota) -> None:
    await quota.settle(subscription_changed(tier="unlimited"), *(spent(10**8) for _ in range(20)))
    assert await quota.authorize(*(asking(beside=10**8, asked=10**8) for _ in range(20))) == [10**8] * 20


async def test_a_plan_takes_effect_for_the_next_check(quota: Quota) -> None:
    await quota.settle(spent(LIMIT))
    assert await quota.authorize(asking()) == [None]
    await quota.settle(subscription_changed(tier="lifetime"))
    assert await quota.authorize(asking()) == [1_000]


async def test_a_settlement_counts_what_was_used_and_releases_the_hold(quota: Quota) -> None:
    request = asking(beside=6_000, asked=4_096)
    await quota.authorize(request)

    await quota.settle(ending(request, input_tokens=5_282, output_tokens=2_812))

    usage = (await quota.account()).usage
    assert (usage.tokens_used, usage.tokens_held, usage.tokens_remaining) == (8_094, 0, 99_906)


async def test_a_settlement_and_the_release_of_its_hold_happen_both_or_neither(quota: Quota) -> None:
    request = asking()
    await quota.authorize(request)
    before = await quota.account()

    def fail_after_settling(db: Connection) -> None:
        store.settle(db, quota.plans, [ending(request)])
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await quota.database.write(fail_after_settling)

    assert await quota.account() == before
    assert await quota.wrong_totals() == []


async def test_nobody_ever_sees_a_generation_both_used_and_held_or_neither(quota: Quota) -> None:
    requests = [asking(least=1_000) for _ in range(50)]
    await quota.authorize(*requests)
    seen: set[int] = set()

    async def settle_one_by_one() -> None:
        for request in requests:
            await quota.settle(ending(request, output_tokens=1_000))

    settling = asyncio.create_task(settle_one_by_one())
    while not settling.done():
        account = await quota.account()
        seen.add(account.tightest.used_tokens + account.tightest.held_tokens)
    await settling

    assert seen == {100_000}


async def test_an_event_is_settled_once_however_often_it_is_delivered(quota: Quota) -> None:
    event, adjustment = spent(8_094), usage_adjusted(tokens_used=-94, effective_at=datetime.now(UTC))
    await quota.settle(event, event, adjustment)
    await quota.settle(event)
    await quota.settle(adjustment, event, adjustment)
    assert (await quota.account()).tightest.used_tokens == 8_000
    assert set((await quota.totals()).values()) == {8_000}


async def test_an_event_that_several_replicas_get_at_once_is_settled_once(
    replicas: list[Database], plans: Plans
) -> None:
    events = [spent(n, f"user_{n % 3}") for n in range(1, 61)]
    # Each gets all of them, in an order of its own: who locked users as they come would wait for ever.
    batches = [events[n:] + events[:n] for n in range(0, 60, 5)]
    await asyncio.gather(
        *(
            Quota(replicas[n % 4], plans).settle(*batch)
            for n, batch in enumerate([*batches, *map(_reversed, batches)])
        )
    )
    for n in range(3):
        quota = Quota(replicas[0], plans)
        assert (await quota.account(f"user_{n}")).tightest.used_tokens == sum(range(n or 3, 61, 3))
        assert await quota.wrong_totals(f"user_{n}") == []


def _reversed(events: list[GenerationCompleted]) -> list[GenerationCompleted]:
    return events[::-1]


async def test_a_new_period_starts_at_zero(quota: Quota) -> None:
    await quota.settle(generation_completed(started_at=NOVEMBER))
    end = datetime(2026, 12, 1, tzinfo=UTC)
    assert (await quota.account_at(end - TICK)).usage.tokens_used == 8_094
    assert (await quota.account_at(end)).usage.tokens_used == 0


async def test_a_late_event_lands_in_the_period_it_belongs_to(quota: Quota) -> None:
    await quota.settle(generation_completed(started_at=NOVEMBER))
    await quota.settle(generation_completed(started_at=OCTOBER), generation_completed(started_at=OCTOBER))
    assert (await quota.account_at(OCTOBER)).tightest.used_tokens == 2 * 8_094
    assert (await quota.account_at(NOVEMBER)).tightest.used_tokens == 8_094


@pytest.mark.parametrize("tier", ["free", "daily", "lifetime"])
async def test_a_total_is_kept_for_every_period_that_has_usage_also_when_it_comes_late(
    quota: Quota, plans: Plans, tier: str
) -> None:
    moments = [NOVEMBER, OCTOBER, OCTOBER - DAY, OCTOBER + SECOND, NOVEMBER - 300 * DAY]
    await quota.settle(subscription_changed(tier=tier, changed_at=NOVEMBER - 400 * DAY))
    await quota.settle(*(usage_reported(tokens_used=n, started_at=moment) for n, moment in enumerate(moments, 1)))
    await quota.settle(usage_reported(tokens_used=100, started_at=OCTOBER))

    expected: dict[tuple[datetime, datetime], int] = {}
    for tokens, moment in zip((1, 102, 3, 4, 5), moments, strict=True):
        period = Period.containing(moment, plans.of(tier).limits[0].period)
        key = (period.start, period.end or FOR_EVER)
        expected[key] = expected.get(key, 0) + tokens
    kept = await quota.totals()
    assert {period: kept.get(period) for period in expected} == expected
    assert not any(tokens for period, tokens in kept.items() if period not in expected)


async def test_totals_are_the_sums_of_settlements_before_and_after_every_change_of_plan_and_zone(
    quota: Quota,
) -> None:
    changes: list[tuple[str, str | None]] = [
        ("daily", None),
        ("daily", "Pacific/Auckland"),
        ("lifetime", "Asia/Kolkata"),
        ("free", "America/New_York"),
        ("unlimited", None),
        ("free", None),
    ]
    now, used = datetime.now(UTC), 0
    for n, (tier, time_zone) in enumerate(changes):
        hours = [timedelta(hours=12 * k) for k in range(5)]
        await quota.settle(*(usage_reported(tokens_used=10**n, started_at=now - ago) for ago in hours))
        change = subscription_changed(tier=tier, time_zone=time_zone, changed_at=NOON + n * SECOND)
        await quota.settle(change, usage_reported(tokens_used=10**n, started_at=now - 30 * DAY))
        used += 6 * 10**n

        account = await quota.account()
        counted = [now - ago for ago in [*hours, 30 * DAY] if account.tightest.period.covers(now - ago)]
        assert account.plan.tier == tier
        assert account.tightest.used_tokens == len(counted) * used // 6
        assert await quota.wrong_totals() == []


async def test_going_back_to_a_plan_counts_what_was_used_in_between(quota: Quota) -> None:
    await quota.settle(spent(100))
    await quota.settle(subscription_changed(tier="daily"), spent(20))
    await quota.settle(subscription_changed(tier="free", changed_at=NOON + SECOND), spent(3))
    assert (await quota.account()).tightest.used_tokens == 123


CHANGES = [
    subscription_changed(tier="daily", changed_at=NOON),
    subscription_changed(tier="lifetime", changed_at=NOON + TICK),
    # At the very same moment: the later id wins, everywhere.
    subscription_changed(tier="unlimited", changed_at=NOON + TICK, time_zone="Asia/Tokyo"),
]


@pytest.mark.parametrize("arriving", list(permutations(CHANGES)))
async def test_the_newest_subscription_wins_whatever_arrives_last(
    quota: Quota, arriving: tuple[SubscriptionChanged, ...]
) -> None:
    together = [
        change.model_copy(update={"id": f"{change.id}-2", "subject": "user_2", "data": _of("user_2", change)})
        for change in arriving
    ]
    for change in arriving:
        await quota.settle(change)
    await quota.settle(*together)
    assert (await quota.account()).plan.tier == "unlimited"
    assert (await quota.account("user_2")).plan.tier == "unlimited"


def _of(user_id: str, change: SubscriptionChanged) -> Any:
    return change.data.model_copy(update={"user_id": user_id})


async def test_a_tier_or_a_time_zone_that_nobody_knows_stops_neither_its_user_nor_others(quota: Quota) -> None:
    await quota.settle(subscription_changed(tier="gold", time_zone="Mars/Olympus"), spent(100), spent(20, "user_2"))
    assert await quota.authorize(asking(), asking("user_2")) == [1_000, 1_000]
    assert [(await quota.account(user)).tightest.used_tokens for user in ("user_1", "user_2")] == [100, 20]
    assert (await quota.account()).plan.tier == "free"


async def test_a_hold_counts_until_its_time_is_over(quota: Quota) -> None:
    request = asking(beside=100_000, asked=8_000)
    await quota.authorize(request)

    await quota.expire_in(timedelta(minutes=1), request.generation_id)
    assert await quota.authorize(asking()) == [None]
    await quota.let_expire(request.generation_id)

    assert (await quota.account()).tightest.held_tokens == 0
    assert await quota.authorize(asking()) == [1_000]


async def test_an_expired_hold_is_reported_once(replicas: list[Database], plans: Plans) -> None:
    quota = Quota(replicas[0], plans)
    lost, open_ = asking(), asking()
    await quota.authorize(lost, open_)
    assert await quota.expired_holds() == []
    await quota.let_expire(lost.generation_id)

    reports = await asyncio.gather(*(Quota(replica, plans).expired_holds() for replica in replicas * 2))

    assert [told for report in reports for told in report] == [(lost.generation_id, "user_1", 2_000)]


async def test_a_generation_that_ends_after_its_hold_did_is_counted_and_not_reported(quota: Quota) -> None:
    request = asking()
    await quota.authorize(request)
    await quota.let_expire(request.generation_id)
    await quota.settle(ending(request, output_tokens=500))
    assert await quota.expired_holds() == []
    assert (await quota.account()).tightest.used_tokens == 1_500


async def test_a_generation_that_was_reported_and_ends_after_all_is_counted_once(quota: Quota) -> None:
    request = asking()
    await quota.authorize(request)
    await quota.let_expire(request.generation_id)
    assert len(await quota.expired_holds()) == 1
    for _ in range(2):
        await quota.settle(ending(request, output_tokens=500))
    assert (await quota.account()).tightest.used_tokens == 1_500


async def test_pending_usage_is_counted_in_place_of_its_hold_and_once(quota: Quota) -> None:
    request, other = asking(), asking()
    await quota.authorize(request, other)
    event = ending(request, output_tokens=500)
    known = pending_of(event)

    for settled in (False, True, True):
        account = await quota.account("user_1", known, known)
        assert (account.tightest.used_tokens, account.tightest.held_tokens) == (1_500, 2_000)
        if not settled:
            assert (await quota.account()).tightest.used_tokens == 0  # nobody else knows of it yet
            await quota.settle(event)


async def test_pending_usage_is_in_the_way_of_the_next_generation_exactly_once(quota: Quota) -> None:
    event = spent(LIMIT - 1_500)
    known = (pending_of(event), pending_of(event))
    assert await quota.authorize(asking(least=1_000, pending=known)) == [None]
    await quota.settle(event)
    assert await quota.authorize(asking(pending=known)) == [500]


async def test_pending_usage_that_one_caller_knows_of_is_not_in_the_answer_of_another(quota: Quota) -> None:
    """It may not be durable yet: shown to somebody else, it could be gone when they ask again."""
    asked = [UsageQuery(user_id="user_1", pending=known) for known in ((), (pending_of(spent(100)),), ())]
    accounts, _ = await quota.database.read(store.look_up, quota.plans, asked)
    assert [account.usage.tokens_used for account in accounts] == [0, 100, 0]


async def test_pending_usage_of_another_user_or_of_another_period_is_not_mine(quota: Quota) -> None:
    theirs, old = (
        pending_of(spent(100, "user_2")),
        pending_of(usage_reported(started_at=datetime(2026, 1, 1, tzinfo=UTC))),
    )
    assert (await quota.account("user_1", theirs, old)).tightest.used_tokens == 0


async def test_pending_usage_with_the_id_of_anothers_generation_releases_nothing(quota: Quota) -> None:
    theirs = asking("user_2")
    await quota.authorize(theirs)
    mine = spent(100).model_copy(update={"id": theirs.generation_id})
    account = await quota.account("user_1", pending_of(mine))
    assert (account.tightest.used_tokens, account.tightest.held_tokens) == (100, 0)
    assert (await quota.account("user_2")).tightest.held_tokens == 2_000


async def test_a_correction_is_signed_and_changes_no_hold(quota: Quota) -> None:
    await quota.authorize(asking())
    await quota.settle(spent(8_094), usage_adjusted(tokens_used=-94, effective_at=datetime.now(UTC)))
    usage = (await quota.account()).usage
    assert (usage.tokens_used, usage.tokens_held) == (8_000, 2_000)


async def test_on_a_plan_with_weights_a_generation_never_counts_for_more_than_was_held(quota: Quota) -> None:
    await quota.settle(subscription_changed(tier="weighted"))
    first, second = asking(beside=40_000, asked=10_000), asking(beside=1_000, asked=10_000)
    assert await quota.authorize(first, second) == [10_000, 1_350]
    assert (await quota.account()).tightest.available_tokens == 0

    await quota.settle(
        ending(first, input_tokens=0, cache_creation_input_tokens=40_000, output_tokens=10_000),
        ending(second, input_tokens=1_000, output_tokens=1_350),
    )

    assert (await quota.account()).tightest.used_tokens == 100_000 + 500 + 6_750


async def test_poison_is_kept_with_the_batch_it_came_in(quota: Quota, database: Database) -> None:
    poison = [Poison("generation.completed", b"\x00 not JSON", "body: Invalid JSON")]
    await database.write(store.settle, quota.plans, [spent(8_094)], poison)
    await database.write(store.settle, quota.plans, [], poison)
    kept = await database.read(lambda db: db.execute(select(table_of(Quarantined).c.body)).scalars().all())
    assert kept == [b"\x00 not JSON"]
    assert (await quota.account()).tightest.used_tokens == 8_094


def altered(event: Event, **data: object) -> Event:
    """The same id, another body."""
    return event.model_copy(update={"data": event.data.model_copy(update=data)})


@pytest.mark.parametrize(
    "data", [{"tokens_used": 1}, {"user_id": "user_2"}, {"model": "claude-haiku-4-5"}, {"started_at": NOON}]
)
async def test_of_two_bodies_under_one_id_the_first_is_counted_and_the_second_is_told(
    quota: Quota, database: Database, data: dict[str, object]
) -> None:
    first, together = spent(8_000), spent(94)
    second = altered(first, **data)

    settled = await database.write(
        store.settle, quota.plans, [first, together, altered(together, **data), first, together]
    )
    assert (settled.events, settled.contradicting) == (2, [altered(together, **data)])
    settled = await database.write(store.settle, quota.plans, [second, first])
    assert (settled.events, settled.contradicting) == (0, [second])

    assert (await quota.account()).tightest.used_tokens == 8_094
    assert (await quota.account("user_2")).tightest.used_tokens == 0


async def test_of_two_changes_under_one_id_the_first_decides_and_the_second_is_told(
    quota: Quota, database: Database
) -> None:
    first = subscription_changed(tier="daily")
    second = altered(first, tier="unlimited")
    settled = await database.write(store.settle, quota.plans, [first, second, first])
    assert (settled.events, settled.contradicting) == (1, [second])
    assert (await quota.account()).plan.tier == "daily"


async def test_what_contradicts_releases_no_hold(quota: Quota, database: Database) -> None:
    over, under_way = asking(), asking()
    await quota.authorize(over, under_way)
    await quota.settle(ending(over))
    second = altered(ending(over), generation_id=under_way.generation_id, tokens_used=1, input_tokens=1)

    settled = await database.write(store.settle, quota.plans, [second])

    assert settled.contradicting == [second]
    account = await quota.account()
    assert (account.tightest.used_tokens, account.tightest.held_tokens) == (1_000, 2_000)


async def test_a_late_generation_is_marked_when_it_is_settled_and_repeated_without_alarm(
    quota: Quota, database: Database
) -> None:
    request = asking()
    await quota.authorize(request)
    await quota.let_expire(request.generation_id)
    late = ending(request)
    for new in (1, 0):
        settled = await database.write(store.settle, quota.plans, [late])
        assert (settled.events, settled.contradicting) == (new, [])
    marks = await database.read(lambda db: db.execute(select(quota_totals.settlements.c.is_late)).scalars().all())
    assert marks == [True]


async def test_a_batch_is_settled_whole_or_not_at_all(quota: Quota) -> None:
    good = spent(1)
    unstorable = good.model_copy(update={"data": good.data.model_copy(update={"started_at": None})})
    with pytest.raises(DatabaseError):
        await quota.settle(spent(8_094), subscription_changed(tier="daily"), unstorable)
    account = await quota.account()
    assert (account.tightest.used_tokens, account.plan.tier) == (0, "free")


@given(user_ids=st.lists(USER_IDS, min_size=1, max_size=5, unique=True))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_users_are_kept_apart_whatever_their_names_look_like(quota: Quota, user_ids: list[str]) -> None:
    before = [await quota.account(user_id) for user_id in user_ids]
    await quota.settle(*(spent(n, user_id) for n, user_id in enumerate(user_ids, 1)))
    after = [await quota.account(user_id) for user_id in user_ids]
    assert [b.tightest.used_tokens - a.tightest.used_tokens for a, b in zip(before, after, strict=True)] == [
        *range(1, len(user_ids) + 1)
    ]


@pytest.mark.parametrize("asked", [1_000, 1_037])
async def test_of_64_authorizations_at_once_exactly_what_fits_is_granted(
    replicas: list[Database], plans: Plans, asked: int
) -> None:
    requests = [asking(asked=asked) for _ in range(64)]

    answers = await asyncio.gather(
        *(Quota(replicas[n % 4], plans).authorize(request) for n, request in enumerate(requests))
    )

    granted = [output for (output,) in answers if output is not None]
    account = await Quota(replicas[0], plans).account()
    assert sum(1_000 + output for output in granted) == account.tightest.held_tokens
    assert LIMIT - 1_000 <= account.tightest.held_tokens <= LIMIT  # what is left is no room for any output
    assert granted.count(asked) == LIMIT // (1_000 + asked)


async def test_authorizations_and_settlements_at_once_never_pass_the_limit_and_lose_no_token(
    replicas: list[Database], plans: Plans
) -> None:
    seen: list[int] = []

    async def chat(quota: Quota) -> int:
        used = 0
        for _ in range(8):
            request = asking(beside=4_000, asked=4_000)
            (granted,) = await quota.authorize(request)
            if granted is not None:
                await quota.settle(ending(request, input_tokens=2_000, output_tokens=granted // 2))
                used += 2_000 + granted // 2
            account = await quota.account()
            seen.append(account.tightest.used_tokens + account.tightest.held_tokens)
        return used

    used = await asyncio.gather(*(chat(Quota(replicas[n % 4], plans)) for n in range(16)))

    account = await Quota(replicas[0], plans).account()
    assert (account.tightest.used_tokens, account.tightest.held_tokens) == (sum(used), 0)
    assert max(seen) <= LIMIT
    assert sum(used) > LIMIT - 8_000


async def test_every_limit_of_a_plan_holds_and_the_tightest_is_shown(quota: Quota) -> None:
    long_ago = usage_reported(tokens_used=90_000, started_at=datetime.now(UTC) - 2 * DAY)
    await quota.settle(subscription_changed(tier="team"), long_ago)
    assert await quota.authorize(asking(asked=30_000)) == [17_000]  # beside 1,000 of input, of 18,000 that are left
    assert (await quota.account()).usage.period == "none"
    await quota.settle(subscription_changed(tier="daily", changed_at=NOON + TICK), spent(35_000))
    await quota.settle(subscription_changed(tier="team", changed_at=NOON + 2 * TICK), topped_up(tokens=200_000))
    assert (await quota.account()).usage.period == "day"


async def test_a_top_up_lasts_for_its_period_or_until_it_is_used_up(quota: Quota) -> None:
    begin = (await quota.account()).tightest.period.start
    await quota.settle(
        topped_up(tokens=1_000, effective_at=begin - TICK),
        topped_up(tokens=10_000, lasts=True, effective_at=begin - TICK),
        usage_reported(tokens_used=LIMIT + 1_000 + 4_000, started_at=begin - TICK),
    )
    await quota.settle(
        topped_up(tokens=500, effective_at=begin), topped_up(tokens=30, lasts=True, effective_at=begin)
    )
    usage = (await quota.account()).usage
    assert (usage.tokens_used, usage.tokens_limit) == (0, LIMIT + 6_000 + 500 + 30)
    before = (await quota.account_at(begin - TICK)).usage
    assert (before.tokens_limit, before.tokens_remaining) == (LIMIT + 11_000, 6_000)


async def test_a_lasting_top_up_survives_a_change_of_plan_and_what_was_used_of_it_does_not(quota: Quota) -> None:
    now = datetime.now(UTC)
    await quota.settle(subscription_changed(tier="daily", changed_at=now - 40 * DAY))
    await quota.settle(topped_up(lasts=True, effective_at=now - 35 * DAY))
    await quota.settle(usage_reported(tokens_used=52_000, started_at=now - 35 * DAY))
    await quota.settle(subscription_changed(tier="free", changed_at=now))
    assert (await quota.account()).usage.tokens_limit == LIMIT + 3_000
    await quota.settle(subscription_changed(tier="daily", changed_at=now + TICK))
    assert (await quota.account()).usage.tokens_limit == 50_000 + 3_000


@pytest.mark.parametrize(
    ("tier", "time_zone", "changed_after"),
    [
        ("free", "Asia/Tokyo", TICK),  # whose month began before the one that has ended
        ("free", "America/Los_Angeles", TICK),
        ("anchored", None, 15 * DAY),  # whose month begins in the middle of one
    ],
)
async def test_what_was_used_of_a_lasting_top_up_stays_used_when_periods_move(
    quota: Quota, tier: str, time_zone: str | None, changed_after: timedelta
) -> None:
    begin = (await quota.account()).tightest.period.start
    used_at = begin + changed_after - 10 * DAY
    await quota.settle(topped_up(tokens=5_000, lasts=True, effective_at=used_at))
    await quota.settle(usage_reported(tokens_used=LIMIT + 2_000, started_at=used_at))
    await quota.settle(subscription_changed(tier=tier, time_zone=time_zone, changed_at=begin + changed_after))
    usage = (await quota.account_at(begin + changed_after + DAY)).usage
    assert (usage.tokens_used, usage.tokens_limit) == (0, LIMIT + 3_000)


async def test_what_two_periods_have_of_a_lasting_top_up_is_used_once(quota: Quota) -> None:
    begin = (await quota.account()).tightest.period.start
    await quota.settle(topped_up(tokens=5_000, lasts=True, effective_at=begin - 10 * DAY))
    await quota.settle(usage_reported(tokens_used=LIMIT + 2_000, started_at=begin - 10 * DAY))
    # Over there, the month that has ended here has some hours left.
    await quota.settle(subscription_changed(tier="free", time_zone="America/Los_Angeles", changed_at=begin + TICK))
    await quota.settle(usage_reported(tokens_used=100, started_at=begin + 2 * TICK))
    usage = (await quota.account_at(begin + DAY)).usage
    assert (usage.tokens_used, usage.tokens_limit) == (0, LIMIT + 2_900)


@pytest.mark.parametrize(
    ("later", "left"),
    [
        ([("free", None, 0)], LIMIT + 3_000),
        ([("free", None, -15), ("daily", "Asia/Tokyo", 0)], 50_000 + 5_000),
        ([("daily", None, -12), ("anchored", None, 0)], LIMIT + 3_000),
    ],
)
async def test_what_is_left_of_a_lasting_top_up_is_the_same_in_whatever_order_events_arrive(
    quota: Quota, later: list[tuple[str, str | None, int]], left: int
) -> None:
    """Also where a change of plan arrives after usage that it decides about, or usage after the next change."""
    begin = (await quota.account()).tightest.period.start
    arriving: dict[str, list[Event]] = {}
    for order in permutations(range(2 + len(later))):
        user_id = f"user_{order}"
        events: list[Event] = [
            usage_reported(user_id, tokens_used=52_000, started_at=begin - 10 * DAY),
            subscription_changed(user_id, "daily", changed_at=begin - 20 * DAY),
            *(
                subscription_changed(user_id, tier, time_zone=time_zone, changed_at=begin + days * DAY)
                for tier, time_zone, days in later
            ),
        ]
        arriving[user_id] = [events[nth] for nth in order]
    await quota.settle(*(topped_up(user_id, lasts=True, effective_at=begin - 11 * DAY) for user_id in arriving))
    for arrived in zip(*arriving.values(), strict=True):
        await quota.settle(*arrived)
    limits = {user_id: (await quota.account_at(begin + DAY, user_id)).usage.tokens_limit for user_id in arriving}
    assert limits == dict.fromkeys(arriving, left)


async def test_one_generation_at_a_time_where_the_plan_says_so(quota: Quota) -> None:
    await quota.settle(subscription_changed(tier="single"))
    first, second = asking(), asking()
    answers = await quota.ask(first, second)
    assert isinstance(answers[0], Grant)
    assert isinstance(answers[1], Refusal)
    assert answers[1].reason == "concurrency"
    await quota.settle(ending(first))
    assert await quota.authorize(second) == [1_000]


async def test_the_month_of_an_anchored_plan_begins_on_the_day_of_the_subscription(quota: Quota) -> None:
    since = datetime(2026, 1, 31, 9, tzinfo=UTC)
    again = subscription_changed(tier="anchored", changed_at=since + 5 * DAY)
    await quota.settle(again)
    await quota.settle(subscription_changed(tier="anchored", changed_at=since))
    period = (await quota.account_at(datetime(2026, 3, 1, tzinfo=UTC))).tightest.period
    assert period == Period(datetime(2026, 2, 28, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC))


async def test_a_threshold_is_reached_once_however_many_replicas_settle(
    replicas: list[Database], plans: Plans
) -> None:
    quotas = [Quota(replica, plans) for replica in replicas]
    settled = await asyncio.gather(
        *(
            quotas[n % 4].database.write(store.settle, plans, [spent(LIMIT // 40), spent(LIMIT // 40)])
            for n in range(24)
        )
    )
    told = [json.loads(event) for _, event in await replicas[0].read(store.alerts_to_publish)]
    assert [event["data"]["percent"] for event in told] == [80, 100]
    assert sorted(event["id"] for event in told) == sorted(id_ for each in settled for id_ in each.alerts)
    assert told[0]["data"]["tokens_limit"] == LIMIT
    await replicas[1].write(store.alerts_published, [event["id"] for event in told])
    assert await replicas[2].read(store.alerts_to_publish) == []


class AnyDay(RuleBasedStateMachine):
    """One user's days in any order, against the simplest model there is: a list of events and a dict of holds."""

    def __init__(self, quota: Quota, run: asyncio.Runner) -> None:
        super().__init__()
        self.quota, self.run = quota, run.run
        self.user_id = new_id()
        self.authorized: dict[str, tuple[Authorize, int, datetime]] = {}
        self.answers: dict[str, Grant | store.Taken | Refusal] = {}
        self.published: list[Event] = []
        self.settled: dict[str, Event] = {}
        self.held: dict[str, int] = {}
        self.tiers: dict[str, str] = {}
        self.expired: set[str] = set()

    @rule(
        sizes=st.lists(
            st.tuples(st.integers(0, 30_000), st.integers(0, 20_000), st.integers(0, 30_000)), min_size=1, max_size=3
        )
    )
    def authorize(self, sizes: list[tuple[int, int, int]]) -> None:
        requests = [asking(self.user_id, beside=i, least=min(two), asked=max(two)) for i, *two in sizes]
        account = self.account()
        answers, _, at = self.run(self.quota.database.write(store.authorize, self.quota.plans, requests))
        for request, answer in zip(requests, answers, strict=True):
            granted = output_tokens(answer)
            beside, least, asked = request.input_tokens_max, request.output_tokens_min, request.output_tokens_max
            room = self.room(account)
            useful = max(1, least, min(64, asked))
            if granted is None:
                assert room is not None
                assert room < self.weigh(account, beside, useful) or asked < useful
                continue
            tokens = self.weigh(account, beside, granted)
            self.held[request.generation_id] = tokens
            self.authorized[request.generation_id] = (request, granted, at)
            assert room is None or useful <= granted
            assert room is None or tokens <= room
            assert granted == asked or room is None or room < self.weigh(account, beside, granted + 1)
            self.tiers[request.generation_id] = account.plan.tier
            self.answers[request.generation_id] = answer
            assert isinstance(answer, Grant)
            limit, period = account.tightest.limit, account.tightest.period
            assert answer == Grant(
                generation_id=request.generation_id,
                user_id=self.user_id,
                period_start=period.start,
                tokens=tokens,
                output_tokens=granted,
                started_at=at,
                expires_at=at + HOLD_TTL,
                input_tokens_max=beside,
                output_tokens_asked=asked,
                tier=account.plan.tier,
                period=limit.period,
                resets_at=period.end,
            )

    @precondition(lambda self: self.authorized)
    @rule(data=st.data(), asked=st.integers(1, 200_000))
    def authorize_again(self, data: st.DataObject, asked: int) -> None:
        generation_id = data.draw(st.sampled_from(sorted(self.authorized)))
        request, *_ = self.authorized[generation_id]
        again = request.model_copy(update={"output_tokens_min": 1, "output_tokens_max": asked})
        answers = self.run(self.quota.ask(again, again))
        if generation_id in self.held:
            assert answers == [self.answers[generation_id]] * 2
        else:
            assert all(isinstance(answer, store.Taken) for answer in answers)

    @precondition(lambda self: self.authorized)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        generation_id = data.draw(st.sampled_from(sorted(self.authorized)))
        request, granted, at = self.authorized.pop(generation_id)
        i, w, r = _parts(data, request.input_tokens_max)
        counts = {"input_tokens": i, "cache_creation_input_tokens": w, "cache_read_input_tokens": r}
        event = ending(request, **counts, output_tokens=data.draw(st.integers(0, granted)))
        started = event.data.model_copy(update={"started_at": at})
        self.published.append(event.model_copy(update={"data": started}))

    @rule(tokens=st.integers(0, 60_000), ago=st.integers(0, 70))
    def report(self, tokens: int, ago: int) -> None:
        moment = datetime.now(UTC) - ago * DAY / 2
        self.published.append(usage_reported(self.user_id, tokens_used=tokens, started_at=moment))

    @rule(tokens=st.integers(-60_000, 20_000), ago=st.integers(0, 70))
    def adjust(self, tokens: int, ago: int) -> None:
        self.published.append(usage_adjusted(self.user_id, tokens, effective_at=datetime.now(UTC) - ago * DAY / 2))

    @rule(tokens=st.integers(1, 60_000), ago=st.integers(0, 70))
    def top_up(self, tokens: int, ago: int) -> None:
        self.published.append(topped_up(self.user_id, tokens, effective_at=datetime.now(UTC) - ago * DAY / 2))

    @rule(
        tier=st.sampled_from(["free", "daily", "lifetime", "unlimited", "weighted", "team", "dear"]),
        time_zone=st.sampled_from([None, "Pacific/Auckland", "America/New_York"]),
        moment=st.integers(0, 9),
    )
    def change_plan(self, tier: str, time_zone: str | None, moment: int) -> None:
        changed_at = NOON + moment * SECOND
        self.published.append(subscription_changed(self.user_id, tier, time_zone=time_zone, changed_at=changed_at))

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any of what was ever published, in any order, again and again."""
        batch = data.draw(st.lists(st.sampled_from(self.published), min_size=1, max_size=6))
        before = self.account()
        new = [event for event in batch if event.id not in self.settled]
        held = all(event.id in self.held and self.tiers[event.id] == before.plan.tier for event in new)
        self.run(self.quota.settle(*batch))
        after = self.account()
        assert (
            not held
            or after.tightest.used_tokens + after.tightest.held_tokens
            <= before.tightest.used_tokens + before.tightest.held_tokens
        )
        for event in batch:
            self.settled[event.id] = event
            self.held.pop(event.id, None)
            self.expired.discard(event.id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_expire(self, data: st.DataObject) -> None:
        generation_id = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[generation_id]
        self.expired.add(generation_id)
        self.run(self.quota.let_expire(generation_id))

    @rule()
    def report_expired(self) -> None:
        told = [
            generation_id
            for generation_id, user_id, _ in self.run(self.quota.expired_holds())
            if user_id == self.user_id
        ]
        assert sorted(told) == sorted(self.expired)
        self.expired.clear()

    @rule(data=st.data())
    def ask_with_pending_usage(self, data: st.DataObject) -> None:
        generations = [event for event in self.published if isinstance(event, GenerationCompleted)]
        pending = data.draw(st.lists(st.sampled_from(generations), max_size=4)) if generations else []
        account = self.run(self.quota.account(self.user_id, *map(pending_of, pending)))
        known = self.settled | {event.id: event for event in pending}
        assert account.tightest.used_tokens == self.used(account, known)
        assert account.tightest.held_tokens == sum(tokens for id_, tokens in self.held.items() if id_ not in known)

    @invariant()
    def the_account_is_the_models(self) -> None:
        account = self.account()
        assert account.tightest.used_tokens == self.used(account, self.settled)
        assert account.tightest.held_tokens == sum(self.held.values())
        changes = [event.data for event in self.settled_changes()]
        assert account.plan.tier == (changes[-1].tier if changes else "free")

    @invariant()
    def every_total_is_the_sum_of_its_settlements(self) -> None:
        assert self.run(self.quota.wrong_totals(self.user_id)) == []

    def account(self) -> Account:
        return self.run(self.quota.account(self.user_id))

    def settled_changes(self) -> list[SubscriptionChanged]:
        changes = [event for event in self.settled.values() if isinstance(event, SubscriptionChanged)]
        return sorted(changes, key=lambda event: (event.data.changed_at, event.id))

    def used(self, account: Account, events: Mapping[str, Event], standing: LimitStanding | None = None) -> int:
        weights, period = account.plan.weights, (standing or account.tightest).period
        exact = Fraction()
        for event in events.values():
            if isinstance(event, GenerationCompleted) and period.covers(event.data.started_at):
                factor = Fraction(weights.models.get("claude-haiku", 1) if event.data.model else 1)
                if event.data.input_tokens is None:
                    exact += factor * event.data.tokens_used
                else:
                    exact += factor * event.data.input_tokens * Fraction(weights.input)
                    exact += factor * (event.data.output_tokens or 0) * Fraction(weights.output)
                    exact += factor * (event.data.cache_creation_input_tokens or 0) * Fraction(weights.cache_creation)
                    exact += factor * (event.data.cache_read_input_tokens or 0) * Fraction(weights.cache_read)
            elif isinstance(event, UsageAdjusted) and period.covers(event.data.effective_at):
                exact += event.data.tokens_used
        return max(0, ceil(exact))

    def room(self, account: Account) -> int | None:
        rooms = [self.room_under(account, standing) for standing in account.standings]
        return None if None in rooms else min(room for room in rooms if room is not None)

    def room_under(self, account: Account, standing: LimitStanding) -> int | None:
        if standing.limit.limit_tokens is None:
            return None
        limit_tokens = standing.limit.limit_tokens + sum(
            event.data.top_up_tokens
            for event in self.settled.values()
            if isinstance(event, UsageAdjusted) and standing.period.covers(event.data.effective_at)
        )
        return limit_tokens - self.used(account, self.settled, standing) - sum(self.held.values())

    def weigh(self, account: Account, beside: int, output: int) -> int:
        weights = account.plan.weights
        dearest = max(map(Fraction, (weights.input, weights.cache_creation, weights.cache_read)))
        factor = Fraction(weights.models.get("claude-haiku", 1))
        return ceil(factor * (beside * dearest + output * Fraction(weights.output)))


def _parts(data: st.DataObject, tokens_max: int) -> tuple[int, int, int]:
    """Any three counts that are `tokens_max` together, or less."""
    one, two, three = sorted(data.draw(st.integers(0, tokens_max)) for _ in range(3))
    return one, two - one, three - two


def test_whatever_happens_in_whatever_order_the_account_is_what_a_simple_model_says(
    quota: Quota, quota_url: str
) -> None:
    examples = 40 if quota_url.startswith("sqlite") else 10
    with asyncio.Runner() as run:

        class Days(AnyDay):
            def __init__(self) -> None:
                super().__init__(quota, run)

        run_state_machine_as_test(
            Days, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
        )
