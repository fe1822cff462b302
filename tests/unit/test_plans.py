from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import Misconfigured
from shared.plans import Period, PeriodKind, Plan, Plans, Weights, weighted_tokens

KINDS: list[PeriodKind] = ["day", "month"]
ZONES = st.sampled_from(sorted(available_timezones()))
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - zone beside it
TICK = timedelta(microseconds=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def hours(period: Period) -> float:
    assert period.end is not None
    return (period.end - period.start) / timedelta(hours=1)


@given(MOMENTS, st.sampled_from(KINDS), ZONES)
# Clocks that change at midnight, a midnight that comes twice, and a day that never was.
@example(at("2018-11-04T12:00Z"), "day", "America/Sao_Paulo")
@example(at("2026-11-01T05:30Z"), "day", "America/Havana")
@example(at("2011-12-30T09:00Z"), "day", "Pacific/Apia")
def test_every_moment_lies_in_exactly_one_period_and_periods_touch(
    moment: datetime, kind: PeriodKind, time_zone: str
) -> None:
    period = Period.containing(moment, kind, time_zone)
    assert period.end is not None
    assert period.covers(moment)
    assert not period.covers(period.end)
    assert not period.covers(period.start - TICK)
    assert Period.containing(period.start, kind, time_zone) == period
    assert Period.containing(period.end - TICK, kind, time_zone) == period
    assert Period.containing(period.end, kind, time_zone).start == period.end
    assert Period.containing(period.start - TICK, kind, time_zone).end == period.start


@given(MOMENTS, MOMENTS, st.sampled_from(KINDS), ZONES)
def test_two_moments_share_a_period_or_their_periods_are_apart(
    one: datetime, other: datetime, kind: PeriodKind, time_zone: str
) -> None:
    first, second = sorted(
        (Period.containing(moment, kind, time_zone) for moment in (one, other)), key=lambda period: period.start
    )
    assert first.end is not None
    assert first == second or first.end <= second.start


@given(MOMENTS, ZONES)
def test_a_period_is_the_same_in_whatever_zone_the_moment_is_told(moment: datetime, time_zone: str) -> None:
    there = Period.containing(moment, "day", time_zone).start.astimezone()
    assert Period.containing(there, "day", time_zone) == Period.containing(there.astimezone(UTC), "day", time_zone)


@pytest.mark.parametrize(
    ("moment", "start", "end"),
    [
        ("2026-11-22T12:00Z", "2026-11-01T00:00Z", "2026-12-01T00:00Z"),
        ("2026-12-31T23:59:59.999999Z", "2026-12-01T00:00Z", "2027-01-01T00:00Z"),
        ("2026-01-31T00:00Z", "2026-01-01T00:00Z", "2026-02-01T00:00Z"),
        ("2024-02-29T12:00Z", "2024-02-01T00:00Z", "2024-03-01T00:00Z"),
        ("2100-02-28T23:59Z", "2100-02-01T00:00Z", "2100-03-01T00:00Z"),
        ("2026-12-01T00:30+01:00", "2026-11-01T00:00Z", "2026-12-01T00:00Z"),
    ],
)
def test_a_month_is_a_calendar_month_in_utc(moment: str, start: str, end: str) -> None:
    assert Period.containing(at(moment), "month") == Period(at(start), at(end))


def test_a_plans_time_zone_moves_its_midnights() -> None:
    late = at("2026-11-30T20:00Z")
    assert Period.containing(late, "month", "Asia/Tokyo") == Period(at("2026-11-30T15:00Z"), at("2026-12-31T15:00Z"))
    assert Period.containing(late, "day", "Asia/Tokyo").start == at("2026-11-30T15:00Z")


@pytest.mark.parametrize(
    ("noon", "length"),
    [("2026-03-29T12:00Z", 23), ("2026-06-21T12:00Z", 24), ("2026-10-25T12:00Z", 25), ("2024-02-29T12:00Z", 24)],
)
def test_a_day_is_as_long_as_the_clocks_of_its_zone_make_it(noon: str, length: int) -> None:
    assert hours(Period.containing(at(noon), "day", "Europe/Berlin")) == length


def test_a_month_in_which_clocks_change_is_an_hour_shorter() -> None:
    assert hours(Period.containing(at("2026-03-15T12:00Z"), "month", "Europe/Berlin")) == 31 * 24 - 1


def test_a_plan_without_periods_never_resets() -> None:
    period = Period.containing(at("2026-11-22T12:00Z"), "none")
    assert period.end is None
    assert period.covers(at("9998-12-31T00:00Z"))


def test_the_file_that_is_shipped_has_the_plans_of_the_product_page() -> None:
    plans = Plans.load()
    free, pro, enterprise = (plans.of(tier) for tier in ("free", "pro", "enterprise"))
    assert plans.default == "free"
    assert [plan.limit_tokens for plan in (free, pro, enterprise)] == [108_000, 500_000, None]
    assert [plan.upgrade_to for plan in (free, pro, enterprise)] == ["pro", "enterprise", None]
    assert {plan.period for plan in (free, pro, enterprise)} == {"month"}


@pytest.mark.parametrize("tier", [None, "", "a plan of last year"])
def test_without_a_known_plan_a_user_has_the_default_one(tier: str | None) -> None:
    assert Plans.load().of(tier).tier == "free"


@pytest.mark.parametrize(
    ("tier", "tokens", "cost_usd"),
    [
        ("free", 108_000, "0.00"),
        ("pro", 0, "0.00"),
        ("pro", 499, "0.00"),
        ("pro", 500, "0.01"),
        ("pro", 8_094, "0.08"),
        ("pro", 500_000, "5.00"),
        ("enterprise", 10**12, "0.00"),
    ],
)
def test_tokens_cost_what_the_plan_says_rounded_to_cents(tier: str, tokens: int, cost_usd: str) -> None:
    assert str(Plans.load().of(tier).cost_usd(tokens)) == cost_usd


def weighted(weights: Weights, tokens_used: int, *split: int) -> int:
    names = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return weighted_tokens(weights, tokens_used=tokens_used, **dict(zip(names, split, strict=True)))


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_with_weights_of_one_a_token_is_a_token(i: int, o: int, w: int, r: int) -> None:
    assert weighted(Weights(), i + o + w + r, i, o, w, r) == i + o + w + r


def test_each_kind_of_token_has_a_weight_of_its_own() -> None:
    weights = Weights(input=Decimal(1), output=Decimal(5), cache_creation=Decimal("1.25"), cache_read=Decimal("0.1"))
    assert weighted(weights, 1111, 1000, 100, 10, 1) == 1000 + 500 + 13  # 12.5 + 0.1, rounded up once


def test_tokens_that_were_not_split_count_once_whatever_the_weights() -> None:
    assert weighted(Weights(input=Decimal(0), output=Decimal(9)), 500, 0, 0, 0, 0) == 500


def test_a_weight_of_zero_makes_tokens_free() -> None:
    assert weighted(Weights(cache_read=Decimal(0)), 110, 10, 0, 0, 100) == 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("default =", "cannot be read"),
        ("", "default: Field required"),
        ('default = "free"', "plans: Dictionary should have at least 1 item"),
        ("plans = 5", "is wrong"),
        ('default = "free"\nplans.free = 5', "is wrong"),
        ('default = "gold"\n[plans.free]\nperiod = "day"', "there is no plan named 'gold'"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nupgrade_to = "gold"', "there is no plan named 'gold'"),
        ('default = "free"\n[plans.free]\nperiod = "week"', "plans.free.period: Input should be 'day', 'month' or"),
        ('default = "free"\n[plans.free]', "plans.free.period: Field required"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nlimit = 5', "plans.free.limit: Extra inputs"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nlimit_tokens = -1', "plans.free.limit_tokens: "),
        ('default = "free"\n[plans.free]\nperiod = "day"\nprice_per_1k_usd = nan', "plans.free.price_per_1k_usd: "),
        ('default = "free"\n[plans.free]\nperiod = "day"\ntime_zone = "Mars"', "'Mars' is not a time zone"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nweights.input = "-1"', "plans.free.weights.input: "),
    ],
)
def test_what_is_wrong_with_a_plans_file_is_said_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "plans.toml"
    path.write_text(content)
    with pytest.raises(Misconfigured) as problem:
        Plans.load(path)
    assert words in str(problem.value)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_plans_file_that_is_missing_or_not_text_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("missing.toml", "bytes.toml", ""):
        with pytest.raises(Misconfigured, match="cannot be read"):
            Plans.load(tmp_path / name)


def test_a_plan_without_a_limit_is_unlimited() -> None:
    assert Plan(tier="any", period="none").limit_tokens is None
