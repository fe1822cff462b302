"""Sums: the ledger's days and quota's totals, held against what the events of the stream come to."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from services.ledger.findings import Difference
from services.ledger.scope import Scope
from services.ledger.scratch import DAILY, SUMS, Day, Scratch, Total
from services.ledger.snapshots import Row, Snapshot, as_sqlite_has_it, finite
from shared.periods import deciding
from shared.plans import COUNTS, Plans
from shared.subscriptions import Change

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
# In PostgreSQL: as text, for a day may be infinite, or of a year that Python has no word for.
_DAY = (
    "CASE WHEN extract(year FROM usage_date) BETWEEN 1 AND 9999 THEN to_char(usage_date, 'YYYY-MM-DD')"
    " ELSE CAST(usage_date AS text) END"
)
_COUNTED = [int] * len(COUNTS)
TOTALS, DAYS = "quota.usage_totals", "ledger.usage_daily"


def compare_days(ledger: Snapshot, scope: Scope, scratch: Scratch) -> int:
    """How many there are. `scratch` has all events, and is told what differs."""
    first = (scope.first or EARLIEST).astimezone(UTC).date()
    last = (scope.last or LATEST).astimezone(UTC).date()
    found = _days(ledger, scope)
    kept = scratch.keep_days(found, first=first.isoformat(), last=last.isoformat())
    for day in scratch.differing_days():
        scratch.add(_differing_day(day))
    return kept


def _days(ledger: Snapshot, scope: Scope) -> Iterator[Row]:
    """Whole days, those at the ends of what is looked at included; without an end whatever stands for a day."""
    conditions = {
        "user_id = ?": scope.user_id,
        "usage_date >= ?": scope.first and ledger.day(scope.first.astimezone(UTC).date()),
        "usage_date <= ?": scope.last and ledger.day(scope.last.astimezone(UTC).date()),
    }
    where, values = _where(conditions)
    columns = ", ".join(("user_id", "usage_date" if ledger.is_sqlite else _DAY, "model", *DAILY))
    for found, day, *counts in ledger.rows(f"SELECT {columns} FROM usage_daily{where}", *values):  # noqa: S608
        yield (found, str(day), *counts)


def _differing_day(day: Day) -> Difference:
    """What is expected of it names the day; of a row that should not be there, what was found."""
    which = {"usage_date": day.usage_date, "model": day.model}
    expected, found = (dict(zip(DAILY, sums, strict=True)) if sums else None for sums in (day.expected, day.found))
    if expected and found:
        names = [name for name in DAILY if expected[name] != found[name]]
        parts = (which | {name: expected[name] for name in names}, {name: found[name] for name in names})
        return Difference(DAYS, "differs", None, day.user_id, *parts)
    if expected:
        return Difference(DAYS, "missing", None, day.user_id, which | expected, None)
    return Difference(DAYS, "unexplained", None, day.user_id, None, which | (found or {}))


def compare_totals(quota: Snapshot, plans: Plans, scope: Scope, scratch: Scratch) -> int:
    """How many there are. `scratch` has all events and changes of plans, and is told what differs."""
    scratch.keep_totals(_totals(quota, scope))
    compared = 0
    for total in scratch.totals():
        compared += 1
        if difference := _differing(total):
            scratch.add(difference)
    scratch.keep_periods(_deciding(plans, scratch))
    first, last = scope.first or EARLIEST, scope.last or LATEST
    for user_id, start, end, *sums in scratch.lacking_totals(as_sqlite_has_it(first), as_sqlite_has_it(last)):
        expected = {"period_start": start, "period_end": end} | dict(zip(SUMS, sums, strict=True))
        scratch.add(Difference(TOTALS, "missing", None, user_id, expected, None))
    return compared


def _deciding(plans: Plans, scratch: Scratch) -> Iterator[Row]:
    """Every period that has to have a total, whichever others cover its events, too."""
    for user_id, moments in scratch.moments_used():
        changed = [
            Change(datetime.fromisoformat(change.changed_at), change.event_id, change.tier, change.time_zone)
            for change in scratch.changes_of(user_id)
        ]
        used = [datetime.fromisoformat(moment) for moment in moments]
        for start, end in set(deciding(plans, changed, used)):
            yield (user_id, as_sqlite_has_it(start), as_sqlite_has_it(end))


def _totals(quota: Snapshot, scope: Scope) -> Iterator[Row]:
    """Totals whose periods have something of what is looked at."""
    conditions = {
        "user_id = ?": scope.user_id,
        "period_end > ?": scope.first and quota.time(scope.first),
        "period_start <= ?": scope.last and quota.time(scope.last),
    }
    where, values = _where(conditions)
    period = [name if quota.is_sqlite else finite(name) for name in ("period_start", "period_end")]
    columns = ", ".join(("user_id", *period, *SUMS, "models"))
    for user_id, start, end, *counts in quota.rows(f"SELECT {columns} FROM usage_totals{where}", *values):  # noqa: S608
        yield (user_id, _text(start), _text(end), *counts)


def _where(conditions: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Those of which there is a value, and the values."""
    asked = {condition: value for condition, value in conditions.items() if value is not None}
    return (f" WHERE {' AND '.join(asked)}" if asked else ""), list(asked.values())


def _text(moment: Any) -> str | None:
    """None of what is no moment: it covers nothing."""
    if isinstance(moment, datetime):
        return as_sqlite_has_it(moment)
    return moment if isinstance(moment, str) and _MOMENT.fullmatch(moment) else None


def _differing(total: Total) -> Difference | None:
    """The total and the sum of its user's events in its period, where they are not the same."""
    if not isinstance(total.user_id, str) or None in (total.period_start, total.period_end):
        told = {"period_start": total.period_start, "period_end": total.period_end}
        found = told | dict(zip(SUMS, total.found, strict=True))
        return Difference(TOTALS, "unexplained", None, total.user_id, None, found)
    expected = dict(zip(SUMS, total.sums, strict=True)) | _by_model(total.models)
    found = dict(zip(SUMS, total.found, strict=True)) | _by_model(_read_models(total.found_models))
    names = [name for name in expected | found if expected.get(name, 0) != found.get(name, 0)]
    if not names:
        return None
    period = {"period_start": total.period_start, "period_end": total.period_end}
    return Difference(
        TOTALS,
        "differs",
        None,
        total.user_id,
        period | {name: expected.get(name, 0) for name in names},
        {name: found.get(name, 0) for name in names},
    )


def _by_model(models: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One that used nothing may be named or not."""
    return {f"models.{model}": list(counts) for model, counts in models.items() if any(counts)}


def _read_models(text: str) -> dict[str, Any]:
    """As quota needs to read them; what else there is, as it is: quota can count nothing there."""
    try:
        models: dict[str, Any] = json.loads(text)
        if all(isinstance(counts, list) and list(map(type, counts)) == _COUNTED for counts in models.values()):
            return models
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return {"": [text or "nothing"]}
