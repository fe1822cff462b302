"""`prove`, the command: a user's own records with what proves each to be in the ledger as it was sealed.

What it writes is checked by services/ledger/verify_record.py alone, anywhere.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from nats.aio.client import Client
from nats.errors import Error as NatsError
from sqlalchemy import Connection, Row, select, union_all

from services.ledger import seal_store, store
from services.ledger.checkpoint import checkpoint
from services.ledger.merkle import inclusion, leaf_hash, roots_of
from services.ledger.scope import legible
from services.ledger.seals import Sealed
from services.ledger.settings import Settings
from services.ledger.verify_record import FORMAT
from shared.archive import Archive
from shared.bus_of_folder import bus_of_folder
from shared.commands import command
from shared.database import snapshot
from shared.errors import Misconfigured, PoisonMessage
from shared.events import SubscriptionChanged, decode
from shared.record import Record
from shared.recorded import bounds
from shared.replay_command import named
from shared.streams import STREAM
from shared.telemetry import configure_logging_of_a_command
from shared.terminal import printable

VERIFIER = Path(__file__).with_name("verify_record.py")
# Messages that are asked for at once.
ASKED_MAX = 64


class Place(NamedTuple):
    """Where a record is among all, what was sealed of it, and what leads from it to the root."""

    leaf_index: int
    hash: bytes
    path: list[bytes]


class Proven(NamedTuple):
    """Of `records` the seal covers some. Each message under the id of one of these has a place, whosever it is."""

    seal: Sealed
    places: list[Place]
    records: int
    covered: int


def prove(
    *,
    user: Annotated[str, typer.Option(help="Whose records.")],
    out: Annotated[Path, typer.Option(metavar="FILE", parser=named, help="The file to write, JSON.")],
    record: Annotated[str | None, typer.Option("--id", help="This record alone.")] = None,
) -> None:
    """Write a user's own records with the proof of each, for anybody to check without ChatRail."""
    legible(user, "'--user'")
    if record is not None:
        legible(record, "'--id'")
    configure_logging_of_a_command()
    with command():
        settings = Settings.read()
        with snapshot(
            settings.database_url, store.usage, store.subscription_changes, store.leaves, store.seals
        ) as db:
            proven = places(db, user, record)
        bodies = asyncio.run(_bodies(settings, proven.places))
        document = proof(user, proven, bodies)
        try:
            out.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise Misconfigured(f"{out} cannot be written: {error.strerror}.") from error
        written, left, shown = len(document["records"]), proven.records - proven.covered, printable(str(out))
        typer.echo(
            f"Wrote {written:,} records to {shown}, under the seal of {proven.seal.head.size:,} messages."
            + (f" {left:,} are not sealed yet." if left else "")
        )
        if written < proven.covered:
            typer.echo(
                f"Under the ids of {proven.covered - written:,} more only another's messages are sealed, or none "
                "that can be read: make audit tells whether something was changed."
            )
        typer.echo(f"Check it anywhere: python3 {VERIFIER.name} {shown}, with a copy of {VERIFIER}")


def places(db: Connection, user_id: str, record_id: str | None = None) -> Proven:
    """Raises Misconfigured when there is nothing to prove, or what is there is damaged."""
    try:
        return _places(db, user_id, record_id)
    except seal_store.Damaged as damage:
        raise Misconfigured(f"Nothing can be proven: {damage}. make audit tells what was changed.") from damage


def _places(db: Connection, user_id: str, record_id: str | None) -> Proven:
    seal = seal_store.newest_seal(db)
    if seal is None:
        raise Misconfigured("Nothing is sealed yet: the ledger seals a minute after the first event.")
    ids = _ids(db, user_id, record_id)
    if not ids:
        raise Misconfigured(f"{user_id} has no such record." if record_id else f"{user_id} has no records.")
    of_ids = _of_ids(db, ids, seal.head.size)
    found = sorted((leaf.stream_sequence - 1, leaf.leaf_hash) for each in of_ids for leaf in store.counting(db, each))
    paths = [inclusion(index, seal.head.size) for index, _ in found]
    try:
        roots = roots_of([subtree for path in paths for subtree in path], _hashes(db, seal.head.size))
    except ValueError as error:
        raise Misconfigured(f"The ledger lacks leaves ({error}). make audit tells what was changed.") from error
    cuts = pairwise(accumulate((len(path) for path in paths), initial=0))
    told = [Place(*leaf, roots[start:stop]) for leaf, (start, stop) in zip(found, cuts, strict=True)]
    return Proven(seal, told, len(ids), len(of_ids))


