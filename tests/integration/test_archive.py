"""What is archived and trimmed is read as one with the stream."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from sqlalchemy import select

from services.chat.deadline import Deadline
from services.chat.idempotency import BODY_DIGEST, publish_once
from services.chat.problems import Problem
from services.ledger import archive as archiving
from services.ledger import store as ledger_store
from services.ledger.archive import Reach, alone_in, archive
from services.ledger.audit import audit
from services.ledger.checkpoint import Keys
from services.ledger.handlers import Handlers as LedgerHandlers
from services.ledger.replay import RebuiltLedger
from services.ledger.scope import Scope
from services.ledger.scratch import scratch
from services.ledger.sealer import Sealer
from services.ledger.snapshots import snapshot
from services.ledger.trim import Trimmed, trim
from services.quota import subscriptions as quota_subscriptions
from services.quota import totals as quota_totals
from services.quota.handlers import Handlers as QuotaHandlers
from services.quota.replay import RebuiltQuota
from shared import streams
from shared.archive import Archive, Manifest
from shared.catchup import catch_up
from shared.consumer import apply
from shared.errors import Misconfigured
from shared.events import Event
from shared.plans import Plans
from shared.record import Record
from shared.recorded import Recorded, bounds, recorded
from shared.replaying import dry_run, rebuild_into, replay
from tests import forked
from tests.builders import (
    generation_completed,
    publish,
    publish_raw,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)
from tests.fixtures import eventually
from tests.integration.test_audit import Found, System
from tests.stack import PROJECT, environment

# A trim lasts half of it at most, and is to end in time on a machine with much else to do.
OVERLAP = timedelta(seconds=1.5)
KEY, BODY = "invoice-7", b"the body"


class Archiving(System):
    """A system that seals, with an archive of its own."""

    folder: Path

    async def happened(self, *events: Event) -> None:
        """Published, handled by both services, and sealed."""
        await publish(self.nats, *events)
        await self.deliver()
        await self.seal()

    async def seal(self) -> None:
        await Sealer(self.nats, self.ledger, keys=Keys(None, {}), every_s=1e-9, archive=self.folder).seal()

    async def archive(self, *, before: datetime | None = None) -> tuple[list[Manifest], Reach]:
        with snapshot(streams.LEDGER, self.urls.ledger_url, ("leaves", "seals")) as ledger:
            return await archive(
                self.nats, ledger.rows, self.folder, before=before or datetime.now(UTC), advance=lambda _: None
            )

    async def trim(self, overlap: timedelta = OVERLAP) -> Trimmed:
        with snapshot(streams.LEDGER, self.urls.ledger_url, ("leaves", "seals")) as ledger:
            return await trim(self.nats, ledger.rows, self.folder, overlap=overlap, settled_s=0)

    async def audit(self, scope: Scope = Scope()) -> Found:  # noqa: B008 - frozen
        with scratch() as kept:
            return self._read(await audit(self.nats, self.urls, self.plans, scope, kept, archive=self.folder))

    async def replay(self) -> None:
        await replay(self.nats, self.urls.ledger_url, RebuiltLedger(), archive=self.folder)
        await replay(self.nats, self.urls.quota_url, RebuiltQuota(Plans.load()), archive=self.folder)

    async def figures(self) -> dict[str, list[Any]]:
        """All that both databases say of usage."""
        usage, totals = ledger_store.usage, quota_totals.totals
        return {
            "usage": await self.ledger.read(lambda db: [*map(tuple, db.execute(select(usage).order_by(usage.c.id)))]),
            "totals": await self.quota.read(
                lambda db: [*map(tuple, db.execute(select(totals).order_by(*totals.primary_key)))]
            ),
            "plans": await self.quota.read(
                lambda db: [*map(tuple, db.execute(select(quota_subscriptions.subscriptions).order_by("user_id")))]
            ),
        }


@pytest.fixture
async def system(nats: Client, ledger_url: str, quota_url: str, tmp_path: Path) -> AsyncIterator[Archiving]:
    system = Archiving(nats, ledger_url, quota_url)
    system.folder = tmp_path / "archive"
    system.folder.mkdir()
    yield system
    await system.close()


def some_events() -> list[Event]:
    return [
        generation_completed(),
        generation_completed("üser *.> 3", metadata={"conversation": "überall 🛤"}),
        usage_reported("user_2", tokens_used=70),
        usage_adjusted(tokens_used=-94),
        topped_up("user_2", lasts=True),
        subscription_changed("user_2"),
    ]


async def keyed(nats: Client, body: bytes = BODY) -> str:
    """The event's id for a report that comes with the key."""
    event = usage_reported("user_2", tokens_used=1_000)
    told = await publish_once(nats, event, Deadline(), subject_of=streams.keyed, key=KEY, body=body)
    return told.event_id


