"""What users have used: their settlements, and the sum of each period, which is always equal to them."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from pydantic_core import to_json
from sqlalchemy import ColumnElement, Connection, Select, Text, bindparam, cast, func, select

from services.quota.domain import Account, Totals
from services.quota.models import Settlement, UsageTotal
from services.quota.subscriptions import changes_of, subscriptions
from shared.bulk import listed, update_each
from shared.database import UtcDateTime, insert_new, is_sqlite, table_of
from shared.events import GenerationCompleted, SubscriptionChanged, UsageAdjusted
from shared.periods import Bounds, decided_since, deciding, midnight
from shared.plans import COUNTS, Counts, Plans

settlements, totals = table_of(Settlement), table_of(UsageTotal)
NOTHING = Totals()
SUMS = (*COUNTS, "top_up_tokens", "lasting_top_up_tokens")
_NO_COUNTS = dict.fromkeys(SUMS, 0)


def settlement(event: GenerationCompleted | UsageAdjusted) -> dict[str, Any]:
    row: dict[str, Any] = {"event_id": event.id, "user_id": event.data.user_id} | _NO_COUNTS
    if isinstance(event, GenerationCompleted):
        generation = event.data
        counts = {name: getattr(generation, name) or 0 for name in COUNTS}
        return row | counts | {"started_at": generation.started_at, "model": generation.model}
    adjustment = event.data
    topped_up = "lasting_top_up_tokens" if adjustment.outlives_period else "top_up_tokens"
    counts = {"tokens_used": adjustment.tokens_used, topped_up: adjustment.top_up_tokens}
    return row | counts | {"started_at": adjustment.effective_at, "model": None}


class Kept(NamedTuple):
    """A total of a user, and the plan that the user has by now."""

    user_id: str
    period_start: datetime
    period_end: datetime
    tokens_used: int
    models: str
    tier: str | None
    time_zone: str | None
    changed_at: datetime | None
    subscribed_at: datetime | None


def add_to_totals(db: Connection, arrived: Sequence[dict[str, Any]]) -> dict[str, list[Kept]]:
    """Add to every total that covers a settlement: also to one of a plan that the user had before.

    Returns each user's totals of these periods and later ones as they are then, where any are kept.
    """
    if not arrived:
        return {}
    by_user: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for settlement in arrived:
        by_user[settlement["user_id"]].append(settlement)
    known = {"user_ids": json.dumps(list(by_user)), "after": min(s["started_at"] for s in arrived)}
    added, kept = [], defaultdict(list)
    for row in map(Kept._make, db.execute(_kept_periods(db.dialect.name), known)):
        user_id, start, end, *_ = row
        covered = [s for s in by_user[user_id] if start <= s["started_at"] < end]
        sums = [sum(s[name] for s in covered) for name in SUMS]
        kept[user_id].append(row._replace(tokens_used=row.tokens_used + sums[0]))
        if covered:
            added.append((user_id, start, end, *sums, _with_models(row.models, covered)))
    if added:
        update_each(
            db, totals, ("user_id", "period_start", "period_end"), adding=SUMS, setting=("models",), rows=added
        )
    return kept


def keep_totals(db: Connection, standing: Iterable[Account]) -> None:
    insert_new(
        db,
        totals,
        [total(user.user_id, each.period.bounds, each.totals) for user in standing for each in user.standings],
    )


def keep_totals_of_other_periods(
    db: Connection,
    plans: Plans,
    standing: Mapping[str, Account],
    arrived: Sequence[dict[str, Any]],
    changed: Sequence[SubscriptionChanged],
) -> None:
    """Of the past: where usage is late, or of a plan that has ended, and where a change of plan arrives after usage
    that it decides about."""
    moments: dict[str, set[datetime]] = defaultdict(set)
    user_ids = {*(row["user_id"] for row in arrived), *(event.data.user_id for event in changed)}
    known = {user_id: sorted(changes) for user_id, changes in changes_of(db, list(user_ids)).items()}
    for row in arrived:
        user_id, moment, changes = row["user_id"], row["started_at"], known.get(row["user_id"])
        if not standing[user_id].covers(moment) or (changes and midnight(moment) < changes[-1].changed_at):
            moments[user_id].add(moment)
    for event in changed:
        user_id = event.data.user_id
        since = decided_since(plans, known[user_id], event.data.changed_at)
        of_user = (settlements.c.user_id == user_id, settlements.c.started_at >= since)
        moments[user_id].update(moment for _, moment in moments_used(db, *of_user))
    periods = {
        user_id: set(deciding(plans, known.get(user_id, []), sorted(used))) for user_id, used in moments.items()
    }
    _keep_totals_of_periods(db, periods)


def _keep_totals_of_periods(db: Connection, periods: Mapping[str, Collection[Bounds]]) -> None:
    """By user. What is kept already stays, and a period without settlements has no total."""
    starts = [start for of_user in periods.values() for start, _ in of_user]
    if not starts:
        return
    known = {"user_ids": json.dumps(list(periods)), "after": min(starts)}
    kept = {tuple(row[:3]) for row in db.execute(_kept_periods(db.dialect.name), known)}
    by_period: dict[Bounds, list[str]] = defaultdict(list)
    for user_id, of_user in periods.items():
        for bounds in of_user:
            if (user_id, *bounds) not in kept:
                by_period[bounds].append(user_id)
    for bounds, user_ids in by_period.items():
        sums = sums_of_settlements(db, bounds, user_ids)
        insert_new(db, totals, [total(user_id, bounds, of_user) for user_id, of_user in sums.items()])


def total(user_id: str, bounds: Bounds, totals: Totals) -> dict[str, Any]:
    return {
        "user_id": user_id,
        "period_start": bounds[0],
        "period_end": bounds[1],
        **dict(zip(SUMS, sums_of(totals), strict=True)),
        "models": models_text(totals.models),
    }


def sums_of_settlements(db: Connection, bounds: Bounds, user_ids: list[str]) -> dict[str, Totals]:
    start, end = bounds
    known = {"user_ids": json.dumps(user_ids), "start": start, "end": end}
    sums: defaultdict[str, Totals] = defaultdict(Totals)
    for row in db.execute(_sums_by_model(db.dialect.name), known):
        sums[row.user_id] += of_model(row.model, *(int(getattr(row, name)) for name in SUMS))
    return sums


def moments_used(db: Connection, *which: ColumnElement[bool]) -> Iterator[tuple[str, datetime]]:
    """Each user, and of each day in UTC of such settlements the first and the last moment: far fewer than those."""
    user_id, moment = settlements.c["user_id", "started_at"]
    day = func.substr(cast(moment, Text), 1, 10) if is_sqlite(db) else func.date_trunc("day", moment, "UTC")
    first, last = func.min(moment), func.max(moment)
    days = select(user_id, first, last).where(*which).group_by(user_id, day).order_by(user_id, first)
    for user, *ends in db.execute(days, execution_options={"yield_per": 1000}):
        yield from ((user, end) for end in ends)


def of_model(model: str | None, *sums: int) -> Totals:
    counts = Counts(*sums[: len(COUNTS)])
    return Totals(counts, {model: counts} if model else {}, *sums[len(COUNTS) :])


def totals_of(row: Any) -> Totals:
    counts = Counts(*(int(getattr(row, name)) for name in COUNTS))
    return Totals(counts, _models(row.models), int(row.top_up_tokens), int(row.lasting_top_up_tokens))


def sums_of(totals: Totals) -> tuple[int, ...]:
    return (*totals.counts.as_tuple, totals.top_up_tokens, totals.lasting_top_up_tokens)


def models_text(models: Mapping[str, Counts]) -> str:
    return _json({model: counts.as_tuple for model, counts in models.items()})


def _with_models(text: str, arrived: Sequence[dict[str, Any]]) -> str:
    """What a total says of its models, with these settlements. Plain lists: it is done for each user of a batch."""
    models: dict[str, list[int]] = json.loads(text)
    for settlement in arrived:
        if (model := settlement["model"]) is not None:
            counts = [settlement[name] for name in COUNTS]
            models[model] = [a + b for a, b in zip(models[model], counts, strict=True)] if model in models else counts
    return _json(models)


def _models(text: str) -> dict[str, Counts]:
    return {model: Counts(*counts) for model, counts in json.loads(text).items()}


def _json(models: Mapping[str, Sequence[int]]) -> str:
    return to_json(models).decode()


@cache
def _kept_periods(dialect: str) -> Select[Any]:
    users = listed(dialect, "user_ids")
    return (
        select(
            *totals.c["user_id", "period_start", "period_end", "tokens_used", "models"],
            *subscriptions.c["tier", "time_zone", "changed_at", "subscribed_at"],
        )
        .select_from(
            users.join(totals, totals.c.user_id == users.c.item).outerjoin(
                subscriptions, subscriptions.c.user_id == users.c.item
            )
        )
        .where(totals.c.period_end > bindparam("after", type_=UtcDateTime))
    )


@cache
def _sums_by_model(dialect: str) -> Select[Any]:
    users = listed(dialect, "user_ids")
    return (
        select(*settlements.c["user_id", "model"], *(func.sum(settlements.c[name]).label(name) for name in SUMS))
        .join(users, users.c.item == settlements.c.user_id)
        .where(
            settlements.c.started_at >= bindparam("start", type_=UtcDateTime),
            settlements.c.started_at < bindparam("end", type_=UtcDateTime),
        )
        .group_by(settlements.c.user_id, settlements.c.model)
    )
