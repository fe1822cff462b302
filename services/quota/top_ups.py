"""What is left of top-ups that last until they are used up: a fold over periods, of which nothing is stored."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, select

from services.quota.domain import LimitStanding, Totals, carried_tokens
from services.quota.subscriptions import changes_of
from services.quota.totals import NOTHING, settlements, sums_of_settlements, totals, totals_of
from shared.periods import plan_and_calendar
from shared.plans import Limit, Period, Plan, Plans
from shared.subscriptions import Change, subscribed


def carried(db: Connection, plans: Plans, user_id: str, limit: Limit, period: Period, *, at: datetime) -> int:
    """What earlier periods left of the top-ups that outlive them."""
    lasting = select(settlements.c.started_at, settlements.c.lasting_top_up_tokens).where(
        settlements.c.user_id == user_id,
        settlements.c.lasting_top_up_tokens != 0,
        settlements.c.started_at < period.start,
    )
    top_ups = [(row.started_at, int(row.lasting_top_up_tokens)) for row in db.execute(lasting)]
    if not top_ups:
        return 0
    spent = []
    since = min(moment for moment, _ in top_ups)
    for lived in _lived_through(db, plans, user_id, limit, since=since, at=at):
        if (over := lived.until(period.start)) is None:
            continue
        had = over.totals or sums_of_settlements(db, over.period.bounds, [user_id]).get(user_id, NOTHING)
        standing = LimitStanding.of(over.limit, over.period, over.plan.weights, had)
        spent.append((over.period.bounds[1], standing.beyond_tokens))
    return carried_tokens(top_ups, spent)


class _Lived(NamedTuple):
    """A period as a user had it, with the limit of their plan that stands for one of today's.

    `totals` are of all of it; None where nobody has kept them, since it was ended early.
    """

    plan: Plan
    limit: Limit
    period: Period
    totals: Totals | None = None

    @classmethod
    def at(cls, plans: Plans, changed: Sequence[Change], limit: Limit, moment: datetime) -> "_Lived":
        """Under the plan that these changes come to."""
        plan, calendar = plan_and_calendar(plans, subscribed(changed))
        had = next((had for had in plan.limits if had.period == limit.period), plan.limits[0])
        return cls(plan, had, calendar.period(moment, plan, had))

    def until(self, moment: datetime) -> "_Lived | None":
        """What of it was over when the next began."""
        start, end = self.period.bounds
        if end <= moment:
            return self
        return self._replace(period=Period(start, moment), totals=None) if start < moment else None


def _lived_through(
    db: Connection, plans: Plans, user_id: str, limit: Limit, *, since: datetime, at: datetime
) -> list[_Lived]:
    """The periods that ended from `since` to `at`, each under the plan that it ended with, none twice.

    A change of plan or time zone may end one early, or go back to before the beginning of one: what was used
    belongs to the last period that has it.
    """
    changed = sorted(changes_of(db, [user_id])[user_id])
    ended: list[tuple[datetime, _Lived]] = []
    past = select(totals).where(totals.c.user_id == user_id, totals.c.period_end > since, totals.c.period_end <= at)
    for row in db.execute(past):
        known = [change for change in changed if change.changed_at < row.period_end]
        whole = _Lived.at(plans, known, limit, row.period_start)
        if whole.period.bounds == (row.period_start, row.period_end):
            ended.append((row.period_end, whole._replace(totals=totals_of(row))))
    for nth, change in enumerate(changed):
        if since < change.changed_at <= at:
            before, after = (_Lived.at(plans, changed[:n], limit, change.changed_at) for n in (nth, nth + 1))
            if cut := before.until(after.period.start):
                ended.append((change.changed_at, cut))
    ended.sort(key=lambda lived: lived[0])
    through: list[_Lived] = []
    for _, lived in ended:
        while through:
            if over := through.pop().until(lived.period.start):
                through.append(over)
                break
        through.append(lived)
    return through
