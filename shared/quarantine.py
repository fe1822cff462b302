"""Where a consumer puts what it can never handle: acknowledged, out of the way, and kept for a person to look at."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog
from prometheus_client import Counter
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, LargeBinary, Text, delete, make_url, select, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlmodel import Field, SQLModel

from shared.database import Database, UtcDateTime, insert_new, now, table_of, usable
from shared.errors import Misconfigured, PoisonMessage
from shared.events import Event, decode

log = structlog.get_logger()

QUARANTINED = Counter("chatrail_quarantined", "Messages that were put into quarantine, again with each delivery")
# The reason of an event whose id has been counted already, with other content: the first is kept.
ANOTHER_BODY = "another body under an id that is counted already"


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


def redrive(db: Connection, apply: Apply) -> int:
    """Hand to `apply` every message that can be read by now, and take it out. How many those were.

    What still cannot be handled stays, with the reason of today. `apply` returns the event when it contradicts an
    earlier one of the same id.
    """
    done = 0
    for row in db.execute(select(_table).order_by(_table.c.received_at)).all():
        which = _table.c.body_sha256 == row.body_sha256
        try:
            with db.begin_nested():
                if apply(db, decode(row.body)):
                    raise PoisonMessage(ANOTHER_BODY)
                db.execute(delete(_table).where(which))
            done += 1
        except (PoisonMessage, DataError, IntegrityError) as problem:
            reason = str(problem) if isinstance(problem, PoisonMessage) else type(problem.orig).__name__
            db.execute(update(_table).where(which).values(reason=_storable(reason)))
    return done


def command(service: str, database_url: str, apply: Apply, *, redriving: bool) -> None:
    """What an operator sees of a service's quarantine: a line a message, never its content."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise Misconfigured(f"{service} has no database yet at {url.database}")
    console = Console(highlight=False)
    database = Database(database_url)

    async def run() -> None:
        if redriving:
            console.print(f"{service}: {await database.write(redrive, apply)} messages are counted now")
        rows = await database.read(lambda db: db.execute(select(_table).order_by(_table.c.received_at)).all())
        table = Table("received", "subject", "bytes", "SHA-256", "reason", box=None, pad_edge=False)
        for row in rows:
            received = row.received_at.isoformat(timespec="seconds")
            table.add_row(received, row.subject, str(len(row.body)), row.body_sha256[:12], row.reason)
        console.print(f"{service}: {len(rows)} messages in quarantine")
        if rows:
            console.print(table)
        await database.close()

    with usable(url):
        asyncio.run(run())
