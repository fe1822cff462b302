import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.quota.domain import (
    RETRY_WHILE_HELD_S,
    Account,
    LimitStanding,
    Refusal,
    Totals,
    carried_tokens,
    hold_tokens,
    output_granted,
    useful_output_tokens,
)
from shared.calls import Pending
from shared.plans import Counts, Period, PeriodKind, Plan, Plans, Weights, weighted_tokens
from shared.subscriptions import Calendar, Change, subscribed
from tests.builders import NOON, generation_completed, usage_reported

FREE, PRO, ENTERPRISE = (Plans.load().of(tier) for tier in ("free", "pro", "enterprise"))
NOVEMBER = Period.containing(NOON, "month")
TOKENS = st.integers(0, 10**8)
TOTALS = st.integers(0, 10**15)
WEIGHTS = st.builds(
    Weights,
    **dict.fromkeys(
        ("input", "output", "cache_creation", "cache_read"),
        st.decimals(0, 1000, places=3, allow_nan=False, allow_infinity=False),
    ),
)
PLAIN = Weights()


def account(used: int = 0, *, held: int = 0, plan: Plan = FREE, totals: Totals | None = None) -> Account:
    totals = totals or Totals(Counts(tokens_used=used, input_tokens=used))
    standings = (
        LimitStanding.of(limit, Calendar().period(NOON, plan, limit), plan.weights, totals, held_tokens=held)
        for limit in plan.limits
    )
    return Account("user_1", plan, tuple(standings))


def refused(known: Account, *, at: datetime = NOON, beside: int = 1_000) -> Refusal:
    answer = known.reserve(input_tokens_max=beside, output_tokens_min=1, output_tokens_max=1_000, at=at)
    assert isinstance(answer, Refusal)
    return answer


def granted_of(
    left: int | None, *, asked: int, least: int = 1, beside: int = 0, weights: Weights = PLAIN
) -> int | None:
    return output_granted(left, weights, input_tokens_max=beside, output_tokens_min=least, output_tokens_max=asked)


def pending(started_at: datetime = NOON, **counts: Any) -> Pending:
    event = generation_completed(started_at=started_at, **counts)
    return Pending.of(event.id, event.data)


def test_the_usage_after_a_generation_is_the_product_pages_to_the_letter() -> None:
    known = account(totals=Totals(Counts(8_094, 5_282, 2_812)))
    assert json.loads(known.usage.model_dump_json()) == {
        "tier": "free",
        "tokensUsed": 8094,
        "tokensLimit": 108000,
        "tokensRemaining": 99906,
        "usagePercentage": 7.5,
        "tokensHeld": 0,
        "period": "month",
        "periodStart": "2026-11-01T00:00:00Z",
        "resetsAt": "2026-12-01T00:00:00Z",
        "upgradeTo": "pro",
        "costUsd": "0.00",
    }


@pytest.mark.parametrize(
    ("used", "remaining", "percentage"),
    [(0, 108_000, 0), (8_094, 99_906, 7.5), (14_594, 93_406, 13.5), (90_000, 18_000, 83.3), (108_000, 0, 100)],
)
def test_a_free_user_sees_the_numbers_of_the_product_page(used: int, remaining: int, percentage: float) -> None:
    usage = account(used).usage
    assert (usage.tokens_used, usage.tokens_remaining, usage.usage_percentage) == (used, remaining, percentage)


def test_a_spent_period_has_zero_tokens_left_not_a_negative_count() -> None:
    spent = account(108_001)
    assert (spent.usage.tokens_remaining, spent.tightest.available_tokens) == (0, 0)


def test_an_unlimited_plan_shows_nulls_and_no_percentage_however_much_is_used() -> None:
    usage = account(10**12, held=10**6, plan=ENTERPRISE).usage
    assert (usage.tokens_limit, usage.tokens_remaining, usage.usage_percentage) == (None, None, 0)
    assert (usage.tokens_used, usage.tokens_held, usage.upgrade_to) == (10**12, 10**6, None)


def test_what_is_held_is_shown_beside_what_is_left_and_not_taken_from_it() -> None:
    busy = account(8_094, held=5_000)
    assert (busy.usage.tokens_remaining, busy.usage.tokens_held) == (99_906, 5_000)
    assert busy.tightest.available_tokens == 94_906


