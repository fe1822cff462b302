from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import Misconfigured
from shared.plans import Counts, Limit, Period, PeriodKind, Plan, Plans, Weights, weighted_tokens, zone

KINDS: list[PeriodKind] = ["day", "month"]
ZONES = st.sampled_from((files("tzdata") / "zones").read_text("utf-8").split())
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - zone beside it
TICK = timedelta(microseconds=1)
TWO_LIMITS = """
default = "free"
[plans.free]
limit_tokens = 20_000
period = "day"
[[plans.free.limits]]
limit_tokens = 108_000
period = "month"
"""
ONLY_LISTED = """
default = "free"
[plans.free]
limits = [{ limit_tokens = 20_000, period = "day" }, { limit_tokens = 108_000, period = "month" }]
"""


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
# Clocks that go back from behind midnight to before it.
@example(at("2010-11-07T02:45Z"), "day", "America/St_Johns")
@example(at("2009-11-01T02:45Z"), "month", "America/St_Johns")
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
    limits = [[(limit.limit_tokens, limit.period) for limit in plan.limits] for plan in (free, pro, enterprise)]
    assert limits == [[(108_000, "month")], [(500_000, "month")], [(None, "month")]]
    assert [plan.upgrade_to for plan in (free, pro, enterprise)] == ["pro", "enterprise", None]


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


def weighted(weights: Weights, *counts: int) -> int:
    return weighted_tokens(weights, [(None, Counts(*counts))])


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
        ('default = "free"\n[plans.free]', "plans.free: needs a period"),
        ('default = "free"\n[plans.free]\nlimit_tokens = 5', "plans.free: needs a period"),
        (TWO_LIMITS.replace("month", "day"), "plans.free: has two limits of the same period"),
        (TWO_LIMITS.replace("limit_tokens = 108_000", ""), "plans.free.limits.0.limit_tokens: Field required"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nlimit = 5', "plans.free.limit: Extra inputs"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nlimit_tokens = -1', "plans.free.limit_tokens: "),
        ('default = "free"\n[plans.free]\nperiod = "day"\nprice_per_1k_usd = nan', "plans.free.price_per_1k_usd: "),
        ('default = "free"\n[plans.free]\nperiod = "day"\ntime_zone = "Mars"', "'Mars' is not a time zone"),
        ('default = "free"\n[plans.free]\nperiod = "day"\nweights.input = "-1"', "plans.free.weights.input: "),
        (TWO_LIMITS.replace("20_000", "true"), "plans.free.limit_tokens: must be a number"),
        ('default = "free"\n[plans.free]\nperiod = "day"\ntier = "pro"', "plans.free.tier: a plan is named by its"),
        ('default = "free"\n[plans.free]\nperiod = "day"\n[plans."a\\nb"]', "a plan's name has 1 to 128 characters"),
    ],
)
def test_what_is_wrong_with_a_plans_file_is_said_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "plans.toml"
    path.write_text(content, encoding="utf-8")
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
    assert Plan(tier="any", period="none").limits == (Limit(limit_tokens=None, period="none"),)


def test_all_limits_of_a_plan_hold(tmp_path: Path) -> None:
    path = tmp_path / "plans.toml"
    for text in (TWO_LIMITS, ONLY_LISTED, f"\ufeff{TWO_LIMITS}"):
        path.write_text(text, encoding="utf-8")
        limits = Plans.load(path).of("free").limits
        assert [(limit.limit_tokens, limit.period) for limit in limits] == [(20_000, "day"), (108_000, "month")]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('default = "gold"\n\n[plans.free]\nperiod = "day"', 1),
        ('# Plans\ndefault = "free"\n\n[plans.free]\nperiod = "day"\nprice = 5', 6),
        ('default = "free"\n[plans.free]\nperiod = "day"\n\n[plans.free.weights]\ninput = "x"', 6),
        ('default = "free"\nplans.free.period = "week"', 2),
        ('default = "free"\n[plans]\nfree = { period = "week" }', 3),
        ('default = "free"\n[plans."a plan"]\nperiod = "day"\n[plans.free]\nperiod = "week"', 5),
        ('default = "free"\n[plans."a plan"]\nperiod = "week"', 3),
        ('default = "free"\n[plans.free]\nlimit_tokens = 5', 2),
        ('default = "free"\n[plans.free]\nperiod = "day"\nperiod = "day"\n', 4),
        (TWO_LIMITS + '[[plans.free.limits]]\nperiod = "week"\nlimit_tokens = 5', 10),
        (TWO_LIMITS.replace("20_000", "true"), 4),
        (TWO_LIMITS.replace("108_000", "false"), 7),
        ('default = "free"\n[plans.free]\nperiod = "day"\nconcurrent_generations_max = true', 4),
        ('default = "free"\n[plans.free]\nperiod = "day"\nalert_percents = [80, true]', 4),
        ('default = "free"\n[plans.free]\nperiod = "day"\ntier = "pro"', 4),
        ('default = "free"\n[plans.free]\nperiod = "day"\n[plans.""]\nperiod = "day"', 4),
        (f'default = "free"\n[plans.free]\nperiod = "day"\n[plans.{"x" * 129}]\nperiod = "day"', 4),
        ('\ufeffdefault = "free"\n[plans.free]\nperiod = "week"', 3),
    ],
)
def test_what_is_wrong_with_a_plans_file_is_said_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "plans.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(Misconfigured, match=rf"line {line}\b"):
        Plans.load(path)


