"""Quota's totals and plans, built anew from the stream, and what they would come to under other weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    union,
)

from services.quota import store
from services.quota.domain import Account, Totals
from services.quota.store import alerts, holds
from services.quota.subscriptions import change_subscriptions, changes, changes_of, plan_change, subscriptions
from services.quota.totals import (
    SUMS,
    add_to_totals,
    keep_totals,
    keep_totals_of_other_periods,
    moments_used,
    of_model,
    settlement,
    settlements,
    sums_of_settlements,
    total,
    totals,
    totals_of,
)
from shared.append_only import AppendOnly
from shared.bulk import insert_once, sorted_out
from shared.calls import HOLD_TTL
from shared.database import UtcDateTime, insert_new, is_sqlite, now, patient_engine
from shared.events import Event, SubscriptionChanged, ThresholdReached
from shared.loading import PlainRows, Value
from shared.periods import ALWAYS, deciding, plan_and_calendar, plans_had
from shared.plain import PlainGeneration, utc_text
from shared.plans import Period, Plan, Plans
from shared.record import Record
from shared.recorded import bounds, recorded
from shared.streams import ALERTS, QUOTA
from shared.subscriptions import Change, Subscribed, subscribed

Item = TypeVar("Item")
CHUNK = 1000

# Every period of which a total is kept. Those that are in use stay, also where nothing is in them.
_periods = Table(
    "replay_periods",
    MetaData(),
    Column("user_id", Text, primary_key=True),
    Column("period_start", UtcDateTime, primary_key=True),
    Column("period_end", UtcDateTime, primary_key=True),
    Column("is_in_use", Boolean, nullable=False),
    prefixes=["TEMPORARY"],
)

PLAIN_COLUMNS = ("event_id", "user_id", *SUMS, "started_at", "model")


def plain_row(generation: PlainGeneration) -> tuple[Value, ...]:
    """What `settlement` makes of the same event, in the order of PLAIN_COLUMNS and as a database keeps it."""
    data = generation.data
    return (
        generation.id,
        data.user_id,
        data.tokens_used,
        data.input_tokens or 0,
        data.output_tokens or 0,
        data.cache_creation_input_tokens or 0,
        data.cache_read_input_tokens or 0,
        0,
        0,
        utc_text(data.started_at),
        data.model,
    )


class RebuiltQuota:
    """Settlements and plan changes follow from their events alone; totals and subscriptions from those."""

    service = "quota"
    durable = QUOTA
    migrations = Path(__file__).with_name("migrations")
    tables: tuple[Table, ...] = (changes, settlements, totals, subscriptions)
    kept: tuple[Table, ...] = (changes, settlements)
    append_only: tuple[AppendOnly, ...] = (
        AppendOnly("plan_changes", "event_id"),
        AppendOnly("settlements", "event_id", may_change=("is_late",)),
    )
    indexes: tuple[str, ...] = ("plan_changes_by_user", "settlements_by_user")
    plain = PlainRows(settlements, PLAIN_COLUMNS, plain_row)

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    def load(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        changed = [event for event in events if isinstance(event, SubscriptionChanged)]
        used = [event for event in events if not isinstance(event, SubscriptionChanged)]
        _, others = sorted_out(changed, insert_once(db, changes, [plan_change(event) for event in changed]))
        _, contradicting = sorted_out(used, insert_once(db, settlements, [settlement(event) for event in used]))
        return [*others, *contradicting]

    def derive(self, db: Connection, live: str | None) -> None:
        for chunk in _chunks(_subscribed(db)):
            insert_new(db, subscriptions, [{"user_id": user_id, **come_to._asdict()} for user_id, come_to in chunk])
        _periods.create(db)
        if live:
            in_use = totals.to_metadata(MetaData(), schema=live)
            names = ("user_id", "period_start", "period_end")
            kept = select(*in_use.c[names], literal(True)).where(*_makes_sense(db, in_use))
            db.execute(insert(_periods).from_select([*names, "is_in_use"], kept))
        for of_users in _chunks(_periods_of_users(db, self._plans)):
            insert_new(db, _periods, list(chain.from_iterable(of_users)))
        for rows in _chunks(_totals(db)):
            insert_new(db, totals, rows)
        _periods.drop(db)

    def add(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        changed = [event for event in events if isinstance(event, SubscriptionChanged)]
        used = [event for event in events if not isinstance(event, SubscriptionChanged)]
        new_changes, others = sorted_out(changed, change_subscriptions(db, changed))
        rows = [settlement(event) for event in used]
        outcomes = insert_once(db, settlements, rows)
        new, _ = sorted_out(rows, outcomes)
        add_to_totals(db, new)
        standing = store.accounts(db, self._plans, {event.data.user_id for event in events}, at=now(db))
        keep_totals(db, standing.values())
        keep_totals_of_other_periods(db, self._plans, standing, new, new_changes)
        return [*others, *sorted_out(used, outcomes)[1]]

    def adopt(self, db: Connection, old: Callable[[str], str]) -> None:
        """Holds stay, but for those whose generation is settled by now; and what came too late stays late."""
        late = f"event_id IN (SELECT event_id FROM {old('settlements')} WHERE is_late)"  # noqa: S608 - names of ours
        db.execute(text(f"UPDATE settlements SET is_late = true WHERE {late}"))  # noqa: S608
        db.execute(_EXPIRED, {"at": now(db)})
        db.execute(_SETTLED)

    async def lost(self, record: Record, url: str) -> list[str]:
        engine = patient_engine(url, begin="BEGIN")
        with engine.begin() as db:
            impossible = _impossible_holds(db)
        engine.dispose()
        return [_told(len(impossible), "would be let go")] if impossible else []

    async def restore(self, record: Record, url: str) -> list[str]:
        """What was announced is not announced again, also by a database that has lost all memory of it. Holds that
        cannot be are let go, also where all else is as it should be."""
        first, last = await bounds(record.nc, stream=ALERTS)
        engine = patient_engine(url)
        async for batch in recorded(record.nc, first=first, last=last, stream=ALERTS):
            with engine.begin() as db:
                insert_new(db, alerts, [_alert(message.body) for message in batch])
        with engine.begin() as db:
            impossible = _impossible_holds(db)
            db.execute(delete(holds).where(holds.c.generation_id.in_(impossible)))
        engine.dispose()
        return [_told(len(impossible), "are let go")] if impossible else []


def _told(number: int, what: str) -> str:
    return f"{number:,} holds of settled generations, or for longer than any, {what}"


def _impossible_holds(db: Connection) -> list[str]:
    """Made by nobody's authorization: it is let go when its generation is settled, and made for HOLD_TTL."""
    is_settled = holds.c.generation_id.in_(select(settlements.c.event_id))
    # As text: what somebody wrote there need not be a moment.
    times = (cast(holds.c[name], Text) for name in ("started_at", "expires_at"))
    found = db.execute(select(holds.c.generation_id, is_settled, *times))
    return [hold for hold, settled, *written in found if settled or not _is_within_ttl(*written)]


