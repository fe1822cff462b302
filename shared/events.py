"""The events on the stream: CloudEvents 1.0 in structured JSON, the record that everything is rebuilt from.

    generation.completed   tokens were spent, or a back end reports that they were
    subscription.changed   from now on a user has another plan
    usage.adjusted         a correction, signed, or a top-up, with a reason and an actor

    ledger.sealed          all messages up to here have this root: a change of any of them is found

    quota.threshold.reached (on a stream of its own) tells that a user has used so much of a limit.

`id` is a UUIDv7 made by our server and is the idempotency key everywhere, for ever; `subject` is the user.
No event carries a prompt, an answer or a secret.
"""

import json
import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json
from uuid6 import uuid7

from shared.errors import PoisonMessage, in_words
from shared.plans import PeriodKind

CONTENT_TYPE = "application/cloudevents+json"
# One event reports at most this many tokens: far above any context window, far below what would overflow a sum.
EVENT_TOKENS_MAX = 100_000_000
METADATA_BYTES_MAX = 4096
_JSON = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
# As JSON escapes it; behind an escaped backslash the same six characters are plain text.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def new_id() -> str:
    """A UUIDv7 (RFC 9562): unique without asking anybody, and ordered by time."""
    return str(uuid7())


def utc_now() -> datetime:
    return datetime.now(UTC)


def small(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """The metadata itself. Raises ValueError when it is too large for an event, or cannot be stored everywhere."""
    if not metadata:
        return metadata
    text = _JSON.encode(metadata)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("metadata must be valid Unicode") from None
    if size > METADATA_BYTES_MAX:
        raise ValueError(f"metadata may take at most {METADATA_BYTES_MAX} bytes as JSON")
    if _NUL.search(text):
        raise ValueError("metadata must not contain NUL characters")
    try:
        from_json(f"[[{text}]]")  # as deep as it is within an event
    except ValueError:
        raise ValueError("metadata is nested too deeply") from None
    return metadata


# No control characters (PostgreSQL cannot store NUL); dots, stars, slashes, spaces and all of Unicode are fine.
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
UserId = Name
Tokens = Annotated[int, Field(ge=0, le=EVENT_TOKENS_MAX, strict=True)]
SignedTokens = Annotated[int, Field(ge=-EVENT_TOKENS_MAX, le=EVENT_TOKENS_MAX, strict=True)]
Metadata = Annotated[dict[str, JsonValue], AfterValidator(small)]
# No database, time zone or period overflows at a moment between these.
Moment = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9999, 1, 1, tzinfo=UTC))]

Outcome = Literal["completed", "disconnected", "provider_error", "interrupted"]
UsageSource = Literal["provider", "estimated", "reported"]
# What becomes of Claude's answer when its reader goes away: it is stopped, or drained within its hold.
OnDisconnect = Literal["stop", "drain"]


class Contract(BaseModel):
    model_config = ConfigDict(frozen=True)


class TokenCounts(Contract):
    """Tokens as the provider counts them. The total input is the sum of the three input counts."""

    input_tokens: Tokens = 0
    output_tokens: Tokens = 0
    cache_creation_input_tokens: Tokens = 0
    cache_read_input_tokens: Tokens = 0

    @property
    def total(self) -> int:
        return (
            self.input_tokens + self.output_tokens + self.cache_creation_input_tokens + self.cache_read_input_tokens
        )


class Authorized(Contract):
    """What was asked for a generation before Claude was, and what quota granted and held, all as it was then.

    `hold_tokens` is weighted as the plan weighs them. `period` is of the limit that decided, the tightest; a period
    without an end has neither start nor reset.
    """

    input_tokens_max: Tokens
    output_tokens_asked: Tokens
    output_tokens_granted: Tokens
    hold_tokens: Annotated[int, Field(ge=0, strict=True)]
    tier: Name
    period: PeriodKind
    period_start: Moment | None
    resets_at: Moment | None
    expires_at: Moment


class Generation(Contract):
    """One generation and what it cost. The four counts are null where a report does not split its total."""

    generation_id: Name
    user_id: UserId
    action_type: Name
    model: Name | None
    input_tokens: Tokens | None
    output_tokens: Tokens | None
    cache_creation_input_tokens: Tokens | None
    cache_read_input_tokens: Tokens | None
    tokens_used: Tokens
    outcome: Outcome
    usage_source: UsageSource
    # The policy in force; null for a report, and in version 1.
    on_disconnect: OnDisconnect | None = None
    provider_request_id: Name | None = None
    # The moment of authorization: it decides the period in which the tokens count.
    started_at: Moment
    completed_at: Moment
    # Null for a report, where quota was not heard to grant anything, and in versions 1 and 2.
    authorized: Authorized | None = None
    metadata: Metadata = {}

    @model_validator(mode="after")
    def _the_split_adds_up(self) -> "Generation":
        split = (
            self.input_tokens,
            self.output_tokens,
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        )
        known = [tokens for tokens in split if tokens is not None]
        if known and (len(known) < len(split) or sum(known) != self.tokens_used):
            raise ValueError("tokens_used must be the sum of the four counts, or all four must be null")
        return self


class Subscription(Contract):
    user_id: UserId
    tier: Name
    time_zone: Name | None = None
    changed_at: Moment
    actor: Name


