"""What is recorded and settled stays: the databases refuse to change it, and the service's role has no right to."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from nats.aio.client import Client
from sqlalchemy import Connection, make_url, select, text
from sqlalchemy.exc import DatabaseError

from services.ledger import __main__ as ledger_service
from services.ledger import store as ledger_store
from services.ledger.partitions import MONTHS_AHEAD, make_ahead
from services.ledger.replay import RebuiltLedger
from services.quota import __main__ as quota_service
from services.quota import store as quota_store
from services.quota import subscriptions as quota_subscriptions
from services.quota import totals as quota_totals
from services.quota.replay import RebuiltQuota
from shared.database import Database, is_sqlite
from shared.errors import Misconfigured
from shared.events import Event
from shared.plans import Plans
from shared.replaying import dry_run, open_shadow, replay
from tests.builders import generation_completed, publish, subscription_changed
from tests.fixtures import Postgres

OF_LEDGER = ("usage", "subscription_changes", "leaves", "seals")
OF_QUOTA = ("settlements", "plan_changes")
EVENTS: list[Event] = [generation_completed(), subscription_changed()]


def do(*statements: str) -> Callable[[Connection], None]:
    def work(db: Connection) -> None:
        for statement in statements:
            db.execute(text(statement))

    return work


@pytest.fixture
async def quota(quota_url: str) -> AsyncIterator[Database]:
    database = Database(quota_url)
    await database.write(quota_store.settle, Plans.load(), EVENTS)
    yield database
    await database.close()


@pytest.mark.parametrize(
    ("statement", "refused"),
    [
        ("UPDATE settlements SET tokens_used = 1", "settlements is append-only: update is refused"),
        ("UPDATE settlements SET started_at = started_at", "settlements is append-only: update is refused"),
        ("DELETE FROM settlements", "settlements is append-only: delete is refused"),
        ("UPDATE plan_changes SET tier = 'free'", "plan_changes is append-only: update is refused"),
        ("DELETE FROM plan_changes", "plan_changes is append-only: delete is refused"),
    ],
)
async def test_what_is_settled_is_neither_changed_nor_deleted(quota: Database, statement: str, refused: str) -> None:
    with pytest.raises(DatabaseError, match=refused):
        await quota.write(do(statement))
    kept = await quota.read(lambda db: db.execute(select(quota_totals.settlements.c.tokens_used)).scalars().all())
    assert kept == [8_094]


async def test_that_a_settlement_came_late_may_be_noted_afterwards_and_is_not_taken_back(quota: Database) -> None:
    for _ in range(2):
        await quota.write(do("UPDATE settlements SET is_late = true"))
    with pytest.raises(DatabaseError, match="settlements is append-only: update is refused"):
        await quota.write(do("UPDATE settlements SET is_late = false"))


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize("table", OF_QUOTA)
async def test_replacing_what_is_settled_on_sqlite_changes_nothing(quota: Database, table: str) -> None:
    def row(db: Connection) -> object:
        return db.execute(text(f"SELECT * FROM {table}")).all()  # noqa: S608

    before = await quota.read(row)
    rows = quota_totals.settlements if table == "settlements" else quota_subscriptions.changes
    columns = ", ".join(column.name for column in rows.c if column.name != "user_id")
    replace = f"INSERT OR REPLACE INTO {table} (user_id, {columns}) SELECT 'other', {columns} FROM {table}"  # noqa: S608
    await quota.write(do(replace))
    assert await quota.read(row) == before


@pytest.fixture
def role_url(postgres: Postgres) -> Iterator[str]:
    """A database of a role that is no administrator, as a service has it."""
    role = f"service_{uuid4().hex}"
    postgres.execute("CREATE ROLE {} LOGIN", role)
    with postgres.new_database() as url:
        name = make_url(url).database or ""
        postgres.execute("ALTER DATABASE {} OWNER TO {}", name, role)
        yield make_url(url).set(username=role).render_as_string(hide_password=False)
    postgres.execute("DROP ROLE {}", role)


@pytest.fixture
async def served_ledger(role_url: str) -> AsyncIterator[Database]:
    database = Database(role_url)
    database.migrate(ledger_service.MIGRATIONS)
    await database.write(ledger_store.record, EVENTS)
    yield database
    await database.close()


@pytest.fixture
async def served_quota(role_url: str) -> AsyncIterator[Database]:
    database = Database(role_url)
    database.migrate(quota_service.MIGRATIONS)
    await database.write(quota_store.settle, Plans.load(), EVENTS)
    yield database
    await database.close()


@pytest.mark.parametrize("table", OF_LEDGER)
@pytest.mark.parametrize("statement", ["UPDATE {} SET {} = {}", "DELETE FROM {}", "TRUNCATE {}"])
async def test_the_ledgers_role_has_no_right_to_change_a_record(
    served_ledger: Database, table: str, statement: str
) -> None:
    column = {"usage": "user_id", "seals": "signature"}.get(table, "event_id")
    with pytest.raises(DatabaseError, match=f"permission denied for table {table}"):
        await served_ledger.write(do(statement.format(table, column, column)))


@pytest.mark.parametrize("statement", ["UPDATE {} SET id = id", "DELETE FROM {}", "TRUNCATE {}"])
async def test_the_ledgers_role_has_no_right_to_change_a_record_through_a_partition(
    served_ledger: Database, statement: str
) -> None:
    await make_ahead(served_ledger)
    of_usage = text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass")
    partitions = await served_ledger.read(lambda db: db.execute(of_usage).scalars().all())
    assert len(partitions) == 2 + MONTHS_AHEAD
    for partition in partitions:
        with pytest.raises(DatabaseError, match=f"permission denied for table {partition}"):
            await served_ledger.write(do(statement.format(partition)))


async def test_the_ledgers_role_replays_what_it_has_no_right_to_change(
    nats: Client, role_url: str, served_ledger: Database
) -> None:
    await make_ahead(served_ledger)
    await publish(nats, *EVENTS)
    await replay(nats, role_url, RebuiltLedger())
    with pytest.raises(DatabaseError, match="permission denied for table usage_default"):
        await served_ledger.write(do("DELETE FROM usage_default"))


async def test_rights_that_are_granted_back_meet_the_trigger(served_ledger: Database) -> None:
    for verb, statement in (
        ("update", "UPDATE usage SET tokens_used = 1"),
        ("delete", "DELETE FROM usage"),
        ("truncate", "TRUNCATE usage"),
    ):
        with pytest.raises(DatabaseError, match=f"usage is append-only: {verb} is refused"):
            await served_ledger.write(do("GRANT ALL ON usage TO CURRENT_USER", statement))


async def test_the_ledger_still_records_without_these_rights(served_ledger: Database) -> None:
    recorded = await served_ledger.write(ledger_store.record, [*EVENTS, generation_completed()])
    assert len(recorded.new) == 1


@pytest.mark.parametrize("table", OF_QUOTA)
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "TRUNCATE {}"])
async def test_quotas_role_has_no_right_to_delete_what_is_settled(
    served_quota: Database, table: str, statement: str
) -> None:
    with pytest.raises(DatabaseError, match=f"permission denied for table {table}"):
        await served_quota.write(do(statement.format(table)))


async def test_quota_still_settles_without_these_rights(served_quota: Database) -> None:
    new: list[Event] = [generation_completed(), subscription_changed(tier="enterprise")]
    settled = await served_quota.write(quota_store.settle, Plans.load(), [*EVENTS, *new])
    assert settled.events == 2
    await served_quota.write(do("UPDATE settlements SET is_late = true"))


def guards(db: Connection) -> list[tuple[Any, ...]]:
    """Every trigger of the database, as it was made and whether it is at work."""
    if is_sqlite(db):
        statement = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY 1"
    else:
        statement = (
            "SELECT tgname, tgrelid::regclass::text, pg_get_triggerdef(oid), tgenabled FROM pg_trigger"
            " WHERE NOT tgisinternal ORDER BY 2, 1"
        )
    return [tuple(row) for row in db.execute(text(statement))]


def take_away_guards(db: Connection, *, of: tuple[str, ...], disabling: bool) -> None:
    for name, table, *_ in guards(db):
        if table.startswith(of) and name != "settlements_stays_late":
            if disabling and not is_sqlite(db):
                db.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER {name}"))
            else:
                db.execute(text(f"DROP TRIGGER {name}" + ("" if is_sqlite(db) else f" ON {table}")))


@pytest.mark.parametrize("disabling", [False, True])
async def test_a_replay_puts_back_the_triggers_of_the_ledger(nats: Client, ledger_url: str, disabling: bool) -> None:
    database = Database(ledger_url)
    await make_ahead(database)
    before = await database.read(guards)
    assert {name.partition("_refuses_")[0].removesuffix("_is_append_only") for name, *_ in before} == {*OF_LEDGER}
    await database.write(partial(take_away_guards, of=OF_LEDGER, disabling=disabling))

    told, _ = await dry_run(nats, ledger_url, RebuiltLedger())
    replayed = await replay(nats, ledger_url, RebuiltLedger())

    assert await database.read(guards) == before
    assert {line.split()[0] for line in told.beside} == {line.split()[0] for line in replayed.beside}
    assert {line.split()[0] for line in replayed.beside} >= {*OF_LEDGER}
    assert (await replay(nats, ledger_url, RebuiltLedger())).beside == []
    await database.close()


async def test_a_replay_puts_back_the_triggers_of_quota(nats: Client, quota: Database, quota_url: str) -> None:
    await publish(nats, *EVENTS)
    before = await quota.read(guards)
    await quota.write(partial(take_away_guards, of=("settlements",), disabling=False))

    replayed = await replay(nats, quota_url, RebuiltQuota(Plans.load()))

    assert await quota.read(guards) == before
    assert replayed.beside == ["settlements lacked triggers that refuse changes, and has them again"]
    await quota.write(do("UPDATE settlements SET is_late = true"))


async def test_a_role_that_may_only_read_is_told_so_by_a_replay(
    postgres: Postgres, served_ledger: Database, role_url: str
) -> None:
    role = f"auditor_{uuid4().hex}"
    postgres.execute("CREATE ROLE {} LOGIN", role)
    url = make_url(role_url).set(username=role).render_as_string(hide_password=False)
    try:
        with (
            pytest.raises(Misconfigured, match="permission denied for database"),
            open_shadow(url, RebuiltLedger.tables, RebuiltLedger.migrations),
        ):
            pass
    finally:
        postgres.execute("DROP ROLE {}", role)
