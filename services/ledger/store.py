"""The ledger's database: every event that used tokens, once and for ever, and what is read from it."""

import base64
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import reduce
from itertools import accumulate, groupby
from operator import add, attrgetter
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import (
    BigInteger,
    Connection,
    FromClause,
    Label,
    Row,
    Select,
    cast,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
)

from services.ledger.merkle import leaf_hash
from services.ledger.models import Leaf, Seal, SubscriptionChange, Usage, UsageDaily
from shared.bulk import add_up, insert_once, sorted_out
from shared.calls import (
    Day,
    ExplainQuery,
    Given,
    History,
    HistoryQuery,
    Logs,
    LogsQuery,
    OnRecord,
    Place,
    Record,
    RecordedStory,
    SealedBy,
)
from shared.database import isos, table_of
from shared.errors import BadCall
from shared.events import (
    Adjustment,
    Authorized,
    Event,
    Generation,
    GenerationCompleted,
    Moment,
    Name,
    Subscription,
    SubscriptionChanged,
    UsageAdjusted,
)
from shared.plans import COUNTS, Counts, Plan, Plans, weighted_tokens
from shared.quarantine import Poison, bodies, quarantine
from shared.streams import GENERATION_COMPLETED

usage, subscription_changes, usage_daily = table_of(Usage), table_of(SubscriptionChange), table_of(UsageDaily)
leaves, seals = table_of(Leaf), table_of(Seal)

# A reply is one NATS message of at most 1 MiB: a page of large records ends early, with a cursor.
PAGE_BYTES_MAX = 768 * 1024

# Rows that are inserted together name the same columns.
_NOTHING: dict[str, Any] = dict.fromkeys(usage.c.keys())
_MOMENTS = ("period_start", "resets_at", "expires_at")
_moments = attrgetter(*_MOMENTS)
_DAILY = ("user_id", "usage_date", "model", *COUNTS, "generations")
_position: TypeAdapter[tuple[datetime, str]] = TypeAdapter(tuple[Moment, Name])


class Recorded(NamedTuple):
    """Of the events that arrived, those that were new, and those that contradict an earlier one of the same id."""

    new: list[Event]
    contradicting: list[Event]


def record(db: Connection, events: Sequence[Event], poison: Sequence[Poison] = ()) -> Recorded:
    """Keep each event once, for ever, all of them or none. Of two with the same id the first stays."""
    recorded = keep(db, events)
    add_up(db, usage_daily, _by_day(recorded.new))
    quarantine(db, poison)
    return recorded


def keep(db: Connection, events: Sequence[Event]) -> Recorded:
    """As `record`, but for the sums of days."""
    used = [event for event in events if not isinstance(event, SubscriptionChanged)]
    changed = [event for event in events if isinstance(event, SubscriptionChanged)]
    uses = sorted_out(used, insert_once(db, usage, usage_rows(used)))
    changes = sorted_out(changed, insert_once(db, subscription_changes, [change_row(event) for event in changed]))
    return Recorded(new=[*uses[0], *changes[0]], contradicting=[*uses[1], *changes[1]])


def history(db: Connection, plans: Plans, query: HistoryQuery) -> History:
    """A row for each day with usage, newest first; each use priced by the plan that the user had at its time."""
    parts = sorted(_parts(db, query), key=lambda part: part.date, reverse=True)
    return History(days=[_day(plans, day, of_day) for day, of_day in groupby(parts, lambda part: part.date)])


def logs(db: Connection, query: LogsQuery) -> Logs:
    """At most `limit` records, newest first, from where `cursor` left off. Raises BadCall for a cursor not ours."""
    names = [name for name in Record.model_fields if name != "time"]
    statement = (
        select(usage.c.created_at.label("time"), *usage.c[*names])
        .where(usage.c.user_id == query.user_id)
        .order_by(usage.c.created_at.desc(), usage.c.id.desc())
        .limit(query.limit + 1)
    )
    if query.cursor is not None:
        statement = statement.where(tuple_(usage.c.created_at, usage.c.id) < _read_cursor(query.cursor))
    found = [Record.model_validate(dict(row)) for row in db.execute(statement).mappings()]
    records = _fitting(found[: query.limit])
    return Logs(records=records, next_cursor=_cursor(records[-1]) if len(records) < len(found) else None)


def explain(db: Connection, query: ExplainQuery) -> RecordedStory:
    """The record, where its event is on the stream, and the first seal that covers it."""
    row = db.execute(select(usage).where(usage.c.id == query.event_id)).mappings().first()
    if row is None or query.user_id not in (None, row["user_id"]):
        return RecordedStory(record=None)
    return RecordedStory(
        record=OnRecord(
            user_id=row["user_id"],
            moment=row["created_at"],
            authorized=row["authorized"] and Authorized.model_validate(row["authorized"]),
            given=Given.model_validate({name: row[name] for name in Given.model_fields}),
            place=_place(db, row["id"], row["event_type"]),
        )
    )