async def stored(nats: Client) -> list[Recorded]:
    first, last = await bounds(nats)
    return [message async for batch in recorded(nats, first=first, last=last) for message in batch]


async def whole(system: Archiving) -> list[Recorded]:
    record = Record(system.nats, system.folder)
    first, last = await record.bounds()
    return [message async for batch in record.read(first=first, last=last) for message in batch]


async def grown_old(system: Archiving, age: timedelta = 1.4 * OVERLAP) -> None:
    """Returns once all that is on the stream is of that age."""
    newest = (await stored(system.nats))[-1].stored_at

    async def is_old() -> bool:
        return datetime.now(UTC) - newest > age

    await eventually(is_old)


async def archived_and_trimmed(system: Archiving) -> list[Recorded]:
    """A stream whose beginning is in the archive alone. Returns all that there ever was."""
    await system.happened(*some_events(), *some_events())
    await grown_old(system)
    await system.happened(*some_events())
    everything = await stored(system.nats)
    await system.archive()
    trimmed = await system.trim()
    assert trimmed.messages >= 12
    assert (await bounds(system.nats))[0] == trimmed.messages + 1
    return everything


async def test_what_is_archived_reads_back_as_it_came(system: Archiving) -> None:
    await publish_raw(system.nats, b"\xff no event")
    await keyed(system.nats)
    await system.happened(*some_events())
    await system.happened(*some_events())

    (manifest,), reach = await system.archive()

    on_stream = await stored(system.nats)
    kept = [message for batch in Archive.at(system.folder).read(first=1, last=10**9) for message in batch]
    assert kept == on_stream[: manifest.last]
    assert (manifest.first, manifest.last, reach.sealed) == (1, len(on_stream) - 1, manifest.last)
    assert kept[1].headers is not None
    assert BODY_DIGEST in kept[1].headers
    assert sorted(path.name for path in system.folder.iterdir()) == [
        f"usage-000000000001-{manifest.last:012}.json",
        f"usage-000000000001-{manifest.last:012}.parquet",
    ]


async def test_archived_and_trimmed_all_is_audited_and_replayed_as_before(system: Archiving) -> None:
    everything = await archived_and_trimmed(system)
    before = await system.figures()

    assert await whole(system) == everything
    assert (await system.audit()).differences == []
    await system.replay()

    assert await system.figures() == before
    found = await system.audit()
    assert found.differences == []
    assert found.report.compared["archive"] == Archive.at(system.folder).last
    assert found.report.read.first == 1


async def test_a_key_is_known_after_its_message_was_trimmed(system: Archiving) -> None:
    first = await keyed(system.nats)
    await archived_and_trimmed(system)
    before = await system.figures()
    length = (await bounds(system.nats))[1]

    assert await keyed(system.nats) == first
    with pytest.raises(Problem) as refused:
        await keyed(system.nats, b"another body")

    assert refused.value.status == 409
    assert (await bounds(system.nats))[1] == length
    await system.deliver()
    assert await system.figures() == before