def test_corrections_below_zero_make_no_plan_larger() -> None:
    corrected = account(-500)
    assert (corrected.usage.tokens_used, corrected.usage.tokens_remaining) == (0, 108_000)
    assert corrected.tightest.available_tokens == 108_000


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        ("day", "2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("month", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("none", None, None),
    ],
)
def test_the_period_that_is_shown_is_the_one_that_is_enforced(
    kind: PeriodKind, start: str | None, end: str | None
) -> None:
    plan = Plan(tier="any", limit_tokens=1, period=kind)
    usage = json.loads(account(plan=plan).usage.model_dump_json())
    assert (usage["period"], usage["periodStart"], usage["resetsAt"]) == (kind, start, end)


def test_a_users_time_zone_comes_before_the_plans() -> None:
    plan = Plan(tier="any", period="day", time_zone="Europe/Berlin")
    assert Calendar(None).period(NOON, plan, plan.limits[0]).start == datetime(2026, 11, 21, 23, tzinfo=UTC)
    assert Calendar("Asia/Tokyo").period(NOON, plan, plan.limits[0]).start == datetime(2026, 11, 21, 15, tzinfo=UTC)


@pytest.mark.parametrize("nowhere", ["Mars/Olympus", "", "../etc/passwd", "a" * 128, "🛤"])
def test_a_time_zone_that_nobody_knows_is_the_plans(nowhere: str) -> None:
    plan = Plan(tier="any", period="day", time_zone="Europe/Berlin")
    assert Calendar(nowhere).period(NOON, plan, plan.limits[0]) == Calendar(None).period(NOON, plan, plan.limits[0])


def test_usage_costs_what_the_plan_says() -> None:
    assert account(8_094, plan=PRO).usage.cost_usd == "0.08"
    assert account(-8_094, plan=PRO).usage.cost_usd == "0.00"


@given(TOTALS, st.integers(1, 10**15))
def test_the_percentage_has_one_decimal_rounded_half_up(used: int, limit: int) -> None:
    shown = account(used, plan=Plan(tier="any", limit_tokens=limit, period="month")).usage.usage_percentage
    assert shown == floor(Fraction(used * 1000, limit) + Fraction(1, 2)) / 10


def test_a_limit_of_zero_is_used_up_from_the_start() -> None:
    closed = account(plan=Plan(tier="any", limit_tokens=0, period="month"))
    assert (closed.usage.usage_percentage, closed.usage.tokens_remaining) == (100, 0)
    assert closed.tightest.remaining_tokens == 0


@given(TOTALS, TOTALS, TOTALS)
def test_nothing_is_ever_available_beyond_the_limit_or_below_zero(limit: int, used: int, held: int) -> None:
    known = account(used, held=held, plan=Plan(tier="any", limit_tokens=limit, period="month"))
    assert known.tightest.available_tokens == max(0, limit - used - held)


@pytest.mark.parametrize(
    ("left", "granted"), [(108_000, 4_096), (5_096, 4_096), (5_095, 4_095), (1_001, 1), (1_000, None), (0, None)]
)
def test_near_the_limit_the_output_is_clamped_to_what_fits_beside_the_input(left: int, granted: int | None) -> None:
    assert granted_of(left, asked=4_096, beside=1_000) == granted


@pytest.mark.parametrize(
    ("wanted", "least", "useful"),
    [(4_096, 1, 64), (64, 1, 64), (63, 1, 63), (1, 1, 1), (4_096, 4_096, 4_096), (4_096, 100, 100)],
)
def test_output_is_useful_from_the_plans_least_on_or_when_it_is_all_that_is_wanted(
    wanted: int, least: int, useful: int
) -> None:
    assert useful_output_tokens(FREE, output_tokens_min=least, output_tokens_max=wanted) == useful


def test_less_output_than_the_least_that_is_asked_for_is_refused() -> None:
    assert granted_of(1_500, asked=1_000, least=500, beside=1_000) == 500
    assert granted_of(1_499, asked=1_000, least=500, beside=1_000) is None


