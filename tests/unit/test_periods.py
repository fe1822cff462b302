"""The periods of which totals are kept: whatever way usage comes in, they are the same."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from shared.periods import Bounds, deciding, midnight
from shared.plans import Plans
from shared.subscriptions import Change
from tests.builders import NOON

PLANS = Plans.model_validate(
    {
        "default": "month",
        "plans": {
            "month": {"tier": "month", "limit_tokens": 1, "period": "month"},
            "day": {"tier": "day", "limit_tokens": 1, "period": "day"},
            "anchored": {"tier": "anchored", "limit_tokens": 1, "period": "month", "anchor": "subscription"},
            "both": {
                "tier": "both",
                "limits": [{"limit_tokens": n, "period": p} for n, p in ((1, "day"), (2, "none"))],
            },
        },
    }
)
ZONES = [None, "Pacific/Auckland", "Asia/Kolkata", "America/New_York"]

MOMENTS = st.integers(0, 5 * 24 * 60).map(lambda minutes: NOON + timedelta(minutes=minutes))
CHANGES = st.builds(
    Change, MOMENTS, st.uuids().map(str), st.sampled_from(sorted(PLANS.plans)), st.sampled_from(ZONES)
)


def one_by_one(changed: Sequence[Change], moments: Sequence[datetime]) -> set[Bounds]:
    return {bounds for moment in moments for bounds in deciding(PLANS, changed, [moment])}


@given(changed=st.lists(CHANGES, max_size=4).map(sorted), moments=st.lists(MOMENTS, max_size=8).map(sorted))
def test_what_is_used_together_and_one_by_one_decides_the_same_periods(
    changed: list[Change], moments: list[datetime]
) -> None:
    days = [list(of_day) for _, of_day in groupby(moments, midnight)]
    ends_of_days = [end for day in days for end in (day[0], day[-1])]
    found = one_by_one(changed, moments)
    assert set(deciding(PLANS, changed, moments)) == found
    assert set(deciding(PLANS, changed, ends_of_days)) == found
    assert all(any(start <= moment < end for moment in moments) for start, end in found)


@given(changed=st.lists(CHANGES, max_size=4).map(sorted), moment=MOMENTS)
def test_each_moment_is_in_a_period_that_decides(changed: list[Change], moment: datetime) -> None:
    assert any(start <= moment < end for start, end in deciding(PLANS, changed, [moment]))