async def test_the_keys_of_all_that_a_trim_might_take_along_are_kept_before_it_begins(system: Archiving) -> None:
    """What is a little younger than the last to go grows old while the stream deletes."""
    await system.happened(*some_events())
    await grown_old(system)
    await keyed(system.nats)
    await system.happened(*some_events())
    subject = next(each.subject for each in await stored(system.nats) if each.subject.startswith(streams.keyed("")))
    await system.archive()

    trimmed = await system.trim()

    assert (trimmed.begins <= 8, trimmed.keys) == (True, 1)
    await system.nats.jetstream().get_last_msg(streams.KEYS, streams.kept_key(subject))


async def test_one_archive_follows_the_other_and_has_what_was_stored_before_a_moment(system: Archiving) -> None:
    await system.happened(*some_events())
    await grown_old(system, timedelta(seconds=0.1))
    moment = datetime.now(UTC)
    await system.happened(*some_events())
    await publish(system.nats, usage_reported())

    first, reach = await system.archive(before=moment)
    assert [(each.first, each.last) for each in first] == [(1, 6)]
    assert reach == Reach(stored_before=7, handled=13, sealed=13)
    nothing, _ = await system.archive(before=moment)
    assert nothing == []

    second, reach = await system.archive()
    assert [(each.first, each.last) for each in second] == [(7, 13)]
    assert (reach.stored_before, reach.handled) == (15, 13)

    kept = Archive.at(system.folder)
    assert [message for batch in kept.read(first=1, last=99) for message in batch] == (await stored(system.nats))[:13]
    assert [message.sequence for batch in kept.read(first=5, last=8) for message in batch] == [5, 6, 7, 8]
    assert set(kept.find([2, 9, 14])) == {2, 9}


async def test_many_messages_are_kept_in_several_files_that_end_where_a_seal_does(
    system: Archiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiving, "FILE_MESSAGES_MAX", 20)
    for _ in range(5):
        await system.happened(*some_events())
    written, _ = await system.archive()
    assert [(each.first, each.last) for each in written] == [(1, 20), (21, 34)]
    assert await whole(system) == await stored(system.nats)
    assert (await system.audit()).agrees

    first, second = (system.folder / each.name for each in written)
    first.rename(away := system.folder / "away")
    second.rename(first)
    away.rename(second)
    told = r"file .*\.parquet is what usage-.*\.parquet was: give each its own name back"
    for asked in (system.audit, system.trim):
        with pytest.raises(Misconfigured, match=told):
            await asked()
    with pytest.raises(Misconfigured, match=told):
        Archive.at(system.folder).check(written[1])


async def test_nothing_is_archived_that_nobody_has_handled_or_sealed(system: Archiving) -> None:
    await publish(system.nats, *some_events())
    assert await system.archive() == ([], Reach(stored_before=6, handled=0, sealed=0))
    await system.deliver(streams.LEDGER)
    await system.seal()
    assert await system.archive() == ([], Reach(stored_before=7, handled=0, sealed=6))
    await system.deliver(streams.QUOTA)
    written, _ = await system.archive()
    assert [(each.first, each.last) for each in written] == [(1, 6)]


async def test_a_stream_that_is_not_what_was_sealed_is_not_archived(system: Archiving) -> None:
    await system.happened(*some_events())
    await system.ledger_does(
        "UPDATE leaves SET leaf_hash = event_id WHERE stream_sequence = 3".replace(
            "event_id", "(SELECT leaf_hash FROM leaves AS others WHERE others.stream_sequence = 4)"
        )
    )
    with pytest.raises(Misconfigured, match="Message 3 of the stream is not what was sealed, and nothing behind 0"):
        await system.archive()
    assert Archive.at(system.folder).last == 0
    assert [*system.folder.iterdir()] == []


async def test_what_is_not_archived_and_the_end_of_what_is_stays_on_the_stream(system: Archiving) -> None:
    await system.happened(*some_events())
    assert await system.trim() == Trimmed(0, 0, 1)
    await system.archive()
    assert await system.trim(timedelta(days=1)) == Trimmed(0, 0, 1)
    assert (await bounds(system.nats))[0] == 1
    config = (await system.nats.jetstream().stream_info(streams.STREAM)).config

    await archived_and_trimmed(system)

    info = await system.nats.jetstream().stream_info(streams.STREAM)
    assert (info.config, info.state.first_seq <= Archive.at(system.folder).last) == (config, True)
    await streams.check(system.nats.jetstream(), streams.LEDGER)
    again = await system.trim()
    assert again.messages == 0


