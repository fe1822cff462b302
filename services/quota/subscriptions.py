"""Which plan each user has had, from when on, and what all of it comes to."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select

from services.quota.models import PlanChange, Subscription
from shared.bulk import Outcome, insert_once, sorted_out
from shared.database import table_of, upsert
from shared.events import SubscriptionChanged
from shared.subscriptions import Change, subscribed

subscriptions, changes = table_of(Subscription), table_of(PlanChange)


def change_subscriptions(db: Connection, events: Sequence[SubscriptionChanged]) -> list[Outcome]:
    """Note each change once, and what all changes of its user come to."""
    outcomes = insert_once(db, changes, [plan_change(event) for event in events])
    new, _ = sorted_out(events, outcomes)
    changed = changes_of(db, sorted({event.data.user_id for event in new}))
    come_to = {user_id: subscribed(known) for user_id, known in changed.items()}
    upsert(db, subscriptions, [{"user_id": user_id, **now._asdict()} for user_id, now in come_to.items() if now])
    return outcomes


def plan_change(event: SubscriptionChanged) -> dict[str, Any]:
    return {
        "event_id": event.id,
        "user_id": event.data.user_id,
        "tier": event.data.tier,
        "time_zone": event.data.time_zone,
        "changed_at": event.data.changed_at,
    }


def changes_of(db: Connection, user_ids: list[str]) -> defaultdict[str, list[Change]]:
    found: defaultdict[str, list[Change]] = defaultdict(list)
    if user_ids:
        for row in db.execute(_CHANGES, {"user_ids": user_ids}):
            found[row.user_id].append(Change(row.changed_at, row.event_id, row.tier, row.time_zone))
    return found


_CHANGES = select(changes).where(changes.c.user_id.in_(bindparam("user_ids", expanding=True)))