@pytest.mark.parametrize("least", [0, 1])
def test_a_generation_without_any_output_is_never_granted(least: int) -> None:
    assert granted_of(1_000, asked=1_000, least=least, beside=1_000) is None


@given(TOKENS, TOKENS, TOKENS)
def test_without_a_limit_everything_is_granted_as_asked(asked: int, least: int, beside: int) -> None:
    assert granted_of(None, asked=asked, least=least, beside=beside) == asked


@given(TOTALS, TOKENS, TOKENS, TOKENS, WEIGHTS)
def test_what_is_granted_is_the_most_that_fits_and_what_is_refused_does_not(
    left: int, asked: int, least: int, beside: int, weights: Weights
) -> None:
    def fits(output: int) -> bool:
        return hold_tokens(weights, input_tokens_max=beside, output_tokens_max=output) <= left

    granted = granted_of(left, asked=asked, least=least, beside=beside, weights=weights)

    if granted is None:
        assert not fits(max(1, least)) or max(1, least) > asked
    else:
        assert max(1, least) <= granted <= asked
        assert fits(granted)
        assert granted == asked or not fits(granted + 1)


@given(TOKENS, TOKENS, TOKENS, TOKENS, WEIGHTS)
def test_no_generation_within_its_bounds_counts_for_more_than_its_hold(
    i: int, w: int, r: int, o: int, weights: Weights
) -> None:
    counted = weighted_tokens(weights, [(None, Counts(i + w + r + o, i, o, w, r))])
    assert counted <= hold_tokens(weights, input_tokens_max=i + w + r, output_tokens_max=o)


def test_a_hold_is_as_dear_as_the_dearest_kind_of_input() -> None:
    weights = Weights(cache_creation=Decimal("1.25"), cache_read=Decimal("0.1"), output=Decimal(5))
    assert hold_tokens(weights, input_tokens_max=1_001, output_tokens_max=100) == 1_752  # 1,251.25 + 500, rounded up
    assert hold_tokens(PLAIN, input_tokens_max=1_000, output_tokens_max=100) == 1_100


def test_weights_are_applied_to_raw_totals_when_they_are_read() -> None:
    dear = FREE.model_copy(update={"weights": Weights(output=Decimal(5), cache_read=Decimal("0.1"))})
    raw = Totals(Counts(1_111, 1_000, 100, cache_read_input_tokens=11))
    assert account(totals=raw).usage.tokens_used == 1_111
    assert account(plan=dear, totals=raw).usage.tokens_used == 1_000 + 500 + 2


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=5), WEIGHTS)
def test_totals_are_weighted_as_a_whole(generations: list[tuple[int, int]], weights: Weights) -> None:
    known = account(plan=FREE.model_copy(update={"weights": weights}))
    for i, o in generations:
        known = known.including(pending(input_tokens=i, output_tokens=o))
    exact = sum((i * Fraction(weights.input) + o * Fraction(weights.output) for i, o in generations), Fraction())
    assert known.tightest.used_tokens == ceil(exact)


def test_pending_usage_of_this_period_is_included() -> None:
    assert account(100).including(pending()).usage.tokens_used == 8_194


def test_pending_usage_that_was_not_split_is_included_as_a_whole() -> None:
    report = usage_reported(tokens_used=500)
    assert account(100).including(Pending.of(report.id, report.data)).usage.tokens_used == 600


@pytest.mark.parametrize("moment", [NOVEMBER.start - timedelta(microseconds=1), NOVEMBER.end])
def test_pending_usage_of_another_period_is_not(moment: datetime) -> None:
    known = account(100)
    assert known.including(pending(moment)) == known


def test_who_has_used_everything_may_come_again_at_the_reset() -> None:
    spent = account(108_000, held=5)
    assert refused(spent) == Refusal("tokens", (8 * 24 + 12) * 3600)
    assert refused(spent, at=datetime(2026, 11, 30, 23, 59, 58, 500_000, tzinfo=UTC)).retry_after_s == 2
    assert refused(spent, at=datetime(2026, 12, 1, tzinfo=UTC)).retry_after_s == 1


