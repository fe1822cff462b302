"""What must be known about users before anything is decided: their totals, their holds, and what is settled.

It is asked for every authorization, so PostgreSQL is asked all of it at once.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from pydantic_core import to_json
from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    FromClause,
    Table,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    true,
)

from services.quota.models import Hold
from services.quota.subscriptions import subscriptions
from services.quota.totals import settlements, totals
from shared.bulk import listed
from shared.database import UtcDateTime, is_sqlite, now, table_of
from shared.plans import PeriodKind
from shared.prepared import Prepared, execute, one_round_trip

holds = table_of(Hold)

# SQLite has one writer. On PostgreSQL an advisory lock a user, taken in one order: no row need exist yet, and two
# batches that share users wait for each other instead of deadlocking.
_LOCK = (
    "WITH locked AS MATERIALIZED (SELECT pg_advisory_xact_lock(key) FROM"
    " (SELECT DISTINCT hashtextextended(u, 0) AS key FROM unnest(CAST(%s AS text[])) u ORDER BY key) keys)"
    " SELECT clock_timestamp() FROM (SELECT count(*) FROM locked) all_of_them"
)


class Grant(NamedTuple):
    """A hold as its row has it. What was asked and which limit decided is None where an earlier release made it."""

    generation_id: str
    user_id: str
    period_start: datetime
    tokens: int
    output_tokens: int
    started_at: datetime
    expires_at: datetime
    input_tokens_max: int | None
    output_tokens_asked: int | None
    tier: str | None
    period: PeriodKind | None
    resets_at: datetime | None

    def stands(self, user_id: str, at: datetime) -> bool:
        return self.user_id == user_id and self.expires_at > at


class Standing(NamedTuple):
    """A user at one moment, with one of the totals that cover it; null where none is kept."""

    at: datetime
    user_id: str
    tier: str | None
    time_zone: str | None
    subscribed_at: datetime | None
    open_holds: list[Any]
    has_settlements: bool
    has_lasting_top_ups: bool
    period_start: datetime | None
    period_end: datetime | None
    tokens_used: int
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    top_up_tokens: int
    lasting_top_up_tokens: int
    models: str


class Events(NamedTuple):
    """Which of them are settled, and the holds that have not been settled, expired ones included."""

    settled: set[str]
    held: dict[str, Grant]


def lock(db: Connection, user_ids: Iterable[str]) -> datetime:
    """Until the transaction ends nobody else changes these users. The database's clock, once they are locked."""
    if is_sqlite(db):
        return now(db)
    at: datetime = execute(db, _LOCK, [list(set(user_ids))]).fetchone()[0]
    return at


def standing(db: Connection, user_ids: Collection[str], *, at: datetime) -> list[Standing]:
    """Each user's rows, as of that moment."""
    return _standing(db.dialect.name).send(db, user_ids=_listed(user_ids), at=at)()


def look(
    db: Connection, user_ids: Collection[str], event_ids: Collection[str], *, locked: bool
) -> tuple[list[Standing], Events]:
    """Users now, by the database's clock, and these events; with `locked`, nobody changes them any more."""
    with one_round_trip(db):
        if locked and not is_sqlite(db):
            execute(db, _LOCK, [list(user_ids)])
        at = now(db) if is_sqlite(db) else None
        users = _standing(db.dialect.name).send(db, user_ids=_listed(user_ids), at=at)
        events = _settled_or_held(db.dialect.name).send(db, event_ids=_listed(event_ids))
    known = events()
    settled = {event_id for event_id, is_settled, _ in known if is_settled}
    held = {event_id: hold for event_id, _, hold in known if hold}
    return users(), Events(settled, held)


def _listed(texts: Collection[str]) -> str:
    return to_json(list(texts)).decode()


# Built once: building a statement costs more than running it.


@cache
def _standing(dialect: str) -> Prepared[Standing]:
    """A row for each user and each of the totals that cover `at`; null is PostgreSQL's clock."""
    users = listed(dialect, "user_ids")
    at: ColumnElement[datetime] = bindparam("at", type_=UtcDateTime)
    if dialect == "postgresql":
        # As of this very statement: where it is sent along with a lock, of when the lock was had.
        at = func.coalesce(at, func.statement_timestamp(type_=UtcDateTime))
    # One scan of the user's holds for all three, through their index: joined as a table, PostgreSQL reads all holds.
    as_json = func.json_array if dialect == "sqlite" else func.json_build_array
    open_holds = (
        select(as_json(func.sum(holds.c.tokens), func.min(holds.c.started_at), func.count(), type_=JSON))
        .where(holds.c.user_id == users.c.item, holds.c.expires_at > at)
        .scalar_subquery()
    )
    ever = totals.alias("ever")
    chosen = subscriptions.c.user_id == users.c.item
    covering = and_(totals.c.user_id == users.c.item, totals.c.period_start <= at, totals.c.period_end > at)
    joined, subscribed = _looked_up(dialect, users, subscriptions, chosen)
    joined, kept = _looked_up(dialect, joined, totals, covering)
    statement = select(
        at.label("at"),
        users.c.item.label("user_id"),
        *subscribed["tier", "time_zone", "subscribed_at"],
        open_holds.label("open_holds"),
        _is_any(settlements.c.user_id == users.c.item).label("has_settlements"),
        _is_any(ever.c.user_id == users.c.item, ever.c.lasting_top_up_tokens != 0).label("has_lasting_top_ups"),
        *(column for column in kept if column.name != "user_id"),
    ).select_from(joined)
    return Prepared(dialect, statement, Standing._make)


@cache
def _settled_or_held(dialect: str) -> Prepared[tuple[str, bool, Grant | None]]:
    """A row for each event: whether it is settled, and its hold, if it has one."""
    events = listed(dialect, "event_ids")
    joined, held = _looked_up(dialect, events, holds, holds.c.generation_id == events.c.item)
    statement = select(
        events.c.item.label("event_id"),
        _is_any(settlements.c.event_id == events.c.item).label("is_settled"),
        *held[*Grant._fields],
    ).select_from(joined)
    return Prepared(dialect, statement, lambda row: (row[0], row[1], Grant(*row[2:]) if row[2] else None))


# PostgreSQL takes every list for a hundred, and keeps the plan that it made while a table was small: left to itself
# it reads a whole table to find one user. What follows can only be looked up, for one of the list after the other.


def _looked_up(dialect: str, left: FromClause, table: Table, which: ColumnElement[bool]) -> tuple[FromClause, Any]:
    """With the rows of `table` that go with each on the left, or nulls; and the columns of these."""
    if dialect == "sqlite":
        return left.outerjoin(table, which), table.c
    rows = select(table).where(which).offset(literal_column("0")).lateral()
    return left.outerjoin(rows, true()), rows.c


def _is_any(*which: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether there is such a row; null for none."""
    return select(true()).where(*which).limit(literal_column("1")).scalar_subquery()
