"""Databases that were lost, built anew by a replay alone: every figure is there, and so is the evidence."""

from pathlib import Path

import pytest
from nats.aio.client import Client
from sqlalchemy import Connection, Table, func, make_url, select, text

from services.ledger.checkpoint import Keys
from services.ledger.replay import CHANGED, RebuiltLedger
from services.ledger.sealer import Sealer, leaves, seals
from services.ledger.store import usage
from services.quota.replay import RebuiltQuota
from shared.database import Database
from shared.errors import Misconfigured
from shared.events import Event
from shared.recorded import Recorded, bounds, recorded
from shared.replaying import Told, dry_run, replay
from shared.streams import LEDGER_SEALED, STREAM, create
from tests.builders import generation_completed
from tests.integration.test_audit import EVENTS, System, system, urls  # noqa: F401 - fixtures

HISTORY: list[list[Event]] = [EVENTS[:5], EVENTS[5:], [generation_completed("user_9")]]


async def happened(system: System) -> None:  # noqa: F811
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


async def replayed(system: System, *, despite_gaps: bool = False) -> Told:  # noqa: F811
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


async def test_what_a_replay_alone_rebuilt_agrees_with_the_stream_and_its_seals(system: System) -> None:  # noqa: F811
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


async def test_evidence_that_somebody_cut_off_is_named_before_a_replay_makes_it_anew(system: System) -> None:  # noqa: F811
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


async def test_evidence_that_was_changed_stays_as_it_is_and_is_named(system: System) -> None:  # noqa: F811
    await happened(system)
    await system.ledger_does("DELETE FROM seals")
    await system.ledger_does("UPDATE leaves SET leaf_hash = (SELECT min(leaf_hash) FROM leaves)")
    changed = await system.ledger.read(lambda db: db.execute(select(leaves)).all())
    told, _ = await dry_run(system.nats, system.urls.ledger_url, RebuiltLedger())
    assert [line.partition(":")[0] for line in told.beside] == [CHANGED]

    told = await replayed(system)

    assert [line.partition(":")[0] for line in told.beside] == [CHANGED]
    assert await system.ledger.read(lambda db: db.execute(select(leaves)).all()) == changed
    assert await number(system.urls.ledger_url, seals) == 0
    assert not (await system.audit()).agrees


async def test_no_evidence_is_made_of_a_record_that_is_not_what_was_sealed(system: System) -> None:  # noqa: F811
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