def test_who_waits_for_others_holds_may_come_again_soon() -> None:
    assert refused(account(8_094, held=99_906)) == Refusal("held", RETRY_WHILE_HELD_S)


@pytest.mark.parametrize("held", [0, 500])
def test_what_does_not_fit_into_the_rest_fits_at_the_reset_and_not_sooner(held: int) -> None:
    assert refused(account(107_000, held=held)) == Refusal("tokens", (8 * 24 + 12) * 3600)


@pytest.mark.parametrize(
    ("used", "asked", "exceeds"), [(8_094, 107_937, True), (8_094, 107_936, False), (108_000, 1, False)]
)
def test_of_what_a_whole_plan_has_no_room_for_a_refusal_says_that_no_reset_helps(
    used: int, asked: int, *, exceeds: bool
) -> None:
    answer = account(used).reserve(input_tokens_max=asked, output_tokens_min=1, output_tokens_max=1_000, at=NOON)
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.exceeds_plan) == ("tokens", exceeds)


def test_a_plan_that_never_resets_names_no_time_of_its_reset() -> None:
    plan = Plan(tier="any", limit_tokens=1, period="none")
    assert refused(account(1, plan=plan)).retry_after_s == RETRY_WHILE_HELD_S


TEAM = Plan(
    tier="team",
    limits=[{"limit_tokens": 20_000, "period": "day"}, {"limit_tokens": 108_000, "period": "month"}],
)


def team(day: int, month: int, *, held: int = 0) -> Account:
    used = [Totals(Counts(tokens_used=tokens, input_tokens=tokens)) for tokens in (day, month)]
    known = account(plan=TEAM, held=held)
    both = zip(known.standings, used, strict=True)
    return known._replace(standings=tuple(standing.including(totals) for standing, totals in both))


@pytest.mark.parametrize(
    ("day", "month", "shown"),
    [
        (0, 0, ("day", 20_000)),
        (10_000, 90_000, ("day", 10_000)),
        (1_000, 95_000, ("month", 13_000)),
        (20_000, 108_000, ("month", 0)),
    ],
)
def test_the_limit_that_leaves_least_is_shown_and_of_equals_the_one_that_resets_last(
    day: int, month: int, shown: tuple[str, int]
) -> None:
    usage = team(day, month).usage
    assert (usage.period, usage.tokens_remaining) == shown


@given(st.integers(0, 30_000), st.integers(0, 120_000), st.integers(0, 30_000), st.integers(1, 20_000))
def test_what_is_granted_fits_under_every_limit_and_what_is_refused_does_not_under_one(
    day: int, month: int, held: int, asked: int
) -> None:
    known = team(day, month, held=held)
    answer = known.reserve(input_tokens_max=100, output_tokens_min=1, output_tokens_max=asked, at=NOON)
    room = min(20_000 - day, 108_000 - month)
    if isinstance(answer, Refusal):
        assert room - held < 100 + min(64, asked)
        assert (answer.reason == "held") == (room >= 100 + min(64, asked))
    else:
        assert answer.hold_tokens == 100 + answer.output_tokens <= room - held
        assert answer.output_tokens == min(asked, room - held - 100)


def test_who_reached_several_limits_may_come_again_when_the_last_of_them_resets() -> None:
    assert refused(team(20_000, 50_000)).retry_after_s == 12 * 3600
    assert refused(team(20_000, 108_000)).retry_after_s == (8 * 24 + 12) * 3600


def test_every_limit_is_told_with_its_window_and_its_reset() -> None:
    day, month = team(8_000, 98_000).limits(NOON)
    assert (day.limit_tokens, day.remaining_tokens, day.window_s, day.resets_in_s) == (20_000, 12_000, 86_400, 43_200)
    assert (month.remaining_tokens, month.window_s, month.resets_in_s) == (10_000, 30 * 86_400, 734_400)
    assert account(plan=ENTERPRISE).limits(NOON) == ()


