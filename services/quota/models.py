"""The tables of quota. Rows, never contracts: what crosses a boundary is in shared/."""

from datetime import datetime

from sqlalchemy import BigInteger, Index, Text, text
from sqlmodel import Field, SQLModel

from shared.database import UtcDateTime


class Subscription(SQLModel, table=True):
    """The plan of a user who has chosen one: the newest change, and since when they have had its plan."""

    __tablename__ = "subscriptions"

    user_id: str = Field(primary_key=True, sa_type=Text)
    tier: str = Field(sa_type=Text)
    time_zone: str | None = Field(default=None, sa_type=Text)
    changed_at: datetime = Field(sa_type=UtcDateTime)
    subscribed_at: datetime = Field(sa_type=UtcDateTime)
    event_id: str = Field(sa_type=Text)


class PlanChange(SQLModel, table=True):
    """Every change of a plan, in whatever order changes arrive: what is made of them is the same in all orders."""

    __tablename__ = "plan_changes"
    __table_args__ = (Index("plan_changes_by_user", "user_id", "changed_at", "event_id"),)

    event_id: str = Field(primary_key=True, sa_type=Text)
    user_id: str = Field(sa_type=Text)
    tier: str = Field(sa_type=Text)
    time_zone: str | None = Field(default=None, sa_type=Text)
    changed_at: datetime = Field(sa_type=UtcDateTime)


class UsageTotal(SQLModel, table=True):
    """The sum of a user's settlements in one period: always equal to it, kept so that no check has to add up."""

    __tablename__ = "usage_totals"

    user_id: str = Field(primary_key=True, sa_type=Text)
    period_start: datetime = Field(primary_key=True, sa_type=UtcDateTime)
    period_end: datetime = Field(primary_key=True, sa_type=UtcDateTime)
    tokens_used: int = Field(sa_type=BigInteger)
    input_tokens: int = Field(sa_type=BigInteger)
    output_tokens: int = Field(sa_type=BigInteger)
    cache_creation_input_tokens: int = Field(sa_type=BigInteger)
    cache_read_input_tokens: int = Field(sa_type=BigInteger)
    top_up_tokens: int = Field(default=0, sa_type=BigInteger)
    lasting_top_up_tokens: int = Field(default=0, sa_type=BigInteger)
    # {"claude-haiku-4-5": [the five counts, as above], ...}: plans may weigh models differently.
    models: str = Field(default="{}", sa_type=Text)


class Settlement(SQLModel, table=True):
    """An event that has been counted. Its primary key is what makes counting happen once, for ever."""

    __tablename__ = "settlements"
    __table_args__ = (
        Index("settlements_by_user", "user_id", "started_at"),
        Index("late_settlements", "event_id", sqlite_where=text("is_late"), postgresql_where=text("is_late")),
    )

    event_id: str = Field(primary_key=True, sa_type=Text)
    user_id: str = Field(sa_type=Text)
    started_at: datetime = Field(sa_type=UtcDateTime)
    tokens_used: int = Field(sa_type=BigInteger)
    input_tokens: int = Field(sa_type=BigInteger)
    output_tokens: int = Field(sa_type=BigInteger)
    cache_creation_input_tokens: int = Field(sa_type=BigInteger)
    cache_read_input_tokens: int = Field(sa_type=BigInteger)
    top_up_tokens: int = Field(default=0, sa_type=BigInteger)
    lasting_top_up_tokens: int = Field(default=0, sa_type=BigInteger)
    model: str | None = Field(default=None, sa_type=Text)
    is_late: bool = False


class Hold(SQLModel, table=True):
    """Tokens set aside for a generation under way, `output_tokens` of them for what Claude writes.

    It counts in the period of `started_at` until it is settled or its time is over. Settled after that, it is late.
    `period` and its bounds are of the limit that decided; they and what was asked are null of an earlier release's.
    """

    __tablename__ = "holds"
    # All that is asked of a user's open holds: the index answers it alone.
    __table_args__ = (Index("holds_by_user", "user_id", "expires_at", "tokens", "started_at"),)

    generation_id: str = Field(primary_key=True, sa_type=Text)
    user_id: str = Field(sa_type=Text)
    period_start: datetime = Field(sa_type=UtcDateTime)
    tokens: int = Field(sa_type=BigInteger)
    output_tokens: int = Field(sa_type=BigInteger)
    started_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    input_tokens_max: int | None = Field(default=None, sa_type=BigInteger)
    output_tokens_asked: int | None = Field(default=None, sa_type=BigInteger)
    tier: str | None = Field(default=None, sa_type=Text)
    period: str | None = Field(default=None, sa_type=Text)
    resets_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    reported_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Alert(SQLModel, table=True):
    """A user came to so many per cent of a limit in a period. Its primary key is what makes it happen once."""

    __tablename__ = "alerts"

    user_id: str = Field(primary_key=True, sa_type=Text)
    period_start: datetime = Field(primary_key=True, sa_type=UtcDateTime)
    period_end: datetime = Field(primary_key=True, sa_type=UtcDateTime)
    percent: int = Field(primary_key=True)
    event_id: str = Field(sa_type=Text)
    event: str = Field(sa_type=Text)
    is_published: bool = False
