"""Holds: no event tells which are open, but some cannot be."""

from datetime import datetime
from typing import Any

from services.ledger.findings import Difference
from services.ledger.scope import Scope
from services.ledger.scratch import Scratch
from services.ledger.snapshots import Snapshot, as_sqlite_has_it, finite
from shared.calls import HOLD_TTL


def look_for_impossible_holds(quota: Snapshot, scope: Scope, scratch: Scratch) -> None:
    """Quota lets a hold go in the transaction that settles its generation, and makes none beyond HOLD_TTL."""
    of_user, values = ("", ()) if scope.user_id is None else (" WHERE user_id = ?", (scope.user_id,))
    times = [name if quota.is_sqlite else finite(name) for name in ("started_at", "expires_at")]
    settled = "generation_id IN (SELECT event_id FROM settlements)"
    columns = ", ".join(("generation_id", "user_id", "tokens", settled, *times))
    for hold, user_id, tokens, is_settled, *moments in quota.rows(f"SELECT {columns} FROM holds{of_user}", *values):  # noqa: S608
        started_at, expires_at = map(_moment, moments)
        is_within = started_at and expires_at and expires_at - started_at <= HOLD_TTL
        if is_settled or not is_within:
            told = {"tokens": tokens, "started_at": _told(started_at), "expires_at": _told(expires_at)}
            scratch.add(Difference("quota.holds", "held", hold, user_id, None, told))


def _moment(value: Any) -> datetime | None:
    """None of what is no moment."""
    try:
        return value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _told(moment: datetime | None) -> str | None:
    return as_sqlite_has_it(moment) if moment else None