class Adjustment(Contract):
    """A signed correction of a user's total in the period that `effective_at` falls into, or room added to its limit.

    One of the two counts is 0: a correction has `tokens_used` (negative: a credit), a top-up has `top_up_tokens`.
    """

    user_id: UserId
    tokens_used: SignedTokens
    top_up_tokens: Tokens = 0
    # Of a top-up: it stands until it is used up, instead of in its period alone.
    outlives_period: bool = False
    reason: Name
    actor: Name
    effective_at: Moment


class Threshold(Contract):
    """A user has used `percent` of a limit in the period that began at `period_start`, once for each per cent."""

    user_id: UserId
    tier: Name
    percent: int
    tokens_used: int
    tokens_limit: int
    period: PeriodKind
    period_start: datetime | None
    resets_at: datetime | None
    reached_at: Moment


class Seal(Contract):
    """The head of the Merkle tree (RFC 9162) over the bodies of the stream's first `tree_size` messages, in order.

    `signature` (Ed25519, base64) is of the checkpoint that services/ledger/checkpoint.py describes, made with the key
    that `key_id` tells (eight hex digits); both are null where the ledger has no key.
    """

    tree_size: Annotated[int, Field(ge=1, strict=True)]
    root_hash: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    sealed_at: Moment
    signature: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")] | None = None
    key_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")] | None = None


class CloudEvent(Contract):
    """The envelope (CloudEvents 1.0, structured mode)."""

    specversion: Literal["1.0"] = "1.0"
    id: Name = Field(default_factory=new_id)
    source: Name = "/chatrail/chat"
    subject: UserId
    time: Moment = Field(default_factory=utc_now)
    datacontenttype: Literal["application/json"] = "application/json"

    @model_validator(mode="after")
    def _the_subject_is_the_user(self) -> "CloudEvent":
        data: Any = getattr(self, "data", None)
        if hasattr(data, "user_id") and data.user_id != self.subject:
            raise ValueError("subject must be the user that data.user_id names")
        return self


def _upcast(dataschema: Any) -> Any:
    """Version 2 is version 3 without `authorized`, and version 1 is without `on_disconnect`, too."""
    is_older = dataschema in ("urn:chatrail:generation.completed:1", "urn:chatrail:generation.completed:2")
    return "urn:chatrail:generation.completed:3" if is_older else dataschema


class GenerationCompleted(CloudEvent):
    type: Literal["generation.completed"] = "generation.completed"
    dataschema: Annotated[Literal["urn:chatrail:generation.completed:3"], BeforeValidator(_upcast)] = (
        "urn:chatrail:generation.completed:3"
    )
    data: Generation


class SubscriptionChanged(CloudEvent):
    type: Literal["subscription.changed"] = "subscription.changed"
    dataschema: Literal["urn:chatrail:subscription.changed:1"] = "urn:chatrail:subscription.changed:1"
    data: Subscription


class UsageAdjusted(CloudEvent):
    type: Literal["usage.adjusted"] = "usage.adjusted"
    dataschema: Literal["urn:chatrail:usage.adjusted:1"] = "urn:chatrail:usage.adjusted:1"
    data: Adjustment


class ThresholdReached(CloudEvent):
    """Tells operators and applications; no total depends on it, so it is on a stream of its own."""

    type: Literal["quota.threshold.reached"] = "quota.threshold.reached"
    dataschema: Literal["urn:chatrail:quota.threshold.reached:1"] = "urn:chatrail:quota.threshold.reached:1"
    source: Name = "/chatrail/quota"
    data: Threshold


class LedgerSealed(CloudEvent):
    """About the record itself and of no user: consumers pass it over, whoever checks the record reads it."""

    type: Literal["ledger.sealed"] = "ledger.sealed"
    dataschema: Literal["urn:chatrail:ledger.sealed:1"] = "urn:chatrail:ledger.sealed:1"
    source: Name = "/chatrail/ledger"
    subject: Literal["ledger"] = "ledger"
    data: Seal


Event = GenerationCompleted | SubscriptionChanged | UsageAdjusted
# What an event must say of itself. A default is for those who make one: read with it, an event without
# an id would get another id, and be counted again, at each delivery.
REQUIRED = ("specversion", "id", "source", "type", "subject", "dataschema")
_event: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def encode(event: CloudEvent) -> bytes:
    return event.model_dump_json().encode()


def decode(body: bytes) -> Event:
    """The event in `body`. An older `dataschema` is upcast here, so that consumers know one version only.

    Raises PoisonMessage when it is none of ours: it names the fields and never repeats their values.
    """
    try:
        event = _event.validate_json(body)
    except ValidationError as error:
        raise PoisonMessage(in_words(error)) from None
    if missing := [name for name in REQUIRED if name not in event.model_fields_set]:
        raise PoisonMessage(f"{', '.join(missing)}: Field required")
    return event


def kind_of(body: bytes) -> str | None:
    """The `type` of what can be read as an event, or as a seal; None of anything else."""
    for read in (decode_seal, decode):
        with suppress(PoisonMessage):
            return read(body).type
    return None


def decode_seal(body: bytes) -> LedgerSealed:
    """Raises PoisonMessage when it is none of ours."""
    try:
        return LedgerSealed.model_validate_json(body)
    except ValidationError as error:
        raise PoisonMessage(in_words(error)) from None