def test_no_more_generations_run_at_once_than_the_plan_says() -> None:
    plan = FREE.model_copy(update={"concurrent_generations_max": 2})
    busy = account(plan=plan).holding(100, NOON)
    assert not isinstance(
        busy.reserve(input_tokens_max=1, output_tokens_min=1, output_tokens_max=1, at=NOON), Refusal
    )
    assert refused(busy.holding(100, NOON)) == Refusal("concurrency", RETRY_WHILE_HELD_S)
    assert not refused_at_once(busy.holding(100, NOON).released(100, NOON))


def refused_at_once(known: Account) -> bool:
    answer = known.reserve(input_tokens_max=1, output_tokens_min=1, output_tokens_max=1, at=NOON)
    return isinstance(answer, Refusal)


def test_a_dear_model_holds_and_uses_more() -> None:
    plan = FREE.model_copy(update={"weights": Weights(models={"claude-opus": Decimal(5)})})
    known = account(plan=plan)
    answer = known.reserve(
        input_tokens_max=1_000, output_tokens_min=1, output_tokens_max=1_000, model="claude-opus-5", at=NOON
    )
    assert not isinstance(answer, Refusal)
    assert (answer.output_tokens, answer.hold_tokens) == (1_000, 10_000)
    dear = known.including(pending(model="claude-opus-5", input_tokens=1_000, output_tokens=1_000))
    assert dear.usage.tokens_used == 10_000
    assert dear.including(pending(model="claude-haiku-5-5")).usage.tokens_used == 18_094


def test_top_ups_raise_the_limit_and_are_used_up_after_the_plans_tokens() -> None:
    topped_up = account(totals=Totals(Counts(tokens_used=110_000), top_up_tokens=5_000, lasting_top_up_tokens=1_000))
    usage = topped_up.usage
    assert (usage.tokens_limit, usage.tokens_remaining) == (114_000, 4_000)
    assert topped_up.tightest.beyond_tokens == 0
    assert account(totals=Totals(Counts(tokens_used=113_500), top_up_tokens=5_000)).tightest.beyond_tokens == 500


def test_what_a_period_takes_of_a_lasting_top_up_is_gone_and_the_rest_is_carried() -> None:
    first, second, third = (NOON + timedelta(days=30 * n) for n in range(3))
    assert carried_tokens([(first, 1_000)], []) == 1_000
    assert carried_tokens([(first, 1_000)], [(second, 400), (third, 300)]) == 300
    assert carried_tokens([(first, 1_000)], [(second, 5_000)]) == 0
    # What was used before there was a top-up is not taken from it.
    assert carried_tokens([(second, 1_000)], [(first, 5_000), (third, 100)]) == 900


@given(st.permutations([("free", 0), ("pro", 1), ("pro", 2), ("free", 3), ("free", 4)]))
def test_a_subscription_begins_with_the_first_change_to_its_plan_in_whatever_order_changes_arrive(
    arriving: list[tuple[str, int]],
) -> None:
    found = subscribed(Change(NOON + timedelta(days=n), f"id{n}", tier, None) for tier, n in arriving)
    assert found is not None
    assert (found.tier, found.changed_at, found.subscribed_at) == (
        "free",
        NOON + timedelta(days=4),
        NOON + timedelta(days=3),
    )
    assert subscribed([]) is None


def test_months_are_anchored_to_the_day_of_the_subscription_in_the_users_time_zone() -> None:
    plan = Plan(tier="any", limit_tokens=1, period="month", anchor="subscription")
    subscribed_at = datetime(2026, 1, 30, 20, tzinfo=UTC)
    period = Calendar("Asia/Tokyo", subscribed_at).period(NOON, plan, plan.limits[0])
    assert period == Period(datetime(2026, 10, 30, 15, tzinfo=UTC), datetime(2026, 11, 29, 15, tzinfo=UTC))
    assert Calendar().period(NOON, plan, plan.limits[0]) == NOVEMBER


@pytest.mark.parametrize(
    ("used", "percents"), [(86_399, []), (86_400, [80]), (107_999, [80]), (108_000, [80, 100]), (10**9, [80, 100])]
)
def test_each_per_cent_that_is_used_is_told(used: int, percents: list[int]) -> None:
    told = account(used).thresholds(NOON)
    assert [threshold.percent for _, threshold in told] == percents
    assert account(used, plan=ENTERPRISE).thresholds(NOON) == []
