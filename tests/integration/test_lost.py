"""Databases that were lost, built anew by a replay alone: every figure is there, and so is the evidence."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from sqlalchemy import Connection, Table, func, make_url, select, text

from services.ledger import audit_waiting
from services.ledger.__main__ import MIGRATIONS
from services.ledger.audit import audit
from services.ledger.checkpoint import Keys
from services.ledger.handlers import Handlers as LedgerHandlers
from services.ledger.merkle import Frontier
from services.ledger.replay import CHANGED, RebuiltLedger
from services.ledger.scope import Scope
from services.ledger.scratch import scratch
from services.ledger.sealer import Sealer
from services.ledger.store import leaves, seals, usage
from services.quota.__main__ import MIGRATIONS as QUOTA_MIGRATIONS
from services.quota.replay import RebuiltQuota
from shared import catchup
from shared.catchup import catch_up
from shared.consumer import apply
from shared.database import Database
from shared.errors import Misconfigured
from shared.events import Event
from shared.recorded import BATCH_SIZE, Recorded, bounds, recorded
from shared.replaying import Told, dry_run, replay
from shared.streams import LEDGER, LEDGER_SEALED, QUOTA, STREAM, create
from tests.builders import generation_completed, publish
from tests.integration import test_audit
from tests.integration.test_audit import EVENTS, System

system = test_audit.system  # a fixture here, too

HISTORY: list[list[Event]] = [EVENTS[:5], EVENTS[5:], [generation_completed("user_9")]]


async def happened(system: System) -> None:
    """Three times something was published, handled and sealed; the last seal is handled, too."""
    for events in HISTORY:
        for event in events:
            await system.nats.jetstream().publish(event.type, event.model_dump_json(by_alias=True).encode())
        await system.deliver()
        await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()
    await system.deliver()


async def lose(database: Database, url: str) -> None:
    if url.startswith("sqlite"):
        await database.close()
        file = Path(make_url(url).database or "")
        for each in file.parent.glob(f"{file.name}*"):
            each.unlink()
        return

    def drop(db: Connection) -> None:
        db.execute(text("DROP SCHEMA public CASCADE"))
        db.execute(text("CREATE SCHEMA public"))

    await database.write(drop)
    await database.close()


async def replayed(system: System, *, despite_gaps: bool = False) -> Told:
    told = await replay(system.nats, system.urls.ledger_url, RebuiltLedger(), despite_gaps=despite_gaps)
    await replay(system.nats, system.urls.quota_url, RebuiltQuota(system.plans), despite_gaps=despite_gaps)
    return told


async def number(url: str, table: Table) -> int:
    database = Database(url)
    found: int = await database.read(lambda db: db.execute(select(func.count()).select_from(table)).scalar_one())
    await database.close()
    return found


async def stored(nats: Client) -> list[Recorded]:
    first, last = await bounds(nats)
    return [message async for batch in recorded(nats, first=first, last=last) for message in batch]


async def test_what_a_replay_alone_rebuilt_agrees_with_the_stream_and_its_seals(system: System) -> None:
    await happened(system)
    assert (before := await system.audit()).differences == []
    await lose(system.ledger, system.urls.ledger_url)
    await lose(system.quota, system.urls.quota_url)

    told = await replayed(system)

    assert told.beside == ["18 leaves and 3 seals were missing, and are made anew as the stream's seals tell"]
    after = await system.audit()
    assert after.differences == []
    assert after.report.compared["ledger.seals"] == before.report.compared["ledger.seals"] == 3
    assert (await replayed(system)).beside == []


async def test_evidence_that_somebody_cut_off_is_named_before_a_replay_makes_it_anew(system: System) -> None:
    await happened(system)
    await system.ledger_does("DELETE FROM seals WHERE tree_size > 6")
    await system.ledger_does("DELETE FROM leaves WHERE stream_sequence > 8")
    assert {difference.where for difference in (await system.audit()).differences} >= {
        "evidence, seal on the stream that the ledger does not have"
    }
    told, _ = await dry_run(system.nats, system.urls.ledger_url, RebuiltLedger())
    assert told.beside == ["10 leaves and 2 seals are missing, and would be made anew as the stream's seals tell"]
    assert await number(system.urls.ledger_url, leaves) == 8

    told = await replayed(system)

    assert told.beside == ["10 leaves and 2 seals were missing, and are made anew as the stream's seals tell"]
    assert (await system.audit()).differences == []


async def test_evidence_that_was_changed_stays_as_it_is_and_is_named(system: System) -> None:
    await happened(system)
    await system.ledger_does("DELETE FROM seals")
    await system.ledger_does("UPDATE leaves SET leaf_hash = (SELECT leaf_hash FROM leaves WHERE stream_sequence = 1)")
    changed = await system.ledger.read(lambda db: db.execute(select(leaves)).all())
    told, _ = await dry_run(system.nats, system.urls.ledger_url, RebuiltLedger())
    assert [line.partition(":")[0] for line in told.beside] == [CHANGED]

    told = await replayed(system)

    assert [line.partition(":")[0] for line in told.beside] == [CHANGED]
    assert await system.ledger.read(lambda db: db.execute(select(leaves)).all()) == changed
    assert await number(system.urls.ledger_url, seals) == 0
    assert not (await system.audit()).agrees


async def test_no_evidence_is_made_of_a_record_that_is_not_what_was_sealed(system: System) -> None:
    await happened(system)
    await lose(system.ledger, system.urls.ledger_url)
    js, messages = system.nats.jetstream(), await stored(system.nats)
    await js.delete_stream(STREAM)
    await create(js)
    for message in messages:
        body = message.body.replace(b"user_9", b"user_8")
        await js.publish(message.subject, body)
    assert [message.subject for message in messages].count(LEDGER_SEALED) == 3

    told, _ = await dry_run(system.nats, system.urls.ledger_url, RebuiltLedger())
    assert told.beside == [
        "The ledger has lost leaves and seals, and the record is not what was sealed: "
        "messages 16 to 17 of the stream are not what was sealed"
    ]
    with pytest.raises(Misconfigured, match=r"messages 16 to 17 .* Restore the broker's store first"):
        await replay(system.nats, system.urls.ledger_url, RebuiltLedger())
    assert [await number(system.urls.ledger_url, table) for table in (usage, leaves, seals)] == [0, 0, 0]

    told = await replay(system.nats, system.urls.ledger_url, RebuiltLedger(), despite_gaps=True)
    assert "messages 16 to 17" in told.beside[0]
    assert [await number(system.urls.ledger_url, table) for table in (usage, leaves, seals)] == [11, 0, 0]


async def lost_and_made_again(system: System) -> None:
    """As a service finds it that starts without its database."""
    await lose(system.ledger, system.urls.ledger_url)
    system.ledger = Database(system.urls.ledger_url)
    system.ledger.migrate(MIGRATIONS)


async def test_evidence_is_whole_also_where_who_made_it_anew_died_before_its_seals(
    system: System,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await happened(system)
    await lost_and_made_again(system)
    append = Sealer._append

    async def killed(self: Sealer, frontier: Frontier, messages: list[Recorded]) -> None:
        await append(self, frontier, messages)
        raise KeyError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Sealer, "_append", killed)
        with pytest.raises(KeyError):
            await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()
    assert [await number(system.urls.ledger_url, table) for table in (leaves, seals)] == [18, 0]

    await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()
    await replayed(system)

    assert await number(system.urls.ledger_url, seals) == 4
    await system.deliver()
    assert (await system.audit()).differences == []


async def test_an_audit_waits_for_a_database_that_is_read_the_stream_again(system: System) -> None:
    await publish(system.nats, *(generation_completed(f"user_{nth}") for nth in range(1_200)))
    await happened(system)
    await lost_and_made_again(system)
    told, is_seen = list[str](), asyncio.Event()

    async def work(messages: list[Msg]) -> Sequence[Msg]:
        await is_seen.wait()
        return await apply(LedgerHandlers(system.ledger, system.plans).on_usage, messages)

    def show(what: str, done: int, total: int) -> None:
        told.append(what)
        is_seen.set()

    async def start() -> None:
        await catch_up(system.nats, LEDGER, system.ledger, work)
        await Sealer(system.nats, system.ledger, keys=Keys(None, {}), every_s=1e-9).seal()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start())
        with scratch() as kept:
            report = await audit(system.nats, system.urls, system.plans, Scope(), kept, progress=show)
            assert report.agrees
    assert told[0] == "The ledger reads again what its database has lost"


@pytest.mark.parametrize("service", [LEDGER, QUOTA])
async def test_where_nobody_reads_a_lost_database_again_a_sentence_says_what_to_do(
    system: System,
    monkeypatch: pytest.MonkeyPatch,
    service: str,
) -> None:
    await happened(system)
    monkeypatch.setattr(audit_waiting, "NOTED_WITHIN", timedelta(0))
    monkeypatch.setattr(audit_waiting, "STILL_S", 0.2)
    database, url = (
        (system.ledger, system.urls.ledger_url) if service == LEDGER else (system.quota, system.urls.quota_url)
    )
    await lose(database, url)
    database.migrate(MIGRATIONS if service == LEDGER else QUOTA_MIGRATIONS)

    with pytest.raises(
        Misconfigured,
        match=rf"The {service}'s database lacks .* from message 1 to 18, .* Start it, or try again .* make replay",
    ):
        await system.audit()

    await replayed(system)
    assert (await system.audit()).differences == []


@pytest.mark.parametrize("is_noted", [True, False])
async def test_what_somebody_cut_off_a_database_is_named_record_by_record(
    system: System,
    monkeypatch: pytest.MonkeyPatch,
    is_noted: bool,
) -> None:
    """Whether it says that it has everything, or ended before it said so of the last few seconds."""
    await happened(system)
    monkeypatch.setattr(audit_waiting, "STILL_S", 0.2)
    if is_noted:
        monkeypatch.setattr(audit_waiting, "NOTED_WITHIN", timedelta(0))
        work = partial(apply, LedgerHandlers(system.ledger, system.plans).on_usage)
        await catch_up(system.nats, LEDGER, system.ledger, work)
    await system.ledger_does("DELETE FROM usage")
    missing = [d for d in (await system.audit()).differences if d.where == "ledger.usage"]
    assert [d.kind for d in missing] == ["missing"] * 11


async def test_who_dies_while_reading_again_goes_on_from_there(
    system: System,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await publish(system.nats, *(generation_completed(f"user_{nth}") for nth in range(BATCH_SIZE)))
    await happened(system)
    await lost_and_made_again(system)
    monkeypatch.setattr(catchup, "NOTE_READING_EVERY_S", -1)
    read = list[Msg]()

    async def work(messages: list[Msg]) -> Sequence[Msg]:
        if len(read) == BATCH_SIZE:
            raise KeyError("killed")
        read.extend(messages)
        return await apply(LedgerHandlers(system.ledger, system.plans).on_usage, messages)

    with pytest.raises(KeyError):
        await catch_up(system.nats, LEDGER, system.ledger, work)
    read.clear()
    await catch_up(system.nats, LEDGER, system.ledger, work)
    assert len(read) == 18
    assert await number(system.urls.ledger_url, usage) == BATCH_SIZE + 11
