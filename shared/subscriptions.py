"""Which plan a user has had at each moment, and where its periods begin. Pure rules, the same for all who ask."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

from shared.plans import Limit, Period, Plan, zone


@dataclass(frozen=True, slots=True)
class Calendar:
    """Where a user's days and months begin: their time zone, and the day on which they subscribed."""

    time_zone: str | None = None
    subscribed_at: datetime | None = None

    def period(self, moment: datetime, plan: Plan, limit: Limit) -> Period:
        """A time zone that this machine does not know is the plan's: one odd event stops nobody."""
        there = self._zone(plan)
        anchor_day = 1
        if plan.anchor == "subscription" and self.subscribed_at is not None:
            anchor_day = self.subscribed_at.astimezone(there).day
        return Period.containing(moment, limit.period, there.key, anchor_day=anchor_day)

    def _zone(self, plan: Plan) -> ZoneInfo:
        try:
            return zone(self.time_zone or plan.time_zone)
        except ValueError:
            return zone(plan.time_zone)


class Change(NamedTuple):
    """One change of a user's plan. They sort by time; of two at once, by id."""

    changed_at: datetime
    event_id: str
    tier: str
    time_zone: str | None


class Subscribed(NamedTuple):
    """What all changes come to: the newest, and since when the user has had its plan without a break."""

    tier: str
    time_zone: str | None
    changed_at: datetime
    subscribed_at: datetime
    event_id: str


def subscribed(changes: Iterable[Change]) -> Subscribed | None:
    """The same in whatever order the changes arrived; None without any."""
    found: Subscribed | None = None
    for change in sorted(changes):
        since = found.subscribed_at if found and found.tier == change.tier else change.changed_at
        found = Subscribed(change.tier, change.time_zone, change.changed_at, since, change.event_id)
    return found
