"""The bus on one page: the stream, its subjects, its durable consumers, and the one step that creates them.

    python -m shared.streams      creates what is missing; safe to repeat

Services never create or change anything here: `check` compares and refuses to start on a difference.
"""

import asyncio
import base64
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from shared.broker import connect
from shared.errors import Misconfigured, Unavailable
from shared.settings import StreamSettings

GENERATION_COMPLETED = "generation.completed"
# A report with an idempotency key has a subject of its own: the stream itself then keeps the key, for ever.
KEYED_GENERATION_COMPLETED = "generation.completed.keyed"
SUBSCRIPTION_CHANGED = "subscription.changed"
USAGE_ADJUSTED = "usage.adjusted"
# A family of its own: the key of an adjustment never meets that of a report.
KEYED_USAGE_ADJUSTED = "usage.adjusted.keyed"
# The record's own tamper evidence: ledger and quota pass it over, no total depends on it.
LEDGER_SEALED = "ledger.sealed"

THRESHOLD_REACHED = "quota.threshold.reached"

STREAM = "USAGE"
ALERTS = "ALERTS"
KEYS = "KEYS"
LEDGER = "ledger"
QUOTA = "quota"

# JetStream: "wrong last sequence", the answer to a second message on a subject that may have only one.
WRONG_LAST_SEQUENCE = 10071

# The answer of a cluster whose nodes do not all know of each other yet.
NO_SUITABLE_PEERS = 10005

GIB = 1024**3
# While the stream is trimmed, its metadata say until when at most (RFC 3339): until then it may have a max_age.
TRIMMING_UNTIL = "chatrail.trimming-until"
# For a cluster to agree on a leader after its start.
LEADER_WITHIN_S = 30


class Origin(NamedTuple):
    """What tells a stream, and a durable of it, from others of the same name: when each was created."""

    stream: datetime | None
    durable: datetime | None = None


def quota_updated(user_id: str) -> str:
    """The core subject on which quota tells that a user's usage has changed; any user id becomes one legal token."""
    return f"quota.updated.{base64.urlsafe_b64encode(user_id.encode()).decode().rstrip('=')}"


def keyed(key_digest: str) -> str:
    return f"{KEYED_GENERATION_COMPLETED}.{key_digest}"


def keyed_adjustment(key_digest: str) -> str:
    return f"{KEYED_USAGE_ADJUSTED}.{key_digest}"


def kept_key(keyed_subject: str) -> str:
    """Where the key of a message is kept when the message itself has been archived and trimmed."""
    return f"key.{keyed_subject}"


# File storage, never expiring, never silently dropping: at max_bytes the publisher is told, and keeps its outbox.
USAGE_STREAM = StreamConfig(
    name=STREAM,
    subjects=[
        GENERATION_COMPLETED,
        keyed("*"),
        SUBSCRIPTION_CHANGED,
        USAGE_ADJUSTED,
        keyed_adjustment("*"),
        LEDGER_SEALED,
    ],
    storage=StorageType.FILE,
    retention=RetentionPolicy.LIMITS,
    discard=DiscardPolicy.NEW,
    max_bytes=8 * GIB,
    max_age=0,
    max_msg_size=64 * 1024,
    duplicate_window=120,
    deny_delete=True,
    deny_purge=True,
    num_replicas=1,
)

# No total depends on these: the oldest make room for the newest.
ALERTS_STREAM = StreamConfig(
    name=ALERTS,
    subjects=[THRESHOLD_REACHED],
    storage=StorageType.FILE,
    retention=RetentionPolicy.LIMITS,
    discard=DiscardPolicy.OLD,
    max_bytes=64 * 1024**2,
    max_age=90 * 24 * 3600,
    max_msg_size=64 * 1024,
    duplicate_window=120,
    num_replicas=1,
)


# The keys of what was trimmed, a message each, for ever: the id of its event, and the headers that it came with.
KEYS_STREAM = StreamConfig(
    name=KEYS,
    subjects=[kept_key(keyed("*")), kept_key(keyed_adjustment("*"))],
    storage=StorageType.FILE,
    retention=RetentionPolicy.LIMITS,
    discard=DiscardPolicy.NEW,
    max_msg_size=64 * 1024,
    deny_delete=True,
    deny_purge=True,
    num_replicas=1,
)