def _is_within_ttl(started_at: str, expires_at: str) -> bool:
    try:
        return datetime.fromisoformat(expires_at) - datetime.fromisoformat(started_at) <= HOLD_TTL
    except (TypeError, ValueError):
        return False


_EXPIRED = text(
    "UPDATE settlements SET is_late = true"
    " WHERE event_id IN (SELECT generation_id FROM holds WHERE expires_at <= :at)"
).bindparams(bindparam("at", type_=UtcDateTime))
_SETTLED = text(
    "DELETE FROM holds WHERE EXISTS (SELECT 1 FROM settlements WHERE settlements.event_id = holds.generation_id)"
)


def _alert(body: bytes) -> dict[str, Any]:
    event = ThresholdReached.model_validate_json(body)
    return {
        "user_id": event.data.user_id,
        "period_start": event.data.period_start or ALWAYS.start,
        "period_end": event.data.resets_at or ALWAYS.bounds[1],
        "percent": event.data.percent,
        "event_id": event.id,
        "event": body.decode(),
        "is_published": True,
    }


def _makes_sense(db: Connection, in_use: Table) -> Iterator[ColumnElement[bool]]:
    """The user is text and both ends of the period are moments: SQLite takes bytes for text and any text for a
    moment, and PostgreSQL knows one that never comes."""
    if is_sqlite(db):
        yield func.typeof(in_use.c.user_id) == "text"
        yield func.is_utf8(cast(in_use.c.user_id, LargeBinary)) == 1
    for column in in_use.c["period_start", "period_end"]:
        if not is_sqlite(db):
            yield func.isfinite(column)
        else:
            written = cast(column, Text)
            yield func.strftime("%Y-%m-%dT%H:%M:%S", written, type_=Text) + func.substr(written, 20) == written


class PeriodUsed(NamedTuple):
    """A user's usage in one period, under the plan with which it ends: raw, and as a plan weighs and prices it."""

    user_id: str
    plan: Plan
    period: Period
    totals: Totals

    def under(self, plan: Plan) -> tuple[int, Decimal]:
        return under(plan, self.totals)


