"""The audit: the stream is read once, and ledger and totals are compared with it, record by record, sum by sum.

It is right beside services that go on working. Both databases are read in one snapshot each, opened when the durables
have acknowledged the stream up to their `floor`: what is older must be there, what is younger may be. The stream is
then read up to its end at that moment, so that it explains all that a snapshot has.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import Error as NatsError

from services.ledger.archive import acknowledged, altered, is_signed
from services.ledger.audit_comparison import Comparison, Tally
from services.ledger.audit_expected import CHANGES, PLAN_CHANGES, SETTLEMENTS, SUBSCRIPTIONS, USAGE
from services.ledger.audit_waiting import evidence_is_back, has_read_again
from services.ledger.checkpoint import Keys
from services.ledger.findings import Difference, Progress, Proven, Read, Report
from services.ledger.scope import Scope
from services.ledger.scratch import Scratch
from services.ledger.seal_check import seal_check
from services.ledger.seal_findings import Kind, Result
from services.ledger.seals import Sealed, sealed_after
from services.ledger.seals_file import end_of, newest_size
from services.ledger.snapshots import Layout, Snapshot, snapshot
from shared.append_only import unguarded
from shared.archive import Archive
from shared.errors import Misconfigured, Unavailable
from shared.plans import Plans
from shared.record import Record, check_origin
from shared.recorded import bounds
from shared.streams import LEDGER, QUOTA, STREAM

# Beside services under load the durables are a fraction of a second behind; one that does not move is not waited for.
FLOOR_WITHIN_S = 5.0
FLOOR_STILL_S = 1.0
# A seal is in the file outside some hundredths of a second after it was made.
WRITTEN_WITHIN_S = 5.0
LOOK_EVERY_S = 0.1

ARCHIVE = "archive"
# What is to be done where the record itself is as it was.
DONE_ABOUT = {
    Kind.LEAF_EDITED: "leaves",
    Kind.LEAF_DELETED: "leaves",
    Kind.LEAF_INSERTED: "leaves",
    Kind.LEAF_MOVED: "leaves",
    Kind.LEAF_STRAY: "leaves",
    Kind.SEAL_SUBTREES: "subtrees",
    Kind.OUTSIDE: "elsewhere",
    Kind.OUTSIDE_LACKS: "outside",
    Kind.UNSIGNED: "unsigned",
}
READING = "Reading the stream"
ONLY_GROW = {LEDGER: ("usage", "subscription_changes", "leaves", "seals"), QUOTA: ("plan_changes", "settlements")}
OTHERS = {LEDGER: ("usage_daily", "quarantine", "leaves", "seals"), QUOTA: ("quarantine", "usage_totals", "holds")}


class Databases(NamedTuple):
    ledger_url: str
    quota_url: str


class Evidence(NamedTuple):
    """What signed seals are checked with, and where else seals are written down."""

    keys: Keys | None = None
    seals_file: Path | None = None


async def audit(
    nc: Client,
    databases: Databases,
    plans: Plans,
    scope: Scope,
    scratch: Scratch,
    *,
    evidence: Evidence = Evidence(),  # noqa: B008 - frozen
    archive: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Raises Misconfigured, or Unavailable, when it cannot be done.

    `progress` hears what is done, and how much of it.
    """
    begun = monotonic()
    record = Record(nc, archive, is_doubted=True)
    await _made_again(record, databases, progress)
    floors, outside = await _floors(nc), evidence.seals_file
    outside_up_to = await _written_down_up_to(databases.ledger_url, outside) if outside else 0
    with ExitStack() as snapshots:
        outside_bytes = outside.stat().st_size if outside and outside.exists() else None

        def open_snapshot(service: str, url: str, layouts: Sequence[Layout]) -> Snapshot:
            tables = [*(layout.table for layout in layouts), *OTHERS[service]]
            return snapshots.enter_context(snapshot(service, url, tables))

        ledger = open_snapshot(LEDGER, databases.ledger_url, (USAGE, CHANGES))
        quota = open_snapshot(QUOTA, databases.quota_url, (SETTLEMENTS, PLAN_CHANGES, SUBSCRIPTIONS))
        sealed = seal_check(
            ledger.rows,
            known_up_to=floors[LEDGER],
            keys=evidence.keys,
            seals_file=outside,
            seals_file_bytes=outside_bytes,
            seals_file_up_to=outside_up_to,
        )
        lacking_triggers = [*_unguarded(LEDGER, ledger), *_unguarded(QUOTA, quota)]
        first, last = await record.bounds()
        archived = await _check_archive(nc, archive, ledger, evidence.keys, scratch) if archive else None
        comparing = Comparison(ledger, quota, plans, floors, scope=scope, scratch=scratch)
        async for batch in record.read(first=first, last=last):
            sealed.take(batch)
            comparing.take(batch)
            progress(READING, batch[-1].sequence - first + 1, last - first + 1)
        comparing.end()
        evident = sealed.end()
        _tell_of_seals(evident, comparing.tally, scratch)
        if archived and archived.last:
            comparing.tally.compared[ARCHIVE] = archived.last
    tally = comparing.tally
    waiting = {service: max(0, last - floor) for service, floor in floors.items()}
    read = Read(first, last, tally.messages, tally.unreadable, tally.repeated, waiting)
    proven = _proven(evident, evidence, archived, lacking_triggers)
    return Report(read, tally.compared, proven, scratch, monotonic() - begun)


