"""Where a consumer puts what it can never handle: acknowledged, out of the way, and kept for a person to look at."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import structlog
from prometheus_client import Counter
from sqlalchemy import Connection, LargeBinary, Row, Text, delete, select, type_coerce, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.types import NullType
from sqlmodel import Field, SQLModel

from shared.database import UtcDateTime, insert_new, now, table_of
from shared.errors import PoisonMessage
from shared.events import Event, decode

log = structlog.get_logger()

QUARANTINED = Counter("chatrail_quarantined", "Messages that were put into quarantine, again with each delivery")
# The reason of an event whose id has been counted already, with other content: the first is kept.
ANOTHER_BODY = "another body under an id that is counted already"

# Each has at most a megabyte.
BODIES_AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Poison:
    """A message that can never be handled."""

    subject: str
    body: bytes
    reason: str


class Quarantined(SQLModel, table=True):
    __tablename__ = "quarantine"

    body_sha256: str = Field(primary_key=True, sa_type=Text)
    subject: str = Field(sa_type=Text)
    body: bytes = Field(sa_type=LargeBinary)
    reason: str = Field(sa_type=Text)
    received_at: datetime = Field(sa_type=UtcDateTime)


_table = table_of(Quarantined)


def quarantine(db: Connection, poison: Sequence[Poison]) -> None:
    """Keep each message once, however often it is delivered."""
    if not poison:
        return
    received_at = now(db)
    rows = [
        {
            "body_sha256": _sha256(message),
            "subject": _storable(message.subject),
            "body": message.body,
            "reason": _storable(message.reason),
            "received_at": received_at,
        }
        for message in poison
    ]
    insert_new(db, _table, rows)


def alarm(poison: Sequence[Poison]) -> None:
    """Say of each message that it is in quarantine, in the log and in the metrics, without its content."""
    for message in poison:
        QUARANTINED.inc()
        log.error("message_quarantined", subject=message.subject, sha256=_sha256(message), reason=message.reason)


def _sha256(message: Poison) -> str:
    return hashlib.sha256(message.body).hexdigest()


def _storable(text: str) -> str:
    """The same on every database: PostgreSQL has no NUL, and none has half a surrogate pair."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


Apply = Callable[[Connection, Event], Sequence[Event]]


def digests(db: Connection) -> set[str]:
    """By which its messages are known."""
    return set(db.execute(select(_table.c.body_sha256)).scalars())


def bodies(db: Connection) -> Iterator[bytes]:
    """Of its messages; what somebody made of one that is none is left out."""
    raw = select(type_coerce(_table.c.body, NullType()))
    found: Iterable[object] = db.execute(raw, execution_options={"yield_per": BODIES_AT_ONCE}).scalars()
    return (body for body in found if isinstance(body, bytes))


class Redriven(NamedTuple):
    """How many are counted now, and how many are not what the stream has: those are never counted."""

    counted: int
    doubted: int


def redrive(db: Connection, apply: Apply, on_stream: Set[str]) -> Redriven:
    """Hand to `apply` every message that can be read by now, and take it out.

    What still cannot be handled stays, with the reason of today, and so does a body that is not `on_stream`, by its
    SHA-256. `apply` returns the event when it contradicts an earlier one of the same id.
    """
    counted = doubted = 0
    for row in db.execute(select(_table).order_by(_table.c.received_at)).all():
        which = _table.c.body_sha256 == row.body_sha256
        if row.body_sha256 not in on_stream or hashlib.sha256(row.body).hexdigest() != row.body_sha256:
            doubted += 1
            continue
        try:
            with db.begin_nested():
                if apply(db, decode(row.body)):
                    raise PoisonMessage(ANOTHER_BODY)
                db.execute(delete(_table).where(which))
            counted += 1
        except (PoisonMessage, DataError, IntegrityError) as problem:
            reason = str(problem) if isinstance(problem, PoisonMessage) else type(problem.orig).__name__
            db.execute(update(_table).where(which).values(reason=_storable(reason)))
    return Redriven(counted, doubted)


def listed(db: Connection) -> Sequence[Row[Any]]:
    """Oldest first."""
    return db.execute(select(_table).order_by(_table.c.received_at)).all()
