"""Quota's database: what is used, what is held, and the one transaction in which either changes."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Executable,
    Row,
    delete,
    func,
    select,
    update,
)

from services.quota.domain import (
    Account,
    LimitStanding,
    Refusal,
    is_kept_and_quiet,
)
from services.quota.models import Alert, Hold
from services.quota.standing import Events, Grant, Standing, lock, look
from services.quota.standing import standing as read_standing
from services.quota.subscriptions import change_subscriptions, changes_of
from services.quota.top_ups import carried
from services.quota.totals import (
    NOTHING,
    Kept,
    add_to_totals,
    keep_totals,
    keep_totals_of_other_periods,
    settlement,
    settlements,
    sums_of_settlements,
    totals,
    totals_of,
)
from shared.bulk import insert_last, insert_once, listed, sorted_out
from shared.calls import HOLD_TTL, Authorize, Counted, CountedStory, ExplainQuery, OpenHold, Pending, UsageQuery
from shared.database import insert_new, now, table_of
from shared.events import (
    Authorized,
    Event,
    GenerationCompleted,
    SubscriptionChanged,
    ThresholdReached,
    encode,
)
from shared.periods import midnight
from shared.plans import COUNTS, Counts, Limit, Period, Plans
from shared.quarantine import Poison, quarantine
from shared.story import counted
from shared.subscriptions import Calendar

holds, alerts = table_of(Hold), table_of(Alert)


class Taken(Exception):
    """Nothing can be held under this generation id: it is settled, or expired, or another user's."""


def authorize(
    db: Connection, plans: Plans, requests: Sequence[Authorize]
) -> tuple[list[Grant | Taken | Refusal], dict[str, Account], datetime]:
    """Hold what fits, request by request, in order: used + held never passes a limit.

    A generation that has its hold already is answered as it was before, and holds nothing more. Returns the answers,
    the accounts as they stand afterwards, and the moment.
    """
    pending = _pending(requests)
    users, generation_ids = {request.user_id for request in requests}, (request.generation_id for request in requests)
    rows, events = look(db, users, [*pending, *generation_ids], locked=True)
    standing, at = _accounts(db, plans, rows)[0], rows[0].at
    _include(standing, pending, events, at=at)
    answers: list[Grant | Taken | Refusal] = []
    added: list[Grant] = []
    for request in requests:
        user, hold = standing[request.user_id], events.held.get(request.generation_id)
        if request.generation_id in events.settled or (hold and not hold.stands(request.user_id, at)):
            answers.append(Taken())
        elif hold:
            answers.append(hold)
        elif isinstance(reserved := _reserve(user, request, at=at), Grant):
            events.held[request.generation_id] = reserved
            standing[request.user_id] = user.holding(reserved.tokens, since=at)
            added.append(reserved)
            answers.append(reserved)
        else:
            answers.append(reserved)
    insert_last(db, holds, Grant._fields, added)
    return answers, standing, at


def _reserve(user: Account, request: Authorize, *, at: datetime) -> Grant | Refusal:
    """The hold for as much of what is asked as fits."""
    reserved = user.reserve(
        input_tokens_max=request.input_tokens_max,
        output_tokens_min=request.output_tokens_min,
        output_tokens_max=request.output_tokens_max,
        model=request.model,
        at=at,
    )
    if isinstance(reserved, Refusal):
        return reserved
    decided, asked = user.tightest, request.output_tokens_asked
    return Grant(
        request.generation_id,
        request.user_id,
        decided.period.start,
        reserved.hold_tokens,
        reserved.output_tokens,
        started_at=at,
        expires_at=at + HOLD_TTL,
        input_tokens_max=request.input_tokens_max,
        output_tokens_asked=request.output_tokens_max if asked is None else asked,
        tier=user.plan.tier,
        period=decided.limit.period,
        resets_at=decided.period.end,
    )


class Settled(NamedTuple):
    """How many events were new, the users that the events name, and the alerts they set off.

    `contradicting` are events whose id has been counted with other content, which stays.
    """

    events: int
    user_ids: set[str]
    alerts: list[str]
    contradicting: list[Event]


def settle(db: Connection, plans: Plans, events: Sequence[Event], poison: Sequence[Poison] = ()) -> Settled:
    """Count each event once, for ever; release its hold; note changed subscriptions. All of it, or nothing."""
    user_ids = {event.data.user_id for event in events}
    at = lock(db, user_ids)
    changed = [event for event in events if isinstance(event, SubscriptionChanged)]
    new_changes, contradicting = sorted_out(changed, change_subscriptions(db, changed))
    used = [event for event in events if not isinstance(event, SubscriptionChanged)]
    rows = [settlement(event) for event in used]
    outcomes = insert_once(db, settlements, rows)
    new_uses, others = sorted_out(used, outcomes)
    _release_holds(db, new_uses, at)
    new, _ = sorted_out(rows, outcomes)
    done = _all_done(plans, add_to_totals(db, new), new, at) - {event.data.user_id for event in changed}
    standing, unkept = _accounts(db, plans, read_standing(db, user_ids - done, at=at))
    keep_totals(db, [standing[user_id] for user_id in unkept])
    keep_totals_of_other_periods(db, plans, standing, [s for s in new if s["user_id"] not in done], new_changes)
    quarantine(db, poison)
    new_events = len(new_changes) + len(new_uses)
    return Settled(new_events, user_ids, _alert(db, standing.values(), at), [*contradicting, *others])


