"""Before an audit: a database that was lost, or put back from an older copy, is read the stream again by its service.

How far that has come is its position on the stream (`shared/catchup.py`). One that goes on is waited for; for one
that does not, nobody needs to be told record by record what is missing.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from datetime import timedelta
from time import monotonic
from typing import NamedTuple

from nats.js.errors import NotFoundError

from services.ledger.archive import acknowledged
from services.ledger.findings import Progress
from services.ledger.snapshots import snapshot
from shared.errors import Misconfigured, PoisonMessage
from shared.events import SubscriptionChanged, decode, decode_seal
from shared.record import Record
from shared.recorded import Recorded
from shared.streams import LEDGER, LEDGER_SEALED, QUOTA, STREAM

STILL_S = 5.0
LOOK_EVERY_S = 0.1
# A service at work notes its position every few seconds, and one that ended did so as long before.
NOTED_WITHIN = timedelta(seconds=10)
# Of what a database may lack, so many messages are looked for.
LAST = 100

# What has a row for each use, and for each change of a plan, by which column.
TABLES = {
    LEDGER: (("usage", "id"), ("subscription_changes", "event_id")),
    QUOTA: (("settlements", "event_id"), ("plan_changes", "event_id")),
}


class _Behind(NamedTuple):
    """The position that a database has noted, and whether it has any of what comes last behind that."""

    position: int
    has_some: bool


async def has_read_again(record: Record, service: str, url: str, progress: Progress) -> None:
    """Returns once the database has what its service has acknowledged, as long as that goes on.

    Raises Misconfigured where most likely all of it is lost and nobody reads it again. What lacks something in
    another way is for the audit to tell.
    """
    floor = (await acknowledged(record.nc))[service]
    seen, moved = await _behind(record, service, url, floor), monotonic()
    while seen and monotonic() < moved + STILL_S:
        progress(f"The {service} reads again what its database has lost", seen.position, floor)
        await asyncio.sleep(LOOK_EVERY_S)
        if (found := await _behind(record, service, url, floor)) != seen:
            seen, moved = found, monotonic()
    if seen and not seen.has_some and await _took_longer(record, seen.position + 1, floor):
        raise Misconfigured(
            f"The {service}'s database lacks what the stream has from message {seen.position + 1:,} to {floor:,}, "
            f"which the {service} had handled: it was lost, or is an older copy. ChatRail reads that again when it "
            "starts. Start it, or try again in a moment where it is starting; or make replay."
        )


async def evidence_is_back(record: Record, ledger_url: str, progress: Progress) -> None:
    """A ledger that was lost makes its leaves and seals anew from the stream: that is waited for while it goes on."""
    try:
        newest = await record.nc.jetstream().get_last_msg(STREAM, LEDGER_SEALED)
        told = decode_seal(newest.data or b"").data.tree_size
    except (NotFoundError, PoisonMessage):
        return
    kept, moved = _evidence(ledger_url), monotonic()
    while kept[1] < told and monotonic() < moved + STILL_S:
        progress("The ledger makes its evidence anew", min(kept[0], told), told)
        await asyncio.sleep(LOOK_EVERY_S)
        if (found := _evidence(ledger_url)) != kept:
            kept, moved = found, monotonic()


def _evidence(ledger_url: str) -> tuple[int, int]:
    """The last leaf, and the size of the tree at the last seal."""
    with snapshot(LEDGER, ledger_url, ("leaves", "seals")) as ledger:
        ((leaf,),) = ledger.rows("SELECT coalesce(max(stream_sequence), 0) FROM leaves")
        ((sealed,),) = ledger.rows("SELECT coalesce(max(tree_size), 0) FROM seals")
    return leaf, sealed


async def _behind(record: Record, service: str, url: str, floor: int) -> _Behind | None:
    """None where it has the last event of what is acknowledged, or says that it has everything."""
    created = (await record.nc.jetstream().stream_info(STREAM)).created
    with snapshot(service, url, ("stream_position",)) as database:
        noted = list(
            database.rows("SELECT stream_created, acknowledged FROM stream_position WHERE durable = ?", service)
        )
    # A stream that was made anew counts from the beginning.
    position = next((int(place) for of, place in noted if created and of == database.time(created)), 0)
    last = await _events(record, max(position, floor - LAST) + 1, floor)
    if not last:
        return None
    known = _known(service, url, last)
    return None if known[-1] else _Behind(position, any(known))


async def _events(record: Record, first: int, last: int) -> list[tuple[str, bool]]:
    """(id, whether it changes a plan) of each event."""
    found = []
    async with aclosing(record.read(first=first, last=last)) as batches:
        async for batch in batches:
            for message in batch:
                try:
                    event = decode(message.body)
                except PoisonMessage:
                    continue
                found.append((event.id, isinstance(event, SubscriptionChanged)))
    return found


def _known(service: str, url: str, events: Sequence[tuple[str, bool]]) -> list[bool]:
    """Of each event whether the database has it."""
    known: set[str] = set()
    ids = [event_id for event_id, _ in events]
    with snapshot(service, url, [table for table, _ in TABLES[service]]) as database:
        for table, key in TABLES[service]:
            found = database.find(f'SELECT "{key}" FROM "{table}" WHERE {database.listed(key)}', ids)  # noqa: S608
            known |= {row[0] for row in found}
    return [event_id in known for event_id in ids]


async def _took_longer(record: Record, first: int, last: int) -> bool:
    """Whether there was more time between these messages than a position may be behind."""
    begun, ended = [await _message(record, sequence) for sequence in (first, last)]
    return bool(begun and ended and ended.stored_at - begun.stored_at > NOTED_WITHIN)


async def _message(record: Record, sequence: int) -> Recorded | None:
    async with aclosing(record.read(first=sequence, last=sequence)) as batches:
        async for batch in batches:
            return batch[0]
    return None
