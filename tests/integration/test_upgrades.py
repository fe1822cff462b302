"""A database that an earlier release made goes on after the next start, with what it has and with what comes."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text

from services.ledger import __main__ as ledger_service
from services.ledger import store as ledger_store
from services.quota import __main__ as quota_service
from services.quota import store as quota_store
from services.quota.standing import Grant
from shared.calls import HOLD_TTL, Authorize, ExplainQuery
from shared.database import Database
from shared.events import GenerationCompleted, decode, encode, utc_now
from shared.plans import Plans
from tests.builders import authorized, generation_completed

# The last revisions before events said what was granted.
LEDGER_BEFORE, QUOTA_BEFORE = "0005", "0006"


def database_of(url: str, migrations: Path, revision: str) -> None:
    """As the release of that revision made it."""
    config = Config()
    config.set_main_option("script_location", str(migrations))
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def do(statement: str, **values: object) -> Callable[[Connection], None]:
    def work(db: Connection) -> None:
        db.execute(text(statement), values)

    return work


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Database]:
    database_of(database_url, ledger_service.MIGRATIONS, LEDGER_BEFORE)
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def quota(database_url: str) -> AsyncIterator[Database]:
    database_of(database_url, quota_service.MIGRATIONS, QUOTA_BEFORE)
    database = Database(database_url)
    yield database
    await database.close()


async def test_what_a_ledger_recorded_before_grants_were_noted_is_not_contradicted_when_it_comes_again(
    ledger: Database,
) -> None:
    document = json.loads(encode(generation_completed(metadata={"note": "old"})))
    del document["data"]["authorized"]
    document["dataschema"] = "urn:chatrail:generation.completed:2"
    old, new = decode(json.dumps(document).encode()), generation_completed(authorized=authorized())
    assert isinstance(old, GenerationCompleted)
    row = {name: value for name, value in ledger_store.usage_rows([old])[0].items() if name != "authorized"}
    await ledger.write(lambda db: db.execute(ledger_store.usage.insert().values(row)))
    await ledger.write(do("INSERT INTO leaves VALUES (1, :id, :hash)", id=old.id, hash=b"\1" * 32))

    ledger.migrate(ledger_service.MIGRATIONS)

    recorded = await ledger.write(ledger_store.record, [old, new])
    assert (recorded.new, recorded.contradicting) == ([new], [])
    told = (await ledger.read(ledger_store.explain, ExplainQuery(event_id=old.id))).record
    assert told
    assert (told.authorized, told.given.metadata, told.place.stream_sequence) == (None, {"note": "old"}, 1)


async def test_a_hold_from_before_is_found_by_who_asks_again_and_released_by_its_settlement(quota: Database) -> None:
    request = Authorize(
        generation_id="g", user_id="user_1", input_tokens_max=1_000, output_tokens_min=1, output_tokens_max=500
    )
    at = utc_now()
    hold = {"generation_id": "g", "user_id": "user_1", "tokens": 1_100, "output_tokens": 100, "started_at": at}
    times = {"period_start": at.replace(day=1), "expires_at": at + HOLD_TTL}
    await quota.write(lambda db: db.execute(quota_store.holds.insert().values(hold | times)))

    quota.migrate(quota_service.MIGRATIONS)

    (answer,), standing, _ = await quota.write(quota_store.authorize, Plans.load(), [request])
    assert isinstance(answer, Grant)
    assert (answer.output_tokens, answer.started_at, answer.tier) == (100, at, None)
    assert standing["user_1"].usage.tokens_held == 1_100
    ended = generation_completed(generation_id="g", started_at=at).model_copy(update={"id": "g"})
    await quota.write(quota_store.settle, Plans.load(), [ended])
    told = await quota.read(quota_store.explain, Plans.load(), ExplainQuery(event_id="g"))
    assert told.settled
    assert (told.hold, told.settled.tokens_counted, told.settled.is_late) == (None, 8_094, False)
