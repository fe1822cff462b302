"""Quota's database: what is used, what is held, and the one transaction in which either changes."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    JSON,
    Connection,
    Executable,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    select,
    text,
    update,
)

from services.quota.domain import Account, Totals, hold_tokens, period_at, useful_output_tokens
from services.quota.models import Hold, Settlement, Subscription, UsageTotal
from shared.calls import Authorize, Pending, UsageQuery
from shared.database import UtcDateTime, insert_new, is_sqlite, now, table_of, upsert
from shared.events import Event, GenerationCompleted, SubscriptionChanged, UsageAdjusted
from shared.plans import Period, Plans
from shared.quarantine import Poison, quarantine

# Longer than the longest generation: a hold never ends before the generation that it covers.
HOLD_TTL = timedelta(minutes=15)
FOR_EVER = datetime(9999, 12, 31, tzinfo=UTC)

holds, settlements = table_of(Hold), table_of(Settlement)
subscriptions, totals = table_of(Subscription), table_of(UsageTotal)
COUNTS = ("tokens_used", "input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")

# SQLite has one writer. On PostgreSQL an advisory lock a user, taken in one order: no row need exist yet, and two
# batches that share users wait for each other instead of deadlocking.
_LOCK = text(
    "SELECT pg_advisory_xact_lock(key) FROM"
    " (SELECT DISTINCT hashtextextended(u, 0) AS key FROM unnest(CAST(:user_ids AS text[])) u ORDER BY key) keys"
)


def lock(db: Connection, user_ids: Iterable[str]) -> datetime:
    """Until the transaction ends nobody else changes these users. Returns the database's clock."""
    if not is_sqlite(db):
        db.execute(_LOCK, {"user_ids": list(set(user_ids))})
    return now(db)


class Grant(NamedTuple):
    """The output that a generation may have, and the database's clock when it was authorized."""

    output_tokens: int
    started_at: datetime


class Taken(Exception):
    """Nothing can be held under this generation id: it is settled, or expired, or another user's."""


def authorize(
    db: Connection, plans: Plans, requests: Sequence[Authorize]
) -> tuple[list[Grant | Taken | None], dict[str, Account], datetime]:
    """Hold what fits, request by request, in order: used + held never passes the limit.

    A generation that has its hold already is answered as it was before, and holds nothing more. Returns what each
    request is granted (None: it is refused), the accounts as they stand afterwards, and the moment.
    """
    at = lock(db, (request.user_id for request in requests))
    standing = accounts(db, plans, {request.user_id for request in requests}, at=at)
    pending = _pending(requests)
    settled, held = _known(db, [*pending, *(request.generation_id for request in requests)])
    _include(standing, pending, settled, held, at=at)
    answers: list[Grant | Taken | None] = []
    added: list[_Hold] = []
    for request in requests:
        user, hold = standing[request.user_id], held.get(request.generation_id)
        if request.generation_id in settled or (hold and not hold.stands(request.user_id, at)):
            answers.append(Taken())
        elif hold:
            answers.append(Grant(hold.output_tokens, hold.started_at))
        elif hold := _hold(user, request, at=at):
            held[request.generation_id] = hold
            standing[request.user_id] = user.holding(hold.tokens)
            added.append(hold)
            answers.append(Grant(hold.output_tokens, at))
        else:
            answers.append(None)
    insert_new(db, holds, [hold._asdict() for hold in added])
    return answers, standing, at


class _Hold(NamedTuple):
    generation_id: str
    user_id: str
    period_start: datetime
    tokens: int
    output_tokens: int
    started_at: datetime
    expires_at: datetime

    def stands(self, user_id: str, at: datetime) -> bool:
        return self.user_id == user_id and self.expires_at > at