def under(plan: Plan, used: Totals) -> tuple[int, Decimal]:
    """What counts against a limit of that plan, and what it costs in dollars."""
    used_tokens = max(0, used.used_tokens(plan.weights))
    return used_tokens, plan.cost_usd(used_tokens)


def periods_used(db: Connection, plans: Plans) -> Iterator[PeriodUsed]:
    """By user and time. A plan with several limits has a period for each kind."""
    rows = db.execute(
        select(totals).order_by(totals.c.user_id, totals.c.period_start, totals.c.period_end),
        execution_options={"yield_per": CHUNK},
    )
    by_user = groupby(rows, lambda row: str(row.user_id))
    for chunk in _chunks((user_id, list(of_user)) for user_id, of_user in by_user):
        changed = changes_of(db, [user_id for user_id, _ in chunk])
        for user_id, of_user in chunk:
            for row in of_user:
                then = subscribed(change for change in changed[user_id] if change.changed_at < row.period_end)
                plan, calendar = plan_and_calendar(plans, then)
                periods = {calendar.period(row.period_start, plan, limit).bounds: limit for limit in plan.limits}
                if limit := periods.get((row.period_start, row.period_end)):
                    period = calendar.period(row.period_start, plan, limit)
                    yield PeriodUsed(user_id, plan, period, totals_of(row))


def used_once(db: Connection, plans: Plans) -> Iterator[tuple[Plan, Totals]]:
    """All usage, each part of it under the plan of its moment. Periods have some of it twice, or not at all: those of
    a plan with several limits, and of plans that follow each other."""
    for chunk in _chunks(db.execute(_users(), execution_options={"yield_per": CHUNK}).scalars()):
        changed = changes_of(db, chunk)
        for user_id in chunk:
            for plan, had in plans_had(plans, sorted(changed[user_id])):
                if used := sums_of_settlements(db, had, [user_id]).get(user_id):
                    yield plan, used


def standing_at(db: Connection, plans: Plans, at: datetime) -> Iterator[Account]:
    """Every user that the database knows, as they stood at that moment."""
    for chunk in _chunks(db.execute(_users(), execution_options={"yield_per": CHUNK}).scalars()):
        found = store.accounts(db, plans, set(chunk), at=at)
        yield from (found[user_id] for user_id in chunk)


def _users() -> Any:
    return union(select(settlements.c.user_id), select(changes.c.user_id)).order_by("user_id")


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def _subscribed(db: Connection) -> Iterator[tuple[str, Subscribed]]:
    rows = db.execute(select(changes).order_by(changes.c.user_id), execution_options={"yield_per": CHUNK})
    for user_id, of_user in groupby(rows, lambda row: row.user_id):
        if come_to := subscribed(Change(row.changed_at, row.event_id, row.tier, row.time_zone) for row in of_user):
            yield user_id, come_to


def _periods_of_users(db: Connection, plans: Plans) -> Iterator[list[dict[str, Any]]]:
    """A list for each user of the periods with settlements, under every plan that decides something about them."""
    by_user = groupby(moments_used(db), lambda used: used[0])
    for chunk in _chunks((user_id, [moment for _, moment in of_user]) for user_id, of_user in by_user):
        changed = changes_of(db, [user_id for user_id, _ in chunk])
        for user_id, moments in chunk:
            yield [
                {"user_id": user_id, "period_start": start, "period_end": end, "is_in_use": False}
                for start, end in set(deciding(plans, sorted(changed[user_id]), moments))
            ]


def _totals(db: Connection) -> Iterator[dict[str, Any]]:
    rows = db.execute(_sums_of_periods(), execution_options={"yield_per": CHUNK})
    for (user_id, start, end, is_in_use), of_period in groupby(rows, lambda row: tuple(row[:4])):
        parts = [row for row in of_period if row.tokens_used is not None]
        if not parts and not is_in_use:
            continue
        by_model = (of_model(row.model, *(int(getattr(row, name)) for name in SUMS)) for row in parts)
        yield total(user_id, (start, end), sum(by_model, start=Totals()))


def _sums_of_periods() -> Select[Any]:
    covered = and_(
        settlements.c.user_id == _periods.c.user_id,
        settlements.c.started_at >= _periods.c.period_start,
        settlements.c.started_at < _periods.c.period_end,
    )
    of_period = (*_periods.c, settlements.c.model)
    return (
        select(*of_period, *(func.sum(settlements.c[name]).label(name) for name in SUMS))
        .select_from(_periods.outerjoin(settlements, covered))
        .group_by(*of_period)
        .order_by(*_periods.c)
    )
