"""What an audit expects: the tables with their columns, and what quota should have made of the events."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from typing import Any

from services.ledger import store
from services.ledger.scratch import SUMS, Change
from services.ledger.snapshots import Layout
from shared.events import GenerationCompleted, UsageAdjusted
from shared.plans import COUNTS
from shared.streams import LEDGER, QUOTA

USAGE = Layout(LEDGER, "usage", tuple(store.usage.c.keys()), "created_at")
CHANGES = Layout(LEDGER, "subscription_changes", tuple(store.subscription_changes.c.keys()), "changed_at")
SETTLEMENTS = Layout(QUOTA, "settlements", ("event_id", "user_id", "started_at", *SUMS, "model"), "started_at")
PLAN_CHANGES = Layout(QUOTA, "plan_changes", ("event_id", "user_id", "tier", "time_zone", "changed_at"), "changed_at")
SUBSCRIPTIONS = Layout(
    QUOTA,
    "subscriptions",
    ("user_id", "tier", "time_zone", "changed_at", "subscribed_at", "event_id"),
    "changed_at",
)

Uses = GenerationCompleted | UsageAdjusted


def settlement(event: Uses) -> dict[str, Any]:
    """What quota should have counted, said here once more: an audit does not ask those whom it audits."""
    record: dict[str, Any] = dict.fromkeys(SUMS, 0) | {"event_id": event.id, "user_id": event.subject}
    if isinstance(event, GenerationCompleted):
        data = event.data
        counts = {name: getattr(data, name) or 0 for name in COUNTS}
        return record | counts | {"started_at": data.started_at, "model": data.model}
    adjustment = event.data
    topped_up = "lasting_top_up_tokens" if adjustment.outlives_period else "top_up_tokens"
    counts = {"tokens_used": adjustment.tokens_used, topped_up: adjustment.top_up_tokens}
    return record | counts | {"started_at": adjustment.effective_at, "model": None}


def subscribed(changes: Iterable[Change]) -> Iterator[dict[str, Any]]:
    """What a user's changes come to, user by user, oldest first: the newest, and since when it has its tier."""
    for user_id, told in groupby(changes, key=lambda change: change.user_id):
        newest: Change | None = None
        since = ""
        for change in told:
            if newest is None or newest.tier != change.tier:
                since = change.changed_at
            newest = change
        assert newest is not None  # noqa: S101 - a group has at least one
        yield {
            "user_id": user_id,
            "tier": newest.tier,
            "time_zone": newest.time_zone,
            "changed_at": datetime.fromisoformat(newest.changed_at),
            "subscribed_at": datetime.fromisoformat(since),
            "event_id": newest.event_id,
        }
