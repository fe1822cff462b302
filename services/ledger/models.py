"""The tables of the ledger. Rows, never contracts: what crosses a boundary is in shared/."""

import datetime as dt
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Index, LargeBinary, Text
from sqlmodel import Field, SQLModel

from shared.database import UtcDateTime


class Usage(SQLModel, table=True):
    """One event that used or corrected tokens, as it came. The database itself refuses to change or delete it."""

    __tablename__ = "usage"
    __table_args__ = (Index("usage_by_time", "user_id", "created_at", "id"),)

    # The event's id: recording it twice is impossible, however often it is delivered.
    id: str = Field(primary_key=True, sa_type=Text)
    event_type: str = Field(sa_type=Text)
    user_id: str = Field(sa_type=Text)
    action_type: str = Field(sa_type=Text)
    model: str | None = Field(sa_type=Text)
    tokens_used: int = Field(sa_type=BigInteger)
    input_tokens: int | None = Field(sa_type=BigInteger)
    output_tokens: int | None = Field(sa_type=BigInteger)
    cache_creation_input_tokens: int | None = Field(sa_type=BigInteger)
    cache_read_input_tokens: int | None = Field(sa_type=BigInteger)
    outcome: str | None = Field(sa_type=Text)
    usage_source: str | None = Field(sa_type=Text)
    on_disconnect: str | None = Field(sa_type=Text)
    # SQLModel keeps the name `metadata` for itself.
    details: dict[str, Any] = Field(sa_column=Column("metadata", JSON, nullable=False))
    # The moment that decides the period in which the tokens count, and its date in UTC.
    created_at: dt.datetime = Field(sa_type=UtcDateTime)
    usage_date: dt.date
    completed_at: dt.datetime | None = Field(sa_type=UtcDateTime)
    generation_id: str | None = Field(sa_type=Text)
    provider_request_id: str | None = Field(sa_type=Text)
    # What quota granted and held, as the event says it.
    authorized: dict[str, Any] | None = Field(sa_column=Column(JSON(none_as_null=True)))


class UsageDaily(SQLModel, table=True):
    """A user's records of one day in UTC, by model: always their sum, kept so that no page has to add them up.

    Records of no tokens are in none: where they are all there is, there is no row.
    """

    __tablename__ = "usage_daily"

    user_id: str = Field(primary_key=True, sa_type=Text)
    usage_date: dt.date = Field(primary_key=True)
    # Empty where a record names none.
    model: str = Field(primary_key=True, sa_type=Text)
    tokens_used: int = Field(sa_type=BigInteger)
    # What a report does not split is in `tokens_used` alone.
    input_tokens: int = Field(sa_type=BigInteger)
    output_tokens: int = Field(sa_type=BigInteger)
    cache_creation_input_tokens: int = Field(sa_type=BigInteger)
    cache_read_input_tokens: int = Field(sa_type=BigInteger)
    generations: int = Field(sa_type=BigInteger)


class SubscriptionChange(SQLModel, table=True):
    """From `changed_at` on the user has `tier`: what a day cost is what the plan cost on that day."""

    __tablename__ = "subscription_changes"
    __table_args__ = (Index("subscription_changes_by_user", "user_id", "changed_at", "event_id"),)

    event_id: str = Field(primary_key=True, sa_type=Text)
    user_id: str = Field(sa_type=Text)
    tier: str = Field(sa_type=Text)
    changed_at: dt.datetime = Field(sa_type=UtcDateTime)
    actor: str = Field(sa_type=Text)


class Leaf(SQLModel, table=True):
    """The hash of a message of the stream, as it was when the ledger had handled it. Never changed, never deleted."""

    __tablename__ = "leaves"
    __table_args__ = (Index("leaves_by_event", "event_id"),)

    stream_sequence: int = Field(primary_key=True, sa_type=BigInteger)
    # Null where the message is no event.
    event_id: str | None = Field(sa_type=Text)
    leaf_hash: bytes = Field(sa_type=LargeBinary)


class Seal(SQLModel, table=True):
    """The head of the Merkle tree over the first `tree_size` leaves. Never changed, never deleted."""

    __tablename__ = "seals"

    tree_size: int = Field(primary_key=True, sa_type=BigInteger)
    root_hash: bytes = Field(sa_type=LargeBinary)
    # The roots of its full subtrees, largest first, 32 bytes each: what is needed to go on from here.
    subtrees: bytes = Field(sa_type=LargeBinary)
    sealed_at: dt.datetime = Field(sa_type=UtcDateTime)
    signature: bytes | None = Field(sa_type=LargeBinary)
    key_id: str | None = Field(sa_type=Text)