def _ids(db: Connection, user_id: str, record_id: str | None) -> set[str]:
    changes = store.subscription_changes
    every = union_all(
        select(store.usage.c.id).where(store.usage.c.user_id == user_id),
        select(changes.c.event_id).where(changes.c.user_id == user_id),
    )
    ids = set(db.execute(every).scalars())
    return ids if record_id is None else ids & {record_id}


def _of_ids(db: Connection, ids: set[str], size: int) -> list[list[Row[Any]]]:
    """The leaves of each id, in their order. All are read once more for the paths: an index would not help."""
    leaves = store.leaves
    statement = select(leaves).where(leaves.c.stream_sequence <= size).order_by(leaves.c.stream_sequence)
    found: defaultdict[str, list[Row[Any]]] = defaultdict(list)
    for row in db.execute(statement, execution_options={"yield_per": seal_store.LEAVES_AT_ONCE}):
        if row.event_id in ids:
            found[row.event_id].append(row)
    return list(found.values())


def _hashes(db: Connection, size: int) -> Iterator[bytes]:
    for place, (sequence, digest) in enumerate(islice(seal_store.leaves_from(db, 1), size), 1):
        if sequence != place:
            raise ValueError(f"there is no leaf {place}")
        yield digest


def proof(user_id: str, proven: Proven, bodies: Sequence[bytes]) -> dict[str, Any]:
    """The document: of each record the user's own message. Raises Misconfigured when one is not what was sealed."""
    seal, known = proven.seal, set[tuple[str, bool]]()
    records = []
    for place, body in zip(proven.places, bodies, strict=True):
        if leaf_hash(body) != place.hash:
            raise Misconfigured(
                f"Message {place.leaf_index + 1} is not what was sealed: it cannot be proven. "
                "make audit tells what was changed."
            )
        record = _record_of(user_id, body)
        if record is None or record in known:
            continue
        known.add(record)
        path = [step.hex() for step in place.path]
        records.append({"leafIndex": place.leaf_index, "record": body.decode(), "path": path})
    return {
        "format": FORMAT,
        "userId": user_id,
        "checkpoint": checkpoint(seal.head, seal.signature),
        "records": records,
    }


def _record_of(user_id: str, body: bytes) -> tuple[str, bool] | None:
    """By what it is known: the id, and whether it is a change of plan. None where it is no record of the user."""
    try:
        event = decode(body)
    except PoisonMessage:
        return None
    return (event.id, isinstance(event, SubscriptionChanged)) if event.data.user_id == user_id else None


async def _bodies(settings: Settings, found: Sequence[Place]) -> list[bytes]:
    """As the record has them."""
    sequences = [place.leaf_index + 1 for place in found]
    async with bus_of_folder(settings, name="prove") as nc:
        begins, _ = await bounds(nc)
        trimmed, there = _parted(sequences, begins)
        archived = {}
        if trimmed:
            # Raises Misconfigured where it does not have them.
            await Record(nc, settings.archive_folder).bounds()
            archive = await asyncio.to_thread(Archive.at, settings.archive_folder)
            archived = await asyncio.to_thread(archive.find, trimmed)
        bodies = [archived[sequence].body for sequence in trimmed]
        for start in range(0, len(there), ASKED_MAX):
            bodies += await _some(nc, there[start : start + ASKED_MAX])
        return bodies


def _parted(sequences: Sequence[int], begins: int) -> tuple[list[int], list[int]]:
    """They are in order: those before the stream's first message, and the others."""
    return [each for each in sequences if each < begins], [each for each in sequences if each >= begins]


async def _some(nc: Client, sequences: Sequence[int]) -> list[bytes]:
    js = nc.jetstream()
    try:
        messages = await asyncio.gather(*(js.get_msg(STREAM, sequence) for sequence in sequences))
    except (NatsError, OSError) as error:
        raise Misconfigured(f"A record cannot be read from the stream: {error!r}") from error
    return [message.data or b"" for message in messages]