def _all_done(
    plans: Plans, kept: Mapping[str, list[Kept]], arrived: Sequence[dict[str, Any]], at: datetime
) -> set[str]:
    """The users for whom nothing is left to do once their totals are added to: nearly all of a batch."""
    moments: dict[str, list[datetime]] = defaultdict(list)
    for row in arrived:
        moments[row["user_id"]].append(row["started_at"])
    return {
        user_id
        for user_id, rows in kept.items()
        if (rows[0].changed_at is None or rows[0].changed_at <= midnight(min(moments[user_id])))
        and is_kept_and_quiet(
            plans.of(rows[0].tier),
            Calendar(rows[0].time_zone, rows[0].subscribed_at),
            {(row.period_start, row.period_end): row.tokens_used for row in rows},
            [at, min(moments[user_id]), max(moments[user_id])],
        )
    }


def _release_holds(db: Connection, events: Sequence[Event], at: datetime) -> None:
    """Of events that are new: what contradicts an earlier one releases nothing."""
    event_ids = {event.data.generation_id: event.id for event in events if isinstance(event, GenerationCompleted)}
    released = db.execute(_release(db.dialect.name), {"generation_ids": json.dumps(list(event_ids))})
    late = [event_ids[hold.generation_id] for hold in released if hold.expires_at <= at]
    if late:
        db.execute(update(settlements).where(settlements.c.event_id.in_(late)).values(is_late=True))


def look_up(db: Connection, plans: Plans, queries: Sequence[UsageQuery]) -> tuple[list[Account], datetime]:
    """For each query its user now, and when that is. Its own `pending` usage that is not settled yet is counted in
    place of its holds; what only another query tells of may not be durable yet, and be gone from the next answer."""
    rows, events = look(db, {query.user_id for query in queries}, _pending(queries), locked=False)
    users, at = _accounts(db, plans, rows)[0], rows[0].at
    answers: list[Account] = []
    for query in queries:
        standing = {query.user_id: users[query.user_id]}
        _include(standing, _pending([query]), events, at=at)
        answers += standing.values()
    return answers, at


def explain(db: Connection, plans: Plans, query: ExplainQuery) -> CountedStory:
    """What is held for a generation, or how its event counts; of another user's, nothing."""
    at, mine = now(db), query.user_id
    found_hold = db.execute(select(holds).where(holds.c.generation_id == query.event_id)).first()
    found = db.execute(select(settlements).where(settlements.c.event_id == query.event_id)).first()
    hold = _open_hold(found_hold, at) if found_hold and mine in (None, found_hold.user_id) else None
    done = _counted(db, plans, found) if found and mine in (None, found.user_id) else None
    user_id = found.user_id if found and done else hold.user_id if hold else None
    return CountedStory(user_id=user_id, hold=hold, settled=done)


def _open_hold(row: Row[Any], at: datetime) -> OpenHold:
    hold = Grant(*(getattr(row, name) for name in Grant._fields))
    return OpenHold(
        user_id=hold.user_id,
        tokens=hold.tokens,
        started_at=hold.started_at,
        expires_at=hold.expires_at,
        is_expired=hold.expires_at <= at,
        authorized=_authorized(hold),
    )


def _authorized(hold: Grant) -> Authorized | None:
    if hold.tier is None:
        return None
    decided = hold._asdict() | {"output_tokens_granted": hold.output_tokens, "hold_tokens": hold.tokens}
    return Authorized.model_validate(decided | {"period_start": hold.resets_at and hold.period_start})


def _counted(db: Connection, plans: Plans, row: Row[Any]) -> Counted:
    return counted(
        plans,
        changes_of(db, [row.user_id])[row.user_id],
        at=row.started_at,
        counts=Counts(*(getattr(row, name) for name in COUNTS)),
        model=row.model,
        top_up_tokens=row.top_up_tokens + row.lasting_top_up_tokens,
        is_late=row.is_late,
    )


def accounts(db: Connection, plans: Plans, user_ids: set[str], *, at: datetime) -> dict[str, Account]:
    """The users as they stand at `at`; one who was never seen has the default plan and zeros."""
    return _accounts(db, plans, read_standing(db, user_ids, at=at))[0]


