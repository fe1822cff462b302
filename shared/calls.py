"""The calls between services: core NATS request/reply, answered by any replica of the queue group.

    quota.authorize   Authorize     -> Granted | Refused
    quota.usage       UsageQuery    -> UsageAnswer
    quota.explain     ExplainQuery  -> CountedStory
    ledger.history    HistoryQuery  -> History
    ledger.logs       LogsQuery     -> Logs
    ledger.explain    ExplainQuery  -> RecordedStory

A fault is an answer, too: the reply then carries the headers of NATS' service protocol (ADR-32),
`Nats-Service-Error-Code` (400: never repeat, 503: later) and `Nats-Service-Error`, in words.
"""

from datetime import date, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, model_validator
from pydantic.alias_generators import to_camel

from shared.events import (
    Authorized,
    Contract,
    Generation,
    Moment,
    Name,
    OnDisconnect,
    Outcome,
    Tokens,
    UsageSource,
    UserId,
)
from shared.plans import PeriodKind

AUTHORIZE = "quota.authorize"
USAGE = "quota.usage"
HISTORY = "ledger.history"
LOGS = "ledger.logs"
EXPLAIN_COUNTED = "quota.explain"
EXPLAIN_RECORDED = "ledger.explain"


class View(BaseModel):
    """A body that front ends see: camelCase on the wire, passed through by chat byte for byte."""

    model_config = ConfigDict(
        frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class Usage(View):
    """What a user has used and what is left. Unlimited plans have null limits and 0 per cent.

    Tokens are weighted as the plan says. `costUsd` is what they come to at the price of the plan in force now,
    whichever was in force when they were used: that is what the days of the history tell.
    """

    tier: str
    tokens_used: int
    tokens_limit: int | None
    tokens_remaining: int | None
    usage_percentage: float
    tokens_held: int
    period: PeriodKind
    period_start: datetime | None
    resets_at: datetime | None
    upgrade_to: str | None
    cost_usd: str


class LimitState(Contract):
    """One limit of a user's plan, top-ups included; without an end the period has no window and no reset."""

    period: PeriodKind
    limit_tokens: int
    remaining_tokens: int
    window_s: int | None
    resets_in_s: int | None


class UsageAnswer(Contract):
    """What people are shown, and each limit behind it. An unlimited plan has none."""

    usage: Usage
    limits: tuple[LimitState, ...]


class Pending(Contract):
    """Usage that is durable (stream or outbox) and that quota may not have applied yet.

    Callers send along what they know of, so that a user's next question already includes it;
    quota adds what it has not settled, by id, and nothing twice.
    """

    id: Name
    user_id: UserId
    started_at: Moment
    model: Name | None = None
    tokens_used: Tokens
    input_tokens: Tokens = 0
    output_tokens: Tokens = 0
    cache_creation_input_tokens: Tokens = 0
    cache_read_input_tokens: Tokens = 0

    @classmethod
    def of(cls, event_id: str, generation: Generation) -> "Pending":
        return cls(
            id=event_id,
            user_id=generation.user_id,
            started_at=generation.started_at,
            model=generation.model,
            tokens_used=generation.tokens_used,
            input_tokens=generation.input_tokens or 0,
            output_tokens=generation.output_tokens or 0,
            cache_creation_input_tokens=generation.cache_creation_input_tokens or 0,
            cache_read_input_tokens=generation.cache_read_input_tokens or 0,
        )


class Authorize(Contract):
    """Hold room for a generation: all of the input, and between `output_tokens_min` and `_max` of output."""

    generation_id: Name
    user_id: UserId
    model: Name | None = None
    input_tokens_max: Tokens
    output_tokens_min: Tokens
    output_tokens_max: Tokens
    # What the caller wanted, where chat asks for less of it: noted, and not decided by. Null is `output_tokens_max`.
    output_tokens_asked: Tokens | None = None
    pending: tuple[Pending, ...] = ()

    @model_validator(mode="after")
    def _the_least_is_no_more_than_the_most(self) -> "Authorize":
        if self.output_tokens_min > self.output_tokens_max:
            raise ValueError("output_tokens_min must not be more than output_tokens_max")
        return self


# Longer than the longest generation: a hold never ends before the generation that it covers.
HOLD_TTL = timedelta(minutes=15)


class Granted(Contract):
    """The hold stands. `started_at` is the database's clock: it names the period that the hold is in.

    The rest is for the record: what is held, as weighed, until when, and by which limit of which plan, the tightest.
    Of a hold that an earlier release made it is null; so are the bounds of a period without an end.
    """

    kind: Literal["granted"] = "granted"
    output_tokens_max: int
    started_at: datetime
    hold_tokens: int | None = None
    expires_at: datetime | None = None
    tier: str | None = None
    period: PeriodKind | None = None
    period_start: datetime | None = None
    resets_at: datetime | None = None
    limits: tuple[LimitState, ...] = ()


# Why nothing is held: it does not fit into what is left; it would, but for what the user's other generations hold; or
# the user has as many generations under way as the plan allows.
Reason = Literal["tokens", "held", "concurrency"]


class Refused(Contract):
    """Nothing is held. `tokens_available` is what a smaller generation could still have.

    `exceeds_plan`: what was asked does not fit into the whole plan either, however much of it is left.
    """

    kind: Literal["refused"] = "refused"
    reason: Reason
    tokens_available: int
    retry_after_s: int
    exceeds_plan: bool = False
    usage: Usage
    limits: tuple[LimitState, ...] = ()


Authorization = Granted | Refused
authorization: TypeAdapter[Authorization] = TypeAdapter(Annotated[Authorization, Field(discriminator="kind")])


class UsageQuery(Contract):
    user_id: UserId
    pending: tuple[Pending, ...] = ()


class HistoryQuery(Contract):
    """Days from `from_date` to `to_date`, both included, in UTC."""

    user_id: UserId
    from_date: date
    to_date: date


class Day(View):
    """Tokens as they were counted, unweighted. `costUsd` is at the weights and prices of the plans in force then."""

    date: date
    tokens_used: int
    input_tokens: int
    output_tokens: int
    generations: int
    cost_usd: str


class History(View):
    days: list[Day]


class LogsQuery(Contract):
    """`cursor` is the `next_cursor` of the page before; absent, the newest page."""

    user_id: UserId
    cursor: str | None = Field(default=None, max_length=1024)
    limit: int = Field(default=50, ge=1, le=1000)


class Record(View):
    id: str
    time: datetime
    action_type: str
    model: str | None
    input_tokens: int | None
    output_tokens: int | None
    cache_creation_input_tokens: int | None
    cache_read_input_tokens: int | None
    tokens_used: int
    outcome: Outcome | None
    usage_source: UsageSource | None
    metadata: dict[str, JsonValue]


class Logs(View):
    records: list[Record]
    next_cursor: str | None


class ExplainQuery(Contract):
    """One generation, report or adjustment, by the id of its event; of this user alone, where one is named."""

    event_id: Name
    user_id: UserId | None = None


class Given(View):
    """What was used or corrected, as it is on record; null where a report or an adjustment does not say."""

    action_type: str
    model: str | None
    input_tokens: int | None
    output_tokens: int | None
    cache_creation_input_tokens: int | None
    cache_read_input_tokens: int | None
    tokens_used: int
    outcome: Outcome | None
    usage_source: UsageSource | None
    on_disconnect: OnDisconnect | None
    provider_request_id: str | None
    completed_at: datetime | None
    metadata: dict[str, JsonValue]


class SealedBy(View):
    """The first seal that covers a message: the head of the tree over all messages up to `tree_size`."""

    tree_size: int
    root_hash: str
    sealed_at: datetime
    key_id: str | None


class Place(View):
    """The event on the stream. Where it is there is known once it is sealed, a minute later."""

    id: str
    type: str
    stream_sequence: int | None
    leaf_hash: str | None
    sealed_by: SealedBy | None


class OnRecord(Contract):
    """A record of the ledger: whose it is, the moment that decides in which period it counts, and what it says."""

    user_id: str
    moment: datetime
    authorized: Authorized | None
    given: Given
    place: Place


class RecordedStory(Contract):
    """Null: no such record, or another user's."""

    record: OnRecord | None


class CountedIn(View):
    """A period without an end has neither start nor reset."""

    period: PeriodKind
    period_start: datetime | None
    resets_at: datetime | None


class Counted(View):
    """What counts against the limits, as weighed, in the periods of the plan that the user had at that moment.

    `counts_at` is the moment that decides which. `is_late`: it came after its hold had expired.
    """

    counts_at: datetime
    tokens_counted: int
    top_up_tokens: int
    is_late: bool
    tier: str
    counted_in: tuple[CountedIn, ...]


class OpenHold(Contract):
    """A hold that nobody settled; after `expires_at` it holds nothing. `authorized`: null of an earlier release's."""

    user_id: str
    tokens: int
    started_at: datetime
    expires_at: datetime
    is_expired: bool
    authorized: Authorized | None


class CountedStory(Contract):
    """What quota has of it: a hold, then a settlement. Null: it has none, or another user's."""

    user_id: str | None
    hold: OpenHold | None
    settled: Counted | None