def _hold(user: Account, request: Authorize, *, at: datetime) -> _Hold | None:
    """The hold for as much of what is asked as fits; None when too little does."""
    weights, input_tokens = user.plan.weights, request.input_tokens_max
    least = useful_output_tokens(
        user.plan, output_tokens_min=request.output_tokens_min, output_tokens_max=request.output_tokens_max
    )
    output_tokens = user.allowance.output_granted(
        weights,
        input_tokens_max=input_tokens,
        output_tokens_min=least,
        output_tokens_max=request.output_tokens_max,
    )
    if output_tokens is None:
        return None
    return _Hold(
        request.generation_id,
        request.user_id,
        user.period.start,
        hold_tokens(weights, input_tokens_max=input_tokens, output_tokens_max=output_tokens),
        output_tokens,
        started_at=at,
        expires_at=at + HOLD_TTL,
    )


def settle(
    db: Connection, plans: Plans, events: Sequence[Event], poison: Sequence[Poison] = ()
) -> tuple[int, dict[str, Account]]:
    """Count each event once, for ever; release its hold; note changed subscriptions. All of it, or nothing.

    How many events were new, and the accounts of all users that the events name, as they stand afterwards.
    """
    user_ids = {event.data.user_id for event in events}
    at = lock(db, user_ids)
    changes = [event for event in events if isinstance(event, SubscriptionChanged)]
    _change_subscriptions(db, changes)
    generation_ids = [event.data.generation_id for event in events if isinstance(event, GenerationCompleted)]
    released = db.execute(_release(db.dialect.name), {"generation_ids": json.dumps(generation_ids)})
    late = {hold.generation_id for hold in released if hold.expires_at <= at}
    arrived = {event.id: _settlement(event, late) for event in events if not isinstance(event, SubscriptionChanged)}
    new_ids = insert_new(db, settlements, list(arrived.values()), returning="event_id")
    new = [arrived[event_id] for event_id in new_ids]
    _add_to_totals(db, new)
    standing = accounts(db, plans, user_ids, at=at)
    _keep_totals(db, standing.values())
    _keep_totals_of_other_periods(db, plans, standing, new)
    quarantine(db, poison)
    return len(new_ids) + len(changes), standing


def look_up(db: Connection, plans: Plans, queries: Sequence[UsageQuery]) -> dict[str, Account]:
    """Users now, with the `pending` usage of theirs that is not settled yet counted in place of its holds."""
    at = now(db)
    found = accounts(db, plans, {query.user_id for query in queries}, at=at)
    if pending := _pending(queries):
        _include(found, pending, *_known(db, list(pending)), at=at)
    return found


def accounts(db: Connection, plans: Plans, user_ids: set[str], *, at: datetime) -> dict[str, Account]:
    """The users as they stand at `at`; one who was never seen has the default plan and zeros."""
    found: dict[str, Account] = {}
    kept: dict[str, Totals] = {}
    settled: set[str] = set()
    for row in db.execute(_standing(db.dialect.name), {"user_ids": json.dumps(list(user_ids)), "at": at}):
        plan = plans.of(row.tier)
        period = period_at(at, plan, row.time_zone)
        held = (
            int(row.held)
            if row.held_since is None or period.covers(row.held_since)
            else _held(db, row.user_id, period, at)
        )
        found[row.user_id] = Account(row.user_id, plan, period, Totals(), held)
        if (row.period_start, row.period_end) == (period.start, period.end or FOR_EVER):
            kept[row.user_id] = _counts(row)
        if row.has_settlements:
            settled.add(row.user_id)
    # No total is kept yet where the period is new, or where a plan's periods have changed. The settlements know.
    unkept: dict[Period, list[str]] = defaultdict(list)
    for user_id in settled - kept.keys():
        unkept[found[user_id].period].append(user_id)
    for period, users in unkept.items():
        known = {"user_ids": json.dumps(users), "start": period.start, "end": period.end or FOR_EVER}
        kept |= {row.user_id: _counts(row) for row in db.execute(_sums_of_settlements(db.dialect.name), known)}
    return {user_id: replace(user, totals=kept.get(user_id, Totals())) for user_id, user in found.items()}


def _held(db: Connection, user_id: str, period: Period, at: datetime) -> int:
    """What the user's open holds of this period hold: for the minutes in which some are of the period before."""
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