def _place(db: Connection, event_id: str, event_type: str) -> Place:
    of_event = select(leaves).where(leaves.c.event_id == event_id).order_by(leaves.c.stream_sequence)
    leaf = next(iter(counting(db, db.execute(of_event).all())), None)
    if leaf is None:
        return Place(id=event_id, type=event_type, stream_sequence=None, leaf_hash=None, sealed_by=None)
    covering = select(seals).where(seals.c.tree_size >= leaf.stream_sequence).order_by(seals.c.tree_size).limit(1)
    seal = db.execute(covering).first()
    return Place(
        id=event_id,
        type=event_type,
        stream_sequence=leaf.stream_sequence,
        leaf_hash=leaf.leaf_hash.hex(),
        sealed_by=seal
        and SealedBy(
            tree_size=seal.tree_size, root_hash=seal.root_hash.hex(), sealed_at=seal.sealed_at, key_id=seal.key_id
        ),
    )


def counting(db: Connection, of_id: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Of the leaves of one event's id, in their order, those whose messages were not set aside; each hash once.

    The first of them is the one that counts, but where a use and a change of plan have one id: then both do.
    """
    found = list({leaf.leaf_hash: leaf for leaf in reversed(of_id)}.values())[::-1]
    if len(found) < 2:
        return found
    set_aside = {leaf_hash(body) for body in bodies(db)}
    return [leaf for leaf in found if leaf.leaf_hash not in set_aside] or found


def usage_rows(events: Sequence[GenerationCompleted | UsageAdjusted]) -> list[dict[str, Any]]:
    """A row for each, in their order."""
    granted = [event.data.authorized for event in events if isinstance(event, GenerationCompleted)]
    # One after the other they would take as long as all the rest.
    texts = isos([moment for data in granted if data for moment in _moments(data)])
    rest = iter(texts)
    return [_row(event, rest) for event in events]


def _row(event: GenerationCompleted | UsageAdjusted, texts: Iterator[str | None]) -> dict[str, Any]:
    # model_dump would take four times as long.
    if isinstance(event, GenerationCompleted):
        row = _NOTHING | vars(event.data)
        row["created_at"] = row.pop("started_at")
        if data := event.data.authorized:
            row["authorized"] = vars(data) | dict(zip(_MOMENTS, texts, strict=False))
    else:
        row = _NOTHING | _adjustment(event.data)
    row["id"], row["event_type"] = event.id, event.type
    row["usage_date"] = row["created_at"].astimezone(UTC).date()
    return row


def _adjustment(data: Adjustment) -> dict[str, Any]:
    metadata: dict[str, Any] = {"reason": data.reason, "actor": data.actor}
    if data.top_up_tokens:
        metadata |= {"topUpTokens": data.top_up_tokens, "outlivesPeriod": data.outlives_period}
    return {
        "user_id": data.user_id,
        "action_type": "top_up" if data.top_up_tokens else "adjustment",
        "tokens_used": data.tokens_used,
        "metadata": metadata,
        "created_at": data.effective_at,
    }


def change_row(event: SubscriptionChanged) -> dict[str, Any]:
    return {"event_id": event.id, **event.data.model_dump(exclude={"time_zone"})}


def _by_day(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    """What new events add to `usage_daily`."""
    days: dict[tuple[str, date, str], tuple[int, ...]] = {}
    for event in events:
        data = event.data
        if isinstance(data, Subscription) or not data.tokens_used:
            continue
        if isinstance(data, Generation):
            key = (data.user_id, data.started_at.astimezone(UTC).date(), data.model or "")
            added = (
                data.tokens_used,
                data.input_tokens or 0,
                data.output_tokens or 0,
                data.cache_creation_input_tokens or 0,
                data.cache_read_input_tokens or 0,
                1,
            )
        else:
            key = (data.user_id, data.effective_at.astimezone(UTC).date(), "")
            added = (data.tokens_used, 0, 0, 0, 0, 0)
        known = days.get(key)
        days[key] = tuple(map(add, known, added)) if known else added
    return [(*key, *sums) for key, sums in days.items()]


def sum_up_days(db: Connection) -> None:
    """Fill the empty `usage_daily` from the records."""
    model = func.coalesce(usage.c.model, literal_column("''"))
    key = (usage.c.user_id, usage.c.usage_date, model)
    sums = select(*key, *_sums(usage), _generations(usage)).where(usage.c.tokens_used != 0).group_by(*key)
    db.execute(insert(usage_daily).from_select(_DAILY, sums))


def _sums(used: FromClause) -> list[Label[int]]:
    return [cast(func.coalesce(func.sum(used.c[name]), 0), BigInteger).label(name) for name in COUNTS]


def _generations(used: FromClause) -> Label[int]:
    return func.count().filter(used.c.event_type == GENERATION_COMPLETED).label("generations")


class _Part(NamedTuple):
    """What a user used of a model on a day, under one plan."""

    date: date
    tier: str | None
    model: str | None
    generations: int
    counts: Counts


def _parts(db: Connection, query: HistoryQuery) -> list[_Part]:
    """Of a day on which the plan changed from the records themselves, of all others from their sums."""
    # In this order: a replay takes the tables away in the same one.
    days = db.execute(_summed_up(query)).all()
    changes = db.execute(_changes(query.user_id)).all()
    changed_on = [changed_at.date() for changed_at, _ in changes]
    mixed = {row.usage_date for row in days} & set(changed_on)
    tiers = [None, *(tier for _, tier in changes)]
    whole = [
        _Part(day, tiers[bisect(changed_on, day)], model or None, generations, Counts(*counts))
        for day, model, generations, *counts in days
        if day not in mixed
    ]
    if not mixed:
        return whole
    rows = db.execute(_sums_by_day_and_tier(query.user_id, mixed))
    return whole + [
        _Part(day, tier, model, generations, Counts(*counts)) for day, tier, model, generations, *counts in rows
    ]


def _summed_up(query: HistoryQuery) -> Select[Any]:
    return select(*usage_daily.c["usage_date", "model", "generations", *COUNTS]).where(
        usage_daily.c.user_id == query.user_id, usage_daily.c.usage_date.between(query.from_date, query.to_date)
    )


def _changes(user_id: str) -> Select[Any]:
    changes = subscription_changes.c
    of_user = select(changes.changed_at, changes.tier).where(changes.user_id == user_id)
    return of_user.order_by(changes.changed_at, changes.event_id)


def _sums_by_day_and_tier(user_id: str, days: Collection[date]) -> Select[Any]:
    changes = subscription_changes
    tier = (
        select(changes.c.tier)
        .where(changes.c.user_id == usage.c.user_id, changes.c.changed_at <= usage.c.created_at)
        .order_by(changes.c.changed_at.desc(), changes.c.event_id.desc())
        .limit(1)
        .scalar_subquery()
    )
    used = (
        select(*usage.c["usage_date", "event_type", "model", *COUNTS], tier.label("tier"))
        .where(
            usage.c.user_id == user_id,
            or_(*(usage.c.created_at.between(*_bounds(day)) for day in days)),
            usage.c.tokens_used != 0,  # Claude was never asked, or gave nothing
        )
        .subquery()
    )
    key = (used.c.usage_date, used.c.tier, used.c.model)
    return select(*key, _generations(used), *_sums(used)).group_by(*key)


def _bounds(day: date) -> tuple[datetime, datetime]:
    """Its first moment and its last, in UTC."""
    return datetime.combine(day, time.min, UTC), datetime.combine(day, time.max, UTC)


def _day(plans: Plans, day: date, parts: Iterable[_Part]) -> Day:
    """One day, in a part for each plan and model that the user had on it. Its input includes both cache counts."""
    of_day = list(parts)
    by_tier: defaultdict[str | None, list[tuple[str | None, Counts]]] = defaultdict(list)
    for part in of_day:
        by_tier[part.tier].append((part.model, part.counts))
    used = reduce(add, (part.counts for part in of_day))
    return Day(
        date=day,
        tokens_used=used.tokens_used,
        input_tokens=used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens,
        output_tokens=used.output_tokens,
        generations=sum(part.generations for part in of_day),
        # From 0.00: what a correction takes from a free plan is Decimal("-0.00").
        cost_usd=str(sum((_cost_usd(plans.of(tier), used) for tier, used in by_tier.items()), start=Decimal("0.00"))),
    )


def _cost_usd(plan: Plan, used: list[tuple[str | None, Counts]]) -> Decimal:
    return plan.cost_usd(weighted_tokens(plan.weights, used))


def _fitting(records: list[Record]) -> list[Record]:
    sizes = accumulate(len(record.model_dump_json().encode()) for record in records)
    return [record for record, size in zip(records, sizes, strict=True) if size <= PAGE_BYTES_MAX]


def _cursor(last: Record) -> str:
    return base64.urlsafe_b64encode(_position.dump_json((last.time, last.id))).decode()


def _read_cursor(cursor: str) -> Any:
    try:
        time, event_id = _position.validate_json(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except ValueError:
        raise BadCall("cursor is not one of ours: use nextCursor of the page before, or leave it out") from None
    return tuple_(literal(time, usage.c.created_at.type), literal(event_id))


def ping(db: Connection) -> None:
    """Raises when the database does not answer or has not been migrated."""
    db.execute(select(usage.c.id).limit(1))
