"""Trimming: what is archived leaves the stream, when an operator says so and never by itself.

The stream denies deletes and purges for ever. What it has leaves it by age alone: for a moment the stream gets a
`max_age` (shared/streams.py says how services know of it). That moment must not delete what is not archived, whatever
becomes of us in it, so the last day of the archive stays on the stream, too.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import StreamConfig
from nats.js.errors import APIError, NotFoundError

from services.ledger.archive import acknowledged, altered, sealed_at, stored_before
from services.ledger.checkpoint import Keys
from services.ledger.seals import Rows, event_id
from shared import streams
from shared.archive import Archive
from shared.database import iso
from shared.errors import Misconfigured, Unavailable
from shared.record import check_origin
from shared.recorded import Recorded, recorded
from shared.streams import STREAM

# For the server to delete, and for us to put things back: a fraction of what stays of the archive.
TRIM_WITHIN = timedelta(seconds=60)
LOOK_EVERY_S = 0.05
# Longer than from chat's look for a key until its report is on the stream, or refused.
KEYS_SETTLED_S = 10.0
KEYED = (streams.keyed(""), streams.keyed_adjustment(""))
PUBLISHED_AT_ONCE = 256
PUT_BACK_TRIES = 20


class Trimmed(NamedTuple):
    """The messages that left the stream; keys that are kept, of all that may leave it; where it begins now."""

    messages: int
    keys: int
    begins: int


async def trim(
    nc: Client,
    rows: Rows,
    folder: Path,
    *,
    overlap: timedelta,
    keys: Keys | None = None,
    settled_s: float = KEYS_SETTLED_S,
) -> Trimmed:
    """Take off the stream what is archived, but for its last `overlap`.

    All of the archive is held against the ledger's leaves and seals first, and what is to go against the stream.
    Raises Misconfigured, and nothing is gone, where one is not what the other is.
    """
    info = await nc.jetstream().stream_info(STREAM)
    if streams.is_being_trimmed(info.config):
        raise Misconfigured("Somebody else trims the stream just now.")
    archive = await asyncio.to_thread(Archive.at, folder)
    check_origin(archive, info.created)
    begins = max(1, info.state.first_seq)
    if archive.last < begins - 1:
        raise Misconfigured(
            f"Messages {archive.last + 1} to {begins - 1} are neither on the stream nor in the archive {folder}: "
            "restore the archive from a copy, or name its folder with CHATRAIL_ARCHIVE."
        )
    if archive.last < begins:
        return Trimmed(0, 0, begins)
    await _verify(nc, rows, archive, keys)
    cut_at = await _end_of(nc, archive) - overlap
    last = await stored_before(nc, cut_at, first=begins, last=archive.last)
    if last < begins:
        return Trimmed(0, 0, begins)
    await _check_that_a_seal_stays(nc, after=archive.last)
    # More may go than is asked for: what grows old meanwhile, and all that is archived where we die over it.
    kept = await _keep_keys(nc, archive, first=begins, last=archive.last)
    if kept:
        await asyncio.sleep(settled_s)
    begins_now = await _expire(nc, cut_at, last=last, within=min(TRIM_WITHIN, overlap) / 2)
    if begins_now > archive.last + 1:
        raise Misconfigured(
            f"The stream begins at message {begins_now}, and the archive ends at {archive.last}: more was deleted "
            "than we asked for. Restore the broker's store."
        )
    return Trimmed(begins_now - begins, kept, begins_now)


async def _verify(nc: Client, rows: Rows, archive: Archive, keys: Keys | None) -> None:
    if min((await acknowledged(nc)).values()) < archive.last:
        raise Misconfigured("Ledger and quota have not handled all that is archived: let them catch up first.")
    for manifest in archive.manifests:
        path, before = archive.path(manifest), sealed_at(rows, manifest.first - 1)
        if not await asyncio.to_thread(path.exists):
            raise Misconfigured(f"The archive's file {path} is not there: restore it. Nothing was trimmed.")
        for found in await altered(path, manifest, rows, before=before, keys=keys):
            await asyncio.to_thread(archive.check_name, manifest)
            raise Misconfigured(
                f"The archive's file {path} is not what was sealed"
                + (f", from message {found.sequence} on" if found.sequence else "")
                + ". Nothing was trimmed; make audit tells what was changed."
            )


async def _end_of(nc: Client, archive: Archive) -> datetime:
    """When the archive's last message was stored, by the stream itself, which stored what follows no earlier.

    What was stored before then is archived, therefore. Raises Misconfigured where that is not so.
    """
    last, told = archive.last, archive.manifests[-1].last_stored_at
    stored_at = await _stored_at(nc, last)
    if stored_at is None or stored_at != told:
        raise Misconfigured(
            f"The archive's last message, {last}, was stored at {iso(stored_at) if stored_at else 'no time'} by the "
            f"stream, and at {iso(told)} by the archive {archive.folder}. Nothing was trimmed; make audit tells "
            "which of them was changed."
        )
    following = await _stored_at(nc, last + 1)
    if min(following or stored_at, await _server_time(nc)) < stored_at:
        raise Misconfigured(
            f"The broker's clock was put back since message {last}, the archive's last, was stored, at "
            f"{iso(stored_at)}. The stream deletes by time, so nothing was trimmed: archive what came after it first."
        )
    return stored_at


async def _stored_at(nc: Client, sequence: int) -> datetime | None:
    """None where the stream has no such message."""
    try:
        return (await nc.jetstream().get_msg(STREAM, sequence)).time
    except NotFoundError:
        return None


async def _check_that_a_seal_stays(nc: Client, *, after: int) -> None:
    """Without one on the stream, the ledger would tell of all its seals anew."""
    try:
        newest = (await nc.jetstream().get_last_msg(STREAM, streams.LEDGER_SEALED)).seq or 0
    except NotFoundError:
        newest = 0
    if newest <= after:
        raise Misconfigured("The ledger has not told the stream of its newest seal: let it run for a minute first.")


async def _keep_keys(nc: Client, archive: Archive, *, first: int, last: int) -> int:
    """The number of keys among these messages, all of which are kept now.

    Raises Misconfigured where a message is not the same on the stream and in the archive.
    """
    try:
        await nc.jetstream().stream_info(streams.KEYS)
    except NotFoundError as error:
        raise Misconfigured(f"The broker has no stream {streams.KEYS}. Run: python -m shared.streams") from error
    kept, archived = 0, chain.from_iterable(archive.read(first=first, last=last))
    async with aclosing(recorded(nc, first=first, last=last)) as on_stream:
        async for theirs in on_stream:
            ours = await asyncio.to_thread(list, islice(archived, len(theirs)))
            if ours != theirs:
                raise _differing(archive, ours, theirs)
            keyed = [message for message in ours if message.subject.startswith(KEYED)]
            for start in range(0, len(keyed), PUBLISHED_AT_ONCE):
                await asyncio.gather(*(_keep_key(nc, each) for each in keyed[start : start + PUBLISHED_AT_ONCE]))
            kept += len(keyed)
    if next(archived, None):
        raise Misconfigured("The stream lacks messages that are archived: make audit tells which.")
    return kept


def _differing(archive: Archive, ours: Sequence[Recorded], theirs: Sequence[Recorded]) -> Misconfigured:
    sequence = next((b.sequence for a, b in zip(ours, theirs, strict=False) if a != b), theirs[-1].sequence)
    return Misconfigured(
        f"Message {sequence} is one thing on the stream and another in the archive {archive.folder}. "
        "Nothing was trimmed; make audit tells which of them was changed."
    )


async def _keep_key(nc: Client, message: Recorded) -> None:
    """For ever, and once: a trim that was cut off may have done it before."""
    headers = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
    body = json.dumps({"id": event_id(message.body), "sequence": message.sequence}).encode()
    try:
        await nc.jetstream().publish(
            streams.kept_key(message.subject),
            body,
            stream=streams.KEYS,
            headers={**headers, "Nats-Expected-Last-Subject-Sequence": "0"},
        )
    except APIError as error:
        if error.err_code != streams.WRONG_LAST_SEQUENCE:
            raise


async def _expire(nc: Client, cut_at: datetime, *, last: int, within: timedelta) -> int:
    """Where the stream begins, once all up to `last` is gone and nothing expires any more.

    What is left after so long goes with the next trim: meanwhile what is behind `last` grows older, too.
    """
    js = nc.jetstream(timeout=within.total_seconds())
    found = (await js.stream_info(STREAM)).config
    age = await _server_time(nc) - cut_at
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(within.total_seconds()):
                await js.update_stream(streams.trimmed(found, max_age_s=age.total_seconds(), within=TRIM_WITHIN))
                await _begins_behind(nc, last)
    finally:
        await asyncio.shield(_put_back(nc, found))
    return max(1, (await js.stream_info(STREAM)).state.first_seq)


async def _begins_behind(nc: Client, sequence: int) -> None:
    while True:
        if (await nc.jetstream().stream_info(STREAM)).state.first_seq > sequence:
            return
        await asyncio.sleep(LOOK_EVERY_S)


async def _put_back(nc: Client, config: StreamConfig) -> None:
    for _ in range(PUT_BACK_TRIES):
        try:
            await nc.jetstream().update_stream(streams.untrimmed(config))
            return
        except (NatsError, OSError):
            await asyncio.sleep(1)
    raise Unavailable("The stream still deletes what grows old: run python -m shared.streams at once.")


async def _server_time(nc: Client) -> datetime:
    """By the clock that decides what is old."""
    told: Mapping[str, str] = json.loads((await nc.request(f"$JS.API.STREAM.INFO.{STREAM}")).data)
    return datetime.fromisoformat(told["ts"]).astimezone(UTC)