def _known(db: Connection, event_ids: list[str]) -> tuple[set[str], dict[str, _Hold]]:
    """Which of these are settled, and the holds that have not been settled, expired ones included."""
    rows = db.execute(_settled_or_held(db.dialect.name), {"event_ids": json.dumps(event_ids)}).all()
    settled = {row.event_id for row in rows if row.is_settled}
    held = {row.event_id: _Hold(*row[2:]) for row in rows if row.user_id is not None}
    return settled, held


def _include(
    standing: dict[str, Account],
    pending: dict[str, Pending],
    settled: set[str],
    held: dict[str, _Hold],
    *,
    at: datetime,
) -> None:
    """Count what is pending and not settled yet, in place of its hold."""
    for usage in pending.values():
        if usage.id in settled:
            continue
        user, hold = standing[usage.user_id].including(usage), held.get(usage.id)
        if hold and hold.stands(usage.user_id, at) and user.period.covers(hold.started_at):
            user = user.holding(-hold.tokens)
        standing[usage.user_id] = user


# Statements of the hot path are built once: building one costs more than running it.


def _listed(dialect: str, parameter: str) -> FromClause:
    """A parameter that is a JSON array of texts, as rows of `item`: one statement asks about one or five hundred."""
    items = bindparam(parameter, type_=Text)
    if dialect == "sqlite":
        return select(func.json_each(items).table_valued("value").c.value.label("item")).subquery("listed")
    return select(func.json_array_elements_text(cast(items, JSON)).column_valued("item")).subquery("listed")


@cache
def _standing(dialect: str) -> Select[Any]:
    """A row for each user and each of the totals that cover `at`: plan, holds, raw sums."""
    users, at = _listed(dialect, "user_ids"), bindparam("at", type_=UtcDateTime)
    is_open = and_(holds.c.user_id == users.c.item, holds.c.expires_at > at)
    held = select(func.coalesce(func.sum(holds.c.tokens), 0)).where(is_open).scalar_subquery()
    held_since = select(func.min(holds.c.started_at)).where(is_open).scalar_subquery()
    covering = and_(totals.c.user_id == users.c.item, totals.c.period_start <= at, totals.c.period_end > at)
    return select(
        users.c.item.label("user_id"),
        subscriptions.c.tier,
        subscriptions.c.time_zone,
        held.label("held"),
        held_since.label("held_since"),
        exists().where(settlements.c.user_id == users.c.item).label("has_settlements"),
        *(column for column in totals.c if column.name != "user_id"),
    ).select_from(users.outerjoin(subscriptions, subscriptions.c.user_id == users.c.item).outerjoin(totals, covering))


@cache
def _settled_or_held(dialect: str) -> Select[Any]:
    """A row for each event: whether it is settled, and its hold, if it has one."""
    events = _listed(dialect, "event_ids")
    return select(
        events.c.item.label("event_id"),
        exists().where(settlements.c.event_id == events.c.item).label("is_settled"),
        *holds.c[*_Hold._fields],
    ).select_from(events.outerjoin(holds, holds.c.generation_id == events.c.item))


@cache
def _release(dialect: str) -> Executable:
    generations = _listed(dialect, "generation_ids")
    released = delete(holds).where(holds.c.generation_id.in_(select(generations.c.item)))
    return released.returning(*holds.c["generation_id", "expires_at"])


@cache
def _kept_periods(dialect: str) -> Select[Any]:
    users = _listed(dialect, "user_ids")
    return (
        select(*totals.c["user_id", "period_start", "period_end"])
        .join(users, users.c.item == totals.c.user_id)
        .where(totals.c.period_end > bindparam("after", type_=UtcDateTime))
    )


@cache
def _sums_of_settlements(dialect: str) -> Select[Any]:
    users = _listed(dialect, "user_ids")
    return (
        select(settlements.c.user_id, *(func.sum(settlements.c[name]).label(name) for name in COUNTS))
        .join(users, users.c.item == settlements.c.user_id)
        .where(
            settlements.c.started_at >= bindparam("start", type_=UtcDateTime),
            settlements.c.started_at < bindparam("end", type_=UtcDateTime),
        )
        .group_by(settlements.c.user_id)
    )


def _counts(row: object) -> Totals:
    return Totals(*(int(getattr(row, name)) for name in COUNTS))


