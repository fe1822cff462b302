"""Generations as our services write them, read at two fifths of the cost: nearly all that a stream consists of.

For whoever reads all of the record. What is valid is said in shared/events.py and nowhere else: a body that is
unusual in any way is not plain, and is left to `decode`. What is plain is valid, and says the same there.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from msgspec import Meta, MsgspecError, Raw, Struct
from msgspec.json import Decoder, Encoder
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from shared.events import EVENT_TOKENS_MAX, Metadata, OnDisconnect, Outcome, UsageSource
from shared.plans import PeriodKind

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Tokens = Annotated[int, Meta(ge=0, le=EVENT_TOKENS_MAX)]
Moment = Annotated[datetime, Meta(tz=True)]

FIRST, END = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
NO_METADATA = b"{}"
# Metadata is read apart from its event, where it may be nested two levels deeper than within it.
NESTED_MAX = 100
# Of a moment, pydantic cuts off what is beyond microseconds, and msgspec rounds it.
_FINER_THAN_MICROSECONDS = re.compile(rb"\.[0-9]{7}")


class PlainAuthorized(Struct, forbid_unknown_fields=True, gc=False):
    input_tokens_max: Tokens
    output_tokens_asked: Tokens
    output_tokens_granted: Tokens
    hold_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    tier: Name
    period: PeriodKind
    period_start: Moment | None
    resets_at: Moment | None
    expires_at: Moment


class PlainData(Struct, forbid_unknown_fields=True, gc=False):
    generation_id: Name
    user_id: Name
    action_type: Name
    model: Name | None
    input_tokens: Tokens | None
    output_tokens: Tokens | None
    cache_creation_input_tokens: Tokens | None
    cache_read_input_tokens: Tokens | None
    tokens_used: Tokens
    outcome: Outcome
    usage_source: UsageSource
    started_at: Moment
    completed_at: Moment
    on_disconnect: OnDisconnect | None = None
    provider_request_id: Name | None = None
    authorized: PlainAuthorized | None = None
    metadata: Raw = Raw(NO_METADATA)


class PlainGeneration(Struct, forbid_unknown_fields=True, gc=False):
    specversion: Literal["1.0"]
    id: Name
    source: Name
    type: Literal["generation.completed"]
    subject: Name
    time: Moment
    datacontenttype: Literal["application/json"]
    dataschema: Literal[
        "urn:chatrail:generation.completed:1",
        "urn:chatrail:generation.completed:2",
        "urn:chatrail:generation.completed:3",
    ]
    data: PlainData


_event = Decoder(PlainGeneration)
_moment = Encoder().encode
_metadata: TypeAdapter[object] = TypeAdapter(Metadata)


def plain_generation(body: bytes) -> PlainGeneration | None:
    """The generation in `body`, where it is plain: its moments are in UTC, its metadata is as it is stored."""
    # Without a backslash the text of a string is the string, and needs none when it is written again.
    if b"\\" in body or _FINER_THAN_MICROSECONDS.search(body):
        return None
    try:
        event = _event.decode(body)
        if (metadata := bytes(event.data.metadata)) != NO_METADATA:
            event.data.metadata = Raw(_stored(metadata))
    except (MsgspecError, UnicodeDecodeError, ValidationError):
        return None
    return event if _is_usual(event) else None


def utc_text(moment: datetime) -> str:
    """As `shared.database.iso` writes it, of a moment in UTC, at a sixth of the cost."""
    quoted = _moment(moment).decode()
    return quoted[1:-1] if moment.microsecond else f"{quoted[1:-2]}.000000Z"


def _stored(metadata: bytes) -> bytes:
    if metadata.count(b"{") + metadata.count(b"[") > NESTED_MAX:
        raise MsgspecError("perhaps too deep")
    return to_json(_metadata.validate_json(metadata))


def _is_usual(event: PlainGeneration) -> bool:
    data = event.data
    return (
        event.subject == data.user_id
        and _adds_up(data)
        # No control characters; of what else this refuses, most is never seen in names.
        and f"{event.id}{event.source}{data.user_id}{data.generation_id}{data.action_type}"
        f"{data.model or ''}{data.provider_request_id or ''}".isprintable()
        and event.time.tzinfo is data.started_at.tzinfo is data.completed_at.tzinfo is UTC
        and FIRST <= event.time < END
        and FIRST <= data.started_at < END
        and FIRST <= data.completed_at < END
        and (data.authorized is None or _is_usual_grant(data.authorized))
    )


def _is_usual_grant(told: PlainAuthorized) -> bool:
    begins, ends = told.period_start or FIRST, told.resets_at or FIRST
    return (
        told.tier.isprintable()
        and begins.tzinfo is ends.tzinfo is told.expires_at.tzinfo is UTC
        and FIRST <= begins < END
        and FIRST <= ends < END
        and FIRST <= told.expires_at < END
    )


def _adds_up(data: PlainData) -> bool:
    split = (data.input_tokens, data.output_tokens, data.cache_creation_input_tokens, data.cache_read_input_tokens)
    if None in split:
        return split == (None, None, None, None)
    return sum(split) == data.tokens_used  # type: ignore[arg-type]