@pytest.mark.parametrize(
    ("day", "moment", "start", "end"),
    [
        (31, "2026-01-31T00:00Z", "2026-01-31T00:00Z", "2026-02-28T00:00Z"),
        (31, "2026-02-27T23:59:59.999Z", "2026-01-31T00:00Z", "2026-02-28T00:00Z"),
        (31, "2026-02-28T00:00Z", "2026-02-28T00:00Z", "2026-03-31T00:00Z"),
        (31, "2026-04-29T00:00Z", "2026-03-31T00:00Z", "2026-04-30T00:00Z"),
        (31, "2024-03-01T00:00Z", "2024-02-29T00:00Z", "2024-03-31T00:00Z"),
        (30, "2026-03-01T00:00Z", "2026-02-28T00:00Z", "2026-03-30T00:00Z"),
        (15, "2026-01-14T12:00Z", "2025-12-15T00:00Z", "2026-01-15T00:00Z"),
    ],
)
def test_an_anchored_month_begins_on_its_day_or_on_the_last_of_a_shorter_month(
    day: int, moment: str, start: str, end: str
) -> None:
    assert Period.containing(at(moment), "month", anchor_day=day) == Period(at(start), at(end))


@given(MOMENTS, ZONES, st.integers(1, 31))
def test_anchored_months_touch_and_cover_every_moment(moment: datetime, time_zone: str, day: int) -> None:
    def containing(moment: datetime) -> Period:
        return Period.containing(moment, "month", time_zone, anchor_day=day)

    period = containing(moment)
    assert period.end is not None
    assert period.covers(moment)
    assert 27 * 24 < hours(period) < 32 * 24
    assert containing(period.start) == containing(period.end - TICK) == period
    assert containing(period.end).start == period.end
    assert containing(period.start - TICK).end == period.start


@pytest.mark.parametrize(
    ("time_zone", "boundary"),
    [
        ("Asia/Tokyo", "2026-11-30T15:00:00.000Z"),
        ("America/New_York", "2026-12-01T05:00:00.000Z"),
        ("Asia/Kolkata", "2026-11-30T18:30:00.000Z"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_period_ends_to_the_millisecond(time_zone: str, boundary: str, kind: PeriodKind) -> None:
    instant, millisecond = at(boundary), timedelta(milliseconds=1)
    assert Period.containing(instant - millisecond, kind, time_zone).end == instant
    assert Period.containing(instant, kind, time_zone).start == instant
    assert Period.containing(instant + millisecond, kind, time_zone).start == instant


@pytest.mark.parametrize("name", ["localtime", "posixrules", "posix/Europe/Berlin", "europe/berlin", "", "../zones"])
def test_what_is_another_zone_on_another_machine_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="is not a time zone"):
        zone(name)


def test_a_model_weighs_what_the_longest_name_that_fits_says() -> None:
    weights = Weights(output=Decimal(2), models={"claude-opus": Decimal(5), "claude-opus-4-8": Decimal(3)})
    factors = {
        model: weights.of_model(model)
        for model in ("claude-opus-5", "claude-opus-4-8", "claude-opus-4-8-20260101", "claude-opusculum", None)
    }
    assert list(factors.values()) == [5, 3, 3, 1, 1]
    counts = Counts(tokens_used=30, input_tokens=10, output_tokens=20)
    assert weighted_tokens(weights, [("claude-opus-5", counts), (None, counts)]) == 5 * 50 + 50
    assert weighted_tokens(weights, [("claude-opus-5", Counts(tokens_used=7))]) == 35  # a report that was not split