def _settlement(event: GenerationCompleted | UsageAdjusted, late: set[str]) -> dict[str, object]:
    started_at = event.data.started_at if isinstance(event, GenerationCompleted) else event.data.effective_at
    counts = {name: getattr(event.data, name, None) or 0 for name in COUNTS}
    is_late = isinstance(event, GenerationCompleted) and event.data.generation_id in late
    return {
        "event_id": event.id,
        "user_id": event.data.user_id,
        "started_at": started_at,
        "is_late": is_late,
        **counts,
    }


def _add_to_totals(db: Connection, arrived: Sequence[dict[str, object]]) -> None:
    """Add to every total that covers a settlement: also to one of a plan that the user had before."""
    if not arrived:
        return
    by_user: dict[object, list[dict[str, object]]] = defaultdict(list)
    for settlement in arrived:
        by_user[settlement["user_id"]].append(settlement)
    known = {"user_ids": json.dumps(list(by_user)), "after": min(_moment(settlement) for settlement in arrived)}
    kept = db.execute(_kept_periods(db.dialect.name), known)
    added = []
    for row in kept:
        covered = [s for s in by_user[row.user_id] if row.period_start <= _moment(s) < row.period_end]
        if covered:
            sums = {f"{name}_added": sum(int(str(s[name])) for s in covered) for name in COUNTS}
            added.append({"user": row.user_id, "start": row.period_start, "end": row.period_end, **sums})
    if added:
        db.execute(_ADD, added)


# Added in SQL, never read and written back: other replicas are at work, too.
_ADD = (
    update(totals)
    .where(
        totals.c.user_id == bindparam("user"),
        totals.c.period_start == bindparam("start"),
        totals.c.period_end == bindparam("end"),
    )
    .values({name: totals.c[name] + bindparam(f"{name}_added") for name in COUNTS})
)


def _moment(settlement: dict[str, object]) -> datetime:
    moment = settlement["started_at"]
    assert isinstance(moment, datetime)  # noqa: S101 - narrows the type of a row
    return moment


def _keep_totals(db: Connection, standing: Iterable[Account]) -> None:
    rows = [
        {
            "user_id": user.user_id,
            "period_start": user.period.start,
            "period_end": user.period.end or FOR_EVER,
            **{name: getattr(user.totals, name) for name in COUNTS},
        }
        for user in standing
    ]
    insert_new(db, totals, rows)


def _keep_totals_of_other_periods(
    db: Connection, plans: Plans, standing: dict[str, Account], arrived: Sequence[dict[str, object]]
) -> None:
    """For late events, and for a replay: the first of a period finds no total that it could be added to."""
    periods = {user_id: user.period for user_id, user in standing.items()}
    arrivals = {(_moment(settlement), str(settlement["user_id"])) for settlement in arrived}
    late = sorted((moment, user_id) for moment, user_id in arrivals if not periods[user_id].covers(moment))
    for moment, user_id in late:
        if not periods[user_id].covers(moment):
            then = accounts(db, plans, {user_id for _, user_id in late}, at=moment)
            periods = {user_id: user.period for user_id, user in then.items()}
            _keep_totals(db, [user for user in then.values() if user.totals != Totals()])


def _change_subscriptions(db: Connection, events: Sequence[SubscriptionChanged]) -> None:
    """The newest change of each user wins, whichever arrives last."""
    newest = {event.data.user_id: event for event in sorted(events, key=lambda e: (e.data.changed_at, e.id))}
    rows = [
        {
            "user_id": user_id,
            "tier": event.data.tier,
            "time_zone": event.data.time_zone,
            "changed_at": event.data.changed_at,
            "event_id": event.id,
        }
        for user_id, event in newest.items()
    ]
    upsert(
        db,
        subscriptions,
        rows,
        only_if=lambda new: (
            (new.changed_at > subscriptions.c.changed_at)
            | ((new.changed_at == subscriptions.c.changed_at) & (new.event_id > subscriptions.c.event_id))
        ),
    )


def ping(db: Connection) -> None:
    """Raises when the database does not answer or has not been migrated."""
    db.execute(select(totals.c.user_id).limit(1))
