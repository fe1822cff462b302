"""Events with an `Idempotency-Key`: the stream itself keeps each key, for ever and for all replicas."""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, NamedTuple

from fastapi import Header
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError
from pydantic import StringConstraints

from services.chat.deadline import Deadline
from services.chat.problems import Problem
from services.chat.publisher import publish_promptly
from shared import streams
from shared.errors import Unavailable
from shared.events import Event, decode

# White space around a field's value is no part of it (RFC 9110, section 5.5).
_Key = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=255)]
IdempotencyKey = Annotated[_Key | None, Header()]
BODY_DIGEST = "Chatrail-Body-Sha256"
# Most of the time that there is belongs to publishing.
LOOK_TIMEOUT_S = 0.4
_UNREACHABLE = "The usage stream cannot be reached right now."


class Recorded(NamedTuple):
    """The one event of a key, and its sequence on the stream."""

    event_id: str
    sequence: int


async def publish_once(
    nc: Client, event: Event, deadline: Deadline, *, subject_of: Callable[[str], str], key: str, body: bytes
) -> Recorded:
    """This event, or the one that the key came with before: `subject_of` the key's digest has room for one message.

    Raises Problem 409 when the key came with another body before; Unavailable when the stream did not take the
    event, Unanswered when nobody knows whether it did: both may be repeated with the same key.
    """
    subject, digest = subject_of(hashlib.sha256(key.encode()).hexdigest()), hashlib.sha256(body).hexdigest()
    only_first = {"Nats-Expected-Last-Subject-Sequence": "0", BODY_DIGEST: digest}
    # Before anything is published: for what was trimmed off the stream, its subject has room again.
    first = await _trimmed(nc, subject, min(LOOK_TIMEOUT_S, deadline.left_s))
    if first is None:
        try:
            return Recorded(event.id, await publish_promptly(nc, subject, event, deadline, headers=only_first))
        except APIError:  # the key has its message already
            first = await _first(nc, subject, deadline.left_s)
    recorded, first_digest = first
    if first_digest != digest:
        raise Problem(
            409,
            "Idempotency key used before",
            "This Idempotency-Key came with another body; use a new key for each report and adjustment.",
        )
    return recorded


async def _trimmed(nc: Client, subject: str, timeout_s: float) -> tuple[Recorded, str | None] | None:
    """What a key came with whose message has left the stream for the archive."""
    if not nc.is_connected:
        raise Unavailable(_UNREACHABLE)
    try:
        kept = await nc.jetstream(timeout=timeout_s).get_last_msg(streams.KEYS, streams.kept_key(subject))
    except NotFoundError:
        return None
    except (NatsError, OSError) as error:
        raise Unavailable(_UNREACHABLE) from error
    told = json.loads(kept.data or b"")
    return Recorded(told["id"], told["sequence"]), (kept.headers or {}).get(BODY_DIGEST)


async def _first(nc: Client, subject: str, timeout_s: float) -> tuple[Recorded, str | None]:
    try:
        message = await nc.jetstream(timeout=timeout_s).get_last_msg(streams.STREAM, subject)
    except (NatsError, OSError) as error:
        raise Unavailable(_UNREACHABLE) from error
    first = Recorded(decode(message.data or b"").id, message.seq or 0)
    return first, (message.headers or {}).get(BODY_DIGEST)