def durable(name: str) -> ConsumerConfig:
    """A durable pull consumer that all replicas of a service share.

    What a replica took and did not acknowledge within `ack_wait` seconds goes to another: so long may a total lag
    after a crash. A batch takes a fraction of that.
    """
    return ConsumerConfig(
        durable_name=name,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=5,
        max_deliver=-1,
        max_ack_pending=20_000,
    )


DURABLES = (durable(LEDGER), durable(QUOTA))

_STREAM_NEEDS = ("subjects", "storage", "retention", "discard", "max_age", "deny_delete", "deny_purge")
_DURABLE_NEEDS = ("deliver_policy", "ack_policy", "max_deliver", "filter_subject")


async def create(js: JetStreamContext, *, max_bytes: int = 8 * GIB, replicas: int = 1) -> None:
    """Create what is missing, and nothing else. Raises Misconfigured when what exists is of another kind.

    Missing may be the stream, a durable, or a subject that the stream of an earlier release does not have. In a
    cluster, durables have as many replicas as their stream.
    """
    try:
        found = (await js.stream_info(STREAM)).config
        if (found.num_replicas or 1) < replicas:
            raise Misconfigured(
                f"The stream {STREAM} has fewer replicas ({found.num_replicas}) than CHATRAIL_STREAM_REPLICAS "
                f"({replicas}). Run: nats stream edit {STREAM} --replicas {replicas}; {ALERTS} and {KEYS} likewise."
            )
        await _add_subjects(js, await _end_trimming(js, found))
    except NotFoundError:
        await _add(js, replace(USAGE_STREAM, max_bytes=max_bytes, num_replicas=replicas))
        print(f"Created the stream {STREAM}")  # noqa: T201 - a command's output
    for other in (ALERTS_STREAM, KEYS_STREAM):
        try:
            await js.stream_info(other.name or "")
        except NotFoundError:
            await _add(js, replace(other, num_replicas=replicas))
    for config in DURABLES:
        try:
            await js.consumer_info(STREAM, config.durable_name or "")
        except NotFoundError:
            await js.add_consumer(STREAM, config)
    for config in DURABLES:
        await check(js, config.durable_name or "")


async def _add(js: JetStreamContext, stream: StreamConfig) -> None:
    try:
        await js.add_stream(stream)
    except APIError as error:
        if isinstance(error, ServiceUnavailableError) or error.err_code == NO_SUITABLE_PEERS:
            raise
        raise Misconfigured(
            f"The broker refuses the stream {stream.name} with {stream.max_bytes} bytes and {stream.num_replicas} "
            f"replicas: {error.description}. Free disk space, or set CHATRAIL_STREAM_BYTES_MAX lower."
        ) from error


async def _add_subjects(js: JetStreamContext, found: StreamConfig) -> None:
    """To a stream that differs in nothing else; one that has subjects of its own is left to `check` to refuse."""
    needed = USAGE_STREAM.subjects or []
    if set(found.subjects or []) < set(needed):
        updated = replace(found, subjects=needed)
        _compare(f"stream {STREAM}", updated, USAGE_STREAM, _STREAM_NEEDS)
        await js.update_stream(updated)


async def _end_trimming(js: JetStreamContext, found: StreamConfig) -> StreamConfig:
    """Of somebody who died over it: from now on nothing expires any more. The stream's config."""
    if TRIMMING_UNTIL not in (found.metadata or {}) or is_being_trimmed(found):
        return found
    return (await js.update_stream(untrimmed(found))).config


def is_being_trimmed(found: StreamConfig) -> bool:
    until = (found.metadata or {}).get(TRIMMING_UNTIL)
    return until is not None and datetime.now(UTC) < datetime.fromisoformat(until)


def trimmed(found: StreamConfig, *, max_age_s: float, within: timedelta) -> StreamConfig:
    """The config under which the server deletes what is older, and of which services know that it will not last."""
    until = (datetime.now(UTC) + within).isoformat()
    # The server wants no window that is longer than messages live.
    window_s = min(found.duplicate_window, max_age_s)
    metadata = {**(found.metadata or {}), TRIMMING_UNTIL: until}
    return replace(found, max_age=max_age_s, duplicate_window=window_s, metadata=metadata)


