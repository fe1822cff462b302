"""The periods of which totals are kept: those that decide something about usage. Pure."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from shared.plans import FOR_EVER, Period, Plan, Plans
from shared.subscriptions import Calendar, Change, Subscribed, subscribed

ALWAYS = Period.containing(FOR_EVER, "none")

Bounds = tuple[datetime, datetime]


def deciding(plans: Plans, changed: Sequence[Change], moments: Sequence[datetime]) -> Iterator[Bounds]:
    """The periods that usage of these moments falls into, under the plan of then and under that with which the
    period ends, which decides what is carried from it.

    `changed` and `moments` are sorted; of a day in UTC its first and its last moment stand for all. What comes of
    moments together comes of them one by one, too. Some periods come twice.
    """
    for had in _had(plans, changed):
        for period_at in had.periods:
            since = ALWAYS.start if had.begun is None else period_at(had.begun).start
            yield from _covering(moments, since, had.ended or FOR_EVER, period_at)


def decided_since(plans: Plans, changed: Sequence[Change], moment: datetime) -> datetime:
    """Since when a change of that moment decides: its periods, and those of later changes, may begin before it."""
    later = [had for had in _had(plans, changed) if had.begun is not None and had.begun >= moment]
    return min(period_at(had.begun).start for had in later for period_at in had.periods if had.begun)


def plans_had(plans: Plans, changed: Sequence[Change]) -> Iterator[tuple[Plan, Bounds]]:
    """Each plan that a user had, from one change until the next: together they are all of time, and none twice."""
    for had in _had(plans, changed):
        yield had.plan, (had.begun or ALWAYS.start, had.ended or FOR_EVER)


def midnight(moment: datetime) -> datetime:
    """That in UTC with which the moment's day begins."""
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def plan_and_calendar(plans: Plans, come_to: Subscribed | None) -> tuple[Plan, Calendar]:
    """Of somebody who never chose, the default plan and its calendar."""
    if come_to is None:
        return plans.of(None), Calendar()
    return plans.of(come_to.tier), Calendar(come_to.time_zone, come_to.subscribed_at)


class _Had(NamedTuple):
    """A plan that a user had from one change until the next: for each limit, its period at a moment."""

    plan: Plan
    periods: list[Callable[[datetime], Period]]
    begun: datetime | None
    ended: datetime | None


def _had(plans: Plans, changed: Sequence[Change]) -> Iterator[_Had]:
    changed_at = [change.changed_at for change in changed]
    for nth, (begun, ended) in enumerate(zip([None, *changed_at], [*changed_at, None], strict=True)):
        plan, calendar = plan_and_calendar(plans, subscribed(changed[:nth]))
        periods = [partial(calendar.period, plan=plan, limit=limit) for limit in plan.limits]
        yield _Had(plan, list[Callable[[datetime], Period]](periods), begun, ended)


def _covering(
    moments: Sequence[datetime], since: datetime, until: datetime, period_at: Callable[[datetime], Period]
) -> Iterator[Bounds]:
    """The periods of one kind that cover moments from `since` to the end of the day of `until`."""
    while (nth := bisect_left(moments, since)) < len(moments) and midnight(moments[nth]) < until:
        start, since = period_at(moments[nth]).bounds
        yield start, since