async def test_the_newest_seal_that_the_stream_tells_of_is_never_trimmed(
    system: Archiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies_before_it_tells(_: Sealer) -> None:
        pass

    await system.happened(*some_events())
    await publish(system.nats, usage_reported())
    await grown_old(system)
    await publish(system.nats, *some_events())
    await system.deliver()
    monkeypatch.setattr(Sealer, "_tell", dies_before_it_tells)
    await system.seal()
    await system.archive()
    with pytest.raises(Misconfigured, match="has not told the stream of its newest seal"):
        await system.trim()
    monkeypatch.undo()
    await system.seal()
    assert (await system.trim()).messages == 8
    await system.seal()
    assert (await system.audit()).agrees


async def test_a_durable_that_was_made_anew_delivers_no_archive_and_needs_none(
    system: Archiving, tmp_path: Path
) -> None:
    """A database that has all of it goes on; one that was lost reads the archive."""
    work = partial(apply, LedgerHandlers(system.ledger, Plans.load()).on_usage)
    await archived_and_trimmed(system)
    await catch_up(system.nats, streams.LEDGER, system.ledger, work, archive=system.folder)
    js, before = system.nats.jetstream(), await system.figures()
    await js.delete_consumer(streams.STREAM, streams.LEDGER)
    await streams.create(js)

    await catch_up(system.nats, streams.LEDGER, system.ledger, work, archive=tmp_path / "none")

    for table in ("usage", "usage_daily", "subscription_changes", "stream_position"):
        await system.ledger_does(f"DELETE FROM {table}")  # noqa: S608
    with pytest.raises(Misconfigured, match="CHATRAIL_ARCHIVE"):
        await catch_up(system.nats, streams.LEDGER, system.ledger, work, archive=tmp_path / "none")
    await catch_up(system.nats, streams.LEDGER, system.ledger, work, archive=system.folder)
    await system.deliver()
    assert await system.figures() == before


async def test_an_older_copy_of_a_database_catches_up_through_the_archive(system: Archiving, tmp_path: Path) -> None:
    """And one that was lost altogether: nothing that was trimmed is delivered to it any more."""
    await archived_and_trimmed(system)
    before = await system.figures()
    plans = Plans.load()
    for table in ("usage", "usage_daily", "subscription_changes"):
        await system.ledger_does(f"DELETE FROM {table}")  # noqa: S608
    for table in ("settlements", "plan_changes", "usage_totals", "subscriptions"):
        await system.quota_does(f"DELETE FROM {table}")  # noqa: S608

    gone = (await bounds(system.nats))[0] - 1
    for durable, database, handle in (
        (streams.LEDGER, system.ledger, LedgerHandlers(system.ledger, plans).on_usage),
        (streams.QUOTA, system.quota, QuotaHandlers(system.nats, system.quota, plans).on_usage),
    ):
        work = partial(apply, handle)
        with pytest.raises(Misconfigured, match=f"Messages 1 to {gone} are neither on the stream nor in the archive"):
            await catch_up(system.nats, durable, database, work, archive=tmp_path / "other")
        await catch_up(system.nats, durable, database, work, archive=system.folder)

    after = await system.figures()
    assert (after["usage"], after["plans"]) == (before["usage"], before["plans"])
    assert (await system.audit()).agrees


async def test_lost_databases_have_every_figure_again_after_a_replay(system: Archiving) -> None:
    await archived_and_trimmed(system)
    before = await system.figures()
    for table in ("usage", "usage_daily", "subscription_changes", "leaves", "seals"):
        await system.ledger_does(f"DELETE FROM {table}")  # noqa: S608
    for table in ("settlements", "plan_changes", "usage_totals", "subscriptions"):
        await system.quota_does(f"DELETE FROM {table}")  # noqa: S608

    await system.replay()
    await system.deliver()
    await system.seal()

    after = await system.figures()
    assert (after["usage"], after["plans"]) == (before["usage"], before["plans"])
    found = await system.audit()
    assert found.differences == []
    assert found.report.compared["ledger.leaves"] >= 20


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_past_and_what_a_replay_would_change_are_read_from_both(system: Archiving, tmp_path: Path) -> None:
    await archived_and_trimmed(system)
    _, differences = await dry_run(system.nats, system.urls.ledger_url, RebuiltLedger(), archive=system.folder)
    assert [difference.rows for difference in differences] == [0] * len(differences)
    told = await rebuild_into(system.nats, tmp_path / "past.db", RebuiltLedger(), archive=system.folder)
    assert told.messages == (await bounds(system.nats))[1]


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_reader_that_was_under_way_when_the_stream_was_trimmed_misses_nothing(
    system: Archiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.happened(*some_events(), *some_events())
    await grown_old(system)
    await system.happened(*some_events())
    await system.archive()
    everything = await stored(system.nats)
    begins = Record._stream
    asked = []

    async def trimmed_behind_our_back(record: Record) -> tuple[int, int]:
        told = await begins(record)
        asked.append(told)
        if len(asked) == 2:  # the first was for the bounds
            await system.trim()
        return told

    monkeypatch.setattr(Record, "_stream", trimmed_behind_our_back)
    assert await whole(system) == everything
    assert (await bounds(system.nats))[0] > 1


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_users_trimmed_records_are_proven(system: Archiving, own_nats_server: str, tmp_path: Path) -> None:
    await archived_and_trimmed(system)
    out = tmp_path / "proof.json"
    status, said = await command(system, own_nats_server, "prove", "--user", "user_2", "--out", str(out))
    assert (status, "Wrote 9 records" in said) == (0, True), said
    verifier = PROJECT / "services" / "ledger" / "verify_record.py"
    process = await asyncio.create_subprocess_exec(sys.executable, str(verifier), str(out))
    assert await process.wait() == 0


def variables(system: Archiving, nats_url: str) -> dict[str, str]:
    return {
        "CHATRAIL_NATS_URL": nats_url,
        "CHATRAIL_LEDGER_DATABASE_URL": system.urls.ledger_url,
        "CHATRAIL_QUOTA_DATABASE_URL": system.urls.quota_url,
        "CHATRAIL_ARCHIVE": str(system.folder),
    }


async def command(
    system: Archiving,
    nats_url: str,
    *arguments: str,
    crash_at: str | None = None,
    started_by: str = "tests.faults.failpoints",
) -> tuple[int, str]:
    """How `python -m services.ledger …` ends, and what it says."""
    step = {"CHATRAIL_CRASH_AT": crash_at} if crash_at else {}
    told = environment(**variables(system, nats_url), **step)
    ended = await forked.run(started_by, "services.ledger", *arguments, env=told)
    return ended.status, ended.out


short_trim = partial(command, started_by="tests.short_overlap")


@pytest.mark.parametrize(
    "step",
    [
        "before services.ledger.archive:sha256_of",
        "before services.ledger.archive:put_in_place",
        "after services.ledger.archive:put_in_place",
        "before services.ledger.archive:_write_down",
        "before services.ledger.archive:put_in_place#2",
        "after services.ledger.archive:put_in_place#2",
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_an_archive_that_was_killed_leaves_nothing_that_looks_whole_and_the_next_one_ends_the_same(
    system: Archiving, own_nats_server: str, step: str
) -> None:
    await system.happened(*some_events())
    before = datetime.now(UTC).isoformat()

    assert (await command(system, own_nats_server, "archive", "--before", before, crash_at=step))[
        0
    ] == -signal.SIGKILL
    kept = Archive.at(system.folder)
    assert kept.last in (0, 6)
    assert (kept.last == 6) == ("after" in step and "#2" in step)
    assert [*kept.read(first=1, last=99)] == ([(await stored(system.nats))[:6]] if kept.last else [])

    await system.happened(*some_events())
    status, said = await command(system, own_nats_server, "archive", "--before", datetime.now(UTC).isoformat())
    assert (status, "Archived messages " in said) == (0, True), said
    assert Archive.at(system.folder).last == 13
    assert not [path for path in system.folder.iterdir() if path.name.endswith(".draft")]
    assert len([*system.folder.glob("*.parquet")]) == len([*system.folder.glob("*.json")])
    assert (await system.audit()).agrees


async def killed_trim(system: Archiving, nats_url: str, *, overlap_s: int) -> None:
    """It dies while the stream deletes what is old."""
    await system.happened(*some_events())
    await grown_old(system)
    await system.happened(*some_events())
    await system.archive()
    step = "before services.ledger.trim:_begins_behind"
    status, _ = await short_trim(system, nats_url, "trim", "--overlap-s", str(overlap_s), crash_at=step)
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_trim_that_was_killed_is_put_back_by_the_next_start_of_the_bus(
    system: Archiving, own_nats_server: str
) -> None:
    js = system.nats.jetstream()
    await killed_trim(system, own_nats_server, overlap_s=1)
    left = (await js.stream_info(streams.STREAM)).config
    assert left.max_age
    # For as long as a trim may take, services bear it, and nobody else trims.
    await streams.check(js, streams.LEDGER)
    await streams.create(js)
    assert (await js.stream_info(streams.STREAM)).config == left
    with pytest.raises(Misconfigured, match="Somebody else trims the stream"):
        await system.trim()

    past = {**(left.metadata or {}), streams.TRIMMING_UNTIL: datetime.now(UTC).isoformat()}
    await js.update_stream(replace(left, metadata=past))
    with pytest.raises(Misconfigured, match=r"was cut off\. Run: python -m shared\.streams"):
        await streams.check(js, streams.LEDGER)
    await streams.create(js)
    await streams.check(js, streams.LEDGER)
    config = (await js.stream_info(streams.STREAM)).config
    assert (config.max_age, streams.TRIMMING_UNTIL in (config.metadata or {})) == (0, False)


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_who_puts_back_what_a_killed_trim_left_waits_until_its_time_is_over(
    system: Archiving, own_nats_server: str
) -> None:
    js = system.nats.jetstream()
    await killed_trim(system, own_nats_server, overlap_s=2)
    assert streams.is_being_trimmed((await js.stream_info(streams.STREAM)).config)
    ended = await forked.run("shared.streams", env=environment(CHATRAIL_NATS_URL=own_nats_server))
    assert ended.status == 0
    assert "waiting until that is over" in ended.out
    assert (await js.stream_info(streams.STREAM)).config.max_age == 0


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_commands_say_what_they_did_and_what_to_do(system: Archiving, own_nats_server: str) -> None:
    status, said = await command(system, own_nats_server, "archive", "--before", "2999-01-01")
    assert (status, "is still to come" in said) == (2, True), said
    await system.happened(*some_events())
    await grown_old(system)
    await system.happened(*some_events())
    now = datetime.now(UTC).isoformat()

    status, said = await command(system, own_nats_server, "archive", "--before", now)
    assert status == 0, said
    assert "Archived messages 1 to 13 in " in said
    assert (
        "Of what was stored before, 1 at the end wait for a later archive: ledger and quota have not handled" in said
    )
    assert "make trim takes off the stream what is archived, but for its last day" in said
    status, said = await command(system, own_nats_server, "archive", "--before", now)
    assert (status, said.startswith("Nothing new is archived")) == (0, True), said

    status, said = await command(system, own_nats_server, "trim")
    assert (status, said.startswith("Nothing was trimmed")) == (0, True), said
    status, said = await short_trim(system, own_nats_server, "trim", "--overlap-s", "1")
    assert (status, "messages left the stream, which begins at message " in said) == (0, True), said
    with alone_in(system.folder):
        status, said = await command(system, own_nats_server, "trim")
    assert (status, "Somebody else works on the archive" in said) == (1, True), said
