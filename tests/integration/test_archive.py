"""What is archived and trimmed is read as one with the stream, and whatever is not as it was is named."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from sqlalchemy import select

from services.chat.idempotency import BODY_DIGEST, publish_once
from services.ledger import store as ledger_store
from services.ledger.archive import Reach, archive
from services.ledger.audit import audit
from services.ledger.checkpoint import Keys
from services.ledger.replay import RebuiltLedger
from services.ledger.scratch import scratch
from services.ledger.sealer import Sealer
from services.ledger.snapshots import Scope, snapshot
from services.ledger.trim import Trimmed, trim
from services.quota import store as quota_store
from services.quota.replay import RebuiltQuota
from shared import streams
from shared.archive import Archive, Manifest
from shared.database import sqlite_url
from shared.events import Event
from shared.plans import Plans
from shared.record import Record
from shared.recorded import Recorded, bounds, recorded
from shared.replaying import replay
from tests.builders import (
    generation_completed,
    publish,
    publish_raw,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)
from tests.fixtures import Postgres, eventually
from tests.integration.test_audit import Found, System

OVERLAP = timedelta(seconds=1)
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
            return self._read(await audit(self.nats, self.urls, scope, kept, archive=self.folder))

    async def replay(self) -> None:
        await replay(self.nats, self.urls.ledger_url, RebuiltLedger(), archive=self.folder)
        await replay(self.nats, self.urls.quota_url, RebuiltQuota(Plans.load()), archive=self.folder)

    async def figures(self) -> dict[str, list[Any]]:
        """All that both databases say of usage."""
        usage, totals = ledger_store.usage, quota_store.totals
        return {
            "usage": await self.ledger.read(lambda db: [*map(tuple, db.execute(select(usage).order_by(usage.c.id)))]),
            "totals": await self.quota.read(
                lambda db: [*map(tuple, db.execute(select(totals).order_by(*totals.primary_key)))]
            ),
            "plans": await self.quota.read(
                lambda db: [*map(tuple, db.execute(select(quota_store.subscriptions).order_by("user_id")))]
            ),
        }


@pytest.fixture
async def system(nats: Client, urls: tuple[str, str], tmp_path: Path) -> AsyncIterator[Archiving]:
    system = Archiving(nats, *urls)
    system.folder = tmp_path / "archive"
    system.folder.mkdir()
    yield system
    await system.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path, "ledger.db"), sqlite_url(tmp_path, "quota.db")
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        with postgres.new_database() as ledger_url, postgres.new_database() as quota_url:
            yield ledger_url, quota_url


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
    told = await publish_once(nats, event, subject_of=streams.keyed, key=KEY, body=body)
    return told.event_id


async def stored(nats: Client) -> list[Recorded]:
    first, last = await bounds(nats)
    return [message async for batch in recorded(nats, first=first, last=last) for message in batch]


async def whole(system: Archiving) -> list[Recorded]:
    record = Record(system.nats, system.folder)
    first, last = await record.bounds()
    return [message async for batch in record.read(first=first, last=last) for message in batch]


async def grown_old(system: Archiving, age: timedelta = 2 * OVERLAP) -> None:
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