def untrimmed(found: StreamConfig) -> StreamConfig:
    """The config as it was before."""
    window_s = found.duplicate_window
    if window_s == found.max_age:
        window_s = USAGE_STREAM.duplicate_window
    metadata = {name: value for name, value in (found.metadata or {}).items() if name != TRIMMING_UNTIL}
    return replace(found, max_age=0, duplicate_window=window_s, metadata=metadata)


async def check(js: JetStreamContext, durable_name: str | None = None) -> Origin:
    """When the stream (and the durable) were created: at another time, they are others.

    Raises Misconfigured, in words, unless they are what this release needs.
    """
    try:
        stream = await js.stream_info(STREAM)
        lasting = untrimmed(stream.config) if is_being_trimmed(stream.config) else stream.config
        if TRIMMING_UNTIL in (lasting.metadata or {}):
            raise Misconfigured(f"A trim of the stream {STREAM} was cut off. Run: python -m shared.streams")
        _compare(f"stream {STREAM}", lasting, USAGE_STREAM, _STREAM_NEEDS)
        if not durable_name:
            return Origin(stream.created)
        consumer = await js.consumer_info(STREAM, durable_name)
        _compare(f"consumer {durable_name}", consumer.config, durable(durable_name), _DURABLE_NEEDS)
        return Origin(stream.created, consumer.created)
    except NotFoundError as error:
        missing = f"consumer {durable_name}" if "consumer" in (error.description or "") else f"stream {STREAM}"
        raise Misconfigured(f"The broker has no {missing}. Run: python -m shared.streams") from error


def _compare(what: str, found: object, needed: object, fields: tuple[str, ...]) -> None:
    for field in fields:
        has, needs = getattr(found, field), getattr(needed, field)
        if (has or None) != (needs or None):
            raise Misconfigured(f"The {what} has {field} = {has!r}, and this release needs {needs!r}.")


class Reached(NamedTuple):
    """When the stream was made, where it begins and ends; up to where a durable acknowledged all of it, or some."""

    created: datetime
    begins: int
    ends: int
    acknowledged: int
    delivered: int


async def reached(nc: Client, durable: str) -> Reached:
    """How far a durable has come. Raises Unavailable, or what the client raises where the broker does not answer."""
    js = nc.jetstream()
    stream, consumer = await js.stream_info(STREAM), await js.consumer_info(STREAM, durable)
    if stream.created is None:
        raise Unavailable(f"The broker does not say when the stream {STREAM} was made.")
    ends = stream.state.last_seq
    # After a power cut a durable may be ahead of its stream.
    acknowledged, delivered = (
        min(place.stream_seq if place else 0, ends) for place in (consumer.ack_floor, consumer.delivered)
    )
    return Reached(stream.created, max(1, stream.state.first_seq), ends, acknowledged, delivered)


async def main() -> None:
    settings = StreamSettings.read()
    nc: Client = await connect(settings.nats_url, name="setup")
    try:
        async with asyncio.timeout(LEADER_WITHIN_S):
            await _create_when_ready(nc.jetstream(), settings)
    except TimeoutError as error:
        raise Misconfigured(f"The broker at {settings.nats_url} has no JetStream that answers.") from error
    else:
        await _wait_for_a_trim(nc.jetstream(), settings)
    finally:
        await nc.close()


async def _wait_for_a_trim(js: JetStreamContext, settings: StreamSettings) -> None:
    """Before its time is over nobody knows whether it was cut off; then what it left is put back."""
    told = False
    while is_being_trimmed((await js.stream_info(STREAM)).config):
        if not told:
            sys.stderr.write("The stream is being trimmed; waiting until that is over, a minute at most.\n")
        told = True
        await asyncio.sleep(0.5)
    if told:
        await _create_when_ready(js, settings)


async def _create_when_ready(js: JetStreamContext, settings: StreamSettings) -> None:
    while True:
        try:
            return await create(js, max_bytes=settings.stream_bytes_max, replicas=settings.stream_replicas)
        except (ServiceUnavailableError, NatsTimeoutError):
            pass  # no leader yet
        except APIError as error:
            if error.err_code != NO_SUITABLE_PEERS:
                raise
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except Misconfigured as problem:
        sys.exit(str(problem))