def _accounts(db: Connection, plans: Plans, rows: Sequence[Standing]) -> tuple[dict[str, Account], set[str]]:
    """Also, of whom a total is not kept yet."""
    kept = {(row.user_id, row.period_start, row.period_end): totals_of(row) for row in rows if row.period_start}
    found = {row.user_id: row for row in rows}
    periods = {user_id: _periods(plans, row) for user_id, row in found.items()}
    # No total is kept yet where the period is new, or where a plan's periods have changed. The settlements know.
    unkept = {
        (user_id, period)
        for user_id in found
        for _, period in periods[user_id]
        if (user_id, *period.bounds) not in kept
    }
    by_period: dict[Period, list[str]] = defaultdict(list)
    for user_id, period in unkept:
        if found[user_id].has_settlements:
            by_period[period].append(user_id)
    for period, users in by_period.items():
        for user_id, sums in sums_of_settlements(db, period.bounds, users).items():
            kept[user_id, *period.bounds] = sums
    standing = {}
    for user_id, row in found.items():
        plan, open_holds = plans.of(row.tier), _OpenHolds(*row.open_holds)
        standings = [
            LimitStanding.of(
                limit,
                period,
                plan.weights,
                kept.get((user_id, *period.bounds), NOTHING),
                held_tokens=_held(db, user_id, open_holds, period, row.at),
                carried_tokens=carried(db, plans, user_id, limit, period, at=row.at)
                if row.has_lasting_top_ups
                else 0,
            )
            for limit, period in periods[user_id]
        ]
        standing[user_id] = Account(user_id, plan, tuple(standings), open_holds.generations)
    return standing, {user_id for user_id, _ in unkept}


def _periods(plans: Plans, row: Standing) -> list[tuple[Limit, Period]]:
    plan, calendar = plans.of(row.tier), Calendar(row.time_zone, row.subscribed_at)
    return [(limit, calendar.period(row.at, plan, limit)) for limit in plan.limits]


class _OpenHolds(NamedTuple):
    """What all of a user's open holds hold, when the first of them began, as text, and how many they are."""

    tokens: int | None
    since: str | None
    generations: int


def _held(db: Connection, user_id: str, open_holds: _OpenHolds, period: Period, at: datetime) -> int:
    """What the open holds of this period hold: all of them, but for the minutes after it began."""
    if open_holds.since is None or period.covers(datetime.fromisoformat(open_holds.since)):
        return int(open_holds.tokens or 0)
    of_period = (holds.c.user_id == user_id, holds.c.expires_at > at, holds.c.started_at >= period.start)
    return int(db.execute(select(func.coalesce(func.sum(holds.c.tokens), 0)).where(*of_period)).scalar_one())


def expired_holds(db: Connection) -> list[tuple[str, str, int]]:
    """(generation, user, tokens) of holds whose time is over and that nobody settled: each is reported once."""
    at = now(db)
    late = (
        update(holds)
        .where(holds.c.expires_at <= at, holds.c.reported_at.is_(None))
        .values(reported_at=at)
        .returning(holds.c.generation_id, holds.c.user_id, holds.c.tokens)
    )
    return [(row.generation_id, row.user_id, row.tokens) for row in db.execute(late)]


def _pending(asked: Sequence[Authorize | UsageQuery]) -> dict[str, Pending]:
    return {usage.id: usage for each in asked for usage in each.pending if usage.user_id == each.user_id}


def _include(
    standing: dict[str, Account],
    pending: dict[str, Pending],
    events: Events,
    *,
    at: datetime,
) -> None:
    """Count what is pending and not settled yet, in place of its hold."""
    for usage in pending.values():
        if usage.id in events.settled:
            continue
        user, hold = standing[usage.user_id].including(usage), events.held.get(usage.id)
        if hold and hold.stands(usage.user_id, at):
            user = user.released(hold.tokens, since=hold.started_at)
        standing[usage.user_id] = user


def _alert(db: Connection, standing: Iterable[Account], at: datetime) -> list[str]:
    """The alerts that these accounts set off now, for the first time: as events, kept until they are published."""
    rows = {}
    for user in standing:
        for period, threshold in user.thresholds(at):
            event = ThresholdReached(subject=user.user_id, data=threshold)
            rows[event.id] = {
                "user_id": user.user_id,
                "period_start": period.start,
                "period_end": period.bounds[1],
                "percent": threshold.percent,
                "event_id": event.id,
                "event": encode(event).decode(),
                "is_published": False,
            }
    return insert_new(db, alerts, list(rows.values()), returning="event_id")


def alerts_to_publish(db: Connection) -> list[tuple[str, bytes]]:
    """(id, event) of each alert that the stream may not have."""
    waiting = select(alerts.c.event_id, alerts.c.event).where(alerts.c.is_published.is_(False))
    return [(row.event_id, row.event.encode()) for row in db.execute(waiting.order_by(alerts.c.event_id))]


def alerts_published(db: Connection, event_ids: Sequence[str]) -> None:
    db.execute(update(alerts).where(alerts.c.event_id.in_(event_ids)).values(is_published=True))


def ping(db: Connection) -> None:
    """Raises when the database does not answer or has not been migrated."""
    db.execute(select(totals.c.user_id).limit(1))


# Built once: building a statement costs more than running it.


@cache
def _release(dialect: str) -> Executable:
    generations = listed(dialect, "generation_ids")
    released = delete(holds).where(holds.c.generation_id.in_(select(generations.c.item)))
    return released.returning(*holds.c["generation_id", "expires_at"])
