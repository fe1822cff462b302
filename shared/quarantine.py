"""Where a consumer puts what it can never handle: acknowledged, out of the way, and kept for a person to look at."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import Connection, LargeBinary, Text
from sqlmodel import Field, SQLModel

from shared.database import UtcDateTime, insert_new, now, table_of

log = structlog.get_logger()


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


def quarantine(db: Connection, poison: Sequence[Poison]) -> None:
    """Keep each message once, however often it is delivered, and say so in the log, without its content."""
    if not poison:
        return
    received_at = now(db)
    rows = [
        {
            "body_sha256": hashlib.sha256(message.body).hexdigest(),
            "subject": message.subject,
            "body": message.body,
            "reason": message.reason,
            "received_at": received_at,
        }
        for message in poison
    ]
    insert_new(db, table_of(Quarantined), rows)
    for row in rows:
        log.error("message_quarantined", subject=row["subject"], sha256=row["body_sha256"], reason=row["reason"])
