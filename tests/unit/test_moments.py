"""How moments are written where a database has no type for them."""

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from shared.database import iso, isos

ZONES = st.one_of(
    st.just(UTC),
    st.timezones(),
    st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9998, 12, 30), timezones=ZONES)  # noqa: DTZ001 - as it wants them
WHOLE_SECONDS = MOMENTS.map(lambda moment: moment.replace(microsecond=0))


@given(st.lists(st.one_of(st.none(), MOMENTS, WHOLE_SECONDS)))
def test_many_moments_are_written_as_each_would_be_alone(moments: list[datetime | None]) -> None:
    assert isos(moments) == [moment and iso(moment) for moment in moments]


@given(MOMENTS, MOMENTS)
def test_moments_that_are_written_sort_by_time(one: datetime, other: datetime) -> None:
    assert (iso(one) < iso(other)) == (one < other)