def _unguarded(service: str, snapshot: Snapshot) -> list[str]:
    found = (unguarded(snapshot.rows, table, on_sqlite=snapshot.is_sqlite) for table in ONLY_GROW[service])
    return [f"{service}.{name}" for names in found for name in names]


def _proven(result: Result, evidence: Evidence, archived: Archive | None, unguarded: list[str]) -> Proven:
    keys, manifests = evidence.keys or Keys(None, {}), archived.manifests if archived else ()
    return Proven(
        seals=result.seals,
        signed=result.signed,
        keys=keys.believed_ids,
        outside=result.outside if evidence.seals_file else None,
        sealed_up_to=result.sealed_up_to,
        outside_up_to=result.outside_up_to if evidence.seals_file else None,
        is_outside_torn=result.is_outside_torn,
        archives=len(manifests),
        archives_signed=sum(is_signed(each, keys) for each in manifests),
        unguarded=unguarded,
    )


async def _made_again(record: Record, databases: Databases, progress: Progress) -> None:
    """Whatever services are just making anew of what was lost is waited for."""
    try:
        for service, url in ((LEDGER, databases.ledger_url), (QUOTA, databases.quota_url)):
            await has_read_again(record, service, url, progress)
        await evidence_is_back(record, databases.ledger_url, progress)
    except (NatsError, OSError) as error:
        raise Unavailable("The broker cannot be asked right now.") from error


async def _written_down_up_to(ledger_url: str, seals_file: Path) -> int:
    """Seals of so many messages, or of fewer, must be in the file. The newest may be on its way there, or its process
    may have died before it was: that is no difference. A file that is empty was emptied."""
    with snapshot(LEDGER, ledger_url, ("seals",)) as ledger:
        sizes = [int(size) for (size,) in ledger.rows("SELECT tree_size FROM seals ORDER BY tree_size DESC LIMIT 2")]
    newest, before = [*sizes, 0, 0][:2]
    written, begun = await asyncio.to_thread(_newest_written, seals_file), monotonic()
    while before <= written < newest and monotonic() < begun + WRITTEN_WITHIN_S:
        await asyncio.sleep(LOOK_EVERY_S)
        written = await asyncio.to_thread(_newest_written, seals_file)
    is_empty = (await asyncio.to_thread(seals_file.stat)).st_size == 0
    return newest if is_empty else max(before, min(written, newest))


def _newest_written(seals_file: Path) -> int:
    try:
        with seals_file.open("rb") as file:
            return newest_size(end_of(file))
    except OSError as error:
        raise Misconfigured(f"CHATRAIL_SEALS_FILE {seals_file} cannot be read: {error.strerror}.") from error


async def _check_archive(nc: Client, folder: Path, ledger: Snapshot, keys: Keys | None, scratch: Scratch) -> Archive:
    """What is not as it was sealed is a difference, also while the stream still has it."""
    archive = await asyncio.to_thread(Archive.at, folder)
    check_origin(archive, (await nc.jetstream().stream_info(STREAM)).created)
    before: Sealed | None = None
    for manifest in archive.manifests:
        path = archive.path(manifest)
        differing = await altered(path, manifest, ledger.rows, before=before, keys=keys)
        if differing:
            await asyncio.to_thread(archive.check_name, manifest)
        for found in differing:
            place = {"sequence": found.sequence} if found.sequence else {}
            expected = {**place, "was": found.expected}
            where = f"{ARCHIVE} {manifest.name}"
            scratch.add(Difference(where, "archive", found.event_id, None, expected, {"is": found.found}))
        before = next(sealed_after(ledger.rows, manifest.last - 1), None)
    return archive


def _tell_of_seals(result: Result, tally: Tally, scratch: Scratch) -> None:
    tally.compared |= {"ledger.leaves": result.leaves, "ledger.seals": result.seals}
    for found in result.differences:
        where, expected = f"evidence, {found.kind}", {"sequence": found.sequence, "was": found.expected}
        scratch.add(
            Difference(
                where, DONE_ABOUT.get(found.kind, "broken"), found.event_id, None, expected, {"is": found.found}
            )
        )
    if result.more:
        scratch.add(Difference("evidence", "broken", None, None, {"and more": result.more}, None))


async def _floors(nc: Client) -> dict[str, int]:
    """Up to where each durable has acknowledged all of the stream: all of it as it is now, if that is soon to be."""
    _, last = await bounds(nc)
    floors, begun = await _acknowledged(nc), monotonic()
    moved = begun
    while min(floors.values()) < last and (now := monotonic()) < min(begun + FLOOR_WITHIN_S, moved + FLOOR_STILL_S):
        await asyncio.sleep(LOOK_EVERY_S)
        if (found := await _acknowledged(nc)) != floors:
            floors, moved = found, now
    return floors


async def _acknowledged(nc: Client) -> dict[str, int]:
    try:
        return await acknowledged(nc)
    except (NatsError, OSError) as error:
        raise Unavailable("The broker cannot be asked right now.") from error
